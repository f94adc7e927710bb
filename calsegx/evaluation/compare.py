"""Paired comparisons of methods, from rows.

The unit is the subject: the values of a subject's cases and of all seeds are averaged first, so that repeated images
and repeated trainings do not pass for independent evidence.  The spread over seeds is reported beside it.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from calsegx.evaluation import evaluate
from calsegx.metrics import ranks, statistics

BETTER, WORSE = "better", "worse"
NO_DIFFERENCE = "no measurable difference"
TOO_FEW = "too few subjects to compare"


SIGNIFICANCE = 0.05  # two-sided Wilcoxon p, not corrected for the number of comparisons


@dataclass(frozen=True)
class Comparison:
    """``method`` minus ``reference`` on one domain, in the metric's own unit."""

    method: str
    reference: str
    domain: str
    metric: str
    region: str
    difference: float  # mean over subjects; NaN without a common subject
    low: float  # 95 % bootstrap interval over subjects
    high: float
    p_value: float  # two-sided Wilcoxon; NaN with fewer than 6 subjects
    subjects: int
    sd_seeds: float | None  # of the difference of the seeds' means; None with fewer than two common seeds
    verdict: str  # BETTER, WORSE, NO_DIFFERENCE or TOO_FEW


Index = Mapping[tuple[str, str, str, str], Sequence[evaluate.Row]]  # by method, domain, metric and region


def index(rows: Iterable[evaluate.Row]) -> Index:
    """The rows that comparisons are made of: class ``all``, with a value."""
    found = defaultdict(list)
    for row in rows:
        if row.class_name == evaluate.ALL and not math.isnan(row.value):
            found[row.method, row.domain, row.metric, row.region].append(row)
    return dict(found)


def compare(rows: Index, method: str, reference: str, domain: str, metric: str, region: str) -> Comparison:
    """Compare two methods on the subjects for which both have a value.

    A difference whose 95 % interval includes 0 is no measurable difference; whether a measurable one is better or
    worse follows from the metric's direction.
    """
    ours, theirs = (rows.get((name, domain, metric, region), ()) for name in (method, reference))
    # A fixed seed: a report of the same rows must say the same.
    result = statistics.paired_difference(*_paired(ours, theirs), np.random.default_rng(0))
    return Comparison(
        *(method, reference, domain, metric, region),
        *(result.mean, result.low, result.high, result.p, result.pairs),
        _sd_of_seeds(_by(ours, "seed"), _by(theirs, "seed")),
        _verdict(result, evaluate.higher_is_better(metric)),
    )


def strongest_baseline(
    rows: Index, candidates: Sequence[str], domain: str, dice: tuple[str, str], ece: tuple[str, str]
) -> str | None:
    """The candidate whose ranks by mean DSC and mean ECE on a domain add up to least; ties go to the larger DSC.

    Args:
        rows: of ``index``.
        candidates: methods; those without a value of both metrics do not take part.
        domain: the source, so that no target decides what its own results are compared with.
        dice: metric and region of the DSC.
        ece: metric and region of the ECE.

    Returns:
        The method; None when no candidate has both.
    """
    means = {
        name: [float(np.mean(list(_by(rows[name, domain, *metric], "subject_id").values()))) for metric in (dice, ece)]
        for name in candidates
        if (name, domain, *dice) in rows and (name, domain, *ece) in rows
    }
    if not means:
        return None
    total = ranks.ranks(np.array(list(means.values())), [True, False]).sum(axis=1)
    return min(zip(means, total, strict=True), key=lambda found: (found[1], -means[found[0]][0]))[0]


def corrected_p_values(
    rows: Index, names: Sequence[str], reference: str, domain: str, metric: str, region: str
) -> dict[str, float]:
    """Two-sided Wilcoxon p of every other method against ``reference``, Holm-corrected over these methods.

    NaN with fewer than 6 common subjects; such a test does not count in the correction.
    """
    others = [name for name in names if name != reference]
    key = (domain, metric, region)
    pairs = [_paired(*(rows.get((n, *key), ()) for n in (name, reference))) for name in others]
    p_values = [statistics.wilcoxon_p(*pair) for pair in pairs]
    return dict(zip(others, statistics.holm(np.array(p_values)), strict=True))


def interval(rows: Index, method: str, domain: str, metric: str, region: str) -> statistics.Interval:
    """The mean over subjects and its 95 % bootstrap interval (subjects are resampled)."""
    values = _by(rows.get((method, domain, metric, region), ()), "subject_id")
    return statistics.bootstrap_interval(np.array(list(values.values())), np.random.default_rng(0))


def _paired(ours: Sequence[evaluate.Row], theirs: Sequence[evaluate.Row]) -> tuple[np.ndarray, np.ndarray]:
    """The values of both by subject, for the subjects that both have."""
    mine, other = _by(ours, "subject_id"), _by(theirs, "subject_id")
    subjects = sorted(mine.keys() & other.keys())
    return np.array([mine[s] for s in subjects]), np.array([other[s] for s in subjects])


def _by(rows: Sequence[evaluate.Row], field: str) -> dict:
    values = defaultdict(list)
    for row in rows:
        values[getattr(row, field)].append(row.value)
    return {key: math.fsum(found) / len(found) for key, found in values.items()}


def _sd_of_seeds(mine: dict[int, float], other: dict[int, float]) -> float | None:
    # A method without training (one seed) is the same reference for every seed of the other.
    constant = next(iter(other.values())) if len(other) == 1 else None
    differences = [
        value - (other[seed] if constant is None else constant)
        for seed, value in mine.items()
        if seed in other or constant is not None
    ]
    return float(np.std(differences, ddof=1)) if len(differences) > 1 else None


def _verdict(result: statistics.PairedDifference, higher: bool) -> str:
    if math.isnan(result.p):  # fewer than 6 subjects: an interval from so few would find differences anywhere
        return TOO_FEW
    # Both must say so: a bootstrap interval from a dozen subjects alone is too easily convinced.
    if result.low <= 0 <= result.high or result.p >= SIGNIFICANCE:
        return NO_DIFFERENCE
    return BETTER if (result.mean > 0) == higher else WORSE
