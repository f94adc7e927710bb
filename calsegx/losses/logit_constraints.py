"""Constraints on the logits themselves: their distance to the largest (MbLS), or to the neighbours' labels (NACL)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from calsegx import losses
from calsegx.interfaces import UsageError
from calsegx.losses import cross_entropy, elementary, neighbourhood, overlap


@losses.registry.register("mbls")
def mbls(
    logits: Float[Array, "B *spatial L"],
    labels: Int[Array, " B *spatial"],
    *,
    margin: float = 5.0,
    weight: float = 0.1,
    distance: str = "l1",
    dice: bool = False,
) -> Float[Array, " B"]:
    """Margin-based label smoothing ``CE + weight * mbls_penalty``, the default of MbLS (Murugesan et al., MedIA 2023).

    Args:
        logits: one (sigmoid, two classes ``[-z/2, z/2]``) or several (softmax) per voxel.
        labels: class indices.
        margin: m, in logits; the paper's experiments take 5, 8 and 10.
        weight: of the penalty, 0.1 as in the paper's experiments.
        distance: as in ``mbls_penalty``.
        dice: add soft Dice without the background, the MbLS + CE + Dice of that code.  The CE + Dice it is compared
            with there includes the background.

    Returns:
        One value per sample, in ``[0, inf)``.

    Raises:
        UsageError: for an unknown distance.
    """
    scores, classes = cross_entropy.as_classes(logits, labels)
    loss = cross_entropy.ce(scores, classes) + weight * _to_largest(scores, margin, distance)
    return loss + overlap.dice(logits, labels, include_background=False) if dice else loss


@losses.registry.register("mbls_penalty")
def mbls_penalty(
    logits: Float[Array, "B *spatial L"],
    labels: Int[Array, " B *spatial"],
    *,
    margin: float = 5.0,
    distance: str = "l1",
) -> Float[Array, " B"]:
    """``mean_vk relu(d_k - m)`` of the logit distances ``d_k = max_j z_j - z_k``: MbLS (Murugesan et al.), Eq. 7.

    The mean over the classes is the published code's, and the published weights are for it; the paper writes a sum,
    ``K`` times as much.  With ``m = 0`` it is the linear penalty behind label smoothing, focal loss and ECP.  Where
    several logits are the largest, the first has the gradient, as in PyTorch.

    Args:
        logits: one (sigmoid, two classes ``[-z/2, z/2]``) or several (softmax) per voxel.
        labels: class indices; the value does not depend on them.
        margin: m, in logits.
        distance: ``l1``; ``l2``, ``relu(d_k - m)^2``; or ``l2_without_hinge``, ``(d_k - m)^2``: the code's L2, which
            also pushes small distances up to the margin, for comparison only.

    Returns:
        One value per sample, in ``[0, inf)``.

    Raises:
        UsageError: for an unknown distance.
    """
    return _to_largest(cross_entropy.as_classes(logits, labels)[0], margin, distance)


@losses.registry.register("nacl")
def nacl(
    logits: Float[Array, "B *spatial L"],
    labels: Int[Array, " B *spatial"],
    *,
    weight: float = 0.1,
    prior: str = "mean",
    size: int = 3,
    sigma: float = 1.0,
    distance: str = "l1",
    on: str = "logits",
    border: str = "replicate",
) -> Float[Array, " B"]:
    """Neighbour-aware calibration ``CE + weight * nacl_penalty``: NACL (Murugesan et al., MICCAI 2023), Eq. 7.

    Args:
        logits: one (sigmoid, two classes ``[-z/2, z/2]``) or several (softmax) per voxel.
        labels: class indices from 0 to ``K - 1``.
        weight: of the penalty, 0.1 as in the paper's experiments.
        prior: as in ``nacl_penalty``, and so for the other options.
        size: see there.
        sigma: see there.
        distance: see there.
        on: see there.
        border: see there.

    Returns:
        One value per sample, in ``[0, inf)``.

    Raises:
        UsageError: for an option that ``nacl_penalty`` does not take.
    """
    logits, labels = cross_entropy.as_classes(logits, labels)
    tau = neighbourhood.prior(labels, logits.shape[-1], kind=prior, size=size, sigma=sigma, border=border)
    return cross_entropy.ce(logits, labels) + weight * _to_prior(logits, tau, distance, on)


@losses.registry.register("nacl_penalty")
def nacl_penalty(
    logits: Float[Array, "B *spatial L"],
    labels: Int[Array, " B *spatial"],
    *,
    prior: str = "mean",
    size: int = 3,
    sigma: float = 1.0,
    distance: str = "l1",
    on: str = "logits",
    border: str = "replicate",
) -> Float[Array, " B"]:
    """``mean_vk |tau_k - z_k|``: logits that equal the class proportions ``tau`` of the voxel's neighbourhood.

    NACL (Murugesan et al., MICCAI 2023), Eq. 7, second term.  The mean over the classes is the published code's, and
    the published weight is for it; the paper writes a sum, ``K`` times as much.  That code pads with the background:
    ``border="background"``, except for its ``gaussian``, which replicates.  MONAI's ``NACLLoss`` is ``border="zero"``,
    with ``prior="monai_gaussian"`` for its Gaussian.

    Args:
        logits: one (sigmoid, two classes ``[-z/2, z/2]``) or several (softmax) per voxel.
        labels: class indices from 0 to ``K - 1``.
        prior: the kind of ``neighbourhood.prior``: mean, gaussian, max, min, median, mode or monai_gaussian.
        size: voxels along an axis of the patch, odd, at least 3; 3 and 5 in the paper.
        sigma: of the Gaussian priors, in voxels.
        distance: ``l1``, or ``l2``: ``(tau_k - z_k)^2``.
        on: ``logits``, or ``probabilities``: ``p_k`` in place of ``z_k``.
        border: ``replicate``, ``background``, ``inside`` or ``zero``, see ``neighbourhood``.

    Returns:
        One value per sample, in ``[0, inf)``.

    Raises:
        UsageError: for an unknown prior, distance, quantity or border, and for a size or sigma out of range.
    """
    logits, labels = cross_entropy.as_classes(logits, labels)
    tau = neighbourhood.prior(labels, logits.shape[-1], kind=prior, size=size, sigma=sigma, border=border)
    return _to_prior(logits, tau, distance, on)


def _to_largest(logits: Float[Array, "B *spatial K"], margin: float, distance: str) -> Float[Array, " B"]:
    costs = {"l1": jax.nn.relu, "l2": lambda x: jnp.square(jax.nn.relu(x)), "l2_without_hinge": jnp.square}
    if distance not in costs:
        raise UsageError(f"MbLS has no distance {distance!r}; choose one of {', '.join(costs)}.")
    return cross_entropy.voxel_mean(costs[distance](elementary.below_largest(logits) - margin))


def _to_prior(
    logits: Float[Array, "B *spatial K"], tau: Float[Array, "B *spatial K"], distance: str, on: str
) -> Float[Array, " B"]:
    if on not in ("logits", "probabilities"):
        raise UsageError(f"NACL constrains logits or probabilities, not {on!r}.")
    if distance not in ("l1", "l2"):
        raise UsageError(f"NACL has no distance {distance!r}; choose l1 or l2.")
    values = logits if on == "logits" else elementary.softmax(logits)
    difference = tau.astype(logits.dtype) - values
    return cross_entropy.voxel_mean(elementary.absolute(difference) if distance == "l1" else jnp.square(difference))
