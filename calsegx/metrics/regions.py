"""The voxels on which calibration is measured, by name.

Over ``all`` voxels easy background hides every fault; so a table shows a region around the structure beside
it. That region must not select on the label: keeping voxels because they turned out to be foreground makes a
perfectly calibrated model look wrong.  ``p>0.01`` selects on the prediction alone: a calibrated model keeps
its zero error.
"""

import difflib
import re

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage

from calsegx.interfaces import InputError, UsageError
from calsegx.metrics import overlap

DILATION_MM = 10.0
FAR_MM = 1e6  # between slices: out of reach of the dilation
REGIONS = ("all", "p>0.01", "dilated")  # what reports offer; the others have to be asked for
_DESCRIPTIONS = {
    "all": "all voxels",
    "pred_fg": "voxels predicted as foreground",
    "dilated": f"voxels within {DILATION_MM:g} mm of true foreground in the same slice",
    "union": "true or predicted foreground (selected by the label as well)",
    "gt_fg": "true foreground only (selected by the label: misleading, for parity with papers)",
}
_LABEL_INDEPENDENT = ("all", "pred_fg")  # and every p>T
_THRESHOLD = re.compile(r"p>(0|0?\.\d+|\d+(?:\.\d+)?e-\d+)")


def region(
    name: str,
    probabilities_foreground: Float[np.ndarray, "*spatial"],
    truth_foreground: Bool[np.ndarray, "*spatial"],
    spacing_mm: tuple[float, ...],
    prediction_foreground: Bool[np.ndarray, "*spatial"] | None = None,
) -> Bool[np.ndarray, "*spatial"]:
    """The mask of a region.

    The regions::

        all      every voxel
        p>T      foreground probability above T, 0 <= T < 1 (e.g. p>0.01): independent of the label
        pred_fg  predicted foreground: independent of the label, but blind to what was missed
        dilated  within 10 mm (Euclidean) of true foreground in the same slice; empty where there is none.  The same
                 voxels for every model, but chosen by labels: compare models on it, do not read its ECE alone
        union    true or predicted foreground: chosen by labels as well, so a calibrated model does not reach 0
        gt_fg    true foreground alone, as the papers of MbLS, NACL and CRaC report it.  Misleading: it selects by
                 outcome, so a perfectly calibrated model scores badly, an over-confident one can score better, and
                 false positives never count

    Args:
        name: one of the above.
        probabilities_foreground: [D, H, W], 1 minus the background probability; at most 1.
        truth_foreground: [D, H, W].
        spacing_mm: voxel size along each axis.
        prediction_foreground: [D, H, W], where the predicted label is foreground; ``pred_fg`` and ``union`` need it,
            because with several classes it does not follow from the foreground probability.

    Returns:
        [D, H, W] bool, a new array.

    Raises:
        UsageError: for an unknown name, or a region that needs the prediction without it.
        InputError: for arrays that do not fit or an unusable spacing.
    """
    threshold = _threshold(name)
    _check_arrays(probabilities_foreground, truth_foreground)
    spacing = overlap.check_spacing(spacing_mm, truth_foreground.ndim)
    if threshold is not None:
        return probabilities_foreground > threshold
    if name == "all":
        return np.ones_like(truth_foreground)
    if name == "gt_fg":
        return truth_foreground.copy()
    if name == "dilated":
        return _dilate(truth_foreground, spacing)
    if prediction_foreground is None:
        raise UsageError(f"Region {name!r} needs prediction_foreground; pass the predicted labels > 0.")
    overlap.check_masks(prediction_foreground, truth_foreground)
    return prediction_foreground.copy() if name == "pred_fg" else prediction_foreground | truth_foreground


def label_independent(name: str) -> bool:
    """Whether a region is chosen without looking at labels, so that a calibrated model has zero error on it.

    True for ``all``, ``pred_fg`` and ``p>T``; False for ``gt_fg``, ``union`` and ``dilated``.

    Raises:
        UsageError: for an unknown name.
    """
    return _threshold(name) is not None or name in _LABEL_INDEPENDENT


def describe(name: str) -> str:
    """What a region is, for a table heading.

    Raises:
        UsageError: for an unknown name.
    """
    threshold = _threshold(name)
    if threshold is not None:
        return f"voxels with foreground probability above {threshold:g}"
    return _DESCRIPTIONS[name]


def _threshold(name: str) -> float | None:
    """T of a region ``p>T``; None for the other known names."""
    if name in _DESCRIPTIONS:
        return None
    match = _THRESHOLD.fullmatch(name)
    if match is None:
        near = difflib.get_close_matches(name, (*_DESCRIPTIONS, "p>0.01"), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UsageError(
            f"There is no region named {name!r}; known: all, p>T with 0 <= T < 1 (e.g. p>0.01), "
            f"pred_fg, dilated, union, gt_fg.{hint}"
        )
    return float(match[1])


def _dilate(mask: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    # Within each slice (the last two axes): a ball would reach into slices that are background by protocol, where every
    # method is right, and dilute the region the more, the shorter the lesion and the thicker the slices.
    if mask.ndim > 2:
        spacing = np.concatenate([np.full(mask.ndim - 2, FAR_MM), spacing[-2:]])
    dilated = np.zeros_like(mask)
    bounds = ndimage.find_objects(mask.astype(np.uint8))
    if not bounds:
        return dilated
    # The distance transform only where it can be within reach of the mask.
    margin = np.ceil(DILATION_MM / spacing).astype(int)
    crop = tuple(slice(max(s.start - m, 0), s.stop + m) for s, m in zip(bounds[0], margin, strict=True))
    dilated[crop] = ndimage.distance_transform_edt(~mask[crop], sampling=spacing) <= DILATION_MM
    return dilated


def _check_arrays(probabilities: np.ndarray, truth: np.ndarray) -> None:
    if not isinstance(truth, np.ndarray) or truth.dtype != np.bool_:
        kind = getattr(truth, "dtype", type(truth).__name__)
        raise InputError(f"truth_foreground is {kind}, expected a boolean array; pass labels > 0.")
    if np.shape(probabilities) != truth.shape:
        raise InputError(
            f"probabilities_foreground has shape {np.shape(probabilities)} and truth_foreground "
            f"{truth.shape}; bring both to the same grid."
        )
    if np.isnan(probabilities).any():  # a comparison would drop these voxels unseen
        raise InputError("probabilities_foreground holds NaN, expected numbers in 0..1; check the prediction.")
