"""Softer targets: label smoothing, its spatially varying form (SVLS), and the explicit confidence penalty (ECP)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from calsegx import losses
from calsegx.interfaces import UsageError
from calsegx.losses import cross_entropy, elementary, neighbourhood


@losses.registry.register("label_smoothing")
def label_smoothing(
    logits: Float[Array, "B *spatial L"], labels: Int[Array, " B *spatial"], *, smoothing: float = 0.1
) -> Float[Array, " B"]:
    """Label smoothing ``-mean_v sum_k [(1 - alpha) q_k + alpha / K] log p_k`` with one-hot targets ``q``.

    Szegedy et al. (CVPR 2016); the baseline "LS" of MbLS and NACL (Murugesan et al., 2023), with ``alpha`` of 0.1 in
    their tables.  One logit counts as ``K = 2`` classes.

    Args:
        logits: one (sigmoid) or several (softmax) per voxel.
        labels: class indices.
        smoothing: alpha, in ``[0, 1]``; 0 is cross-entropy.

    Returns:
        One value per sample in nats, in ``[0, inf)``.

    Raises:
        UsageError: for a smoothing outside ``[0, 1]``.
    """
    if not 0 <= smoothing <= 1:
        raise UsageError(f"The loss 'label_smoothing' needs a smoothing in [0, 1], got {smoothing}; 0 is CE.")
    logits, labels = cross_entropy.as_classes(logits, labels)
    classes = logits.shape[-1]
    targets = (1 - smoothing) * jax.nn.one_hot(labels, classes, dtype=logits.dtype) + smoothing / classes
    return cross_entropy.of_targets(logits, targets)


@losses.registry.register("ecp")
def ecp(
    logits: Float[Array, "B *spatial L"],
    labels: Int[Array, " B *spatial"],
    *,
    weight: float = 0.1,
    mean_over_classes: bool = False,
) -> Float[Array, " B"]:
    """Explicit confidence penalty ``CE - weight * mean_v H(p)`` with the entropy ``H = -sum_k p_k log p_k``.

    Pereyra et al. (ICLR workshop 2017), Eq. 2; the baseline "ECP" of MbLS and NACL (Murugesan et al., 2023), whose code
    takes the mean of ``-p_k log p_k`` over the classes, with ``p`` clamped to ``[1e-10, 1 - 1e-10]``: the weight 0.1 of
    their tables is ``0.1 / K`` here.

    Args:
        logits: one (sigmoid) or several (softmax) per voxel.
        labels: class indices.
        weight: lambda, no unit.
        mean_over_classes: as in that code; for comparison with published numbers.

    Returns:
        One value per sample in nats, at least ``-weight log K``.
    """
    logits, labels = cross_entropy.as_classes(logits, labels)
    if mean_over_classes:
        p = jnp.clip(elementary.softmax(logits), 1e-10, 1 - 1e-10)
        entropy = cross_entropy.voxel_mean(-p * jnp.log(p))
    else:
        entropy = cross_entropy.voxel_mean(_entropy(elementary.centred(logits)))
    return cross_entropy.ce(logits, labels) - weight * entropy


@losses.registry.register("svls")
def svls(
    logits: Float[Array, "B *spatial L"], labels: Int[Array, " B *spatial"], *, sigma: float = 2.0
) -> Float[Array, " B"]:
    """Spatially varying label smoothing ``-mean_v sum_k t_k log p_k`` with ``svls_targets`` ``t``.

    Islam and Glocker (IPMI 2021); NACL (Murugesan et al., MICCAI 2023), Eq. 1.  Since the centre keeps 1/2 it is half
    the cross-entropy of the voxel's label plus half that of its neighbours', the form of NACL's Eq. 4.

    Args:
        logits: one (sigmoid, two classes) or several (softmax) per voxel.
        labels: class indices.
        sigma: in voxels; it only moves weight from corner to edge neighbours.  NACL's tables take 2.

    Returns:
        One value per sample in nats, in ``[0, inf)``.

    Raises:
        UsageError: for a sigma that is not positive.
    """
    logits, labels = cross_entropy.as_classes(logits, labels)
    return cross_entropy.of_targets(logits, svls_targets(labels, logits.shape[-1], sigma=sigma).astype(logits.dtype))


def svls_targets(
    labels: Int[Array, " B *spatial"], classes: int, *, sigma: float
) -> Float[Array, "B *spatial {classes}"]:
    """One-hot labels averaged over the 3-voxel patch with ``neighbourhood.svls_kernel``, the image's border replicated.

    Args:
        labels: class indices from 0 to ``classes - 1``.
        classes: K.
        sigma: in voxels.

    Returns:
        Values in ``[0, 1]`` whose sum over the classes is 1.

    Raises:
        UsageError: for a sigma that is not positive.
    """
    return neighbourhood.prior(labels, classes, kind="gaussian", sigma=sigma)


@jax.custom_jvp
def _entropy(centred: Float[Array, "*shape K"]) -> Float[Array, "*shape"]:
    total = elementary.log_sum_exp(centred)
    return total - elementary.class_sum(jnp.exp(centred - total[..., None]) * centred)


@_entropy.defjvp
def _entropy_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (logits,), (tangent,) = primals, tangents
    log_p, values = elementary.log_softmax(logits), _entropy(logits)
    return values, -jnp.sum(jnp.exp(log_p) * (log_p + values[..., None]) * tangent, axis=-1)
