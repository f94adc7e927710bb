"""Bins of scores in 0..1, their additive sums, and the errors that follow from them.

A score is a predicted probability, its hit whether the event happened (the top label was right, the voxel has the
class).  ``Bins`` holds the sums of a set of voxels; those of two sets add up to those of their union.
"""

import functools
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from calsegx.interfaces import Array, InputError, UsageError

BINNINGS = ("right", "left", "torchmetrics")
CHUNK = 1 << 16  # voxels: fits the second-level cache, where the passes over it are fastest
ROUNDING = 1e-5  # how far beyond 0..1 probabilities may lie: resampling and sums of classes round
SUM_ROUNDING = 0.02  # of a softmax's sum: lets half precision pass and catches independent sigmoids


class Bins(NamedTuple):
    """Sums per bin along the last axis; any axes before it are separate problems (classes, images)."""

    count: Array  # [..., M] integer, voxels
    score_sum: Array  # [..., M] float
    hit_sum: Array  # [..., M] integer, voxels whose event happened

    def merge(self, other: "Bins") -> "Bins":
        """The bins of both sets of voxels together."""
        return Bins(*(a + b for a, b in zip(self, other, strict=True)))

    def gaps(self) -> Float[np.ndarray, "... M"]:
        """``|hit rate - mean score|`` of every bin, 0..1; NaN where a bin is empty."""
        return np.abs(self.hit_sum - self.score_sum) / np.where(self.count > 0, self.count, np.nan)

    def expected(self, voxels: Array) -> Float[np.ndarray, "..."]:
        """Expected calibration error ``sum_i n_i / N * gap_i`` with ``N`` = ``voxels``, 0..1; NaN for N = 0."""
        return _ratio(np.abs(self.hit_sum - self.score_sum).sum(axis=-1), voxels)

    def root_mean_square(self, voxels: Array) -> Float[np.ndarray, "..."]:
        """``sqrt(sum_i n_i / N * gap_i^2)`` with ``N`` = ``voxels``, 0..1; NaN for N = 0."""
        return np.sqrt(_ratio(np.nansum(self.count * self.gaps() ** 2, axis=-1), voxels))

    def maximum(self) -> Float[np.ndarray, "..."]:
        """The largest gap of a non-empty bin, 0..1; NaN without voxels."""
        largest = np.nan_to_num(self.gaps(), nan=-1.0).max(axis=-1)
        return np.where(largest < 0, np.nan, largest)

    def average(self) -> Float[np.ndarray, "..."]:
        """The mean gap of the non-empty bins, each counting alike, 0..1; NaN without voxels."""
        return _ratio(np.nansum(self.gaps(), axis=-1), (self.count > 0).sum(axis=-1))

    def curve(self) -> "ReliabilityCurve":
        """Mean score, hit rate and count of every bin."""
        count = np.where(self.count > 0, self.count, np.nan)
        return ReliabilityCurve(self.score_sum / count, self.hit_sum / count, np.array(self.count))


class ReliabilityCurve(NamedTuple):
    """Per-bin means, [..., M] each; NaN where a bin has no voxel."""

    confidence: np.ndarray  # mean score, 0..1
    accuracy: np.ndarray  # fraction of hits, 0..1
    count: np.ndarray  # voxels, int64


def check_options(bins: int, binning: str) -> None:
    """Refuse unusable bins.

    Raises:
        UsageError: for less than one bin or an unknown ``binning``.
    """
    if bins < 1:
        raise UsageError(f"Calibration bins={bins} must be at least 1.")
    if binning not in BINNINGS:
        raise UsageError(f"Calibration binning {binning!r} is not one of {', '.join(BINNINGS)}.")


def columns(bins: int, binning: str) -> int:
    """How many bins a binning has: one more for ``torchmetrics``."""
    return bins + 1 if binning == "torchmetrics" else bins


@functools.cache
def edges(bins: int, binning: str) -> Float[np.ndarray, " bins+1"]:
    """``numpy.linspace(0, 1, bins + 1)``, for ``torchmetrics`` ``torch.linspace``, both of float64.

    Edges that a float32 can hit lie exactly there.
    """
    exact = np.arange(bins + 1) / bins
    rounded = np.linspace(0, 1, bins + 1)
    if binning == "torchmetrics":  # torch takes the upper half from above, rounding once
        half = (bins + 1) // 2
        rounded[half:] = [float(1 - Fraction(1 / bins) * k) for k in range(bins - half, -1, -1)]
    found = np.where(exact == exact.astype(np.float32), exact, rounded)
    found.flags.writeable = False  # it is cached
    return found


