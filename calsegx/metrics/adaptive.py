"""Calibration errors over bins of equal count: TACE, the adaptive ACE and the top label's.

``tace``, ``ace_adaptive`` and ``top_label_ace`` sort, so they are exact and need the whole array.
``AdaptiveStatistics`` streams and merges in bounded memory, and says how far from the exact value it may be.
"""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from calsegx.interfaces import Array, InputError, UsageError
from calsegx.metrics import binning

# Fine sub-bins: 2^10 per octave of min(s, 1 - s), down to 2^-24, where a float32 softmax ends.
_SHIFT = 13  # of the 23 mantissa bits of a float32, so that 10 are left
_LOWEST = int(np.float32(2.0**-24).view(np.uint32)) >> _SHIFT
_HALF = (int(np.float32(0.5).view(np.uint32)) >> _SHIFT) - _LOWEST
SUB_BINS = 2 * _HALF + 2
_CHUNK = 1 << 18  # voxels: several for each sub-bin


def tace(probabilities: Array, labels: Array, *, threshold: float = 1e-3, ranges: int = 15) -> float:
    """Thresholded adaptive calibration error, exact, 0..1.

    ``1 / (K R) sum_k sum_r |frequency(r, k) - mean p(r, k)|`` over R ranges of equal count of the scores of class k
    above the threshold (Nixon et al. 2019; CRaC takes 1e-3 and R = 15, but its code is
    ``CalibrationStatistics.tace_equalwidth``).  Ranges are those of ``numpy.array_split`` on the stably sorted scores,
    so tied scores are told apart by their order.  An empty range, or a class without scores above the threshold,
    counts as 0.

    Args:
        probabilities: [V, K], a softmax, or [V], a foreground probability, which is the only class then.
        labels: [V], integers 0..K-1.
        threshold: scores must be above it.
        ranges: R.

    Returns:
        NaN without voxels.

    Raises:
        InputError: for shapes that do not fit, labels outside the classes, values that are no probabilities.
        UsageError: for less than one range.
    """
    _check_ranges(ranges)
    found = []
    for scores, hits in class_scores(probabilities, labels):
        kept = scores > threshold
        gaps, counts = _range_gaps(scores[kept], hits[kept], ranges)
        found.append((gaps / np.maximum(counts, 1)).sum() / ranges)
    return float(np.mean(found)) if found else float("nan")


def ace_adaptive(probabilities: Array, labels: Array, *, ranges: int = 15) -> float:
    """Adaptive calibration error (Nixon et al. 2019): ``tace`` of all scores above 0; arguments and errors as there.

    Not the average over non-empty bins that shares its short name (``CalibrationStatistics.ace_nonempty``).
    """
    return tace(probabilities, labels, threshold=0.0, ranges=ranges)


def top_label_ace(probabilities: Array, labels: Array, *, ranges: int = 15) -> float:
    """ECE of the top label over ranges of equal count, exact, 0..1: torch-uncertainty's "ACE".

    ``sum_r n_r / V |accuracy_r - confidence_r|``; arguments, ranges and errors as for ``tace``.
    """
    _check_ranges(ranges)
    confidence, correct = top_label(probabilities, labels)
    if not len(confidence):
        return float("nan")
    return float(_range_gaps(confidence, correct, ranges)[0].sum() / len(confidence))


def top_label(probabilities: Array, labels: Array) -> tuple[Float[np.ndarray, " V"], Float[np.ndarray, " V"]]:
    """The confidence max_k p_k of every voxel and whether its arg max (the lowest of a tie) is the label, 0 or 1."""
    for rows, kept in binning.chunks(probabilities, labels, size=max(np.size(labels), 1)):
        return rows.max(axis=0), (rows.argmax(axis=0) == kept).astype(np.float64)
    return np.zeros(0), np.zeros(0)


