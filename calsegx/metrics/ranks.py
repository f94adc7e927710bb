"""Ranks of methods over metrics, cases and data sets: Friedman, Nemenyi, sum-rank and mean-case-rank.

Rank 1 is the best.  Ties are exact equality, and the rule for them is an argument, because published tables differ
in it: ``average`` (1, 2.5, 2.5, 4: what Friedman's test assumes), ``min`` (1, 2, 2, 4: competition ranks) or
``dense`` (1, 2, 2, 3).  A column with an undefined value (NaN) of any method is left out for all methods and counted:
that is lenient to the method that failed, so give failures a value (``surface``: ``empty="diagonal"``) before ranking.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from calsegx.interfaces import InputError, UsageError
from calsegx.metrics import statistics

TIES = ("average", "min", "dense")
Directions = bool | Sequence[bool] | np.ndarray  # is more better: of all columns, or of each


class Ranking(NamedTuple):
    """Methods ranked over columns."""

    value: np.ndarray  # [methods], mean (or sum) of the ranks; smaller is better
    final: np.ndarray  # [methods], competition ("min") rank of ``value``: the "final rank" of the tables
    columns: int  # columns that entered
    dropped: int  # columns with a NaN, which did not


class Friedman(NamedTuple):
    """Friedman's test that all methods are alike."""

    statistic: float  # chi squared, corrected for ties, methods - 1 degrees of freedom
    p: float
    columns: int  # columns that entered
    dropped: int  # columns with a NaN, which did not


def ranks(scores: np.ndarray, higher_is_better: Directions, *, ties: str = "average") -> np.ndarray:
    """Rank the methods within each column.

    Args:
        scores: [methods, columns]; infinite values are the best or the worst.
        higher_is_better: of all columns, or [columns].
        ties: ``average``, ``min`` or ``dense``.

    Returns:
        [methods, columns], 1 is the best; a column with a NaN is all NaN.

    Raises:
        UsageError: for unknown ``ties``.
        InputError: for scores that are not [methods, columns] or directions that do not fit.
    """
    if ties not in TIES:
        raise UsageError(f"Rank option ties={ties!r} is not one of {', '.join(TIES)}.")
    scores, higher = _table(scores, higher_is_better)
    return stats.rankdata(np.where(higher, -scores, scores), method=ties, axis=0, nan_policy="propagate")


def mean_rank(scores: np.ndarray, higher_is_better: Directions, *, ties: str = "average") -> Ranking:
    """Mean over columns of the rank within each column: the "Friedman rank" of result tables.

    Args:
        scores: [methods, columns], a column per data set and metric, or per case.
        higher_is_better: of all columns, or [columns].
        ties: ``average`` or, as printed in Table 1 of the CRaC paper (which does not say so), ``min``; ``dense``.

    Returns:
        The mean ranks, 1..methods; NaN without a column.

    Raises:
        UsageError: for unknown ``ties``.
        InputError: for scores that are not [methods, columns] or directions that do not fit.
    """
    ranked = ranks(scores, higher_is_better, ties=ties)
    kept = _complete(ranked)
    value = kept.mean(axis=1) if kept.shape[1] else np.full(len(kept), np.nan)
    return _ranking(value, kept.shape[1], ranked.shape[1] - kept.shape[1])


def mean_case_rank(scores: np.ndarray, higher_is_better: Directions, *, ties: str = "average") -> Ranking:
    """Rank within each case and metric, then average over cases and metrics (ISLES: Maier et al. 2017).

    Sensitive to which method wins often, not by how much; ``sum_rank`` is the opposite.

    Args:
        scores: [methods, cases, metrics].
        higher_is_better: of all metrics, or [metrics].
        ties: ``average``, ``min`` or ``dense``.

    Returns:
        The mean ranks, 1..methods; ``columns`` and ``dropped`` count pairs of case and metric.

    Raises:
        UsageError: for unknown ``ties``.
        InputError: for scores that are not [methods, cases, metrics] or directions that do not fit.
    """
    scores, higher = _cube(scores, higher_is_better)
    return mean_rank(scores.reshape(len(scores), -1), np.tile(higher, scores.shape[1]), ties=ties)


def sum_rank(scores: np.ndarray, higher_is_better: Directions, *, ties: str = "average") -> Ranking:
    """Rank on the mean over cases of each metric, then add the ranks (MRBrainS: Mendrik et al. 2015).

    Within a metric, cases with a NaN of any method are left out for all methods, so that all means are over the same
    cases.  For several data sets call it for each and add up the values.

    Args:
        scores: [methods, cases, metrics].
        higher_is_better: of all metrics, or [metrics].
        ties: ``average``, ``min`` or ``dense``.

    Returns:
        The sums of ranks, metrics..methods*metrics, NaN where a metric has no case left; ``columns``
        and ``dropped`` count pairs of case and metric.

    Raises:
        UsageError: for unknown ``ties``.
        InputError: for scores that are not [methods, cases, metrics] or hold infinities, or directions that do not fit.
    """
    scores, higher = _cube(scores, higher_is_better)
    if np.isinf(scores).any():
        raise InputError("scores holds infinite values, which have no mean; give failures a finite value or NaN.")
    kept = [_complete(scores[:, :, metric]) for metric in range(scores.shape[2])]
    means = np.stack([k.mean(axis=1) if k.shape[1] else np.full(len(k), np.nan) for k in kept], axis=1)
    columns = sum(k.shape[1] for k in kept)
    value = ranks(means, higher, ties=ties).sum(axis=1)
    return _ranking(value, columns, scores.shape[1] * scores.shape[2] - columns)


