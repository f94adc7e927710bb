"""Losses of region overlap."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from calsegx import losses
from calsegx.losses import cross_entropy


@losses.registry.register("dice")
def dice(
    logits: Float[Array, "B *spatial L"],
    labels: Int[Array, " B *spatial"],
    *,
    include_background: bool = True,
    squared: bool = False,
    jaccard: bool = False,
    smooth: float = 1e-5,
) -> Float[Array, " B"]:
    """Soft Dice loss, per sample and class, the mean over classes.

    ``1 - (2 sum_v p q + smooth) / (sum_v p + sum_v q + smooth)`` with targets ``q`` (Milletari et al., 2016;
    the constants and the reduction are MONAI's).  CalSAM (Khan and Syed), Eq. 1, first term, on
    probabilities: hard masks have no gradient.  A class that is absent from a sample counts, with a loss near
    1 until its probabilities vanish.

    Args:
        logits: one (sigmoid) or several (softmax) per voxel.
        labels: class indices.
        include_background: for a softmax, whether channel 0 is in the mean; a single logit has no background
            channel.
        squared: ``sum p^2 + sum q^2`` in the denominator.
        jaccard: ``1 - (2I + smooth) / (2 (S - I) + smooth)`` with intersection I and the denominator's sum S.
        smooth: added to numerator and denominator.

    Returns:
        One value per sample, in ``[0, 1]``.
    """
    logits = cross_entropy.prepare(logits, labels)
    count = logits.shape[-1]
    if count == 1:
        probabilities = jax.nn.sigmoid(logits)
        targets = (labels > 0)[..., None].astype(logits.dtype)
    else:
        probabilities = jax.nn.softmax(logits)
        targets = jax.nn.one_hot(labels, count, dtype=logits.dtype)
    if count > 1 and not include_background:
        probabilities, targets = probabilities[..., 1:], targets[..., 1:]

    voxels = tuple(range(1, logits.ndim - 1))
    intersection = jnp.sum(probabilities * targets, axis=voxels)
    predicted = jnp.square(probabilities) if squared else probabilities
    size = jnp.sum(predicted, axis=voxels) + jnp.sum(targets, axis=voxels)  # targets are 0 or 1: their own squares
    if jaccard:
        size = 2 * (size - intersection)
    return jnp.mean(1 - (2 * intersection + smooth) / (size + smooth), axis=-1)
