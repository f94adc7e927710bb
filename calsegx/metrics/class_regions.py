"""Structures made of several classes that may overlap, such as the regions of BraTS.

Which id is the enhancing tumour changed between the BraTS challenges; scoring labels of one convention with the
regions of the other drops it silently, so the convention is always named.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from calsegx.interfaces import InputError, UsageError
from calsegx.metrics import overlap

# Ids of the files: 1 necrotic core (until 2021 with the non-enhancing tumour), 2 oedema, then the enhancing tumour.
BRATS: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "1,2,4": {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)},  # BraTS 2018-2021
    "1,2,3": {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)},  # BraTS 2023 and later
}


def region_masks(labels: np.ndarray, regions: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """The boolean mask of each region: the voxels whose label is one of its ids.

    Args:
        labels: integers, any shape; ids of no region belong to none of the masks.
        regions: name -> label ids, e.g. ``{"WT": (1, 2, 3), "ET": (3,)}``; regions may overlap.

    Returns:
        Name -> bool, of the shape of ``labels``.

    Raises:
        InputError: for labels that are not integers.
        UsageError: for no region, or a region without ids or with an id that is no integer of at least 0.
    """
    overlap.check_labels("label map", labels)
    _check_regions(regions)
    return {name: np.isin(labels, list(ids)) for name, ids in regions.items()}


def region_counts(matrix: np.ndarray, regions: Mapping[str, Sequence[int]]) -> dict[str, overlap.OverlapCounts]:
    """The overlap counts of each region, from one confusion matrix of the classes.

    Args:
        matrix: [K, K] of ``overlap.confusion``, which streams over volumes.
        regions: name -> label ids below K, as in ``region_masks``.

    Raises:
        InputError: for an id that the matrix does not have.
        UsageError: for regions that are not usable.
    """
    _check_regions(regions)
    return {name: overlap.counts_of(matrix, ids) for name, ids in regions.items()}


def brats_regions(labels: np.ndarray, convention: str) -> dict[str, np.ndarray]:
    """Whole tumour (WT), tumour core (TC) and enhancing tumour (ET) as boolean masks.

    Args:
        labels: integers, any shape, with the ids of the files.
        convention: ``1,2,4`` (BraTS 2018-2021) or ``1,2,3`` (2023 and later): ids of core, oedema and enhancing
            tumour.

    Raises:
        UsageError: for an unknown convention.
        InputError: for labels that are not integers, or an id outside the convention.
    """
    overlap.check_option("convention", convention, tuple(BRATS))
    overlap.check_labels("label map", labels)
    regions = BRATS[convention]
    unknown = [int(i) for i in np.unique(labels) if i not in (0, *regions["WT"])]
    if unknown:
        raise InputError(
            f"The label map holds the ids {unknown[:5]}, expected 0 and {convention}; choose the other convention "
            f"({' or '.join(BRATS)}) or pass your own regions to region_masks."
        )
    return region_masks(labels, regions)


def _check_regions(regions: Mapping[str, Sequence[int]]) -> None:
    if not regions:
        raise UsageError("There are no regions; pass for example {'WT': (1, 2, 3)}.")
    for name, ids in regions.items():
        if not len(ids) or not all(isinstance(i, int | np.integer) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise UsageError(f"The region {name!r} has the ids {ids!r}, expected label ids of at least 0.")
