"""Losses of region overlap."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from calsegx import interfaces, losses
from calsegx.losses import cross_entropy, elementary


@losses.registry.register("dice")
def dice(
    logits: Float[Array, "B *spatial L"],
    labels: Int[Array, " B *spatial"],
    *,
    include_background: bool = True,
    squared: bool = False,
    jaccard: bool = False,
    smooth: float = 1e-5,
    smooth_denominator: float | None = None,
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
        smooth_denominator: another number for the denominator, as MONAI has it; None: the same.

    Returns:
        One value per sample, in ``[0, 1]``.
    """
    logits = cross_entropy.prepare(logits, labels)
    count = logits.shape[-1]
    if count == 1:
        probabilities = jax.nn.sigmoid(logits)
        targets = (labels > 0)[..., None].astype(logits.dtype)
    else:
        probabilities = elementary.softmax(logits)
        targets = jax.nn.one_hot(labels, count, dtype=logits.dtype)
    if count > 1 and not include_background:
        probabilities, targets = probabilities[..., 1:], targets[..., 1:]

    voxels = tuple(range(1, logits.ndim - 1))
    intersection = jnp.sum(probabilities * targets, axis=voxels)
    predicted = jnp.square(probabilities) if squared else probabilities
    size = jnp.sum(predicted, axis=voxels) + jnp.sum(targets, axis=voxels)  # targets are 0 or 1: their own squares
    if jaccard:
        size = 2 * (size - intersection)
    below = smooth if smooth_denominator is None else smooth_denominator
    return jnp.mean(1 - (2 * intersection + smooth) / (size + below), axis=-1)


@losses.registry.register("dice_plus_plus")
def dice_plus_plus(
    logits: Float[Array, "B *spatial L"],
    labels: Int[Array, " B *spatial"],
    *,
    gamma: float = 2.0,
    smooth: float = 1e-7,
    include_background: bool = True,
    clip: float = 0.0,
) -> Float[Array, " B"]:
    """DSC++ loss: soft Dice whose errors count with the power gamma, per sample and class, the mean over classes.

    ``1 - (2 TP + smooth) / (2 TP + FN + FP + smooth)`` with ``TP = sum_v q p``, ``FN = sum_v (q (1 - p))^gamma`` and
    ``FP = sum_v ((1 - q) p)^gamma`` (Yeung et al., "Calibrating the Dice loss to handle neural network overconfidence
    for biomedical image segmentation", 2023).  ``gamma = 1`` is soft Dice; above 1 a small error costs little, and
    nothing pulls probabilities to 0 and 1.

    Args:
        logits: one (sigmoid) or several (softmax) per voxel.
        labels: class indices.
        gamma: at least 1, no unit.
        smooth: added to numerator and denominator.
        include_background: for a softmax, whether channel 0 is in the mean.
        clip: the published code's ``1e-7``, to which it clips both p and q (``[clip, 1 - clip]``): a bias of that
            size, and no gradient for saturated voxels.

    Returns:
        One value per sample, in ``[0, 1]``.

    Raises:
        UsageError: for a ``gamma`` below 1.
    """
    if gamma < 1:
        raise interfaces.UsageError(
            f"The loss 'dice_plus_plus' needs gamma of at least 1, got {gamma}; 1 is soft Dice."
        )
    logits = cross_entropy.prepare(logits, labels)
    count = logits.shape[-1]
    if count == 1:
        targets, probabilities = (labels > 0)[..., None], jax.nn.sigmoid(logits)
    else:
        targets, probabilities = jax.nn.one_hot(labels, count, dtype=bool), elementary.softmax(logits)
    if count > 1 and not include_background:
        targets, probabilities = targets[..., 1:], probabilities[..., 1:]
    voxels = tuple(range(1, logits.ndim - 1))
    if clip:
        probabilities = jnp.clip(probabilities, clip, 1 - clip)
        soft = jnp.where(targets, 1 - clip, clip).astype(logits.dtype)
        hits = jnp.sum(soft * probabilities, axis=voxels)
        errors = (soft * (1 - probabilities)) ** gamma + ((1 - soft) * probabilities) ** gamma
    else:
        hits = jnp.sum(jnp.where(targets, probabilities, 0.0), axis=voxels)
        # The floor: below gamma = 2 a power has no second derivative at 0, where probabilities of sure voxels round to.
        errors = jnp.maximum(jnp.where(targets, 1 - probabilities, probabilities), 1e-12) ** gamma
    return jnp.mean(1 - (2 * hits + smooth) / (2 * hits + jnp.sum(errors, axis=voxels) + smooth), axis=-1)
