"""Penalties on confident errors."""

import math

import jax
from jaxtyping import Array, Float, Int

from calsegx import losses
from calsegx.losses import cross_entropy


@losses.registry.register("cmp")
def cmp(
    logits: Float[Array, "B *spatial L"],
    labels: Int[Array, " B *spatial"],
    *,
    threshold: float = math.log(2),
    temperature: float = 0.1,
) -> Float[Array, " B"]:
    """Confidence misalignment penalty ``mean_v sigmoid((l_v - threshold) / temperature)``.

    CalSAM (Khan and Syed), Eq. 4, with ``l_v`` the cross-entropy of voxel v.  The paper gives no threshold.
    With one logit ``log 2`` makes the penalty a smooth count of the voxels on the wrong side of the boundary,
    and ``-log(1 - c)`` of the errors more confident than c.  With several classes a loss above the threshold
    says that ``p_y`` is small, not that one wrong class is certain.  The gradient peaks at the threshold and
    vanishes for the most confident errors.

    Args:
        logits: one (sigmoid) or several (softmax) per voxel.
        labels: class indices.
        threshold: tau, in nats.
        temperature: gamma > 0, in nats; towards 0 the penalty becomes the hard count.

    Returns:
        One value per sample, in ``[0, 1]``.
    """
    excess = cross_entropy.per_voxel(logits, labels) - threshold
    return cross_entropy.voxel_mean(jax.nn.sigmoid(excess / temperature))