@dataclass(frozen=True, eq=False)
class AdaptiveStatistics:
    """Additive sums over fine sub-bins of the scores, 1.1 MB per class whatever the number of voxels.

    ``update`` adds voxels, ``+`` (``merge``) adds other statistics.  Sub-bins are 0.1 % wide, relative to the distance
    from the nearer of 0 and 1, and hold exact sums; only the sub-bin that a range's border falls into is cut in
    proportion, so a value does not depend on the order of voxels, not even of tied scores.
    """

    count: np.ndarray  # [K, SUB_BINS] int64; K = 1 for a binary problem
    score_sum: np.ndarray  # [K, SUB_BINS] float64
    hit_sum: np.ndarray  # [K, SUB_BINS] int64
    voxels: int
    threshold: float

    def __add__(self, other: "AdaptiveStatistics") -> "AdaptiveStatistics":
        if not isinstance(other, AdaptiveStatistics):
            return NotImplemented
        if (self.threshold, len(self.count)) != (other.threshold, len(other.count)):
            raise UsageError(
                f"Adaptive statistics of {len(self.count)} classes above {self.threshold:g} cannot be added to those "
                f"of {len(other.count)} classes above {other.threshold:g}; compute both alike."
            )
        return replace(
            self,
            count=self.count + other.count,
            score_sum=self.score_sum + other.score_sum,
            hit_sum=self.hit_sum + other.hit_sum,
            voxels=self.voxels + other.voxels,
        )

    merge = __add__

    def update(self, probabilities: Array, labels: Array) -> "AdaptiveStatistics":
        """These statistics with more voxels; arguments and errors as for ``adaptive_statistics``."""
        count, score_sum, hit_sum = self.count.copy(), self.score_sum.copy(), self.hit_sum.copy()
        for rows, part in binning.chunks(probabilities, labels, size=_CHUNK):
            first = _first(probabilities)
            if len(rows) - first != len(count):
                raise InputError(
                    f"Probabilities have shape {np.shape(probabilities)}, expected {len(count)} classes; keep one set "
                    "of statistics per problem."
                )
            for k, scores in enumerate(rows[first:]):
                kept = scores > self.threshold
                cell, is_label = _sub_bin(scores[kept]), part[kept] == k + first
                count[k] += np.bincount(cell, minlength=SUB_BINS)
                score_sum[k] += np.bincount(cell, scores[kept], minlength=SUB_BINS)
                hit_sum[k] += np.bincount(cell[is_label], minlength=SUB_BINS)
        return replace(
            self, count=count, score_sum=score_sum, hit_sum=hit_sum, voxels=self.voxels + len(np.asarray(labels))
        )

    def tace(self, *, ranges: int = 15) -> float:
        """What ``adaptive.tace`` is of the same voxels, up to ``error_bound``; 0..1, NaN without voxels."""
        return self._finalise(ranges)[0]

    def error_bound(self, *, ranges: int = 15) -> float:
        """How far ``tace`` may be from the exact value, 0..1; NaN without voxels.

        Cutting a sub-bin of n voxels with h hits and width w at the fraction f misplaces at most
        ``n f (1 - f) w`` of score and as many hits as may all lie on one side; both neighbouring ranges see that.
        It is some 1e-3 for many voxels with continuous scores, and the error far smaller.  Where many scores are tied,
        it covers the exact value's own dependence on the order of the voxels.
        """
        return self._finalise(ranges)[1]

    def _finalise(self, ranges: int) -> tuple[float, float]:
        _check_ranges(ranges)
        if not self.voxels:
            return float("nan"), float("nan")
        found = [_cut(*sums, ranges) for sums in zip(self.count, self.score_sum, self.hit_sum, strict=True)]
        value, bound = np.mean(found, axis=0)
        return float(value), float(bound)


