"""Calibration statistics that stream and add up: ECE, CECE, MCE, RMSCE, ACE, Brier scores, NLL, reliability curves.

Sums of slices, cases, seeds or devices add up, so one pass gives both the pooled value and the mean over cases.  On
which voxels they are taken decides the number: see ``regions``, and name the region in every table.  Equal-count bins
are in ``adaptive``, the sums of arrays on a device in ``device``.
"""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from calsegx.interfaces import Array, InputError, UsageError
from calsegx.metrics import binning as binned
from calsegx.metrics.binning import Bins, ReliabilityCurve

SCORES = ("top_label", "foreground")
BRIERS = ("sum", "mean", "top_label")
CLASSES = ("all", "foreground", "present")
# 1 minus the largest float32 below 1.  A float32 sigmoid or softmax saturates there, and one saturated wrong
# voxel would make the NLL of a volume infinite.
PROBABILITY_FLOOR = 2.0**-24


@dataclass(frozen=True, eq=False)
class CalibrationStatistics:
    """Additive sums over voxels; those of the same classes and options can be merged.

    ``update`` adds voxels, ``+`` (``merge``) adds other statistics, the other methods finalise.  Merging in another
    order changes floating-point sums by rounding (1e-15 relative), never counts.  The options are those of
    ``calibration_statistics``.
    """

    top_label: Bins  # [M]: score max_k p_k, hit where the arg max is the label
    classes: Bins  # [K, M]: score p_k, hit where the label is k
    label_count: np.ndarray  # [K] int64, voxels of each label
    brier_sum: np.ndarray  # [K] float64, of (p_k - q_k)^2
    top_label_brier_sum: float
    nll_sum: float  # nats
    binary: bool  # one foreground probability per voxel, kept as the classes 1 - p and p
    score: str = "top_label"
    bins: int = 15
    binning: str = "right"
    above: float | None = None

    @property
    def voxels(self) -> int:
        """The number of voxels."""
        return int(self.label_count.sum())

    @property
    def count(self) -> Int[np.ndarray, " M"]:
        """Voxels in every bin of the score."""
        return self._of_score().count

    def __add__(self, other: "CalibrationStatistics") -> "CalibrationStatistics":
        if not isinstance(other, CalibrationStatistics):
            return NotImplemented
        if self._kind() != other._kind():
            raise UsageError(
                f"Calibration statistics of {self._kind()} cannot be added to those of {other._kind()}; compute both "
                "alike."
            )
        return replace(
            self,
            top_label=self.top_label.merge(other.top_label),
            classes=self.classes.merge(other.classes),
            label_count=self.label_count + other.label_count,
            brier_sum=self.brier_sum + other.brier_sum,
            top_label_brier_sum=self.top_label_brier_sum + other.top_label_brier_sum,
            nll_sum=self.nll_sum + other.nll_sum,
        )

    merge = __add__

    def update(self, probabilities: Array, labels: Array) -> "CalibrationStatistics":
        """These statistics with more voxels, as for ``calibration_statistics``, whose errors it raises."""
        total, floor = self, probability_floor(np.asarray(probabilities).dtype)
        for rows, part in binned.chunks(probabilities, labels):
            if (np.ndim(probabilities) == 1) != self.binary or len(rows) != len(self.label_count):
                raise InputError(
                    f"Probabilities have shape {np.shape(probabilities)}, expected those of {self._kind()}; keep one "
                    "set of statistics per problem."
                )
            total = total + replace(self, **_sums(rows, part, self.bins, self.binning, self.above, floor))
        return total

    def ece(self) -> float:
        """Expected calibration error of the score, 0..1; NaN without voxels.

        ``sum_i |B_i| / V * |accuracy_i - confidence_i|``: Naeini et al. 2015; Guo et al. 2017, equation 3.  For
        binning ``torchmetrics`` torchmetrics' ``l1``.
        """
        return float(self._of_score().expected(self.voxels))

    def mce(self) -> float:
        """Maximum calibration error: the largest gap of a non-empty bin, 0..1; NaN without voxels.

        Naeini et al. 2015; Guo et al. 2017, equation 5.
        """
        return float(self._of_score().maximum())

    def rmsce(self) -> float:
        """Root mean square calibration error ``sqrt(sum_i |B_i| / V * gap_i^2)``, 0..1; NaN without voxels.

        Also called L2 error; at least the ECE.
        """
        return float(self._of_score().root_mean_square(self.voxels))

    def ace_nonempty(self) -> float:
        """Average calibration error: mean gap of the non-empty equal-width bins, 0..1; NaN without voxels.

        Not the adaptive calibration error that shares its short name (``adaptive.ace_adaptive``).  A bin with one voxel
        weighs as much as one with all others.
        """
        return float(self._of_score().average())

    def class_ece(self) -> Float[np.ndarray, " K"]:
        """Expected calibration error of every class against the rest, on ``p_k``, 0..1; NaN without voxels."""
        return self.classes.expected(self.voxels)

    def cece(self, *, classes: str = "all", reduction: str = "mean") -> float:
        """Class-wise expected calibration error ``mean_k sum_i |B_ik| / V * |frequency_ik - mean p_ik|``, 0..1.

        Nixon et al. 2019 (there "static calibration error").  MbLS equation 9 sums over k (``reduction="sum"``, 0..K);
        its code takes the mean over the classes from 0 to the largest label that occurs (``classes="present"``) and
        drops scores of 0 (``above=0``), so that its K changes from case to case.

        Args:
            classes: ``all``, ``foreground`` (without class 0) or ``present``.
            reduction: ``mean`` or ``sum``.

        Returns:
            NaN without voxels.

        Raises:
            UsageError: for an unknown option.
        """
        return self._over_classes(self.class_ece(), classes, reduction)

    def tace_equalwidth(self, *, classes: str = "all") -> float:
        """CECE over the scores above the threshold, weights relative to their number in each class, 0..1.

        What the code of CRaC reports as TACE (with ``above=1e-3`` and ``classes="present"``).  It is not adaptive:
        for the thresholded adaptive error see ``adaptive.tace``.  A class without such scores counts as 0.

        Raises:
            UsageError: for statistics without ``above`` or unknown ``classes``.
        """
        if self.above is None:
            raise UsageError("tace_equalwidth needs a threshold; compute the statistics with above=1e-3.")
        survivors = self.classes.count.sum(axis=-1)
        found = np.where(survivors > 0, self.classes.expected(survivors), 0.0 if self.voxels else np.nan)
        return self._over_classes(found, classes, "mean")

    def brier(self, kind: str | None = None) -> float:
        """Brier score; NaN without voxels.

        Args:
            kind: ``sum``, mean of ``sum_k (p_k - q_k)^2``, 0..2 (default of a softmax); ``mean``, that divided by K,
                0..1 (default of a binary problem, where it is the mean of ``(p - y)^2``, CalSAM's); ``top_label``,
                mean of ``(max_k p_k - correct)^2``, 0..1.

        Raises:
            UsageError: for an unknown ``kind``.
        """
        kind = kind or ("mean" if self.binary else "sum")
        _choose("Brier score", kind, BRIERS)
        if kind == "top_label":
            return self._per_voxel(self.top_label_brier_sum)
        total = self._per_voxel(float(self.brier_sum.sum()))
        return total if kind == "sum" else total / len(self.brier_sum)

    def nll(self) -> float:
        """Mean of ``-log p_y`` in nats, NaN without voxels; of float32 probabilities at most 24 log 2 = 16.6."""
        return self._per_voxel(self.nll_sum)

    def reliability_curve(self) -> ReliabilityCurve:
        """Mean confidence, accuracy (of score foreground: frequency) and number of voxels of every bin, [M] each."""
        return self._of_score().curve()

    def class_reliability_curves(self) -> ReliabilityCurve:
        """Mean probability, frequency and number of voxels of every class and bin, [K, M] each."""
        return self.classes.curve()

    def _of_score(self) -> Bins:
        if self.score == "top_label":
            return self.top_label
        return Bins(*(values[1] for values in self.classes))

    def _over_classes(self, values: np.ndarray, classes: str, reduction: str) -> float:
        _choose("Set of classes", classes, CLASSES)
        _choose("Reduction", reduction, ("mean", "sum"))
        if classes == "foreground":
            values = values[1:]
        elif classes == "present" and self.voxels:
            values = values[: np.flatnonzero(self.label_count)[-1] + 1]
        return float(values.mean() if reduction == "mean" else values.sum())

    def _per_voxel(self, total: float) -> float:
        return total / self.voxels if self.voxels else float("nan")

    def _kind(self) -> str:
        problem = "a binary problem" if self.binary else f"{len(self.label_count)} classes"
        threshold = "" if self.above is None else f" and scores above {self.above:g}"
        return f"{problem} with score {self.score!r}, {self.bins} bins, binning {self.binning!r}{threshold}"


