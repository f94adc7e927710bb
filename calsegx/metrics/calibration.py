"""Calibration statistics that stream and add up: ECE, MCE, Brier score, NLL and the reliability curve.

Sums of slices, cases or workers add up, so one pass gives both the pooled value and the mean over cases.  On
which voxels they are taken decides the number: see ``regions``, and name the region in every table.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from calsegx.interfaces import InputError, UsageError

SCORES = ("top_label", "foreground")
# 1 minus the largest float32 below 1.  A float32 sigmoid or softmax saturates there, and one saturated wrong
# voxel would make the NLL of a volume infinite.
PROBABILITY_FLOOR = 2.0**-24
ROUNDING = 1e-5  # how far beyond 0..1 probabilities may lie: resampling and sums of classes round


class ReliabilityCurve(NamedTuple):
    """Per-bin means, [bins] each; NaN where a bin has no voxel."""

    confidence: np.ndarray  # mean confidence, 0..1
    accuracy: np.ndarray  # fraction correct (score top_label) or fraction foreground (score foreground), 0..1
    count: np.ndarray  # voxels, int64


@dataclass(frozen=True, eq=False)
class CalibrationStatistics:
    """Additive sums over voxels; those of one ``score`` and number of bins can be added.

    Adding in another order changes floating-point sums by rounding (1e-15 relative), never counts.
    """

    count: np.ndarray  # [bins] int64, voxels
    confidence_sum: np.ndarray  # [bins] float64
    correct_sum: np.ndarray  # [bins] int64
    brier_sum: float
    nll_sum: float  # nats
    voxels: int
    score: str = "top_label"

    def __add__(self, other: "CalibrationStatistics") -> "CalibrationStatistics":
        if not isinstance(other, CalibrationStatistics):
            return NotImplemented
        if (self.score, len(self.count)) != (other.score, len(other.count)):
            raise UsageError(
                f"Calibration statistics of score {self.score!r} with {len(self.count)} bins cannot be added "
                f"to those of score {other.score!r} with {len(other.count)} bins; compute both alike."
            )
        return CalibrationStatistics(
            self.count + other.count,
            self.confidence_sum + other.confidence_sum,
            self.correct_sum + other.correct_sum,
            self.brier_sum + other.brier_sum,
            self.nll_sum + other.nll_sum,
            self.voxels + other.voxels,
            self.score,
        )

    def ece(self) -> float:
        """Expected calibration error, 0..1; NaN without voxels.

        ``sum_i |B_i| / V * |accuracy_i - confidence_i|``: Naeini et al. 2015; Guo et al. 2017, equation 3.
        """
        return self._per_voxel(float(np.abs(self.correct_sum - self.confidence_sum).sum()))

    def mce(self) -> float:
        """Maximum calibration error: the largest gap of a non-empty bin, 0..1; NaN without voxels.

        Naeini et al. 2015; Guo et al. 2017, equation 5.
        """
        curve = self.reliability_curve()
        return float(np.nanmax(np.abs(curve.accuracy - curve.confidence))) if self.voxels else float("nan")

    def brier(self) -> float:
        """Brier score; NaN without voxels.

        Mean of ``(p - y)^2`` for one foreground probability, 0..1; mean of ``sum_k (p_k - q_k)^2`` for a
        softmax, 0..2: for two classes twice the former.
        """
        return self._per_voxel(self.brier_sum)

    def nll(self) -> float:
        """Mean of ``-log p_y`` in nats, at most 24 log 2 = 16.6; NaN without voxels."""
        return self._per_voxel(self.nll_sum)

    def reliability_curve(self) -> ReliabilityCurve:
        """Mean confidence, accuracy and number of voxels of every bin."""
        count = np.where(self.count > 0, self.count, np.nan)
        return ReliabilityCurve(self.confidence_sum / count, self.correct_sum / count, self.count.copy())

    def _per_voxel(self, total: float) -> float:
        return total / self.voxels if self.voxels else float("nan")


def calibration_statistics(
    probabilities: np.ndarray, labels: np.ndarray, *, bins: int = 15, score: str = "top_label"
) -> CalibrationStatistics:
    """Calibration sums of the voxels of a region.

    Bins are equally wide and right-closed, ``(lo, hi]``; 0 belongs to the first.  The scores::

        top_label   confidence max_k p_k (binary: max(p, 1 - p)), correct when the arg max is the label; the
                    lowest class wins a tie
        foreground  confidence p, "correct" when the voxel is foreground: a binary problem's reliability curve

    They are different numbers: name the score beside an ECE.  In the NLL alone, probabilities below 2^-24
    count as 2^-24.

    Args:
        probabilities: [V], foreground probability of a binary problem, or [V, K'], a softmax with K' >= 2; of
            any float dtype.
        labels: [V], integers 0..K'-1 (0 or 1 for a binary problem) or bool; V = 0 is allowed.
        bins: number of bins.
        score: ``top_label`` or ``foreground``; the latter for [V] only.

    Raises:
        InputError: for shapes that do not fit, labels outside the classes, values that are no probabilities.
        UsageError: for an unknown ``score`` or no bins.
    """
    if score not in SCORES:
        raise UsageError(f"Calibration score {score!r} is not one of {', '.join(SCORES)}.")
    if bins < 1:
        raise UsageError(f"Calibration bins={bins} must be at least 1.")
    probabilities, labels = _checked(probabilities, labels)
    if probabilities.ndim == 1:
        foreground = labels == 1
        of_label = np.where(foreground, probabilities, 1 - probabilities)
        brier = np.square(1 - of_label)
        if score == "foreground":
            confidence, correct = probabilities, foreground
        else:
            confidence = np.maximum(probabilities, 1 - probabilities)
            correct = (probabilities > 0.5) == foreground
    elif score == "foreground":
        raise InputError(
            f"Score 'foreground' needs one foreground probability per voxel, got {probabilities.shape}; pass "
            "probabilities[:, 1]."
        )
    else:
        of_label = np.take_along_axis(probabilities, labels[:, None], axis=1)[:, 0]
        brier = np.square(probabilities).sum(axis=1) - np.square(of_label) + np.square(1 - of_label)
        confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    index = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence, side="left")
    return CalibrationStatistics(
        count=np.bincount(index, minlength=bins),
        confidence_sum=np.bincount(index, confidence, minlength=bins),
        correct_sum=np.bincount(index[correct], minlength=bins),
        brier_sum=float(brier.sum()),
        nll_sum=float(-np.log(np.maximum(of_label, PROBABILITY_FLOOR)).sum()),
        voxels=len(labels),
        score=score,
    )


def _checked(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    labels = np.asarray(labels)
    probabilities = np.asarray(probabilities, np.float64)
    fits = probabilities.ndim == 1 or (probabilities.ndim == 2 and probabilities.shape[1] >= 2)
    if not fits or labels.shape != probabilities.shape[:1]:
        raise InputError(
            f"Probabilities {probabilities.shape} and labels {labels.shape} do not fit; expected [V] or [V, "
            "K'] with K' >= 2, and [V]: select a region first."
        )
    if labels.dtype.kind not in "biu":
        raise InputError(f"Labels are {labels.dtype}, expected integers or bool; convert the label map first.")
    labels = labels.astype(np.intp, copy=False)
    classes = 2 if probabilities.ndim == 1 else probabilities.shape[1]
    if labels.size == 0:
        return probabilities, labels
    if labels.min() < 0 or labels.max() >= classes:
        raise InputError(
            f"Labels span {labels.min()}..{labels.max()}, expected 0..{classes - 1}; map the label ids to "
            "classes first."
        )
    if not (probabilities.min() >= -ROUNDING and probabilities.max() <= 1 + ROUNDING):  # so that NaN fails
        raise InputError(
            f"Probabilities span {probabilities.min()}..{probabilities.max()}, expected 0..1 without NaN; "
            "apply the sigmoid or softmax to logits first."
        )
    # 0.02 lets half-precision softmaxes pass and catches independent sigmoids.
    if probabilities.ndim == 2 and np.abs(probabilities.sum(axis=1) - 1).max() > 0.02:
        raise InputError(
            "Class probabilities of a voxel do not sum to 1, expected a softmax; apply it over the last axis."
        )
    return np.clip(probabilities, 0, 1), labels
