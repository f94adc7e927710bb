"""What a report is made of, and the words for it; the sentences are those of ``verdict``."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from calsegx import configs
from calsegx.evaluation import compare, evaluate, marks, methods, review, robustness, tables
from calsegx.metrics import calibration

MAIN_REGION, FIXED_REGION = "p>0.01", "dilated"
DSC = (evaluate.DSC, evaluate.VOLUME)
ECE = (evaluate.ECE, MAIN_REGION)
ECE_FIXED = (evaluate.ECE, FIXED_REGION)
BRIER = (evaluate.BRIER, FIXED_REGION)
COMPARED = (DSC, ECE, ECE_FIXED, BRIER)


@dataclass(frozen=True)
class Picture:
    """A figure of the gallery."""

    caption: str
    png: bytes


@dataclass(frozen=True)
class Record:
    """Everything that a report is made of."""

    title: str
    rows: Sequence[evaluate.Row]
    source: str  # the domain that was trained on
    targets: Sequence[str]  # the domains that were not; may be empty
    domain_kind: str = ""  # what a domain is: "scanner" or "centre"
    # What was run, as shown: dataset, counts, protocol, versions ...
    description: Mapping[str, str] = field(default_factory=dict)
    # (method, domain, region) -> pooled over cases and seeds
    statistics: Mapping[tuple[str, str, str], calibration.CalibrationStatistics] = field(default_factory=dict)
    # (method, domain) -> ``margins.histogram``, pooled likewise; methods without logits have none
    margins: Mapping[tuple[str, str], np.ndarray] = field(default_factory=dict)
    logs: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)  # run -> records of metrics.jsonl
    gallery: Sequence[Picture] = ()
    reviews: Sequence[review.Review] = ()  # the least confident first
    reviewed: str = ""  # the method (and seed) whose confidence it is
    protocol: str = "gt_points"  # how prompts were placed
    jittered: Sequence[robustness.Line] = ()  # with prompts that were moved at random; empty: not asked for
    external: Sequence[str] = ()  # methods that are other tools' predictions

    @property
    def every_slice(self) -> bool:
        """Whether every slice was prompted, so that no prompt-only guess can be made."""
        return self.protocol in configs.EVERY_SLICE

    @functools.cached_property
    def index(self) -> compare.Index:
        """The rows that comparisons are made of."""
        return compare.index(self.rows)

    @functools.cached_property
    def overview(self) -> list[tables.Block]:
        """Methods by ``tables.COLUMNS``, for every table and report that shows them."""
        return tables.overview(self.rows, self.source, self.targets, self.domain_kind)

    @functools.cached_property
    def further(self) -> list[tables.Block]:
        """Methods by ``tables.MORE_COLUMNS``."""
        return tables.overview(self.rows, self.source, self.targets, self.domain_kind, tables.MORE_COLUMNS)

    @functools.cached_property
    def legend(self) -> list[str]:
        """What the marks in ``overview`` and ``further`` mean."""
        return marks.legend(self.rows, self.source, self.targets)

    @functools.cached_property
    def comparisons(self) -> list[compare.Comparison]:
        """Every other training (each without and with TS) against SAM-FT without and with TS, on ``COMPARED``.

        What has FIP or CMP is compared with early stopping too, their cheap rival.  Other tools' predictions are
        compared like trainings.
        """
        present = methods.order(row.method for row in self.rows)
        scaled = methods.BASELINE + methods.CALIBRATED

        def references(method: str) -> list[str]:
            early = [methods.EARLY] if methods.is_ours(method) else []
            if methods.calibrated(method):
                return [scaled, *(name + methods.CALIBRATED for name in early)]
            return [methods.BASELINE, scaled, *early]

        pairs = [
            (method, reference)
            for method in present
            if methods.base(method) not in (*methods.UNTRAINED, methods.BASELINE)
            for reference in references(method)
            if reference in present
        ]
        return [
            compare.compare(self.index, *pair, domain, *metric)
            for domain in domains(self)
            for pair in pairs
            for metric in COMPARED
        ]


def where(record: Record, domain: str) -> str:
    """A domain's name in a sentence, e.g. ``scanner B (target)``."""
    role = "source" if domain == record.source else "target"
    return f"{place(record, domain)} ({role})" if record.targets else place(record, domain)


def place(record: Record, domain: str) -> str:
    """A domain's name without its role; the unnamed domain is ``the test cases``."""
    return f"{record.domain_kind} {domain}".strip() if domain else "the test cases"


def domains(record: Record) -> list[str]:
    """The domains that have rows, source first."""
    present = {row.domain for row in record.rows}
    return [domain for domain in (record.source, *record.targets) if domain in present]


def label(metric: str, region: str) -> str:
    """A metric's name with its region."""
    return metric if region == evaluate.VOLUME else f"{metric} [{region}]"


def change(c: compare.Comparison) -> str:
    """A comparison's difference with its unit."""
    return signed(c, c.difference) + (" points" if c.metric == evaluate.DSC else "")


def signed(c: compare.Comparison, value: float) -> str:
    """A difference in the unit in which it is read: DSC in points, everything else as it is."""
    if math.isnan(value):
        return "undefined"
    return tables.with_sign(100 * value, 1) if c.metric == evaluate.DSC else tables.with_sign(value, 3)


def uncertainty(c: compare.Comparison) -> list[str]:
    """Interval, test, number of subjects and spread over seeds of a comparison, as phrases."""
    if c.verdict == compare.TOO_FEW:
        return [f"n = {c.subjects}"]
    phrases = [
        f"95 % CI {signed(c, c.low)} to {signed(c, c.high)}",
        "p < 0.001" if c.p_value < 0.001 else f"p = {c.p_value:.3f}",
        f"n = {c.subjects}",
    ]
    return phrases if c.sd_seeds is None else [*phrases, f"seed sd {signed(c, c.sd_seeds).lstrip('+')}"]