def calibration_statistics(
    probabilities: Array,
    labels: Array,
    *,
    bins: int = 15,
    score: str = "top_label",
    binning: str = "right",
    above: float | None = None,
) -> CalibrationStatistics:
    """Calibration sums of the voxels of a region, in one pass over chunks.

    Bins are equally wide and right-closed, ``(lo, hi]``; 0 belongs to the first.  The scores whose bins ``ece`` and
    its kin read::

        top_label   confidence max_k p_k (binary: max(p, 1 - p)), correct when the arg max is the label; the
                    lowest class wins a tie
        foreground  confidence p, "correct" when the voxel is foreground: a binary problem's reliability curve

    They are different numbers: name the score beside an ECE.  In the NLL alone, float32 probabilities
    below 2^-24 count as 2^-24, float64 ones below 2^-1022 as that.

    Args:
        probabilities: [V], foreground probability of a binary problem, or [V, K], a softmax with K >= 2; of
            any float dtype.
        labels: [V], integers 0..K-1 (0 or 1 for a binary problem) or bool; V = 0 is allowed.
        bins: number of bins M.
        score: ``top_label`` or ``foreground``; the latter for [V] only.
        binning: ``right`` is ``(lo, hi]``; ``left`` is ``[lo, hi)`` with 1 in the last bin; ``torchmetrics`` is
            ``[lo, hi)`` with one more bin for scores of exactly 1, which a saturated float32 softmax fills.
        above: only scores above this enter the bins (0 for the originals, which drop p = 0; 1e-3 for
            ``tace_equalwidth``).  Denominators keep all voxels unless a metric says otherwise.

    Raises:
        InputError: for shapes that do not fit, labels outside the classes, values that are no probabilities.
        UsageError: for an unknown option or no bins.
    """
    classes = np.shape(probabilities)[1] if np.ndim(probabilities) == 2 else None
    return empty(classes, bins=bins, score=score, binning=binning, above=above).update(probabilities, labels)


