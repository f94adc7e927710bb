"""Detection of single lesions: how many were found, and how many of those reported exist, by size.

A Dice score is decided by the largest lesion; a missed small one hardly moves it.  BraTS 2023 scores lesions in
another way (Dice and HD95 per lesion of a dilated truth); these are the counts of detection alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from calsegx.interfaces import UsageError
from calsegx.metrics import overlap
from calsegx.metrics.overlap import Score

EMPTY = ("agree", "nan")


class LesionScores(NamedTuple):
    """Lesion-wise detection, 0..1 each."""

    sensitivity: Score
    precision: Score
    f1: Score


@dataclass(frozen=True)
class LesionCounts:
    """Numbers of lesions in each size stratum; those of several cases with the same strata add up.

    A true lesion stands in the stratum of its own volume, a predicted one in that of its own.
    """

    edges_mm3: tuple[float, ...]  # stratum i holds volumes in [edges[i - 1], edges[i]), from 0 to infinity
    true: tuple[int, ...]  # [strata], lesions of the truth
    detected: tuple[int, ...]  # of those, found by the prediction
    predicted: tuple[int, ...]  # lesions of the prediction
    matched: tuple[int, ...]  # of those, present in the truth

    def __add__(self, other: "LesionCounts") -> "LesionCounts":
        if not isinstance(other, LesionCounts):
            return NotImplemented
        if self.edges_mm3 != other.edges_mm3:
            raise UsageError(
                f"Lesion counts with strata at {self.edges_mm3} mm3 cannot be added to those with strata at "
                f"{other.edges_mm3} mm3; count both alike."
            )
        sums = [
            tuple(a + b for a, b in zip(mine, theirs, strict=True))
            for mine, theirs in (
                (self.true, other.true),
                (self.detected, other.detected),
                (self.predicted, other.predicted),
                (self.matched, other.matched),
            )
        ]
        return LesionCounts(self.edges_mm3, *sums)

    def finalise(self, stratum: int | None = None, *, empty: str = "agree") -> LesionScores:
        """Sensitivity, precision and F1 of one stratum, or of all lesions.

        ::

            sensitivity  detected / true
            precision    matched / predicted
            f1           2 * sensitivity * precision / (sensitivity + precision); 0 where both are 0

        One prediction can cover several true lesions and the reverse, so the two ratios count hits separately.
        Without true (predicted) lesions sensitivity (precision) is 0/0.  Under ``agree`` it is 1 where there are
        neither true nor predicted lesions and 0 where there is one kind; under ``nan`` it is NaN.  F1 follows
        the same rule and is defined where there is a true or a predicted lesion.

        Args:
            stratum: index of the size stratum; None for all lesions.
            empty: ``agree`` or ``nan``.

        Raises:
            UsageError: for an unknown ``empty`` or stratum.
        """
        overlap.check_option("empty", empty, EMPTY)
        if stratum is not None and not 0 <= stratum < len(self.true):
            raise UsageError(f"Lesion stratum {stratum} is not one of 0..{len(self.true) - 1}.")
        chosen = slice(None) if stratum is None else slice(stratum, stratum + 1)
        true, detected, predicted, matched = (
            sum(numbers[chosen]) for numbers in (self.true, self.detected, self.predicted, self.matched)
        )
        absent = Score(math.nan if empty == "nan" else float(not true and not predicted), False)
        sensitivity = Score(detected / true, True) if true else absent
        precision = Score(matched / predicted, True) if predicted else absent
        if not true and not predicted:
            return LesionScores(sensitivity, precision, absent)
        hits = detected and matched  # otherwise a ratio is 0 or 0/0
        f1 = 2 * sensitivity.value * precision.value / (sensitivity.value + precision.value) if hits else 0.0
        return LesionScores(sensitivity, precision, Score(f1, True))


def lesion_counts(
    prediction: np.ndarray,
    truth: np.ndarray,
    spacing_mm: Sequence[float],
    *,
    edges_mm3: Sequence[float] = (),
    connectivity: int | None = None,
    minimal_overlap: float = 0.0,
) -> LesionCounts:
    """Count the lesions of two boolean masks, and those that meet a lesion of the other mask.

    A lesion is a connected component.  It is met when the other mask has at least one of its voxels and at least
    the fraction ``minimal_overlap`` of them: of a true lesion, its recall; of a predicted one, its precision.

    Args:
        prediction: bool, any number of axes.
        truth: bool, of the same shape.
        spacing_mm: voxel size along each axis; three axes for volumes in mm3 (areas in mm2 for two).
        edges_mm3: increasing volumes that part the size strata; () for a single stratum of all lesions.
        connectivity: 1 connects voxels across faces, 2 across edges too, 3 across corners too; None for all
            neighbours of the image's number of axes.
        minimal_overlap: 0 (one voxel is enough) to 1 (the whole lesion).

    Raises:
        InputError: for masks that are not boolean or differ in shape, or an unusable spacing.
        UsageError: for edges that do not increase from above 0, or an unusable connectivity or overlap.
    """
    overlap.check_masks(prediction, truth)
    voxel_mm3 = float(np.prod(overlap.check_spacing(spacing_mm, truth.ndim)))
    if connectivity is not None and connectivity not in range(1, truth.ndim + 1):
        raise UsageError(f"Lesion connectivity {connectivity} is not one of 1..{truth.ndim}.")
    if not 0 <= minimal_overlap <= 1:
        raise UsageError(f"minimal_overlap={minimal_overlap} of lesions must lie in 0..1.")
    edges = np.asarray(edges_mm3, np.float64)
    if edges.ndim != 1 or not (np.isfinite(edges).all() and (np.diff(edges, prepend=0) > 0).all()):
        raise UsageError(f"edges_mm3={edges_mm3!r} of lesion strata must be positive and increase.")
    structure = ndimage.generate_binary_structure(truth.ndim, connectivity or truth.ndim)
    crop = overlap.bounding_box(prediction | truth)
    prediction, truth = prediction[crop], truth[crop]
    strata = []
    for mask, other in ((truth, prediction), (prediction, truth)):
        labels, number = ndimage.label(mask, structure)
        voxels = np.bincount(labels[mask], minlength=number + 1)[1:]
        shared = np.bincount(labels[mask & other], minlength=number + 1)[1:]
        met = (shared > 0) & (shared / voxels >= minimal_overlap)
        stratum = np.searchsorted(edges, voxels * voxel_mm3, side="right")
        strata += [np.bincount(which, minlength=len(edges) + 1).tolist() for which in (stratum, stratum[met])]
    return LesionCounts(tuple(edges.tolist()), *(tuple(numbers) for numbers in strata))
