"""Overlap of masks and label maps, from counts that add up exactly over slices, volumes, devices and domains.

Two ways to one number for many cases, and they differ: add the ``OverlapCounts`` of the cases (pooled: large
structures weigh more), or collect one score per case in ``CaseScores`` (every case weighs the same).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from calsegx.interfaces import Array, InputError, UsageError

EMPTY = ("agree", "nan", "nan_without_truth")


class Score(NamedTuple):
    """A value, and whether the formula gave it: False where an empty-mask policy did.  Count those in every table."""

    value: float
    defined: bool


class OverlapScores(NamedTuple):
    """What the voxel counts of a prediction A and a truth B say; see ``OverlapCounts.finalise``."""

    dsc: Score
    iou: Score
    precision: Score
    recall: Score
    volume_difference_ml: Score  # positive: too much was segmented
    relative_volume_difference: Score


@dataclass(frozen=True)
class OverlapCounts:
    """Voxel counts of a prediction A against a truth B; those of several images or slices add up."""

    true_positive: int = 0  # |A and B|
    false_positive: int = 0  # |A without B|
    false_negative: int = 0  # |B without A|
    true_negative: int = 0

    @property
    def predicted(self) -> int:
        """``|A|``."""
        return self.true_positive + self.false_positive

    @property
    def truth(self) -> int:
        """``|B|``."""
        return self.true_positive + self.false_negative

    def __add__(self, other: "OverlapCounts") -> "OverlapCounts":
        if not isinstance(other, OverlapCounts):
            return NotImplemented
        return OverlapCounts(
            self.true_positive + other.true_positive,
            self.false_positive + other.false_positive,
            self.false_negative + other.false_negative,
            self.true_negative + other.true_negative,
        )

    def finalise(self, spacing_mm: Sequence[float], *, empty: str = "agree") -> OverlapScores:
        """The scores of the counts.

        With true positives TP, false positives FP and false negatives FN::

            dsc                          2 TP / (2 TP + FP + FN), 0..1: Dice 1945
            iou                          TP / (TP + FP + FN), 0..1: Jaccard 1912
            precision                    TP / (TP + FP), 0..1
            recall                       TP / (TP + FN), 0..1
            volume_difference_ml         (|A| - |B|) * voxel volume; always defined
            relative_volume_difference   (|A| - |B|) / |B|, -1..; NaN where only B is empty, whatever the policy

        ``empty`` decides what stands for 0/0; such a score is not ``defined``::

            agree              both masks empty: 1 (relative volume difference: 0); exactly one empty: 0
            nan                NaN
            nan_without_truth  as nan, and NaN in every ratio of a case without truth, even where the formula
                               gives 0: MONAI's Dice and IoU with ``ignore_empty``

        The papers' code gives DSC 1 to every prediction where the truth is empty; none of these does.

        Args:
            spacing_mm: three sizes of a voxel, of all images that were counted; of a single slice, its thickness and
                the size of a pixel.
            empty: ``agree``, ``nan`` or ``nan_without_truth``.

        Raises:
            InputError: for an unusable spacing.
            UsageError: for an unknown ``empty``.
        """
        check_option("empty", empty, EMPTY)
        voxel_ml = float(np.prod(check_spacing(spacing_mm, 3))) / 1000
        tp, difference = self.true_positive, self.predicted - self.truth
        relative = self._ratio(difference, self.truth, empty)
        if not relative.defined and empty == "agree":
            relative = Score(math.nan if difference else 0.0, False)
        return OverlapScores(
            dsc=self._ratio(2 * tp, self.predicted + self.truth, empty),
            iou=self._ratio(tp, self.predicted + self.false_negative, empty),
            precision=self._ratio(tp, self.predicted, empty),
            recall=self._ratio(tp, self.truth, empty),
            volume_difference_ml=Score(difference * voxel_ml, True),
            relative_volume_difference=relative,
        )

    def _ratio(self, numerator: int, denominator: int, empty: str) -> Score:
        if denominator and (self.truth or empty != "nan_without_truth"):
            return Score(numerator / denominator, True)
        if empty == "agree":
            return Score(0.0 if self.predicted or self.truth else 1.0, False)
        return Score(math.nan, False)


class CaseMean(NamedTuple):
    """Mean over cases."""

    mean: float  # over the values that are not NaN; NaN without any
    cases: int  # values that entered
    undefined: int  # cases whose value, if it has one, is the empty-mask policy's


@dataclass(frozen=True)
class CaseScores:
    """One metric's scores of many cases; those of volumes, domains, devices or seeds add up.

    It keeps every value (they are few), so the mean does not depend on the order of adding, to the last bit, and
    ``values`` can go to ``statistics.bootstrap_interval``.
    """

    values: tuple[float, ...] = ()
    undefined: int = 0

    def __add__(self, other: "CaseScores") -> "CaseScores":
        if not isinstance(other, CaseScores):
            return NotImplemented
        return CaseScores(self.values + other.values, self.undefined + other.undefined)

    def finalise(self) -> CaseMean:
        """Mean of the values that are not NaN, how many those are, and the number of undefined cases."""
        kept = [value for value in self.values if not math.isnan(value)]
        return CaseMean(math.fsum(kept) / len(kept) if kept else math.nan, len(kept), self.undefined)


def case_scores(scores: Iterable[Score]) -> CaseScores:
    """The additive form of some cases' scores of one metric."""
    scores = tuple(scores)
    return CaseScores(tuple(s.value for s in scores), sum(not s.defined for s in scores))


