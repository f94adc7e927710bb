"""Means over cases with intervals, paired tests of two models, Holm, correlation, and the generalisation gap.

NaN is an undefined case everywhere: dropped together with its partners and counted.  Ranks: see ``ranks``.
"""

import functools
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


class PairedTest(NamedTuple):
    """A two-sided test of no difference between pairs."""

    statistic: float
    p: float
    pairs: int  # pairs that entered
    dropped: int  # pairs with a NaN, which did not


class Correlation(NamedTuple):
    """Pearson's r between two rows, the p of r = 0 and the least-squares line ``y = slope x + intercept``."""

    r: float
    p: float
    slope: float
    intercept: float
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
    check_level(level)
    values = _row("values", values)
    kept = values[~np.isnan(values)]
    dropped = len(values) - len(kept)
    if len(kept) == 0:
        return Interval(math.nan, math.nan, math.nan, 0, dropped)
    mean = float(kept.mean())
    if len(kept) == 1:
        return Interval(mean, math.nan, math.nan, 1, dropped)
    means = kept[rng.integers(0, len(kept), (RESAMPLES, len(kept)))].mean(axis=1)
    return Interval(mean, *_percentiles(means, level), len(kept), dropped)


def bootstrap_interval_over_seeds(values: np.ndarray, rng: np.random.Generator, level: float = 0.95) -> Interval:
    """Mean over seeds x cases and its percentile bootstrap interval, of seeds and cases resampled together.

    Every seed was trained once and every model saw every case, so the two are crossed, not nested.  Each resample
    draws S of the S seeds and, independently, C of the C cases, with replacement, and averages the values at all
    their crossings (McCullagh 2000, Bernoulli 6(2); Owen 2007, "The pigeonhole bootstrap", AOAS 1(2)).  The interval
    thus speaks of another training on other cases; ``bootstrap_interval`` of the mean over seeds speaks of these
    seeds alone.  For two models pass the differences of the same seeds and cases.

    The resampled variance is too small by (S - 1) / S in the seeds' share and, as Owen shows, too large in the
    share of what neither seed nor case explains.  With 3 seeds the former matters: report the spread beside it.

    A case with a NaN in any seed is dropped in all seeds and counted, so that all seeds average the same cases.  No
    case: all NaN; one case or one seed: the interval is NaN.

    Args:
        values: [seeds, cases], one value per seed and case (per subject: average a subject's images first).
        rng: source of the resampling.
        level: coverage, in (0, 1).

    Returns:
        The interval; ``count`` and ``dropped`` are cases.

    Raises:
        UsageError: for a level outside (0, 1).
        InputError: for values that are not [seeds, cases], or infinite.
    """
    check_level(level)
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or values.shape[0] == 0:
        raise InputError(f"values has shape {values.shape}, expected [seeds, cases]; stack one row per seed.")
    _check_finite("values", values)
    kept = values[:, ~np.isnan(values).any(axis=0)]
    seeds, cases = kept.shape
    dropped = values.shape[1] - cases
    if cases == 0:
        return Interval(math.nan, math.nan, math.nan, 0, dropped)
    mean = float(kept.mean())
    if seeds == 1 or cases == 1:
        return Interval(mean, math.nan, math.nan, cases, dropped)
    # How often each seed and each case is drawn, instead of the draws themselves.
    seed_weights, case_weights = (rng.multinomial(n, np.full(n, 1 / n), RESAMPLES) / n for n in (seeds, cases))
    means = ((seed_weights @ kept) * case_weights).sum(axis=1)
    return Interval(mean, *_percentiles(means, level), cases, dropped)


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
    a, b, dropped = _pairs(a, b)
    interval = bootstrap_interval(a - b, rng, level)
    return PairedDifference(interval.mean, interval.low, interval.high, wilcoxon_p(a, b), interval.count, dropped)


def wilcoxon_p(a: np.ndarray, b: np.ndarray) -> float:
    """The two-sided p of ``paired_difference`` alone, with its rules for few pairs, zeros and NaN.

    Args:
        a: [cases], the metric of one model per case.
        b: [cases], of the other model, the same cases in the same order.

    Raises:
        InputError: for rows of different length, or infinite values.
    """
    a, b, _ = _pairs(a, b)
    difference = a - b
    if len(difference) < FEWEST_PAIRS:
        return math.nan
    # Without zeros here, as versions of scipy differ in when zeros switch off the exact distribution.
    return _wilcoxon_p(tuple(difference[difference != 0].tolist())) if difference.any() else 1.0


@functools.lru_cache(maxsize=8192)
def _wilcoxon_p(differences: tuple[float, ...]) -> float:
    # Up to half a second where differences are tied, and a report asks for the same ones again and again.
    return float(stats.wilcoxon(np.array(differences)).pvalue)


