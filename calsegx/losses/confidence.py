"""Penalties on confidence: on that of errors, and (experimental) on the gap between the two likeliest classes."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from calsegx import losses
from calsegx.interfaces import UsageError
from calsegx.losses import cross_entropy, elementary

VARIANTS = ("sigmoid", "softplus", "focal")


@losses.registry.register("cmp")
def cmp(
    logits: Float[Array, "B *spatial L"],
    labels: Int[Array, " B *spatial"],
    *,
    threshold: float = math.log(2),
    temperature: float = 0.1,
    variant: str = "sigmoid",
    confidence: float = 0.5,
    gamma: float = 2.0,
) -> Float[Array, " B"]:
    """Confidence misalignment penalty, three readings of CalSAM (Khan and Syed), as means over voxels.

    With ``l_v = -log p_y`` the cross-entropy of voxel v in nats:

    * ``sigmoid``: ``sigmoid((l_v - threshold) / temperature)``, Eq. 4.  The paper gives no threshold.  With one logit
      ``log 2`` makes the penalty a smooth count of the voxels on the wrong side of the boundary, and ``-log(1 - c)``
      of the errors more confident than c.  With several classes a loss above the threshold says that ``p_y`` is
      small, not that one wrong class is certain.  The gradient peaks at the threshold and vanishes for the most
      confident errors.
    * ``softplus``: ``temperature * softplus((l_v - threshold) / temperature)``, ours: a smooth ``max(0, l_v -
      threshold)``, whose gradient by ``l_v`` is the value of ``sigmoid``, largest for the most confident errors.
    * ``focal``: ``1[p_y <= confidence] (1 - p_y)^gamma l_v``, what the paper's implementation notes describe ("masked
      focal loss"); the mask has no gradient, and the mean is over all voxels.

    Args:
        logits: one (sigmoid) or several (softmax) per voxel.
        labels: class indices.
        threshold: tau of ``sigmoid`` and ``softplus``, in nats.
        temperature: gamma of Eq. 4, above 0, in nats; towards 0 ``sigmoid`` becomes the hard count.
        variant: one of ``VARIANTS``.
        confidence: kappa of ``focal``, between 0 and 1.
        gamma: the power in ``focal``, at least 0.

    Returns:
        One value per sample: in ``[0, 1]`` for ``sigmoid``, in nats in ``[0, inf)`` for the others.

    Raises:
        UsageError: for an unknown variant, or a ``confidence`` or ``gamma`` out of range.
    """
    if variant not in VARIANTS:
        raise UsageError(f"The loss 'cmp' has no variant {variant!r}; use one of {', '.join(VARIANTS)}.")
    if not 0 < confidence < 1 or gamma < 0:
        raise UsageError(
            f"The loss 'cmp' needs a confidence between 0 and 1 and gamma of at least 0, got {confidence} and {gamma}."
        )
    against = cross_entropy.log_odds_against(logits, labels)
    values = elementary.softplus(against)  # -log p_y
    if variant == "focal":
        mask = against >= math.log((1 - confidence) / confidence)  # p_y <= kappa, exactly so at kappa = 1/2
        return cross_entropy.voxel_mean(jnp.where(mask, jnp.exp(-gamma * elementary.softplus(-against)) * values, 0.0))
    excess = (values - threshold) / temperature
    if variant == "softplus":
        return cross_entropy.voxel_mean(temperature * elementary.softplus(excess))
    return cross_entropy.voxel_mean(jax.nn.sigmoid(excess))


@losses.registry.register("probability_margin")
def probability_margin(
    logits: Float[Array, "B *spatial L"], labels: Int[Array, " B *spatial"], *, margin: float = 0.5
) -> Float[Array, " B"]:
    """Experimental: ``mean_v max(0, p_(1) - p_(2) - margin)``, with the two largest probabilities of each voxel.

    What CalSAM (Khan and Syed) says of "margin loss" in its related work, "a margin between class probabilities".  It
    is not evaluated there, and the work it cites is something else (a margin on cosine similarities in metric
    learning); neither formula nor default comes from a paper.  A penalty to add to a loss: it looks at the labels'
    shape only, and does not learn by itself.

    Args:
        logits: one (sigmoid: ``|2p - 1|``) or several (softmax) per voxel.
        labels: class indices; their values do not matter.
        margin: the gap that costs nothing, in ``[0, 1]``, a difference of probabilities.

    Returns:
        One value per sample, in ``[0, 1 - margin]``.

    Raises:
        UsageError: for a margin out of range.
    """
    if not 0 <= margin <= 1:
        raise UsageError(f"The loss 'probability_margin' needs a margin from 0 to 1, got {margin}.")
    logits = cross_entropy.prepare(logits, labels)
    if logits.shape[-1] == 1:
        gap = elementary.absolute(jnp.tanh(logits[..., 0] / 2))
    else:
        channels = [logits[..., k] for k in range(logits.shape[-1])]
        largest, second = channels[0], jnp.full_like(channels[0], -jnp.inf)
        # By comparison: where classes tie, the first is the largest and the next one second, also for the gradient.
        for channel in channels[1:]:
            second = jnp.where(channel > largest, largest, jnp.where(channel > second, channel, second))
            largest = jnp.where(channel > largest, channel, largest)
        top = jax.lax.stop_gradient(largest)
        gap = (jnp.exp(largest - top) - jnp.exp(second - top)) / sum(jnp.exp(channel - top) for channel in channels)
    return cross_entropy.voxel_mean(jax.nn.relu(gap - margin))
