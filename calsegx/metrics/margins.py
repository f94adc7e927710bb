"""How far the true class's logit lies above or below its strongest rival: histograms that add up.

The margin of a voxel with logits z and label y is ``z_y - max over j != y of z_j``, in nats (differences of logits are
log-odds).  It is positive where the arg max is right; its size is then the distance from the winner to the runner-up,
and where it is negative, the distance ``max_j z_j - z_y`` that MbLS (Liu et al. 2022; Murugesan et al. 2023) penalises
beyond its margin m.  Of one logit z of a binary problem (background 0) it is z on foreground and -z on background.
From float32 probabilities it could not be had: they saturate at 17 nats.
"""

import numpy as np
from jaxtyping import Float, Int

from calsegx.interfaces import InputError

LIMIT = 30.0  # nats; margins beyond are counted in the end bins
WIDTH = 0.5  # nats, of a bin
BINS = round(2 * LIMIT / WIDTH)
EDGES = np.linspace(-LIMIT, LIMIT, BINS + 1)  # of half-open bins [lo, hi), so that 0 begins one
KINDS = ("background", "foreground")  # rows of a histogram: of the true label


def true_class_margins(
    logits: Float[np.ndarray, "*spatial L"], labels: Int[np.ndarray, "*spatial"]
) -> Float[np.ndarray, "*spatial"]:
    """The margin of every voxel, float32.

    Args:
        logits: L = 1: the foreground's against a background of 0; L >= 2: of background and the classes.
        labels: 0 (background) to max(1, L - 1).

    Raises:
        InputError: for shapes that do not fit, labels outside the classes, logits that are not finite.
    """
    logits, labels = np.asarray(logits, dtype=np.float32), np.asarray(labels)
    if logits.shape[:-1] != labels.shape or not logits.shape[-1]:
        raise InputError(f"Logits {logits.shape} and labels {labels.shape} do not fit; expected [..., L] and [...].")
    most = max(1, logits.shape[-1] - 1)
    if labels.size and not 0 <= labels.min() <= labels.max() <= most:
        raise InputError(f"Labels span {labels.min()}..{labels.max()}, expected 0..{most} for these logits.")
    if not np.isfinite(logits).all():
        raise InputError("Logits hold NaN or infinity, expected finite numbers; check the model's predictions.")
    if logits.shape[-1] == 1:
        return np.where(labels > 0, logits[..., 0], -logits[..., 0])
    index = labels[..., None].astype(np.intp)
    own = np.take_along_axis(logits, index, axis=-1)[..., 0]
    rivals = logits.copy()
    np.put_along_axis(rivals, index, -np.inf, axis=-1)
    return own - rivals.max(axis=-1)


def histogram(
    logits: Float[np.ndarray, "*spatial L"], labels: Int[np.ndarray, "*spatial"]
) -> Int[np.ndarray, "2 BINS"]:
    """Voxels per bin of ``EDGES``, a row for each of ``KINDS``; those of disjoint voxels add up exactly.

    Arguments and errors are those of ``true_class_margins``.
    """
    # Not (margin + LIMIT) / WIDTH: float32 rounds a margin just below 0 plus LIMIT to LIMIT, where it counts as right.
    bins = np.floor(true_class_margins(logits, labels) / WIDTH) + BINS // 2
    place = bins.clip(0, BINS - 1).astype(np.intp)
    place += BINS * (np.asarray(labels) > 0)
    return np.bincount(place.ravel(), minlength=2 * BINS).reshape(2, BINS)


def wrong(counts: Int[np.ndarray, "2 BINS"]) -> Float[np.ndarray, " 2"]:
    """The share of each kind's voxels with a negative margin, 0..1: misclassified ones; NaN without voxels."""
    total = counts.sum(axis=-1)
    return counts[:, : BINS // 2].sum(axis=-1) / np.where(total > 0, total, np.nan)