def paired_t_test(a: np.ndarray, b: np.ndarray) -> PairedTest:
    """Paired t-test (Student 1908): ``t = mean(d) / (sd(d) / sqrt(n))``, ``d = a - b``; two-sided p, n - 1 df.

    It assumes normal differences; for Dice and distances, which are skewed, ``paired_difference`` has Wilcoxon's p.
    Pairs with a NaN are dropped and counted.  Fewer than two pairs, or differences that are all the same, give NaN;
    differences that are all zero t = 0 and p = 1.

    Args:
        a: [cases], the metric of one model per case.
        b: [cases], of the other model, the same cases in the same order.

    Raises:
        InputError: for rows of different length, or infinite values.
    """
    a, b, dropped = _pairs(a, b)
    difference = a - b
    if len(difference) >= 2 and not difference.any():
        return PairedTest(0.0, 1.0, len(difference), dropped)
    if _is_constant(difference):
        return PairedTest(math.nan, math.nan, len(difference), dropped)
    result = stats.ttest_rel(a, b)
    return PairedTest(float(result.statistic), float(result.pvalue), len(difference), dropped)


def holm(p_values: np.ndarray) -> np.ndarray:
    """Holm's step-down adjusted p-values (Holm 1979), which control the family-wise error under any dependence.

    With ``p_(1) <= ... <= p_(m)``: ``adjusted_(i) = min(1, max_{j <= i} (m - j + 1) p_(j))``; compare them with the
    level.  NaN (a test that could not be made) stays NaN and does not count in m.

    Args:
        p_values: [tests], all p-values of one family: every comparison that a table makes.

    Returns:
        [tests], in the given order, 0..1.

    Raises:
        InputError: for values that are not one row of 0..1 or NaN.
    """
    p_values = _row("p_values", p_values)
    tested = np.flatnonzero(~np.isnan(p_values))
    if ((p_values[tested] < 0) | (p_values[tested] > 1)).any():
        raise InputError(f"p_values span {np.nanmin(p_values)}..{np.nanmax(p_values)}, expected 0..1; pass raw p.")
    order = tested[np.argsort(p_values[tested])]
    adjusted = np.full_like(p_values, np.nan)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(np.arange(len(order), 0, -1) * p_values[order]))
    return adjusted


def pearson(x: np.ndarray, y: np.ndarray, *, probit: bool = False) -> Correlation:
    """Pearson's correlation over models or cases, its two-sided p, and the least-squares line of y over x.

    With ``probit`` both rows go through the inverse normal distribution function first: accuracies on and off the
    training domain lie on a line on that scale (Miller et al. 2021, "Accuracy on the line").

    Pairs with a NaN are dropped and counted.  Fewer than three pairs (r of two is always 1 or -1), or a row whose
    values are all the same, give NaN.

    Args:
        x: [n].
        y: [n], of the same models or cases in the same order.
        probit: transform both; the values must then lie strictly between 0 and 1.

    Raises:
        InputError: for rows of different length, infinite values, or with ``probit`` values outside (0, 1).
    """
    x, y, dropped = _pairs(x, y)
    if probit:
        for name, values in (("x", x), ("y", y)):
            if ((values <= 0) | (values >= 1)).any():
                raise InputError(
                    f"{name} spans {values.min()}..{values.max()}, but the probit needs values strictly between 0 and "
                    "1; leave such pairs out (NaN) or clip them."
                )
        x, y = stats.norm.ppf(x), stats.norm.ppf(y)
    if len(x) < 3 or _is_constant(x) or _is_constant(y):
        return Correlation(math.nan, math.nan, math.nan, math.nan, len(x), dropped)
    line = stats.linregress(x, y)
    r, p, slope, intercept = (float(value) for value in (line.rvalue, line.pvalue, line.slope, line.intercept))
    return Correlation(r, p, slope, intercept, len(x), dropped)


def generalisation_gap(source: float, target: float, higher_is_better: bool) -> float:
    """How much a metric gets worse from the source domain to a target domain; positive is degradation.

    ``source - target`` for a metric like Dice, ``target - source`` for one like ECE or HD95, in its unit.
    """
    return source - target if higher_is_better else target - source


def check_level(level: float) -> None:
    """Refuse a confidence level outside (0, 1).

    Raises:
        UsageError: naming it.
    """
    if not 0 < level < 1:
        raise UsageError(f"Confidence level {level} must lie between 0 and 1.")


def _percentiles(means: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _is_constant(values: np.ndarray) -> bool:
    # Up to rounding: 0.4 - 0.3 and 0.3 - 0.2 are the same difference.
    return len(values) < 2 or bool(np.ptp(values) <= 1e-12 * np.abs(values).max())


def _pairs(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Both rows without the pairs that hold a NaN, and the number of those."""
    a, b = _row("a", a), _row("b", b)
    if a.shape != b.shape:
        raise InputError(f"Paired comparison of {len(a)} with {len(b)} cases; pass the same cases in the same order.")
    kept = ~(np.isnan(a) | np.isnan(b))
    return a[kept], b[kept], int((~kept).sum())


def _row(name: str, values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 1:
        raise InputError(f"{name} has shape {values.shape}, expected one row; pass one value per case.")
    _check_finite(name, values)
    return values


def _check_finite(name: str, values: np.ndarray) -> None:
    if np.isinf(values).any():
        raise InputError(f"{name} holds infinite values, expected numbers or NaN; pass undefined cases as NaN.")
