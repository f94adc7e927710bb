"""Boundary-weighted consistency between two views of one image (BWCR)."""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from calsegx import losses
from calsegx.interfaces import UsageError
from calsegx.losses import cross_entropy, overlap

BASES = {"ce": cross_entropy.ce, "dice": overlap.dice}


@losses.registry.register("bwcr")
def bwcr(
    logits: Float[Array, "B *spatial L"],
    labels: Int[Array, " B *spatial"],
    *,
    weight: float = 1.0,
    base: str = "ce",
    radius: float = 10,
    exponent: float = 1.0,
    lowest: float = 0.01,
    highest: float = 1.0,
) -> Float[Array, " B"]:
    """Supervision of two views plus their consistency: ``(S(z1) + S(z2) + weight * C(z1, z2)) / (2 + weight)``.

    Karani et al., "Boundary-weighted logit consistency improves calibration of segmentation networks" (MICCAI 2023);
    a baseline of CRaC.  The batch holds pairs: samples ``2i`` and ``2i + 1`` are the logits of two random views of
    one image, mapped back to one grid, with the same labels there.  ``C`` is ``consistency``, its gradient flows into
    both views.  The published cross-entropy is divided by the number of classes; this one is not.  The paper's
    third supervised term, on the image as it is, is left out.

    Args:
        logits: one (sigmoid) or several (softmax) per voxel; B is even.
        labels: class indices.
        weight: of the consistency, at least 0.
        base: the supervised loss S, ``ce`` or ``dice``.
        radius: see ``boundary_weights``.
        exponent: see ``boundary_weights``.
        lowest: see ``boundary_weights``.
        highest: see ``boundary_weights``.

    Returns:
        One value per sample, in ``[0, inf)``; both samples of a pair get the pair's.

    Raises:
        UsageError: for an odd batch or an unknown base.
    """
    if base not in BASES:
        raise UsageError(f"The loss 'bwcr' has no base {base!r}; use one of {', '.join(BASES)}.")
    if logits.shape[0] % 2:
        raise UsageError(
            f"The loss 'bwcr' compares samples 2i and 2i + 1, two views of one image, and got {logits.shape[0]} "
            "samples; use an even batch size."
        )
    supervised = BASES[base](logits, labels)
    first, second, shared = logits[::2], logits[1::2], labels[::2]
    agreement = consistency(first, second, shared, radius=radius, exponent=exponent, lowest=lowest, highest=highest)
    values = (supervised[::2] + supervised[1::2] + weight * agreement) / (2 + weight)
    return jnp.repeat(values, 2)


def consistency(
    logits: Float[Array, "B *spatial L"],
    other: Float[Array, "B *spatial L"],
    labels: Int[Array, " B *spatial"],
    mask: Bool[Array, " B *spatial"] | None = None,
    *,
    radius: float = 10,
    exponent: float = 1.0,
    lowest: float = 0.01,
    highest: float = 1.0,
) -> Float[Array, " B"]:
    """``mean_{k,v} mask_v w_v (z_kv - z'_kv)^2`` of two views' logits, with ``w`` the ``boundary_weights``.

    Karani et al. (MICCAI 2023).  Gradients flow into both; give ``lax.stop_gradient(other)`` for a teacher.

    Args:
        logits: of one view; one logit ``z`` counts as the two ``[-z/2, z/2]``.
        other: of the other view, on the same grid.
        labels: class indices on that grid.
        mask: the voxels that both views see; None: all.  The mean is over all voxels whatever the mask.
        radius: see ``boundary_weights``.
        exponent: see ``boundary_weights``.
        lowest: see ``boundary_weights``.
        highest: see ``boundary_weights``.

    Returns:
        One value per sample in squared logits, in ``[0, inf)``.

    Raises:
        ValueError: when the shapes differ or the labels are not integers.
    """
    logits, other = cross_entropy.prepare(logits, labels), cross_entropy.prepare(other, labels)
    if logits.shape != other.shape:
        raise ValueError(f"Both views need the same shape, got logits {logits.shape} and {other.shape}.")
    difference, labels = cross_entropy.as_classes(logits - other, labels)
    weights = boundary_weights(
        labels, difference.shape[-1], radius=radius, exponent=exponent, lowest=lowest, highest=highest
    )
    if mask is not None:
        weights = weights * mask
    return cross_entropy.voxel_mean(weights * jnp.mean(jnp.square(difference), axis=-1))


def boundary_weights(
    labels: Int[Array, " B *spatial"],
    classes: int,
    *,
    radius: float = 10,
    exponent: float = 1.0,
    lowest: float = 0.01,
    highest: float = 1.0,
) -> Float[Array, " B *spatial"]:
    """``highest * (max(R - r, 0) / R)^exponent + lowest``: large at the boundaries of the foreground classes.

    ``r`` is the distance in whole voxels to the class's boundary: 0 for its outermost voxels and 1 for the first
    ones outside, ``floor(d) - 1`` inside and ``ceil(d)`` outside with ``d`` the Euclidean distance to the nearest
    voxel of the other side.  The nearest foreground class decides.  Beyond the image's border there is nothing, and
    where no boundary is within the radius the weight is ``lowest``.  The published code gives structures of two
    voxels or less ``lowest`` throughout; here they have boundaries like any other.

    Args:
        labels: class indices, 0 the background.
        classes: K, with the background.
        radius: R above 0, in voxels.
        exponent: alpha above 0.
        lowest: far from all boundaries.
        highest: added to ``lowest`` on a boundary.

    Returns:
        float32 weights in ``[lowest, lowest + highest]``.

    Raises:
        UsageError: for a radius of 0 or less.
    """
    if radius <= 0:
        raise UsageError(f"Boundary weights need a radius above 0 voxels, got {radius}.")
    reach = math.ceil(radius)
    members = labels[:, None] == jnp.arange(classes).reshape(-1, *(1,) * (labels.ndim - 1))
    squares = _squared_distances(members, reach)  # to the nearest voxel of every class
    squares = jnp.where(members, (reach + 1) ** 2, squares)  # hence, of every other class
    outside = jnp.sqrt(jnp.min(squares[:, 1:], axis=1))
    inside = jnp.sqrt(jnp.min(squares, axis=1))
    steps = jnp.minimum(jnp.ceil(outside), jnp.where(labels > 0, jnp.floor(inside) - 1, radius))
    return highest * (jnp.maximum(radius - steps, 0) / radius) ** exponent + lowest


def _squared_distances(members: Bool[Array, "B K *spatial"], reach: int) -> Float[Array, "B K *spatial"]:
    """Squared Euclidean distance to the nearest member, exact below ``(reach + 1)^2`` and that from there on.

    Separable: along one axis after the other ``min_d f(x + d) + d^2``, where ``|d| <= reach`` suffices.
    """
    far = float((reach + 1) ** 2)
    squares = jnp.where(members, 0.0, far).astype(jnp.float32)
    for axis in range(2, members.ndim):
        size = members.shape[axis]
        span = min(reach, size - 1)
        padding = [(span, span) if a == axis else (0, 0) for a in range(members.ndim)]
        padded = jnp.pad(squares, padding, constant_values=far)
        for shift in range(-span, span + 1):
            moved = lax.slice_in_dim(padded, span + shift, span + shift + size, axis=axis)
            squares = jnp.minimum(squares, moved + shift**2)
    return squares