def friedman(scores: np.ndarray, higher_is_better: Directions) -> Friedman:
    """Friedman's test (1937) that the methods are alike, against that some tend to rank better.

    ``12 N / (k (k+1)) * (sum_j R_j^2 - k (k+1)^2 / 4)`` with the mean ranks R of k methods in N columns (Demsar 2006,
    section 3.2.2), divided by the correction for ties; average ranks for ties, always.  p is the chi-squared
    approximation, good for N > 10 and k > 5.  Columns must be independent (cases or data sets): metrics of one case
    are not.  Columns that are all tied say nothing; if all are, the statistic is 0 and p is 1.

    Args:
        scores: [methods, columns], at least 3 methods.
        higher_is_better: of all columns, or [columns].

    Returns:
        The test; NaN with fewer than 2 columns.

    Raises:
        InputError: for fewer than 3 methods, scores that are not [methods, columns] or directions that do not fit.
    """
    ranked = ranks(scores, higher_is_better)
    if len(ranked) < 3:
        raise InputError(f"Friedman's test of {len(ranked)} methods needs 3 or more; compare two with a paired test.")
    kept = _complete(ranked)
    columns = kept.shape[1]
    dropped = ranked.shape[1] - columns
    if columns < 2:
        return Friedman(math.nan, math.nan, columns, dropped)
    if not np.ptp(kept, axis=0).any():
        return Friedman(0.0, 1.0, columns, dropped)
    result = stats.friedmanchisquare(*kept)
    return Friedman(float(result.statistic), float(result.pvalue), columns, dropped)


def nemenyi(scores: np.ndarray, higher_is_better: Directions) -> np.ndarray:
    """P-values of all pairs of methods after Friedman's test (Nemenyi 1963; Demsar 2006, section 3.2.2).

    ``p_ij = P(Q > |R_i - R_j| / sqrt(k (k+1) / (12 N)))`` with the mean average-tie ranks R and the studentised range Q
    of k means with infinite degrees of freedom.  Corrects for all k (k-1) / 2 comparisons already; no Holm on top.

    Args:
        scores: [methods, columns].
        higher_is_better: of all columns, or [columns].

    Returns:
        [methods, methods], symmetric, 1 on the diagonal; all NaN without a complete column.

    Raises:
        InputError: for fewer than 2 methods, scores that are not [methods, columns] or directions that do not fit.
    """
    ranking = mean_rank(scores, higher_is_better)
    methods = _at_least_two(len(ranking.value))
    if ranking.columns == 0:
        return np.full((methods, methods), np.nan)
    difference = np.abs(ranking.value[:, None] - ranking.value)
    quotient = difference / math.sqrt(methods * (methods + 1) / (12 * ranking.columns))
    # The integral that scipy takes rounds to slightly below 1 at a quotient of 0.
    p = np.minimum(1, stats.studentized_range.sf(quotient, methods, np.inf))
    np.fill_diagonal(p, 1)
    return p


def critical_difference(methods: int, columns: int, level: float = 0.95) -> float:
    """Nemenyi's critical difference: mean ranks that differ by more are significantly different.

    ``q sqrt(k (k+1) / (6 N))``, q the ``level`` quantile of the studentised range divided by sqrt(2) (Demsar 2006,
    section 3.2.2 and Table 5a): 2.343 sqrt(...) for two-sided 0.05 and three methods.

    Args:
        methods: k, at least 2.
        columns: N, independent cases or data sets that were ranked.
        level: 1 - significance, in (0, 1).

    Raises:
        UsageError: for a level outside (0, 1).
        InputError: for fewer than 2 methods or no column.
    """
    statistics.check_level(level)
    if columns < 1:
        raise InputError(f"A critical difference over {columns} columns does not exist; rank at least one.")
    quantile = float(stats.studentized_range.ppf(level, _at_least_two(methods), np.inf))
    return quantile * math.sqrt(methods * (methods + 1) / (12 * columns))


def _ranking(value: np.ndarray, columns: int, dropped: int) -> Ranking:
    return Ranking(value, stats.rankdata(value, method="min", nan_policy="propagate"), columns, dropped)


def _complete(table: np.ndarray) -> np.ndarray:
    return table[:, ~np.isnan(table).any(axis=0)]


def _at_least_two(methods: int) -> int:
    if methods < 2:
        raise InputError(f"A comparison of {methods} methods needs 2 or more; pass one row of scores per method.")
    return methods


def _table(scores: np.ndarray, higher_is_better: Directions) -> tuple[np.ndarray, np.ndarray]:
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 2 or len(scores) == 0:
        raise InputError(f"scores has shape {scores.shape}, expected [methods, columns]; stack one row per method.")
    return scores, _directions(higher_is_better, scores.shape[1])


def _cube(scores: np.ndarray, higher_is_better: Directions) -> tuple[np.ndarray, np.ndarray]:
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 3 or scores.shape[2] == 0 or len(scores) == 0:
        raise InputError(
            f"scores has shape {scores.shape}, expected [methods, cases, metrics]; add an axis for a single metric."
        )
    return scores, _directions(higher_is_better, scores.shape[2])


def _directions(higher_is_better: Directions, columns: int) -> np.ndarray:
    higher = np.asarray(higher_is_better)
    if higher.dtype != np.bool_ or higher.shape not in ((), (columns,)):
        raise InputError(
            f"higher_is_better={higher_is_better!r} does not fit {columns} columns; pass one bool, or one per column."
        )
    return np.broadcast_to(higher, (columns,))
