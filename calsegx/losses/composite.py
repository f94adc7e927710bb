"""Sums of losses."""

from jaxtyping import Array, Float, Int

from calsegx import losses
from calsegx.losses import cross_entropy, overlap


@losses.registry.register("sam")
def sam(logits: Float[Array, "B *spatial L"], labels: Int[Array, " B *spatial"]) -> Float[Array, " B"]:
    """Soft Dice plus voxel-mean cross-entropy, unweighted: Dice + BCE for one logit, Dice + CE for a softmax.

    CalSAM (Khan and Syed), Eq. 1; for a softmax this is the ``CE + Dice`` of MbLS and NACL (Murugesan et al.,
    2023).

    Returns:
        One value per sample, in ``[0, inf)``.
    """
    return overlap.dice(logits, labels) + cross_entropy.ce(logits, labels)
