"""Parts of the report that look across domains, metrics and cases."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from calsegx.evaluation import comparison_figures, evaluate, figures, methods, rankings, review, tables, transfer
from calsegx.evaluation import record as findings
from calsegx.evaluation.record import Record

SHOWN = (findings.DSC, findings.ECE)  # of the matrices and the corruption curves


@dataclass(frozen=True)
class Matrix:
    """Methods by domains, as text."""

    title: str
    domains: list[str]
    rows: list[tuple[str, list[str]]]  # (method, cells)


def matrices(record: Record) -> list[Matrix]:
    """Source -> target, one matrix per metric of ``SHOWN``; none without a target.

    More targets than ``transfer.MOST_TARGETS`` have no columns of their own.
    """
    found = []
    for metric, region in SHOWN:
        lines = transfer.matrix(record, metric, region)
        if lines:
            column = next(c for c in tables.COLUMNS if (c.metric, c.region) == (metric, region))
            cells = [_transfer_cells(record, column, line) for line in lines]
            rows = [(methods.display(line.method), list(c.values())) for line, c in zip(lines, cells, strict=True)]
            found.append(Matrix(column.title, list(cells[0]), rows))
    return found


def _transfer_cells(record: Record, column: tables.Column, line: transfer.Line) -> dict[str, str]:
    """Cells by heading; a model that is tested elsewhere has no source, and so no gap."""
    count = len(line.targets)
    source = {record.source: line.source} if record.source else {}
    own = source | (dict(line.targets) if count <= transfer.MOST_TARGETS else {})
    cells = {findings.where(record, domain): tables.number(column, value, None) for domain, value in own.items()}
    if count > 1:
        cells[f"mean of {count} targets"] = tables.number(column, line.mean, None)
    worst = tables.number(column, line.targets.get(line.worst, math.nan), None)
    cells["worst target"] = f"{worst} ({line.worst})" if line.worst else worst
    if source:
        cells["gap to the worst"] = tables.number(column, line.gap, None, True)
    return cells


def rank_maps(record: Record) -> list[tuple[str, str, str]]:
    """``(title, image, note)`` for the source and for all targets together; nothing where there is nothing to rank."""
    present = findings.domains(record)
    targets = [domain for domain in present if domain != record.source]
    groups = {findings.where(record, record.source): [record.source]} if record.source in present else {}
    if targets:
        title = findings.where(record, targets[0]) if len(targets) == 1 else f"{len(targets)} targets together"
        groups[title] = targets
    found = []
    for title, domains in groups.items():
        ranked = rankings.rank(record.rows, domains)
        if ranked is not None:
            image = figures.data_uri(comparison_figures.rank_map(ranked, f"Ranks on {title}"))
            found.append((title, image, _left_out(ranked.left_out)))
    return found


def _left_out(metrics: Iterable[tuple[str, str]]) -> str:
    names = ", ".join(findings.label(*metric) for metric in metrics)
    return f"Left out, because no subject has a value of every method: {names}." if names else ""


def corruption_curves(record: Record) -> list[str]:
    """DSC and ECE against the level, where the domains are corruptions; the DSC without TS, which keeps labels."""
    levels = transfer.corruptions(findings.domains(record))
    if not levels:
        return []
    names = methods.order(row.method for row in record.rows)
    plain = [name for name in names if not (name.endswith(methods.CALIBRATED) and methods.base(name) in names)]
    return [
        figures.data_uri(
            comparison_figures.corruption_curves(
                transfer.means(record, metric, region),
                levels,
                plain if metric == evaluate.DSC else names,
                "DSC (points)" if metric == evaluate.DSC else findings.label(metric, region),
                100.0 if metric == evaluate.DSC else 1.0,
            )
        )
        for metric, region in SHOWN
    ]


def reviews(record: Record) -> list[tuple[str, str, str, str]]:
    """``(case, domain, confidence, DSC in points)`` of the least confident cases."""
    return [
        (
            r.case_id,
            findings.place(record, r.domain),
            "nothing predicted" if math.isnan(r.confidence) else f"{r.confidence:.3f}",
            "undefined" if math.isnan(r.dsc) else f"{100 * r.dsc:.1f}",
        )
        for r in record.reviews[: review.MOST]
    ]


def review_note(record: Record) -> str:
    """What the list is made of, and whether it finds the bad cases."""
    found = review.agreement(record.reviews)
    shown = min(review.MOST, len(record.reviews))
    text = (
        f"The {shown} of {len(record.reviews)} cases with the lowest confidence of {record.reviewed}: {review.SCORE}. "
    )
    if math.isnan(found.r):
        return text + "Too few cases have both a confidence and a DSC to say whether they go together."
    return text + (
        f"Its correlation with the DSC over {found.pairs} cases is r = {found.r:.2f} (Pearson, p = {found.p:.3f}): a "
        "list worth following needs one well above 0."
    )
