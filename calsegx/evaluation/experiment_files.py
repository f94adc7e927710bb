"""What an experiment leaves at the top of its folder, beside the runs and the evaluations of its folds."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calsegx import files
from calsegx.evaluation import evaluate, experiment_report, latex, methods, paper_tables, pooled, tables
from calsegx.evaluation.experiment_report import Experiment
from calsegx.evaluation.record import Record


def write(workdir: Path, experiment: Experiment, class_names: Sequence[str]) -> None:
    """``cases.csv``, ``table.md``, ``table.tex``, ``summary.json``, ``tables/`` and ``report.html``, each atomically.

    Args:
        workdir: the experiment's folder.
        experiment: what was evaluated.
        class_names: K names, of the labels 1..K.
    """
    pooled.write_cases(workdir / "cases.csv", experiment.parts)
    blocks = pooled.overview(experiment.parts, experiment.kind)
    files.write_atomically(workdir / "table.md", tables.markdown(blocks))
    files.write_atomically(workdir / "table.tex", _tex(experiment))
    _write_summary(workdir / "summary.json", experiment, class_names)
    for family, record in experiment.families:
        folder = workdir / "tables" / family.folder
        for table in paper_tables.of(record):
            files.write_atomically(folder / f"{table.name}.md", paper_tables.markdown(table))
            files.write_atomically(folder / f"{table.name}.tex", paper_tables.tex(table))
    experiment_report.write(workdir / "report.html", experiment)


def _tex(experiment: Experiment) -> str:
    """All folds of a family together; fold by fold they are in ``table.tex`` of each evaluation."""
    parts = []
    for family, record in experiment.families:
        titled = [dataclasses.replace(block, title=f"{family.title}; {block.title}") for block in record.overview]
        parts.append(latex.latex(titled, legend=record.legend))
    return "\n".join(parts)


def _write_summary(path: Path, experiment: Experiment, class_names: Sequence[str]) -> None:
    """nnU-Net's keys for the first family, where a case stands once for every model that it was tested with."""
    rows = [
        dataclasses.replace(row, domain=f"{part.fold}: {row.domain}" if part.fold else row.domain)
        for part in experiment.families[0][0].parts
        for row in part.rows
    ]
    present = methods.order(row.method for row in rows)
    trained = [name for name in present if name not in methods.UNTRAINED]
    first = ("calsam", *methods.ADDITIONS, methods.BASELINE, *trained, *present)
    method = next((name for name in first if name in present), "")
    about = {"experiment": [_summary(*family) for family in experiment.families]}
    tables.write_summary(path, rows, class_names, method, "", [], about=about)


def _summary(family: pooled.Family, record: Record) -> dict[str, Any]:
    gaps = [g for target in record.targets for g in evaluate.generalisation_gaps(record.rows, record.source, target)]
    return {
        "training_subjects": family.training_subjects,
        "protocol": family.protocol,
        "images": family.images,
        "folds": len(family.parts),
        "summary": [dataclasses.asdict(summary) for summary in evaluate.summarise(record.rows)],
        "gaps": [dataclasses.asdict(gap) for gap in gaps],
    }