def overlap_counts(prediction: np.ndarray, truth: np.ndarray) -> OverlapCounts:
    """Count the voxels of two boolean masks of one shape.

    Raises:
        InputError: for masks that are not boolean or differ in shape.
    """
    check_masks(prediction, truth)
    both, predicted, true = (int(np.count_nonzero(mask)) for mask in (prediction & truth, prediction, truth))
    return OverlapCounts(both, predicted - both, true - both, truth.size - predicted - true + both)


def dice(prediction: np.ndarray, truth: np.ndarray, *, both_empty: float = 1.0) -> float:
    """Dice similarity coefficient ``2 |A and B| / (|A| + |B|)`` of two boolean masks, 0..1.

    Exactly one empty mask gives 0.

    Args:
        prediction: bool, any shape.
        truth: bool, of the same shape.
        both_empty: the value where neither mask has a voxel; NaN to leave such cases out of a mean.

    Raises:
        InputError: for masks that are not boolean or differ in shape.
    """
    counts = overlap_counts(prediction, truth)
    size = counts.predicted + counts.truth
    return 2 * counts.true_positive / size if size else float(both_empty)


def confusion(prediction: np.ndarray, truth: np.ndarray, classes: int) -> np.ndarray:
    """How many voxels of class j were predicted as class i, in one pass; matrices of several images add up.

    Args:
        prediction: integers 0..K-1, any shape.
        truth: integers 0..K-1, of the same shape.
        classes: K, with the background.

    Returns:
        [K, K] int64: rows are predicted classes, columns true ones.  ``counts_of`` makes them scores.

    Raises:
        InputError: for arrays that are not integers, differ in shape or hold other labels.
    """
    for name, labels in (("prediction", prediction), ("truth", truth)):
        check_labels(name, labels)
        if labels.size and not (labels.min() >= 0 and labels.max() < classes):
            raise InputError(
                f"The {name} holds labels {labels.min()}..{labels.max()}, expected 0..{classes - 1}; map the labels "
                "to class indices or raise the number of classes."
            )
    _check_shapes(prediction, truth)
    # The narrowest integers that hold K^2 values: reading and writing memory is most of the time.
    kind = np.min_scalar_type(classes**2)
    index = prediction.astype(kind) * kind.type(classes) + truth.astype(kind)
    return np.bincount(index.ravel(), minlength=classes**2).reshape(classes, classes)


