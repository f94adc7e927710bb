"""Class proportions in the patch around every voxel: the priors of NACL and SVLS, the regions of CRaC.

A patch has an odd number of voxels, ``size``, along each spatial axis.  ``border`` says what lies outside the image:

* ``replicate``: the nearest voxel of the image (the default);
* ``background``: class 0, as in the published NACL and CRaC;
* ``inside``: nothing, and what lies inside is weighted up to a whole patch;
* ``zero``: nothing, so that the proportions sum to less than 1, as in MONAI's ``NACLLoss``.
"""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jaxtyping import Array, Bool, Float, Int

from calsegx.interfaces import UsageError

KINDS = ("mean", "gaussian", "max", "min", "median", "mode", "monai_gaussian")
BORDERS = ("replicate", "background", "inside", "zero")


def prior(
    labels: Int[Array, " B *spatial"],
    classes: int,
    *,
    kind: str = "mean",
    size: int = 3,
    sigma: float = 1.0,
    border: str = "replicate",
) -> Float[Array, "B *spatial {classes}"]:
    """Class proportions ``tau`` of the patch around every voxel: NACL (Murugesan et al., MICCAI 2023), Eq. 6.

    With ``q_i`` the one-hot labels of the ``d`` voxels of the patch:

    * ``mean``: ``sum_i q_i / d``;
    * ``gaussian``: ``q / 2 + sum_i w_i q_i / 2`` with ``w_i ~ exp(-|i|^2 / 2 sigma^2)`` that sum to 1 over the
      neighbours: the targets of SVLS (Islam and Glocker, IPMI 2021).  The centre keeps 1/2 whatever sigma
      is (``svls_kernel``);
    * ``max``, ``min``, ``median``, ``mode``: one-hot of that label of the patch; the lower median, and the smallest of
      the most frequent.  They depend on how the classes are numbered, ``mode`` in ties only;
    * ``monai_gaussian``: ``sum_i w_i q_i`` with a Gaussian integrated over every voxel up to 4 sigma; no ``size``.

    The paper divides by ``d`` in a footnote only, its code always.  That code's ``gaussian`` always takes ``replicate``
    and misplaces the centre of patches larger than 3.

    Args:
        labels: class indices from 0 to ``classes - 1``.
        classes: K.
        kind: one of ``KINDS``.
        size: voxels along an axis of the patch, odd, at least 3.
        sigma: of the Gaussian kinds, in voxels.
        border: one of ``BORDERS``; for the one-hot kinds ``zero`` is ``inside``.

    Returns:
        Values in ``[0, 1]`` whose sum over the classes is 1, except at a ``zero`` border (and 1.5e-5 less for
        ``monai_gaussian`` in 2D), in JAX's default precision.

    Raises:
        UsageError: for an unknown kind or border, a size that is even or below 3, or a sigma that is not positive.
    """
    _check(size, border)
    if kind not in KINDS:
        raise UsageError(f"There is no prior {kind!r}; choose one of {', '.join(KINDS)}.")
    if not sigma > 0:
        raise UsageError(f"The sigma of a prior is in voxels and must be positive, got {sigma}.")
    dimensions, indices = labels.ndim - 1, jnp.arange(classes)
    kernels = _kernels(kind, dimensions, size, sigma)
    # Outside voxels of no class get the index after the last one.
    outside = 0 if border == "background" else classes
    padded = _pad(labels, max(kernels[0].shape) // 2, border, outside)[..., None]

    def proportion(chosen: Bool[Array, "B *padded K"]) -> Float[Array, "B *spatial K"]:
        return functools.reduce(_weighted_sum, kernels, chosen.astype(jnp.result_type(float)))

    if kind in ("min", "median", "max"):  # the label of a rank among the sorted ones, from counts
        up_to, whole = proportion(padded <= indices), proportion(padded < classes)
        rank = {"min": 0.0, "median": jnp.floor((whole - 1) / 2), "max": whole - 1}[kind]
        return ((up_to > rank) & (proportion(padded < indices) <= rank)).astype(up_to.dtype)
    shares = proportion(padded == indices)
    if kind == "mode":
        return jax.nn.one_hot(jnp.argmax(shares, axis=-1), classes, dtype=shares.dtype)
    if border == "inside":
        return shares / proportion(padded < classes)
    return shares / size**dimensions if kind == "mean" else shares


def outer_mask(
    labels: Int[Array, " B *spatial"], *, size: int = 3, border: str = "replicate"
) -> Bool[Array, " B *spatial"]:
    """Whether the patch around a voxel holds several classes: the outer region of CRaC (Murugesan et al., MICCAI 2024).

    Exactly ``min_i y_i != max_i y_i``.  The published code tests a sum that is 0 but for rounding, and so takes about a
    tenth of the outer voxels for inner ones.

    Args:
        labels: class indices.
        size: voxels along an axis of the patch, odd, at least 3.
        border: one of ``BORDERS``; only ``background`` differs from the others.

    Returns:
        True for the outer voxels.

    Raises:
        UsageError: for an unknown border, or a size that is even or below 3.
    """
    _check(size, border)
    lowest = highest = _pad(labels, size // 2, "background" if border == "background" else "replicate", 0)
    for axis in range(labels.ndim - 1):
        window = _along(axis, labels.ndim - 1, np.ones(size)).shape
        lowest = functools.reduce(jnp.minimum, _windows(lowest, window))
        highest = functools.reduce(jnp.maximum, _windows(highest, window))
    return lowest != highest


def svls_kernel(dimensions: int, sigma: float, *, size: int = 3) -> np.ndarray:
    """The weights of SVLS: ``exp(-|i|^2 / 2 sigma^2)``, scaled to sum 1 over the neighbours, and 1 at the centre.

    Args:
        dimensions: spatial axes.
        sigma: in voxels.
        size: voxels along an axis, odd.

    Returns:
        float64 ``[size] * dimensions``, with sum 2.
    """
    squares = np.sum(np.square(np.indices((size,) * dimensions) - size // 2), axis=0)
    # Relative to the nearest neighbours, so that a small sigma does not make all of them 0.
    kernel = np.where(squares > 0, np.exp(-np.maximum(squares - 1, 0) / (2 * sigma**2)), 0)
    kernel /= kernel.sum()
    kernel[squares == 0] = 1
    return kernel


def _check(size: int, border: str) -> None:
    if size < 3 or size % 2 == 0:
        raise UsageError(f"The size of a patch is odd and at least 3, got {size}.")
    if border not in BORDERS:
        raise UsageError(f"There is no border rule {border!r}; choose one of {', '.join(BORDERS)}.")


def _kernels(kind: str, dimensions: int, size: int, sigma: float) -> list[np.ndarray]:
    """Weights of the patch, applied one after the other; 1 where voxels are counted."""
    if kind == "gaussian":
        return [svls_kernel(dimensions, sigma, size=size) / 2]
    weights = np.ones(size)
    if kind == "monai_gaussian":
        reach = int(max(4 * sigma, 0.5) + 0.5)
        weights = np.diff(scipy.special.ndtr((np.arange(-reach, reach + 2) - 0.5) / sigma))
    return [_along(axis, dimensions, weights) for axis in range(dimensions)]


def _along(axis: int, dimensions: int, weights: np.ndarray) -> np.ndarray:
    return weights.reshape([-1 if a == axis else 1 for a in range(dimensions)])


def _pad(labels: Int[Array, " B *spatial"], reach: int, border: str, outside: int) -> Int[Array, " B *padded"]:
    widths = ((0, 0), *((reach, reach),) * (labels.ndim - 1))
    labels = labels.astype(jnp.int32)
    if border == "replicate":
        return jnp.pad(labels, widths, mode="edge")
    return jnp.pad(labels, widths, constant_values=outside)


def _windows(values: Array, window: tuple[int, ...]) -> list[Array]:
    """The shifted copies that a window over the spatial axes sees: slices, because XLA fuses them into their sum."""
    lengths = [whole - size + 1 for whole, size in zip(values.shape[1:], window, strict=False)]
    starts = np.ndindex(window)
    return [values[(slice(None), *(slice(s, s + n) for s, n in zip(start, lengths, strict=True)))] for start in starts]


def _weighted_sum(values: Float[Array, "B *padded K"], kernel: np.ndarray) -> Float[Array, "B *spatial K"]:
    return functools.reduce(operator.add, map(operator.mul, kernel.ravel(), _windows(values, kernel.shape)))
