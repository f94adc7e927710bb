"""Distances between the surfaces of two masks, in millimetres, with their definition in their name.

The surface of A is A without its erosion by the 6-neighbourhood (4 in 2D); outside the image is background.  Its
elements are voxels, as in MedPy and MONAI; DeepMind's surface-distance measures areas on the grid of voxel
corners and gives other numbers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import spatial

from calsegx.interfaces import UsageError
from calsegx.metrics import overlap
from calsegx.metrics.overlap import Score

METHODS = ("max_directed", "pooled", "directed")
ASSD_METHODS = ("pooled", "mean_directed")
EMPTY = ("diagonal", "inf", "nan")
BOTH_EMPTY = ("agree", "nan")


class SurfaceScores(NamedTuple):
    """Every surface metric of one pair of masks; see ``SurfaceDistances``."""

    hd: Score  # mm
    hd95: Score  # mm
    asd: Score  # mm
    assd: Score  # mm
    nsd: Score  # 0..1


@dataclass(frozen=True, eq=False)
class SurfaceDistances:
    """The distances behind all surface metrics of one pair of masks, computed once.

    ``empty`` of the methods is the value where exactly one mask is empty: ``diagonal`` of the image in mm (no
    distance is larger, so missing a structure costs), ``inf``, or ``nan``.  ``both_empty`` is that of two empty
    masks: ``agree`` (a perfect score) or ``nan``.  Such scores are not ``defined``.  MedPy raises in both cases
    (``nan``, ``nan``); MONAI gives (``inf``, ``nan``), and for HD95 (``nan``, ``nan``).
    """

    to_truth: np.ndarray  # [surface voxels of the prediction] mm to the nearest surface voxel of the truth
    to_prediction: np.ndarray  # [surface voxels of the truth] mm; inf where the other mask is empty
    diagonal_mm: float  # of the image

    def hausdorff(
        self,
        *,
        percentile: float = 100.0,
        method: str = "max_directed",
        empty: str = "diagonal",
        both_empty: str = "agree",
    ) -> Score:
        """Hausdorff distance in mm, or a percentile of it (Huttenlocher et al. 1993).

        With P the percentile (linearly interpolated)::

            max_directed  max(P(to_truth), P(to_prediction)): MONAI, BraTS
            pooled        P(to_truth and to_prediction together): MedPy
            directed      P(to_truth) alone

        At 100 the first two are one number.

        Raises:
            UsageError: for an unknown option or a percentile outside (0, 100].
        """
        overlap.check_option("method", method, METHODS)
        if not 0 < percentile <= 100:
            raise UsageError(f"Percentile {percentile} of a Hausdorff distance must lie above 0 and be at most 100.")
        if absent := self._absent(empty, both_empty):
            return absent
        sets = {
            "max_directed": (self.to_truth, self.to_prediction),
            "pooled": (np.concatenate([self.to_truth, self.to_prediction]),),
            "directed": (self.to_truth,),
        }[method]
        return Score(max(float(np.percentile(distances, percentile)) for distances in sets), True)

    def asd(self, *, empty: str = "diagonal", both_empty: str = "agree") -> Score:
        """Average surface distance in mm, directed: the mean of ``to_truth``, as MedPy and MONAI by default.

        Raises:
            UsageError: for an unknown option.
        """
        return self._absent(empty, both_empty) or Score(float(self.to_truth.mean()), True)

    def assd(self, *, method: str = "pooled", empty: str = "diagonal", both_empty: str = "agree") -> Score:
        """Average symmetric surface distance in mm.

        ``pooled``: the mean over both sets together (MedPy 0.5, MONAI symmetric); ``mean_directed``: the mean of
        the two directed means (older MedPy).

        Raises:
            UsageError: for an unknown option.
        """
        overlap.check_option("method", method, ASSD_METHODS)
        if absent := self._absent(empty, both_empty):
            return absent
        if method == "mean_directed":
            return Score(float(self.to_truth.mean() + self.to_prediction.mean()) / 2, True)
        return Score(float(np.concatenate([self.to_truth, self.to_prediction]).mean()), True)

    def nsd(self, tolerance_mm: float, *, both_empty: str = "agree") -> Score:
        """Normalised surface distance (surface Dice) at a tolerance, 0..1.

        ``(#{to_truth <= t} + #{to_prediction <= t}) / (#to_truth + #to_prediction)``: Nikolov et al. 2018, with
        surface voxels where they have surface areas.  Exactly one empty mask gives 0, and that is defined, as for
        Dice.  Two empty masks: 1 or NaN.

        Raises:
            UsageError: for an unknown option or a tolerance that is not a number of at least 0.
        """
        overlap.check_option("both_empty", both_empty, BOTH_EMPTY)
        if not (math.isfinite(tolerance_mm) and tolerance_mm >= 0):
            raise UsageError(f"tolerance_mm={tolerance_mm} of a surface Dice must be a finite number of at least 0.")
        voxels = len(self.to_truth) + len(self.to_prediction)
        if not voxels:
            return Score(1.0 if both_empty == "agree" else math.nan, False)
        # One voxel away is within one voxel's size: 3 * 0.7 - 2 * 0.7 is a little more than 0.7 in floating point.
        limit = tolerance_mm * (1 + 1e-9)
        near = sum(int(np.count_nonzero(distances <= limit)) for distances in (self.to_truth, self.to_prediction))
        return Score(near / voxels, True)

    def _absent(self, empty: str, both_empty: str) -> Score | None:
        """The policy's score where a mask is empty; None where there are distances."""
        overlap.check_option("empty", empty, EMPTY)
        overlap.check_option("both_empty", both_empty, BOTH_EMPTY)
        surfaces = (len(self.to_truth) > 0) + (len(self.to_prediction) > 0)
        if surfaces == 2:
            return None
        if surfaces == 0:
            return Score(0.0 if both_empty == "agree" else math.nan, False)
        return Score({"diagonal": self.diagonal_mm, "inf": math.inf, "nan": math.nan}[empty], False)


def surface_distances(prediction: np.ndarray, truth: np.ndarray, spacing_mm: Sequence[float]) -> SurfaceDistances:
    """Both sets of directed distances between the surfaces of two masks.

    Args:
        prediction: bool, any number of axes.
        truth: bool, of the same shape.
        spacing_mm: voxel size along each axis; required, because images are anisotropic.

    Raises:
        InputError: for masks that are not boolean or differ in shape, or an unusable spacing.
    """
    overlap.check_masks(prediction, truth)
    spacing = overlap.check_spacing(spacing_mm, prediction.ndim)
    diagonal_mm = float(np.linalg.norm(spacing * prediction.shape))
    crop = overlap.bounding_box(prediction | truth)
    surfaces = [surface(mask[crop]) for mask in (prediction, truth)]
    return SurfaceDistances(
        _directed(surfaces[0], surfaces[1], spacing), _directed(surfaces[1], surfaces[0], spacing), diagonal_mm
    )


def surface_scores(
    prediction: np.ndarray,
    truth: np.ndarray,
    spacing_mm: Sequence[float],
    *,
    tolerance_mm: float,
    hd95_method: str = "max_directed",
    assd_method: str = "pooled",
    empty: str = "diagonal",
    both_empty: str = "agree",
) -> SurfaceScores:
    """HD, HD95, ASD, ASSD and NSD of two masks for the price of one: see ``SurfaceDistances`` for each.

    Raises:
        InputError: for masks that are not boolean or differ in shape, or an unusable spacing.
        UsageError: for an unknown option or tolerance.
    """
    distances = surface_distances(prediction, truth, spacing_mm)
    return SurfaceScores(
        hd=distances.hausdorff(empty=empty, both_empty=both_empty),
        hd95=distances.hausdorff(percentile=95, method=hd95_method, empty=empty, both_empty=both_empty),
        asd=distances.asd(empty=empty, both_empty=both_empty),
        assd=distances.assd(method=assd_method, empty=empty, both_empty=both_empty),
        nsd=distances.nsd(tolerance_mm, both_empty=both_empty),
    )


def hausdorff95(
    prediction: np.ndarray,
    truth: np.ndarray,
    spacing_mm: Sequence[float],
    *,
    method: str = "max_directed",
    empty: str = "diagonal",
    both_empty: str = "agree",
) -> Score:
    """95 % Hausdorff distance in mm of two boolean masks: ``SurfaceDistances.hausdorff`` at percentile 95.

    A stray object can move ``max_directed`` a lot and ``pooled`` hardly: say which one a table shows.

    Raises:
        InputError: for masks that are not boolean or differ in shape, or an unusable spacing.
        UsageError: for an unknown option.
    """
    distances = surface_distances(prediction, truth, spacing_mm)
    return distances.hausdorff(percentile=95, method=method, empty=empty, both_empty=both_empty)


def hausdorff95_name(method: str = "max_directed", empty: str = "diagonal") -> str:
    """The name of the metric for tables, e.g. ``HD95[max_directed,empty=diagonal] (mm)``.

    Raises:
        UsageError: for an unknown ``method`` or ``empty``.
    """
    overlap.check_option("method", method, METHODS)
    overlap.check_option("empty", empty, EMPTY)
    return f"HD95[{method},empty={empty}] (mm)"


def surface(mask: np.ndarray) -> np.ndarray:
    """The voxels of a boolean mask that have a background neighbour along an axis; outside is background."""
    padded = np.pad(mask, 1)
    interior = mask.copy()
    centre = (slice(1, -1),) * mask.ndim
    for axis in range(mask.ndim):
        for neighbour in (slice(0, -2), slice(2, None)):
            interior &= padded[centre[:axis] + (neighbour,) + centre[axis + 1 :]]
    return mask & ~interior


def _directed(here: np.ndarray, there: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Distances in mm from each voxel of one surface to the nearest of the other; inf where that is empty."""
    if not there.any():
        return np.full(np.count_nonzero(here), np.inf)
    # A search tree over surface voxels instead of a distance transform of the image: the same distances, and several
    # times faster for real structures because its cost follows the surface, not the volume.
    tree = spatial.KDTree(np.argwhere(there) * spacing, leafsize=20, balanced_tree=False)
    distances = np.zeros(np.count_nonzero(here))
    apart = ~there[here]
    distances[apart] = tree.query(np.argwhere(here & ~there) * spacing, workers=-1)[0]
    return distances