def confusion_on_device(prediction: Array, truth: Array, classes: int) -> Array:
    """As ``confusion`` for jax arrays, jit-able with static ``classes``: [K, K] int32.

    Under jit values cannot be checked: a voxel with a label outside 0..K-1 is not counted, so the matrix then sums
    to less than the number of voxels.
    """
    import jax.numpy as jnp  # here, so that importing the metrics does not need jax

    known = (prediction >= 0) & (prediction < classes) & (truth >= 0) & (truth < classes)
    index = jnp.where(known, prediction.astype(jnp.int32) * classes + truth.astype(jnp.int32), classes**2)
    return jnp.bincount(index.ravel(), length=classes**2 + 1)[:-1].reshape(classes, classes)


def counts_of(matrix: np.ndarray, labels: Sequence[int]) -> OverlapCounts:
    """Counts of a structure made of one or several classes, e.g. ``(1,)`` or a whole tumour ``(1, 2, 3)``.

    Args:
        matrix: [K, K] of ``confusion``.
        labels: the classes that make the structure.

    Raises:
        InputError: for a class that the matrix does not have.
    """
    matrix, members = np.asarray(matrix), sorted(set(labels))
    if not members or members[0] < 0 or members[-1] >= len(matrix):
        raise InputError(
            f"Classes {tuple(labels)} are not in a confusion matrix of {len(matrix)} classes; expected some of "
            f"0..{len(matrix) - 1}."
        )
    both = int(matrix[np.ix_(members, members)].sum())
    predicted, true = int(matrix[members].sum()), int(matrix[:, members].sum())
    return OverlapCounts(both, predicted - both, true - both, int(matrix.sum()) - predicted - true + both)


def bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """The smallest box around the true voxels of a mask; without any, an empty box."""
    box: list[slice] = []
    for axis in range(mask.ndim):
        found = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        box.append(slice(int(found[0]), int(found[-1]) + 1) if len(found) else slice(0, 0))
        mask = mask[(slice(None),) * axis + (box[axis],)]  # the next axes then read less
    return tuple(box)


def check_masks(prediction: np.ndarray, truth: np.ndarray) -> None:
    """Refuse masks that are not boolean (label maps, probabilities) or whose shapes differ.

    Raises:
        InputError: naming the mask and what it is.
    """
    for name, mask in (("prediction", prediction), ("truth", truth)):
        if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
            kind = getattr(mask, "dtype", type(mask).__name__)
            raise InputError(
                f"The {name} mask is {kind}, expected a boolean array; compare first (labels == k, p > 0.5)."
            )
    _check_shapes(prediction, truth)


def check_labels(name: str, labels: np.ndarray) -> None:
    """Refuse a label map that is not an array of integers.

    Raises:
        InputError: naming the array and what it is.
    """
    if not isinstance(labels, np.ndarray) or labels.dtype.kind not in "iu":
        kind = getattr(labels, "dtype", type(labels).__name__)
        raise InputError(f"The {name} is {kind}, expected an array of integer labels; take the arg max or round first.")


def check_spacing(spacing_mm: Sequence[float], dimensions: int) -> np.ndarray:
    """The voxel spacing as an array [dimensions], in millimetres.

    Raises:
        InputError: unless there is one positive finite number per axis.
    """
    spacing = np.asarray(spacing_mm, np.float64)
    if spacing.shape != (dimensions,) or not all(math.isfinite(s) and s > 0 for s in spacing):
        raise InputError(
            f"spacing_mm={spacing_mm!r} is not usable, expected {dimensions} positive numbers; pass the "
            "voxel size in mm along each axis of the mask."
        )
    return spacing


def check_option(name: str, value: str, allowed: Sequence[str]) -> None:
    """Refuse an unknown option.

    Raises:
        UsageError: listing the known ones.
    """
    if value not in allowed:
        raise UsageError(f"Metric option {name}={value!r} is not one of {', '.join(allowed)}.")


def _check_shapes(prediction: np.ndarray, truth: np.ndarray) -> None:
    if prediction.shape != truth.shape:
        raise InputError(
            f"The prediction has shape {prediction.shape} and the truth {truth.shape}; bring both to the same grid."
        )
