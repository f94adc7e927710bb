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


@losses.registry.register("ce_dice")
def ce_dice(logits: Float[Array, "B *spatial L"], labels: Int[Array, " B *spatial"]) -> Float[Array, " B"]:
    """``CE + Dice``, unweighted, with the background in Dice: the baseline of MbLS and NACL (Murugesan et al., 2023).

    The same function as ``sam``, under the name that those papers use.  Their code asks for Dice without background,
    but its wrapper drops the argument; the published numbers are with it.

    Returns:
        One value per sample, in ``[0, inf)``.
    """
    return sam(logits, labels)
