"""The cases most in need of review: those of which a method is least sure, as far as it knows itself."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from calsegx.metrics import statistics

SCORE = "mean probability of the top label over the voxels with a foreground probability above 0.01; no truth is used"
MOST = 10  # cases that a report lists


@dataclass(frozen=True)
class Review:
    """How sure a method is of a case, and how good it is there."""

    case_id: str
    domain: str
    confidence: float  # ``mean_confidence``; NaN where nothing was predicted
    dsc: float  # 0 to 1, or NaN


def mean_confidence(probabilities: np.ndarray) -> float:
    """Mean probability of the top label where the foreground's exceeds 0.01; NaN where it does so nowhere.

    Args:
        probabilities: ``[D, H, W, K]`` of the foreground classes.

    Returns:
        Between 1 / (K + 1) and 1.  No truth is used.  Not ``uncertainty.scores.uncertain_area``: that one does not
        change when all voxels become less certain alike.
    """
    total = np.minimum(probabilities.sum(axis=-1), 1)
    inside = total > 0.01
    top = np.maximum(probabilities[inside].max(axis=-1, initial=0), 1 - total[inside])
    return float(top.mean(dtype=np.float64)) if inside.any() else math.nan


def ranked(found: Iterable[Review]) -> list[Review]:
    """The least confident first; before them the cases where nothing was predicted."""
    return sorted(found, key=lambda r: (-1 if math.isnan(r.confidence) else r.confidence, r.case_id))


def agreement(found: Sequence[Review]) -> statistics.Correlation:
    """Pearson's correlation of confidence and DSC over the cases with both: whether the list is worth following."""
    return statistics.pearson(np.array([r.confidence for r in found]), np.array([r.dsc for r in found]))
