"""The report: one HTML file that needs nothing else, made of a ``Record``."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from calsegx import __version__, files
from calsegx.evaluation import (
    calibration_parts,
    compare,
    evaluate,
    figures,
    methods,
    report_parts,
    robustness,
    tables,
)
from calsegx.evaluation import record as findings
from calsegx.evaluation.record import Picture, Record
from calsegx.evaluation.verdict import headline, verdict

__all__ = ["Picture", "Record", "headline", "verdict", "write_report"]

MOST_DOMAINS = 12  # beyond which figures with a panel per domain are left out
# Keys of metrics.jsonl, and the axes on which they are drawn.
QUANTITIES = {
    "task": "Task loss (no unit)",
    "validation_loss": "Validation loss (no unit)",
    "penalty": "Fisher penalty (no unit)",
    "cmp": "CMP (error rate, 0 to 1)",
}


def write_report(path: Path, record: Record) -> None:
    """Render ``record`` to ``path``, atomically.  Images are inside the file and nothing is loaded from elsewhere."""
    many = len(findings.domains(record)) > MOST_DOMAINS
    content = {
        "record": record,
        "headline": headline(record),
        "findings": [sentence.split(": ", 1) for sentence in verdict(record)],
        "columns": tables.COLUMNS,
        "more_columns": tables.MORE_COLUMNS,
        "comparisons": comparison_table(record),
        "comparison_metrics": [findings.label(*metric) for metric in findings.COMPARED],
        "classes": _class_table(record),
        "reliability": [] if many else calibration_parts.reliability(record),
        "reliability_by_region": [] if many else calibration_parts.reliability_by_region(record),
        "reliability_by_class": [] if many else calibration_parts.reliability_by_class(record),
        "margins": calibration_parts.margin_histograms(record),
        "without_margins": calibration_parts.without_margins(record),
        "many_domains": many,
        "most_domains": MOST_DOMAINS,
        "matrices": report_parts.matrices(record),
        "ranks": report_parts.rank_maps(record),
        "corruptions": report_parts.corruption_curves(record),
        "reviews": report_parts.reviews(record),
        "review_note": report_parts.review_note(record),
        "region": findings.MAIN_REGION,
        "fixed_region": findings.FIXED_REGION,
        "papers_region": evaluate.PAPERS_REGION,
        "several_classes": len({row.class_name for row in record.rows} - {evaluate.ALL}) > 1,
        "scatter": None if many else _scatter(record),
        "training": _training(record),
        "jittered": _jittered(record),
        "jitter_columns": [
            f"{findings.label(metric, region)}{' (points)' if metric == evaluate.DSC else ''}, {amount:g}"
            for metric, region, amount in _jitter_columns(record)
        ],
        "gallery": [(picture.caption, figures.data_uri(picture.png)) for picture in record.gallery],
    }
    render(path, "report.html.j2", content)


def render(path: Path, template: str, content: Mapping[str, Any]) -> None:
    """Write a page made of a template of this folder, atomically."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("calsegx", "evaluation"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"display": methods.display, "version": __version__}
    files.write_atomically(path, environment.get_template(template).render(content))


def comparison_table(record: Record) -> list[dict[str, Any]]:
    """One line per domain, method and reference; one cell per metric."""
    lines: dict[tuple[str, str, str], dict[str, Any]] = {}
    for c in record.comparisons:
        line = lines.setdefault(
            (c.domain, c.method, c.reference),
            {
                "domain": findings.where(record, c.domain),
                "method": methods.display(c.method),
                "reference": methods.display(c.reference),
                "cells": [],
            },
        )
        kind = {compare.BETTER: "better", compare.WORSE: "worse"}.get(c.verdict, "neutral")
        line["cells"].append((findings.signed(c, c.difference), findings.uncertainty(c), c.verdict, kind))
    return list(lines.values())


def _class_table(record: Record) -> list[tuple[str, str, str, list[tuple[str, str]]]]:
    """``(domain, method, class, [(text, note)])`` of DSC and HD95; empty for a single class."""
    summaries = [s for s in evaluate.summarise(record.rows) if s.class_name != evaluate.ALL]
    if len({s.class_name for s in summaries}) < 2:
        return []
    columns = [column for column in tables.COLUMNS if column.region == evaluate.VOLUME]
    found: dict[tuple[str, str, str], dict[str, evaluate.Summary]] = {}
    for s in summaries:
        if s.region == evaluate.VOLUME:
            found.setdefault((s.domain, s.method, s.class_name), {})[s.metric] = s
    order = {name: index for index, name in enumerate(methods.order(s.method for s in summaries))}
    where = findings.domains(record)
    keys = sorted((k for k in found if k[0] in where), key=lambda k: (where.index(k[0]), k[2], order[k[1]]))
    return [
        (
            findings.where(record, key[0]),
            methods.display(key[1]),
            key[2],
            [
                (
                    tables.number(c, found[key][c.metric].mean, found[key][c.metric].sd_seeds),
                    f"undef. {found[key][c.metric].undefined}/{found[key][c.metric].values}",
                )
                for c in columns
            ],
        )
        for key in keys
    ]


def _scatter(record: Record) -> str | None:
    points: dict[str, dict[str, tuple[float, float]]] = {}
    means: dict[tuple[str, ...], float] = {
        (s.domain, s.method, s.metric, s.region): s.mean
        for s in evaluate.summarise(record.rows)
        if s.class_name == evaluate.ALL
    }
    for domain in findings.domains(record):
        for method in methods.order(row.method for row in record.rows):
            dice, ece = (means.get((domain, method, *m), math.nan) for m in (findings.DSC, findings.ECE))
            points.setdefault(findings.where(record, domain), {})[method] = (dice, ece)
    return figures.data_uri(figures.dice_against_ece(points, findings.MAIN_REGION)) if points else None


def _jitter_columns(record: Record) -> list[tuple[str, str, float]]:
    return list(dict.fromkeys((line.metric, line.region, line.amount) for line in record.jittered))


def _jittered(record: Record) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """``(domain, [(method, cells)])``, the cells by metric and amount."""
    found = {(line.domain, line.method, line.metric, line.region, line.amount): line for line in record.jittered}
    names = methods.order(line.method for line in record.jittered)

    def cell(line: robustness.Line) -> str:
        column = next(c for c in tables.COLUMNS if (c.metric, c.region) == (line.metric, line.region))
        return tables.number(column, line.mean, line.sd_draws)

    return [
        (
            findings.where(record, domain),
            [(n, [cell(found[domain, n, *column]) for column in _jitter_columns(record)]) for n in names],
        )
        for domain in findings.domains(record)
        if any(line.domain == domain for line in record.jittered)
    ]


def _training(record: Record) -> str | None:
    logs: Mapping[str, Sequence[Mapping[str, Any]]] = record.logs
    if not any(key in entry for run in logs.values() for entry in run for key in QUANTITIES):
        return None
    return figures.data_uri(figures.training_curves(logs, QUANTITIES))
