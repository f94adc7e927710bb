"""Pictures of the best, the median and the worst case of every domain, and the cases most in need of review."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from calsegx.evaluation import evaluate, figures, methods, predict, review, study
from calsegx.evaluation.record import Picture
from calsegx.evaluation.review import Review
from calsegx.interfaces import Case

MOST_METHODS = 4  # columns of a picture


@dataclass(frozen=True)
class Snapshot:
    """The slice of a case with most foreground, and what the methods make of it."""

    case: Case
    domain: str
    index: int  # along D
    truth: np.ndarray  # [H, W] bool
    spacing_mm: tuple[float, float]
    results: dict[str, figures.Overlay]
    confidence: dict[str, float] = field(default_factory=dict)  # ``review.mean_confidence`` of the volume, by method


def snapshot(subject: study.Subject, domain: str) -> Snapshot:
    """The slice with the largest foreground, without results yet."""
    index = int((subject.truth > 0).sum(axis=(1, 2)).argmax())
    return Snapshot(subject.case, domain, index, subject.truth[index] > 0, subject.spacing_mm[1:], {})


def add(picture: Snapshot, method: str, seed: int, volume: np.ndarray, shown: Sequence[tuple[str, int]]) -> None:
    """Keep a method's result on the slice, if it is one of those ``shown``."""
    if (method, seed) in shown:
        picture.confidence[method] = review.mean_confidence(volume)
        foreground = volume[picture.index]
        picture.results[method] = figures.Overlay(predict.segment(foreground) > 0, foreground.sum(axis=-1).clip(0, 1))


def reviews(snapshots: Sequence[Snapshot], rows: Sequence[evaluate.Row], ranked_by: tuple[str, int]) -> list[Review]:
    """Every case with the confidence and the DSC of one method and seed, the least confident first."""
    dice, name = _dice(rows, ranked_by), ranked_by[0]
    return review.ranked(
        Review(s.case.case_id, s.domain, s.confidence[name], dice.get(s.case.case_id, math.nan))
        for s in snapshots
        if name in s.confidence
    )


def shown_methods(models: Sequence[study.Model]) -> list[tuple[str, int]]:
    """The trained methods of the first seed, at most ``MOST_METHODS``, with that seed."""
    names = methods.order(model.method for model in models)[:MOST_METHODS]
    return [(name, next(model.seed for model in models if model.method == name)) for name in names]


def pictures(
    snapshots: Sequence[Snapshot],
    rows: Sequence[evaluate.Row],
    ranked_by: tuple[str, int],
    domain_kind: str,
    read_slice: Callable[[Case, int], np.ndarray],
) -> list[Picture]:
    """The best, median and worst case of each domain, by the DSC of one method and seed.

    Args:
        snapshots: one per case.
        rows: all rows.
        ranked_by: the method and seed whose DSC ranks the cases.
        domain_kind: what a domain is called: ``scanner`` or ``centre``.
        read_slice: ``(case, index along D) -> [H, W]`` image to show.
    """
    dice = _dice(rows, ranked_by)
    known = [s for s in snapshots if not math.isnan(dice.get(s.case.case_id, math.nan)) and s.truth.any()]
    domains: dict[str, list[Snapshot]] = {}
    for s in sorted(known, key=lambda s: dice[s.case.case_id]):
        domains.setdefault(s.domain, []).append(s)
    found = []
    for domain, members in sorted(domains.items()):
        chosen = {"best": members[-1], "median": members[len(members) // 2], "worst": members[0]}
        seen: set[str] = set()
        for rank, s in chosen.items():
            if s.case.case_id in seen:
                continue
            seen.add(s.case.case_id)
            score = f"{methods.display(ranked_by[0])} DSC {100 * dice[s.case.case_id]:.1f} points"
            place = f"{domain_kind} {domain}, " if domain else ""
            title = f"{place}{rank} case: {s.case.case_id}, slice {s.index}, {score}"
            results = {name: s.results[name] for name in methods.order(s.results)}
            png = figures.overlay(read_slice(s.case, s.index), s.truth, results, s.spacing_mm, title)
            found.append(Picture(title, png))
    return found


def _dice(rows: Sequence[evaluate.Row], ranked_by: tuple[str, int]) -> dict[str, float]:
    """The DSC of one method and seed by case."""
    return {
        row.case_id: row.value
        for row in rows
        if (row.method, row.seed) == ranked_by and row.metric == evaluate.DSC and row.class_name == evaluate.ALL
    }
