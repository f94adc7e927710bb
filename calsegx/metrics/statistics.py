"""Means over cases with intervals, paired comparison of two models, and the generalisation gap."""

import math
from typing import NamedTuple

import numpy as np
from scipy import stats

from calsegx.interfaces import InputError, UsageError

RESAMPLES = 2000
# With five pairs the smallest two-sided Wilcoxon p is 0.0625: no outcome could be significant at 0.05.
FEWEST_PAIRS = 6


class Interval(NamedTuple):
    """A mean over cases with its confidence interval."""

    mean: float
    low: float
    high: float
    count: int  # values that entered
    dropped: int  # NaN values that did not


class PairedDifference(NamedTuple):
    """Mean of ``a - b`` over cases, its confidence interval and a test of no difference."""

    mean: float
    low: float
    high: float
    p: float  # two-sided Wilcoxon signed-rank
    pairs: int  # pairs that entered
    dropped: int  # pairs with a NaN, which did not


def bootstrap_interval(values: np.ndarray, rng: np.random.Generator, level: float = 0.95) -> Interval:
    """Mean over cases and its percentile bootstrap interval (Efron 1979; cases are resampled).

    NaN values (undefined cases) are dropped and counted.  No value: all NaN; one value: its interval is NaN.

    Args:
        values: [cases], one value per case (per subject, where a subject has several images: average first).
        rng: source of the resampling.
        level: coverage, in (0, 1).

    Raises:
        UsageError: for a level outside (0, 1).
        InputError: for values that are not one row, or infinite.
    """
    if not 0 < level < 1:
        raise UsageError(f"Confidence level {level} must lie between 0 and 1.")
    values = _row("values", values)
    kept = values[~np.isnan(values)]
    dropped = len(values) - len(kept)
    if len(kept) == 0:
        return Interval(math.nan, math.nan, math.nan, 0, dropped)
    mean = float(kept.mean())
    if len(kept) == 1:
        return Interval(mean, math.nan, math.nan, 1, dropped)
    means = kept[rng.integers(0, len(kept), (RESAMPLES, len(kept)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high), len(kept), dropped)


def paired_difference(a: np.ndarray, b: np.ndarray, rng: np.random.Generator, level: float = 0.95) -> PairedDifference:
    """Mean of ``a - b`` over the same cases, its bootstrap interval, and the two-sided Wilcoxon p.

    Pairs with a NaN are dropped and counted.  p is NaN with fewer than 6 pairs and 1.0 where all differences
    are zero; zero differences are left out of the signed ranks (Wilcoxon 1945).

    Args:
        a: [cases], the metric of one model per case.
        b: [cases], of the other model, the same cases in the same order.
        rng: source of the resampling.
        level: coverage of the interval, in (0, 1).

    Raises:
        UsageError: for a level outside (0, 1).
        InputError: for rows of different length, or infinite values.
    """
    a, b = _row("a", a), _row("b", b)
    if a.shape != b.shape:
        raise InputError(f"Paired comparison of {len(a)} with {len(b)} cases; pass the same cases in the same order.")
    difference = a - b
    interval = bootstrap_interval(difference, rng, level)
    kept = difference[~np.isnan(difference)]
    if len(kept) < FEWEST_PAIRS:
        p = math.nan
    elif not kept.any():
        p = 1.0
    else:
        # Without zeros here, as versions of scipy differ in when zeros switch off the exact distribution.
        p = float(stats.wilcoxon(kept[kept != 0]).pvalue)
    return PairedDifference(interval.mean, interval.low, interval.high, p, interval.count, interval.dropped)


def generalisation_gap(source: float, target: float, higher_is_better: bool) -> float:
    """How much a metric gets worse from the source domain to a target domain; positive is degradation.

    ``source - target`` for a metric like Dice, ``target - source`` for one like ECE or HD95, in its unit.
    """
    return source - target if higher_is_better else target - source


def _row(name: str, values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 1:
        raise InputError(f"{name} has shape {values.shape}, expected one row; pass one value per case.")
    if np.isinf(values).any():
        raise InputError(f"{name} holds infinite values, expected numbers or NaN; pass undefined cases as NaN.")
    return values
