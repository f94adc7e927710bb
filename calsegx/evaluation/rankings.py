"""Ranks of the methods over metrics: by the mean of each metric (sum-rank) and within each subject (mean-case-rank).

The unit is the subject, as in ``compare``: its cases, seeds and, where several domains are ranked together, domains are
averaged first, so that Friedman's test sees independent columns.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from calsegx.evaluation import evaluate, methods
from calsegx.metrics import ranks, statistics

RANKED = (
    (evaluate.DSC, evaluate.VOLUME),
    (evaluate.HD95, evaluate.VOLUME),
    *((metric, "dilated") for metric in (evaluate.ECE, evaluate.BRIER, evaluate.NLL)),
    (evaluate.ECE, "p>0.01"),
)


@dataclass(frozen=True)
class Rankings:
    """Ranks of methods on some domains; 1 is the best."""

    methods: list[str]
    metrics: list[tuple[str, str]]  # with region
    of_means: np.ndarray  # [methods, metrics] rank of the mean over subjects
    sum_rank: np.ndarray  # [methods] their sum
    of_cases: np.ndarray  # [methods, metrics] mean over subjects of the rank within a subject
    mean_case_rank: np.ndarray  # [methods] over subjects and metrics
    friedman_p: list[float]  # by metric; NaN with fewer than 3 methods or FEWEST_PAIRS subjects
    subjects: list[int]  # that entered, by metric
    left_out: list[tuple[str, str]]  # metrics without a subject for which every method has a value


def rank(rows: Sequence[evaluate.Row], domains: Sequence[str]) -> Rankings | None:
    """Rank the methods of these domains on ``RANKED``; None with fewer than two methods or without a metric.

    A subject for which a method has no value of a metric is left out of that metric for all methods.
    """
    values: dict[tuple[str, str], dict[str, dict[str, list[float]]]] = {metric: {} for metric in RANKED}
    seen = []
    for row in rows:
        metric = (row.metric, row.region)
        if row.class_name == evaluate.ALL and row.domain in domains and metric in values:
            seen.append(row.method)
            if not math.isnan(row.value):
                of_method = values[metric].setdefault(row.method, defaultdict(list))
                of_method[row.subject_id].append(row.value)
    names = methods.order(seen)
    tables = {metric: _table(found, names) for metric, found in values.items()}
    metrics = [metric for metric, table in tables.items() if table.shape[1]]
    if len(names) < 2 or not metrics:
        return None
    higher = [evaluate.higher_is_better(name) for name, _ in metrics]
    used = [tables[metric] for metric in metrics]
    of_means = np.stack([ranks.sum_rank(t[..., None], h).value for t, h in zip(used, higher, strict=True)], axis=1)
    of_cases = [ranks.mean_case_rank(t[..., None], h).value for t, h in zip(used, higher, strict=True)]
    # Every pair of subject and metric weighs the same: metrics with few complete subjects weigh less.
    together = np.concatenate([t if h else -t for t, h in zip(used, higher, strict=True)], axis=1)
    return Rankings(
        *(names, metrics, of_means, of_means.sum(axis=1)),
        *(np.stack(of_cases, axis=1), ranks.mean_rank(together, True).value),
        [_friedman(t, h) for t, h in zip(used, higher, strict=True)],
        [table.shape[1] for table in used],
        [metric for metric in RANKED if metric not in metrics],
    )


def _friedman(table: np.ndarray, higher_is_better: bool) -> float:
    enough = len(table) > 2 and table.shape[1] >= statistics.FEWEST_PAIRS
    return ranks.friedman(table, higher_is_better).p if enough else math.nan


def _table(found: dict[str, dict[str, list[float]]], names: Sequence[str]) -> np.ndarray:
    """``[methods, subjects]`` of the subjects that every method has a value for."""
    subjects = sorted(set.intersection(*(set(found.get(name, ())) for name in names))) if names else []
    return np.array([[np.mean(found[name][s]) for s in subjects] for name in names]).reshape(len(names), len(subjects))
