"""Cross-entropy, per voxel and as a loss; the shared checks of a loss's arguments."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from calsegx import interfaces, losses
from calsegx.losses import elementary


def at_least_float32(array: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``array`` in float32, or in its own precision where that is higher."""
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def prepare(logits: Float[Array, "B *spatial L"], labels: Int[Array, " B *spatial"]) -> Float[Array, "B *spatial L"]:
    """Check that logits and labels belong together; the logits in at least float32.

    Raises:
        ValueError: when the shapes differ (they would broadcast, silently) or the labels are not integers.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"Logits {logits.shape} need labels {logits.shape[:-1]}, an index per voxel; got {labels.shape}."
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"Labels are class indices and must be integers, got {labels.dtype}.")
    return at_least_float32(logits)


def as_classes(
    logits: Float[Array, "B *spatial L"], labels: Int[Array, " B *spatial"]
) -> tuple[Float[Array, "B *spatial K"], Int[Array, " B *spatial"]]:
    """Checked softmax logits, in at least float32, and their labels; one logit becomes two classes.

    Raises:
        ValueError: when the shapes differ or the labels are not integers.
    """
    prepared = prepare(logits, labels)
    if logits.shape[-1] == 1:
        labels = (labels > 0).astype(labels.dtype)
    return elementary.as_softmax(prepared), labels


def per_voxel(logits: Float[Array, "B *spatial L"], labels: Int[Array, " B *spatial"]) -> Float[Array, " B *spatial"]:
    """Negative log-likelihood of every voxel's label, in nats, in ``[0, inf)``.

    ``L = 1``: ``softplus(z) - z y``, written ``softplus((1 - 2y) z)``, which does not cancel.  ``L >= 2``:
    ``-log softmax(z)_y``.
    """
    logits = prepare(logits, labels)
    if logits.shape[-1] == 1:
        return elementary.softplus(jnp.where(labels > 0, -logits[..., 0], logits[..., 0]))
    # A product with the one-hot targets, not a gather: its second derivative needs no scatter.
    targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return -jnp.sum(targets * elementary.log_softmax(logits), axis=-1)


def of_targets(logits: Float[Array, "B *spatial K"], targets: Float[Array, "B *spatial K"]) -> Float[Array, " B"]:
    """``-mean_v sum_k t_k log p_k`` in nats, for targets whose sum over the classes is 1 and softmax logits."""
    logits = elementary.centred(logits)
    classes = logits.shape[-1]
    return voxel_mean(elementary.log_sum_exp(logits)) - classes * voxel_mean(targets * logits)


def voxel_mean(values: Float[Array, " B *spatial"]) -> Float[Array, " B"]:
    """The mean over the voxels of each sample."""
    return jnp.mean(values, axis=tuple(range(1, values.ndim)))


@losses.registry.register("ce")
def ce(logits: Float[Array, "B *spatial L"], labels: Int[Array, " B *spatial"]) -> Float[Array, " B"]:
    """Cross-entropy ``mean_v -log p_y``, the mean over voxels; for one logit it equals ``bce``.

    The voxel mean, not the sum that CalSAM (Khan and Syed) writes in Eq. 1: at 2e6 voxels a sum would drown
    Dice.

    Returns:
        One value per sample in nats, in ``[0, inf)``.
    """
    if logits.shape[-1] == 1:
        return voxel_mean(per_voxel(logits, labels))
    logits = prepare(logits, labels)
    return of_targets(logits, jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype))


@losses.registry.register("bce")
def bce(logits: Float[Array, "B *spatial 1"], labels: Int[Array, " B *spatial"]) -> Float[Array, " B"]:
    """Binary cross-entropy ``-mean_v [y log p + (1 - y) log(1 - p)]``, ``p = sigmoid(z)``, for one logit.

    CalSAM (Khan and Syed), Eq. 1, second term, as a mean over voxels.

    Returns:
        One value per sample in nats, in ``[0, inf)``.

    Raises:
        UsageError: for more than one logit per voxel.
    """
    if logits.shape[-1] != 1:
        raise interfaces.UsageError(
            f"The loss 'bce' needs one logit per voxel (one class), got {logits.shape[-1]}; use 'ce'."
        )
    return voxel_mean(per_voxel(logits, labels))


def log_odds_against(
    logits: Float[Array, "B *spatial L"], labels: Int[Array, " B *spatial"]
) -> Float[Array, " B *spatial"]:
    """``s_v = log((1 - p_y) / p_y)``: how strongly the other classes speak against a voxel's label.

    ``-log p_y = softplus(s)`` and ``-log(1 - p_y) = softplus(-s)``, both without cancellation for any logits.
    ``L = 1``: ``z`` or ``-z``.  ``L >= 2``: the logarithm of ``sum exp z_k`` over the other classes, minus ``z_y``.
    """
    logits = prepare(logits, labels)
    if logits.shape[-1] == 1:
        return jnp.where(labels > 0, -logits[..., 0], logits[..., 0])
    # Class by class: on a CPU a reduction over a last axis of a few entries takes two to four times as long.
    channels = elementary.planes(logits)
    own = sum(jnp.where(labels == k, channel, 0.0) for k, channel in enumerate(channels))
    others = [jnp.where(labels == k, -jnp.inf, channel) for k, channel in enumerate(channels)]
    largest = jax.lax.stop_gradient(functools.reduce(jnp.maximum, others))
    return jnp.log(sum(jnp.exp(channel - largest) for channel in others)) + largest - own


@losses.registry.register("focal")
def focal(
    logits: Float[Array, "B *spatial L"], labels: Int[Array, " B *spatial"], *, gamma: float = 2.0
) -> Float[Array, " B"]:
    """Focal loss ``mean_v (1 - p_y)^gamma (-log p_y)``, without class weights; ``gamma = 0`` is cross-entropy.

    Lin et al. (ICCV 2017), Eq. 4, there for a sigmoid.  MbLS (Murugesan et al., 2023), Eq. 5: it is at least ``CE -
    gamma H(p)``, so it asks for entropy as well.  Their code sums over voxels by default, but their experiments, and
    this, take the mean; their tables use ``gamma = 3``.  CalSAM's baseline states none.

    Args:
        logits: one (sigmoid) or several (softmax) per voxel.
        labels: class indices.
        gamma: at least 0, no unit.

    Returns:
        One value per sample in nats, in ``[0, inf)``.

    Raises:
        UsageError: for a negative ``gamma``.
    """
    if gamma < 0:
        raise interfaces.UsageError(f"The loss 'focal' needs gamma of at least 0, got {gamma}; 0 is cross-entropy.")
    against = log_odds_against(logits, labels)
    loss = elementary.softplus(against)
    # (1 - p)^gamma through its logarithm: a power has no finite derivative where p rounds to 1.
    return voxel_mean(jnp.exp(gamma * (against - loss)) * loss)
