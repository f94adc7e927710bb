"""The sums of ``calibration`` for arrays on a device: jit-able, in the array's own precision, merged on the host.

::

    sums = device.calibration_sums(probabilities, labels, mask)      # inside or outside jit, also over a mesh
    total = total + device.to_statistics(sums)                       # float64 on the host
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from calsegx.interfaces import InputError
from calsegx.metrics import binning as binned
from calsegx.metrics import calibration
from calsegx.metrics.binning import Bins

_BLOCK = 4096  # voxels that one float32 accumulator adds up


class Sums(NamedTuple):
    """The summed fields of ``CalibrationStatistics``, a pytree: int32 counts, float sums.  Sums of parts add up."""

    top_label: Bins  # [M]
    classes: Bins  # [K, M]
    label_count: Integer[Array, " K"]
    brier_sum: Float[Array, " K"]
    top_label_brier_sum: Float[Array, ""]
    nll_sum: Float[Array, ""]


@functools.partial(jax.jit, static_argnames=("bins", "binning", "above"))
def calibration_sums(
    probabilities: Float[Array, "V K"] | Float[Array, " V"],
    labels: Integer[Array, " V"] | Bool[Array, " V"],
    mask: Bool[Array, " V"] | None = None,
    *,
    bins: int = 15,
    binning: str = "right",
    above: float | None = None,
) -> Sums:
    """The sums that ``calibration_statistics`` takes, of the voxels in ``mask``.

    Voxels fall into exactly the same bins; float sums differ by the rounding of the array's precision (float32: 1e-6
    relative; float16 and bfloat16 are taken as float32).  Values are not checked: probabilities outside 0..1, NaN or
    labels outside the classes give meaningless sums.  A binary problem's ``1 - p`` is rounded to the array's precision
    (on the host: float64), which may move a top label's confidence over a bin's edge.

    Args:
        probabilities: [V, K], a softmax, or [V], a foreground probability; fewer than 2^31 voxels.
        labels: [V], 0..K-1.
        mask: the voxels of the region; None for all.
        bins: number of bins M.
        binning: as for ``calibration_statistics``.
        above: as for ``calibration_statistics``.

    Raises:
        InputError: for shapes that do not fit.
        UsageError: for an unknown option or no bins.
    """
    binned.check_options(bins, binning)
    if probabilities.ndim not in (1, 2) or labels.shape != probabilities.shape[:1]:
        raise InputError(
            f"Probabilities {probabilities.shape} and labels {labels.shape} do not fit; expected [V] or [V, K] and "
            "[V]: reshape the volume and pass the region as mask."
        )
    if probabilities.dtype.itemsize < 4:
        probabilities = probabilities.astype(jnp.float32)
    mask = jnp.ones(labels.shape, bool) if mask is None else mask
    rows = jnp.stack([1 - probabilities, probabilities]) if probabilities.ndim == 1 else probabilities.T
    blocks = -(-len(labels) // _BLOCK)
    short = blocks * _BLOCK - len(labels)
    rows = jnp.pad(jnp.clip(rows, 0, 1), ((0, 0), (0, short))).reshape(len(rows), blocks, _BLOCK)
    labels = jnp.pad(labels.astype(jnp.int32), (0, short)).reshape(blocks, _BLOCK)
    mask = jnp.pad(mask, (0, short)).reshape(blocks, _BLOCK)

    is_label = labels == jnp.arange(len(rows))[:, None, None]
    confidence = rows.max(axis=0)
    correct = rows.argmax(axis=0) == labels
    of_label = jnp.where(is_label, rows, 0).sum(axis=0)
    scores = jnp.concatenate([confidence[None], rows])
    hits = jnp.concatenate([correct[None], is_label])
    counted = mask if above is None else mask & (scores > above)

    def of_bin(border: tuple[jax.Array, jax.Array]) -> Bins:
        low, high = border
        inside = (scores > low) & (scores <= high) if binning == "right" else (scores >= low) & (scores < high)
        inside &= counted
        return Bins(_total(inside), _total(jnp.where(inside, scores, 0)), _total(inside & hits))

    borders = jnp.asarray(_borders(bins, binning, np.dtype(scores.dtype)))
    per_bin = jax.lax.map(of_bin, (borders[:-1], borders[1:]))  # a loop: no [M, K, V] array in memory
    return Sums(
        top_label=Bins(*(values[:, 0] for values in per_bin)),
        classes=Bins(*(values[:, 1:].T for values in per_bin)),
        label_count=_total(is_label & mask),
        brier_sum=_total(jnp.where(mask, (rows - is_label) ** 2, 0)),
        top_label_brier_sum=_total(jnp.where(mask, (confidence - correct) ** 2, 0)),
        nll_sum=_total(
            jnp.where(mask, -jnp.log(jnp.maximum(of_label, calibration.probability_floor(of_label.dtype))), 0)
        ),
    )


def to_statistics(
    sums: Sums,
    *,
    score: str = "top_label",
    binning: str = "right",
    above: float | None = None,
    binary: bool = False,
) -> calibration.CalibrationStatistics:
    """Host statistics in float64, which merge with all others.

    Args:
        sums: of ``calibration_sums``.
        score: as for ``calibration_statistics``.
        binning: as the sums were taken with.
        above: as the sums were taken with.
        binary: whether the probabilities were [V].

    Raises:
        UsageError: for an unknown option.
    """
    bins = sums.classes.count.shape[1] - (binning == "torchmetrics")
    classes = None if binary else len(sums.label_count)
    start = calibration.empty(classes, bins=bins, score=score, binning=binning, above=above)
    host = jax.tree.map(lambda values: np.asarray(values, np.dtype(values.dtype.kind + "8")), sums)
    return dataclasses.replace(start, **host._asdict())


def _total(values: jax.Array) -> jax.Array:
    """Sum over the blocks [..., blocks, _BLOCK], each first, so that float32 stays accurate."""
    values = values.astype(jnp.int32) if values.dtype == bool else values
    return values.sum(axis=-1).sum(axis=-1)


def _borders(bins: int, binning: str, dtype: np.dtype) -> np.ndarray:
    """Borders of the bins as numbers of ``dtype`` that part its numbers as the float64 edges do."""
    exact = binned.edges(bins, binning)
    near = exact.astype(dtype)
    if binning == "right":  # s > edge where s > the largest number not above it
        near = np.where(near > exact, np.nextafter(near, dtype.type(-1)), near)
        return np.concatenate([[-1], near[1:]]).astype(dtype)  # 0 belongs to the first
    near = np.where(near < exact, np.nextafter(near, dtype.type(2)), near)
    return np.concatenate([near if binning == "torchmetrics" else near[:-1], [2]]).astype(dtype)
