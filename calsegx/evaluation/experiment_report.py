"""The report of an experiment: one HTML file over all its folds, which links to the report of each.

Figures that need more than the rows (reliability, cases, training) are those of the folds' own reports.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calsegx.evaluation import (
    comparison_figures,
    evaluate,
    figures,
    methods,
    pooled,
    report,
    report_parts,
    tables,
    transfer,
    verdict,
)
from calsegx.evaluation import record as words
from calsegx.evaluation.record import Record


@dataclass(frozen=True)
class Experiment:
    """Everything that the report of an experiment is made of."""

    title: str
    parts: Sequence[pooled.Part]  # joined
    kind: str  # what a domain is: "scanner" or "centre"
    planned: Sequence[str]  # the methods of the plan
    description: Mapping[str, str] = field(default_factory=dict)  # what was run, as shown
    selections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # setting -> what the grid's rule saw
    external: Sequence[str] = ()  # methods that are other tools' predictions

    @functools.cached_property
    def families(self) -> list[tuple[pooled.Family, Record]]:
        """What differs in more than the fold, each with all its folds as the record of one evaluation."""
        found = []
        for family in pooled.families(self.parts):
            pool = pooled.pool(family, self.kind)
            about = self.title, pool.rows, pool.source, pool.targets, pool.kind
            found.append((family, Record(*about, protocol=family.protocol, external=self.external)))
        return found


def write(path: Path, experiment: Experiment) -> None:
    """Render the report to ``path``, atomically; its links are relative to the folder of ``path``."""
    content = {
        "record": experiment,
        "sections": [_section(experiment, family, made) for family, made in experiment.families],
        "missing": missing(experiment),
        "few_shot": _few_shot(experiment),
        "columns": tables.COLUMNS,
        "comparison_metrics": [words.label(*metric) for metric in words.COMPARED],
        "selections": [_selection(name, content) for name, content in experiment.selections.items()],
        "folds": [_fold(part) for part in experiment.parts],
    }
    report.render(path, "experiment.html.j2", content)


def missing(experiment: Experiment) -> list[str]:
    """Planned methods without results, and those that only some folds have, as sentences."""
    present = {row.method for part in experiment.parts for row in part.rows}
    absent = [methods.display(name) for name in experiment.planned if name not in present]
    sentences = [f"Planned, but without any result: {', '.join(absent)}."] if absent else []
    for family, _ in experiment.families:
        names = [{row.method for row in part.rows} for part in family.parts]
        for method in methods.order(name for found in names for name in found):
            lacking = [part.fold for part, found in zip(family.parts, names, strict=True) if method not in found]
            if lacking:
                sentences.append(f"{methods.display(method)}, {family.title}: no result on fold {', '.join(lacking)}.")
    return sentences or ["Nothing: every planned method has results, on every fold of its prompt protocol."]


def _section(experiment: Experiment, family: pooled.Family, made: Record) -> dict[str, Any]:
    count = len(family.parts)
    notes = {
        pooled.IN: f"{count} folds together: seen are the test cases of the domain that a fold was trained on "
        "(in-domain), unseen those of all others (out-of-domain).",
        "": f"{count} folds together: every case is tested once, by a model of ours that never saw it.",
    }
    return {
        "title": family.title,
        "headline": verdict.headline(made),
        "note": notes.get(made.source, f"{count} folds together.") if count > 1 else "One split.",
        "findings": [sentence.split(": ", 1) for sentence in verdict.verdict(made)],
        "blocks": made.overview,
        "legend": made.legend,
        "by_source": bool(made.source),
        "transfer": _transfer(experiment, family, made),
        "ranks": report_parts.rank_maps(made),
        "corruptions": report_parts.corruption_curves(made),
        "comparisons": report.comparison_table(made),
    }


def _transfer(
    experiment: Experiment, family: pooled.Family, made: Record
) -> list[tuple[str, list[report_parts.Matrix]]]:
    """``(title, matrices)``: a block for each source, or the folds as targets where all domains are trained on."""
    if len(family.parts) == 1 or family.images == pooled.CORRUPTED:
        return [("", report_parts.matrices(made))] if made.targets else []
    if not made.source:
        folds = [part.fold for part in family.parts]
        rows = [dataclasses.replace(row, domain=part.fold) for part in family.parts for row in part.rows]
        return [("", report_parts.matrices(Record("", rows, "", folds, "fold")))]
    found = []
    for part in family.parts:
        targets = sorted({row.domain for row in part.rows} - {part.source})
        matrices = report_parts.matrices(Record("", part.rows, part.source, targets, experiment.kind))
        found.append((f"Trained on {experiment.kind} {part.source}", matrices))
    return found


def _few_shot(experiment: Experiment) -> list[str]:
    """DSC and ECE against the number of training subjects; empty where that is not varied."""
    levels: dict[str, dict[int, str]] = {}
    values: dict[tuple[str, str, str], float] = {}  # metric, method, place and size
    names: list[str] = []
    for family, made in experiment.families:
        if not family.training_subjects or family.images == pooled.CORRUPTED:
            continue
        names += [row.method for row in made.rows]
        means = {metric: transfer.means(made, metric, region) for metric, region in report_parts.SHOWN}
        for domain in words.domains(made):
            title = f"{words.place(made, domain)}, {family.protocol}"
            key = f"{title}@{family.training_subjects}"
            levels.setdefault(title, {})[family.training_subjects] = key
            for metric, found in means.items():
                values |= {(metric, method, key): mean for (method, where), mean in found.items() if where == domain}
    if not levels:
        return []
    names = methods.order(names)
    plain = [name for name in names if not (methods.calibrated(name) and methods.base(name) in names)]
    return [
        figures.data_uri(
            comparison_figures.corruption_curves(
                {(method, key): value for (m, method, key), value in values.items() if m == metric},
                {title: dict(sorted(sizes.items())) for title, sizes in levels.items()},
                plain if metric == evaluate.DSC else names,
                "DSC (points)" if metric == evaluate.DSC else words.label(metric, region),
                100.0 if metric == evaluate.DSC else 1.0,
                "Training subjects",
            )
        )
        for metric, region in report_parts.SHOWN
    ]


def _selection(name: str, content: Mapping[str, Any]) -> dict[str, Any]:
    rule = content["rule"]
    metric = words.label(rule["lowest"], rule["region"])
    rows = []
    for method, found in content["methods"].items():
        for candidate in found["candidates"]:
            listed = ", ".join(f"{key} = {value:g}" for key, value in candidate["weights"].items())
            dice, value = (_number(candidate[key], scale) for key, scale in (("dsc", 100.0), ("value", 1.0)))
            chosen = candidate["weights"] == found["chosen"]
            rows.append((methods.display(method), listed or "as published", dice, value, chosen))
    return {
        "title": name,
        "metric": metric,
        "rule": f"The lowest {metric} of the candidates whose DSC is at most {rule['within_dsc_points']:g} points "
        "below SAM-FT's; if there is none, the highest DSC.",
        "rows": rows,
    }


def _number(value: float | None, scale: float) -> str:
    if value is None or value != value:
        return "undefined"
    return f"{scale * value:.1f}" if scale > 1 else f"{value:.4f}"


def _fold(part: pooled.Part) -> tuple[str, str, int, int, int, Sequence[str]]:
    family = pooled.Family(part.training_subjects, part.protocol, part.images, [part])
    return (
        f"{part.fold or 'the one split'}",
        family.title,
        len({row.subject_id for row in part.rows}),
        len({row.case_id for row in part.rows}),
        len({row.method for row in part.rows}),
        part.reports,
    )
