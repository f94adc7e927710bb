"""Cross-entropy, per voxel and as a loss; the shared checks of a loss's arguments."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from calsegx import interfaces, losses


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


def per_voxel(logits: Float[Array, "B *spatial L"], labels: Int[Array, " B *spatial"]) -> Float[Array, " B *spatial"]:
    """Negative log-likelihood of every voxel's label, in nats, in ``[0, inf)``.

    ``L = 1``: ``softplus(z) - z y``, written ``softplus((1 - 2y) z)``, which does not cancel.  ``L >= 2``:
    ``-log softmax(z)_y``.
    """
    logits = prepare(logits, labels)
    if logits.shape[-1] == 1:
        return jax.nn.softplus(jnp.where(labels > 0, -logits[..., 0], logits[..., 0]))
    # A product with the one-hot targets, not a gather: its second derivative needs no scatter.
    targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return -jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)


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
    return voxel_mean(per_voxel(logits, labels))


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