def slots(scores: Float[np.ndarray, " n"], bins: int, binning: str) -> Int[np.ndarray, " n"]:
    """Which of the ``bins + 1`` slots a score in 0..1 falls into.

    Slot ``i`` is ``(edge_{i-1}, edge_i]`` for ``right`` and ``[edge_i, edge_{i+1})`` otherwise, so that slot 0 holds
    the zeros alone, or slot ``bins`` the ones alone.  Exact, also on the edges.
    """
    right = binning == "right"
    scaled = np.multiply(scores, float(bins), dtype=np.float64)
    found = (np.ceil(scaled) if right else np.floor(scaled)).astype(np.intp)
    if scores.dtype != np.float32:  # a product of a float32 is exact here, one of a float64 rounds
        near = np.flatnonzero((np.abs(scaled - np.rint(scaled)) < 1e-9) & (scores > 0) & (scores < 1))
        side = "left" if right else "right"
        found[near] = np.searchsorted(edges(bins, binning), scores[near], side) - (not right)
    return found


def fold(slots_of: np.ndarray, binning: str) -> np.ndarray:
    """Sums per slot ``[..., bins + 1]`` -> sums per bin of a binning, ``[..., columns]``."""
    if binning == "torchmetrics":
        return slots_of
    folded = (slots_of[..., 1:] if binning == "right" else slots_of[..., :-1]).copy()
    end = 0 if binning == "right" else -1
    folded[..., end] += slots_of[..., end]
    return folded


def chunks(
    probabilities: Array, labels: Array, *, size: int = CHUNK
) -> Iterator[tuple[Float[np.ndarray, "K n"], Int[np.ndarray, " n"] | Bool[np.ndarray, " n"]]]:
    """Checked class probabilities, a row per class, and labels, ``size`` voxels at a time.

    A binary problem ``[V]`` becomes the two rows ``1 - p`` and ``p`` in float64.  Others are float32, or float64 if
    they come so.  Values that rounding left outside 0..1 are brought back.

    Raises:
        InputError: for shapes that do not fit, labels outside the classes, values that are no probabilities.
    """
    probabilities, labels = np.asarray(probabilities), np.asarray(labels)
    fits = probabilities.ndim == 1 or (probabilities.ndim == 2 and probabilities.shape[1] >= 2)
    if not fits or labels.shape != probabilities.shape[:1]:
        raise InputError(
            f"Probabilities {probabilities.shape} and labels {labels.shape} do not fit; expected [V] or [V, "
            "K] with K >= 2, and [V]: select a region first."
        )
    if labels.dtype.kind not in "biu":
        raise InputError(f"Labels are {labels.dtype}, expected integers or bool; convert the label map first.")
    for start in range(0, len(labels), size):
        part = slice(start, start + size)
        rows = _rows(probabilities[part])
        yield rows, _checked_labels(labels[part], len(rows))


def _rows(part: np.ndarray) -> np.ndarray:
    if part.ndim == 1:
        values = part.astype(np.float64)
        rows = np.stack([1 - values, values])
    else:
        rows = part.T.astype(np.float64 if part.dtype.kind != "f" or part.itemsize > 4 else np.float32, order="C")
    low, high = rows.min(), rows.max()
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # so that NaN fails
        raise InputError(
            f"Probabilities span {low}..{high}, expected 0..1 without NaN; apply the sigmoid or softmax to logits "
            "first."
        )
    if part.ndim == 2 and np.abs(rows.sum(axis=0) - 1).max() > SUM_ROUNDING:
        raise InputError(
            "Class probabilities of a voxel do not sum to 1, expected a softmax; apply it over the last axis."
        )
    return rows if low >= 0 and high <= 1 else np.clip(rows, 0, 1)


def _checked_labels(labels: np.ndarray, classes: int) -> np.ndarray:
    if labels.min() < 0 or labels.max() >= classes:
        raise InputError(
            f"Labels span {labels.min()}..{labels.max()}, expected 0..{classes - 1}; map the label ids to "
            "classes first."
        )
    return labels


def _ratio(total: Array, number: Array) -> np.ndarray:
    number = np.asarray(number)
    return total / np.where(number > 0, number, np.nan)
