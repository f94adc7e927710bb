"""Calibration figures as the original repositories compute them, defects included: to compare with published numbers.

Use ``calibration`` and ``adaptive`` for everything else.  What an option of those reproduces is not here.
"""

import numpy as np
from jaxtyping import Float, Int
from scipy import ndimage

from calsegx.interfaces import Array, InputError
from calsegx.metrics import adaptive, binning


def nixon_tace(probabilities: Array, labels: Array, *, threshold: float = 0.0, ranges: int = 15) -> float:
    """TACE of its authors' code (Nixon et al. 2019), 0..1; NaN without voxels.

    Mean over k of ``sum_r n_r / n |frequency - mean p|`` over the ``n`` scores of class k above the threshold.  Ranges
    weigh by their count and lie between values, so that tied scores stay together; not so in ``adaptive.tace``.

    Args:
        probabilities: [V, K], a softmax.
        labels: [V], integers 0..K-1.
        threshold: scores must be above it; 0 gives the adaptive calibration error.
        ranges: number of ranges.

    Raises:
        InputError: for shapes that do not fit, labels outside the classes, values that are no probabilities.
    """
    found = []
    for scores, hits in adaptive.class_scores(probabilities, labels):
        scores, hits = scores[scores > threshold], hits[scores > threshold]
        starts = np.rint(np.linspace(0, len(scores), ranges, endpoint=False)).astype(int)
        edges = np.sort(scores)[np.minimum(starts, len(scores) - 1)[1:]] if len(scores) else np.zeros(0)
        excess = np.bincount(np.searchsorted(edges, scores, side="right"), hits - scores, minlength=ranges)
        found.append(np.abs(excess).sum() / max(len(scores), 1))
    return float(np.mean(found)) if found else float("nan")


def marginloss_adaptive_ece(probabilities: Array, labels: Array, *, ranges: int = 15) -> float:
    """What MbLS's code calls adaptive ECE, 0..1; NaN without voxels.

    Top label, edges interpolated between the sorted confidences, ranges ``(lo, hi]``: the smallest confidence belongs
    to none, and a constant confidence gives 0 whatever the accuracy.  Arguments and errors as for ``nixon_tace``.
    """
    confidence, correct = adaptive.top_label(probabilities, labels)
    voxels = len(confidence)
    if not voxels:
        return float("nan")
    edges = np.interp(np.linspace(0, voxels, ranges + 1), np.arange(voxels), np.sort(confidence))
    place = np.searchsorted(edges, confidence, side="left")  # 0: the dropped minimum
    return float(np.abs(np.bincount(place, correct - confidence, minlength=ranges + 1)[1:]).sum() / voxels)


def crac_seg_brier(probabilities: Float[Array, "B H W K"], labels: Int[Array, "B H W"]) -> float:
    """``seg_brier_score`` of CRaC's code, 0..2: no Brier score, a perfect prediction does not reach 0.

    Mean over true foreground of ``sum_k (p_k - r_k)^2``, with ``r_k`` the share of class k among the 3 x 3
    neighbours; outside the image counts as background.

    Returns:
        NaN without foreground.

    Raises:
        InputError: for shapes that do not fit, labels outside the classes, values that are no probabilities.
    """
    probabilities, labels = np.asarray(probabilities), np.asarray(labels)
    if probabilities.ndim != 4 or probabilities.shape[:3] != labels.shape:
        raise InputError(
            f"Probabilities {probabilities.shape} and labels {labels.shape} do not fit; expected [B, H, W, K] and "
            "[B, H, W]: pass the slices of a volume as a batch."
        )
    classes = probabilities.shape[-1]
    for _ in binning.chunks(probabilities.reshape(-1, classes), labels.ravel()):
        pass  # checks only
    total = 0.0
    for k in range(classes):
        share = ndimage.uniform_filter((labels == k).astype(np.float64), (0, 3, 3), mode="constant", cval=float(k == 0))
        total += np.square(probabilities[..., k] - share)[labels > 0].sum()
    foreground = np.count_nonzero(labels)
    return float(total / foreground) if foreground else float("nan")