def adaptive_statistics(probabilities: Array, labels: Array, *, threshold: float = 1e-3) -> AdaptiveStatistics:
    """Mergeable statistics for ``tace`` (``threshold`` 0: ``ace_adaptive``) of the voxels of a region.

    Args:
        probabilities: [V, K], a softmax, or [V], a foreground probability, which is the only class then.
        labels: [V], integers 0..K-1.
        threshold: scores must be above it.

    Raises:
        InputError: for shapes that do not fit, labels outside the classes, values that are no probabilities.
    """
    classes = np.shape(probabilities)[1] if np.ndim(probabilities) == 2 else 1
    shape = (classes, SUB_BINS)
    start = AdaptiveStatistics(np.zeros(shape, np.int64), np.zeros(shape), np.zeros(shape, np.int64), 0, threshold)
    return start.update(probabilities, labels)


def class_scores(probabilities: Array, labels: Array) -> list[tuple[np.ndarray, np.ndarray]]:
    """Scores and hits of every class over all voxels; of the foreground alone for a binary problem."""
    for rows, kept in binning.chunks(probabilities, labels, size=max(np.size(labels), 1)):
        return [(rows[k].astype(np.float64), kept == k) for k in range(_first(probabilities), len(rows))]
    return []


def _first(probabilities: Array) -> int:
    """The first class that counts: of a binary problem only the foreground does."""
    return 1 if np.ndim(probabilities) == 1 else 0


def _range_gaps(scores: np.ndarray, hits: np.ndarray, ranges: int) -> tuple[np.ndarray, np.ndarray]:
    """|hits - sum of scores| and count of every range, [R] each."""
    order = np.argsort(scores, kind="stable")
    excess = np.concatenate([[0.0], np.cumsum(hits[order] - scores[order])])
    borders = _borders(len(scores), ranges)
    return np.abs(np.diff(excess[borders])), np.diff(borders)


def _borders(voxels: int, ranges: int) -> np.ndarray:
    """Where ``numpy.array_split`` cuts: the first ranges take one more each when R does not divide."""
    each, more = divmod(voxels, ranges)
    return np.arange(ranges + 1) * each + np.minimum(np.arange(ranges + 1), more)


def _cut(count: np.ndarray, score_sum: np.ndarray, hit_sum: np.ndarray, ranges: int) -> tuple[float, float]:
    """TACE of one class from its sub-bins, and the bound on its error."""
    used = np.flatnonzero(count)
    n, h = count[used], hit_sum[used]
    ends = np.concatenate([[0], np.cumsum(n)])
    if not ends[-1]:
        return 0.0, 0.0
    borders = _borders(int(ends[-1]), ranges)
    excess = np.interp(borders, ends, np.concatenate([[0.0], np.cumsum(h - score_sum[used])]))
    cut = np.minimum(np.searchsorted(ends, borders, side="right") - 1, len(used) - 1)
    n, h, width = n[cut], h[cut], _width(used[cut])
    below = borders - ends[cut]
    expected = h * below / n
    lost_hits = np.maximum(expected - np.maximum(0, h - (n - below)), np.minimum(h, below) - expected)
    lost = lost_hits + below * (n - below) / n * width
    sizes = np.maximum(np.diff(borders), 1)
    value = (np.abs(np.diff(excess)) / sizes).sum() / ranges
    return value, ((lost[:-1] + lost[1:]) / sizes).sum() / ranges


def _sub_bin(scores: np.ndarray) -> np.ndarray:
    """Sub-bins of scores in 0..1; higher scores never get a lower one."""
    upper = scores > 0.5
    bits = np.where(upper, 1 - scores, scores).astype(np.float32).view(np.uint32) >> _SHIFT
    cell = np.maximum(bits.astype(np.intp) - _LOWEST, 0)
    return np.where(upper, SUB_BINS - 1 - cell, cell)


def _width(cell: np.ndarray) -> np.ndarray:
    """How far apart two scores of a sub-bin may be, with the rounding to float32."""
    cell = np.minimum(cell, SUB_BINS - 1 - cell)
    start = ((cell + _LOWEST).astype(np.uint32) << _SHIFT).view(np.float32).astype(np.float64)
    return np.where(cell == 0, 2.0**-23, 1.001 * 2.0**-10 * start)


def _check_ranges(ranges: int) -> None:
    if ranges < 1:
        raise UsageError(f"Calibration ranges={ranges} must be at least 1.")