def empty(
    classes: int | None,
    *,
    bins: int = 15,
    score: str = "top_label",
    binning: str = "right",
    above: float | None = None,
) -> CalibrationStatistics:
    """Statistics of no voxels, to which ``update`` adds; K ``classes``, or None for a binary problem's ``[V]``.

    Raises:
        InputError: for score ``foreground`` with classes.
        UsageError: for an unknown option or no bins.
    """
    _choose("Calibration score", score, SCORES)
    binned.check_options(bins, binning)
    if score == "foreground" and classes is not None:
        raise InputError(
            f"Score 'foreground' needs one foreground probability per voxel, got those of {classes} classes; pass "
            "probabilities[:, 1]."
        )
    rows = classes or 2
    shape = (rows, binned.columns(bins, binning))
    nothing = Bins(np.zeros(shape, np.int64), np.zeros(shape), np.zeros(shape, np.int64))
    return CalibrationStatistics(
        top_label=Bins(*(values[0] for values in nothing)),
        classes=nothing,
        label_count=np.zeros(rows, np.int64),
        brier_sum=np.zeros(rows),
        top_label_brier_sum=0.0,
        nll_sum=0.0,
        binary=classes is None,
        score=score,
        bins=bins,
        binning=binning,
        above=above,
    )


def _sums(rows: np.ndarray, labels: np.ndarray, bins: int, binning: str, above: float | None, floor: float) -> dict:
    """The summed fields of ``CalibrationStatistics`` of one chunk: rows [K, n], labels [n]."""
    classes, voxels = rows.shape
    # One histogram per class over (is the top label) x (is the label) x slot gives the bins of the top label and of
    # the classes at once; the last slot takes what ``above`` drops.
    slots = bins + 2
    count = np.empty((classes, 2, 2, slots), np.int64)
    score_sum = np.empty((classes, 2, 2, slots))
    brier_sum = np.empty(classes)
    confidence = rows.max(axis=0)
    of_label = np.zeros_like(confidence)
    correct = np.zeros(voxels, bool)
    taken = np.zeros(voxels, bool)
    for k, scores in enumerate(rows):
        is_label = labels == k
        is_top = (scores == confidence) & ~taken
        taken |= is_top
        correct |= is_top & is_label
        cell = binned.slots(scores, bins, binning)
        if above is not None:
            cell[scores <= above] = slots - 1
        cell += np.multiply(is_top.view(np.uint8) * 2 + is_label.view(np.uint8), slots, dtype=np.intp)
        count[k] = np.bincount(cell, minlength=4 * slots).reshape(2, 2, slots)
        score_sum[k] = np.bincount(cell, scores, minlength=4 * slots).reshape(2, 2, slots)
        brier_sum[k] = _square_sum(scores - is_label)
        of_label += scores * is_label
    top = Bins(count[:, 1].sum(axis=(0, 1)), score_sum[:, 1].sum(axis=(0, 1)), count[:, 1, 1].sum(axis=0))
    each = Bins(count.sum(axis=(1, 2)), score_sum.sum(axis=(1, 2)), count[:, :, 1].sum(axis=1))
    return {
        "top_label": Bins(*(binned.fold(values[..., :-1], binning) for values in top)),
        "classes": Bins(*(binned.fold(values[..., :-1], binning) for values in each)),
        "label_count": each.hit_sum.sum(axis=-1),
        "brier_sum": brier_sum,
        "top_label_brier_sum": _square_sum(confidence - correct),
        "nll_sum": float(-np.log(np.maximum(of_label, floor)).sum(dtype=np.float64)),
    }


def probability_floor(dtype: np.dtype) -> float:
    """What counts as the lowest probability in the NLL: ``PROBABILITY_FLOOR``, or of float64 its smallest number."""
    return float(np.finfo(np.float64).tiny) if dtype == np.float64 else PROBABILITY_FLOOR


def _square_sum(values: np.ndarray) -> float:
    return float(np.square(values).sum(dtype=np.float64))  # a float32 dot product loses 4e-7


def _choose(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"{what} {value!r} is not one of {', '.join(known)}.")
