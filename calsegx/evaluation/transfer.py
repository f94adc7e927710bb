"""From source to targets at a glance: DSC and ECE of every method on every domain, the worst target and the gap to it.

Also how domains that are corruptions (``launch.corrupt``: ``<corruption>-<level>`` beside ``clean``) are grouped.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from calsegx.data.corruptions import manifest
from calsegx.evaluation import evaluate, methods
from calsegx.evaluation.record import Record, domains
from calsegx.metrics import statistics

MOST_TARGETS = 6  # columns of a matrix; of more targets it shows the mean, the worst and the gap


@dataclass(frozen=True)
class Line:
    """One method's means of one metric."""

    method: str
    source: float  # NaN where it has no value
    targets: Mapping[str, float]
    mean: float  # over the targets that have a value
    worst: str  # domain; empty when no target has a value
    gap: float  # from the source to the worst target, positive = degradation


def means(record: Record, metric: str, region: str) -> dict[tuple[str, str], float]:
    """``(method, domain)`` -> mean over cases, then seeds, of the class ``all``."""
    rows = (r for r in record.rows if (r.class_name, r.metric, r.region) == (evaluate.ALL, metric, region))
    return {(s.method, s.domain): s.mean for s in evaluate.summarise(rows)}


def matrix(record: Record, metric: str, region: str) -> list[Line]:
    """One line per method; empty without a target that has results."""
    found, higher = means(record, metric, region), evaluate.higher_is_better(metric)
    targets = [domain for domain in domains(record) if domain != record.source]
    lines = []
    for method in methods.order(row.method for row in record.rows) if targets else ():
        source = found.get((method, record.source), math.nan)
        values = {domain: found.get((method, domain), math.nan) for domain in targets}
        known = {domain: value for domain, value in values.items() if not math.isnan(value)}
        worst = (min if higher else max)(known, key=lambda name: known[name], default="")
        mean = sum(known.values()) / len(known) if known else math.nan
        gap = statistics.generalisation_gap(source, known[worst], higher) if worst else math.nan
        lines.append(Line(method, source, values, mean, worst, gap))
    return lines


def corruptions(names: Sequence[str]) -> dict[str, dict[int, str]]:
    """Corruption -> level -> domain, level 0 being ``clean``; empty unless the domains are ``launch.corrupt``'s."""
    found: dict[str, dict[int, str]] = {}
    for name in names if manifest.CLEAN in names else ():
        match = re.fullmatch(r"(.+)-([1-5])", name)
        if match:
            found.setdefault(match[1], {0: manifest.CLEAN})[int(match[2])] = name
    return {name: dict(sorted(levels.items())) for name, levels in sorted(found.items())}
