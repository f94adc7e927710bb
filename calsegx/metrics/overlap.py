"""Overlap of two boolean masks, from additive counts."""

import math
from dataclasses import dataclass

import numpy as np

from calsegx.interfaces import InputError


@dataclass(frozen=True)
class OverlapCounts:
    """Voxel counts of a prediction A and a truth B; counts of several images or slices add up."""

    true_positive: int  # |A and B|
    predicted: int  # |A|
    truth: int  # |B|

    def __add__(self, other: "OverlapCounts") -> "OverlapCounts":
        if not isinstance(other, OverlapCounts):
            return NotImplemented
        return OverlapCounts(
            self.true_positive + other.true_positive,
            self.predicted + other.predicted,
            self.truth + other.truth,
        )

    def dice(self, *, both_empty: float = 1.0) -> float:
        """Dice similarity coefficient ``2 |A and B| / (|A| + |B|)``, in [0, 1].

        Exactly one empty mask gives 0.

        Args:
            both_empty: the value where neither mask has a voxel; NaN to leave such cases out of a mean.
        """
        size = self.predicted + self.truth
        return 2 * self.true_positive / size if size else float(both_empty)


def overlap_counts(prediction: np.ndarray, truth: np.ndarray) -> OverlapCounts:
    """Count the voxels of two boolean masks of one shape.

    Raises:
        InputError: for masks that are not boolean or differ in shape.
    """
    check_masks(prediction, truth)
    return OverlapCounts(
        int(np.count_nonzero(prediction & truth)),
        int(np.count_nonzero(prediction)),
        int(np.count_nonzero(truth)),
    )


def dice(prediction: np.ndarray, truth: np.ndarray, *, both_empty: float = 1.0) -> float:
    """Dice similarity coefficient of two boolean masks of one shape; see ``OverlapCounts.dice``.

    Raises:
        InputError: for masks that are not boolean or differ in shape.
    """
    return overlap_counts(prediction, truth).dice(both_empty=both_empty)


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
    if prediction.shape != truth.shape:
        raise InputError(
            f"The prediction mask has shape {prediction.shape} and the truth mask {truth.shape}; "
            "bring both to the same grid."
        )


def check_spacing(spacing_mm: tuple[float, ...], dimensions: int) -> np.ndarray:
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
