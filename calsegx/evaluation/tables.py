"""Tables of an evaluation: ``cases.csv``, ``summary.json``, and the overview as Markdown (HTML: report; TeX: latex).

Files are written atomically: a reader sees the old file or the whole new one.
"""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calsegx import files
from calsegx.evaluation import compare, evaluate, marks, methods
from calsegx.interfaces import DataError
from calsegx.metrics import regions

FIELDS = tuple(field.name for field in dataclasses.fields(evaluate.Row))
_NUMBERS = {"seed": int, "value": float, "defined": lambda text: text == "True"}  # the others are text


@dataclass(frozen=True)
class Column:
    """A column of the overview: which number, and how it is printed."""

    metric: str
    region: str
    title: str
    definition: str
    scale: float = 1.0
    digits: int = 3


@dataclass(frozen=True)
class Cell:
    """One number of the overview, as text."""

    text: str  # mean, and sd over seeds where there are several
    note: str  # how many values are undefined
    best: bool = False
    second: bool = False
    stars: str = ""  # of the corrected test against the strongest baseline
    interval: str = ""  # of the mean over subjects


@dataclass(frozen=True)
class Block:
    """The overview of one domain, or of one gap."""

    title: str
    rows: list[tuple[str, list[Cell]]]  # (method, cells)


def _of_region(metric: str, definition: str, region: str, digits: int = 3) -> Column:
    by_label = " (selected by the label)" if region == evaluate.PAPERS_REGION else ""
    title = f"{metric} [{region}]{by_label}"
    return Column(metric, region, title, f"{definition}, on {regions.describe(region)}", 1.0, digits)


def _columns() -> tuple[Column, ...]:
    ece = f"expected calibration error of the top label, {evaluate.BINS} equal bins"
    brier = "mean squared error of the probabilities (several classes: summed over classes)"
    return (
        Column(
            *(evaluate.DSC, evaluate.VOLUME, "DSC (points)"),
            "Dice of the whole volume in points of 100; a class that truth and prediction both lack is left out and "
            "counted",
            *(100.0, 1),
        ),
        Column(
            *(evaluate.HD95, evaluate.VOLUME, evaluate.HD95),
            "95 % Hausdorff distance in mm, the larger directed one; a mask that only one side has counts as the "
            "diagonal of the volume, one that both lack is left out; both are counted as undefined",
            *(1.0, 1),
        ),
        *(_of_region(evaluate.ECE, ece, name, 4 if name == "all" else 3) for name in evaluate.REGIONS),
        _of_region(evaluate.BRIER, brier, "dilated"),
        _of_region(evaluate.BRIER, brier, "all", 4),
        _of_region(evaluate.NLL, "mean of -log p of the true class in nats", "dilated"),
    )


def _more_columns() -> tuple[Column, ...]:
    volume = evaluate.VOLUME
    bins = f"{evaluate.BINS} equal bins"
    return (
        Column(
            *(evaluate.ASSD, volume, evaluate.ASSD),
            "mean distance in mm of the voxels of both surfaces to the other; a mask that one side lacks as for HD95",
            *(1.0, 2),
        ),
        Column(
            *(evaluate.NSD, volume, evaluate.NSD),
            f"share of the voxels of both surfaces within {evaluate.NSD_MM:g} mm of the other",
        ),
        Column(evaluate.PRECISION, volume, evaluate.PRECISION, "share of the predicted voxels that are of the class"),
        Column(evaluate.RECALL, volume, evaluate.RECALL, "share of the voxels of the class that are predicted"),
        Column(
            *(evaluate.VOLUME_DIFFERENCE, volume, evaluate.VOLUME_DIFFERENCE),
            "difference of the predicted and the true volume, without its sign",
            *(1.0, 2),
        ),
        Column(
            *(evaluate.LESION_F1, volume, evaluate.LESION_F1),
            "harmonic mean of the shares of true lesions found and of predicted lesions that exist; a lesion is a "
            "connected component, and one common voxel is enough",
        ),
        _of_region(evaluate.CECE, f"class-wise calibration error, {bins}, mean over background and classes", "p>0.01"),
        _of_region(evaluate.MCE, f"largest gap of a bin of the top label, {bins}", "p>0.01"),
        _of_region(
            evaluate.TACE,
            f"class-wise calibration error of the probabilities above 0.001, {evaluate.BINS} bins of equal count "
            "(a single class: of the foreground probability)",
            "p>0.01",
        ),
    )


COLUMNS = _columns()
MORE_COLUMNS = _more_columns()


def overview(
    rows: Sequence[evaluate.Row],
    source: str,
    targets: Sequence[str],
    kind: str = "",
    columns: Sequence[Column] = COLUMNS,
) -> list[Block]:
    """Methods by metrics, for the source, each target, and each gap (class ``all``).

    ``kind`` is what a domain is ("scanner"), for the titles.  The best and the second mean of a column and the
    differences from the strongest baseline are marked, except in gaps, where a method that is bad everywhere has a
    small one, and where the label selects the voxels, which favours over-confidence.
    """
    shown = {(c.metric, c.region) for c in columns}
    by_domain: dict[str, list[evaluate.Row]] = {domain: [] for domain in (source, *targets)}
    for row in rows:
        if row.class_name == evaluate.ALL and row.domain in by_domain and (row.metric, row.region) in shown:
            by_domain[row.domain].append(row)
    summaries = {
        (s.method, s.domain, s.metric, s.region): s for found in by_domain.values() for s in evaluate.summarise(found)
    }
    names = methods.order(row.method for row in rows)
    indexed, baseline, masks = compare.index(rows), marks.strongest(rows, source, targets), marks.certain(rows)
    blocks = []
    for domain, role in ((source, "Source"), *((target, "Target") for target in targets)):
        present = [name for name in names if any(key[:2] == (name, domain) for key in summaries)]
        found = {n: [summaries.get((n, domain, c.metric, c.region)) for c in columns] for n in present}
        by_column = [[cells[i] for cells in found.values()] for i in range(len(columns))]
        marked = [marks.of(column, indexed, baseline, masks) for column in by_column]
        lines = [
            (name, [_cell(c, s, m, indexed) for c, s, m in zip(columns, cells, marked, strict=True)])
            for name, cells in found.items()
        ]
        if lines or domain:  # a model that is tested elsewhere has no source among the rows
            title = f"{kind} {domain}".strip() or "test cases"
            blocks.append(Block(f"{role}: {title}" if source and targets else title.capitalize(), lines))
    elsewhere = bool(source) or not targets  # without results on the source there is no gap
    pairs = [(target, by_domain[source] + by_domain[target]) for target in targets if elsewhere]
    return blocks + [_gap_block(found, source, target, names, columns) for target, found in pairs]


def _gap_block(
    rows: Sequence[evaluate.Row], source: str, target: str, names: Sequence[str], columns: Sequence[Column]
) -> Block:
    gaps = {
        (g.method, g.metric, g.region): g
        for g in evaluate.generalisation_gaps(rows, source, target)
        if g.class_name == evaluate.ALL
    }
    present = [name for name in names if any(key[0] == name for key in gaps)]
    lines = []
    for name in present:
        found = [gaps.get((name, c.metric, c.region)) for c in columns]
        lines.append(
            (
                name,
                [
                    Cell(number(c, g.mean, g.sd_seeds, True) if g else "not measured", "")
                    for c, g in zip(columns, found, strict=True)
                ],
            )
        )
    return Block(f"Gap: {source} to {target}", lines)


def _cell(column: Column, summary: evaluate.Summary | None, marked: marks.Marks, rows: compare.Index) -> Cell:
    if summary is None:
        return Cell("not measured", "")
    note = f"undef. {summary.undefined}/{summary.values}"
    if math.isnan(summary.mean):
        return Cell("undefined in every case", note)
    found = compare.interval(rows, summary.method, summary.domain, column.metric, column.region)
    return Cell(
        number(column, summary.mean, summary.sd_seeds),
        note,
        summary.mean == marked.best,
        summary.mean == marked.second,
        marked.stars(summary.method),
        "" if math.isnan(found.low) else f"[{number(column, found.low, None)}, {number(column, found.high, None)}]",
    )


def number(column: Column, mean: float, sd: float | None, signed: bool = False) -> str:
    """A mean (± sd over seeds) in the column's unit."""
    if math.isnan(mean):
        return "undefined"
    value = mean * column.scale
    text = with_sign(value, column.digits) if signed else f"{value:z.{column.digits}f}"
    return text if sd is None else f"{text} ± {sd * column.scale:.{column.digits}f}"


def with_sign(value: float, digits: int) -> str:
    """A difference with its sign, which one that rounds to zero lacks."""
    text = f"{value:+.{digits}f}"
    return text.lstrip("+-") if float(text) == 0 else text


def markdown(blocks: Sequence[Block], columns: Sequence[Column] = COLUMNS) -> str:
    """The overview of these columns as a Markdown table, with the definitions below (and not the ``legend``)."""
    lines = ["| Method | " + " | ".join(c.title for c in columns) + " |", "|---|" + "---:|" * len(columns)]
    for block in blocks:
        lines.append(f"| **{escape(block.title)}** |" + " |" * len(columns))
        for name, cells in block.rows:
            lines.append(f"| {escape(methods.display(name))} | {' | '.join(map(_markdown_cell, cells))} |")
    definitions = [f"* {c.title}: {c.definition}." for c in columns]
    return "\n".join([*lines, "", *definitions, ""])


def _markdown_cell(cell: Cell) -> str:
    text = f"**{cell.text}**" if cell.best else f"<u>{cell.text}</u>" if cell.second else cell.text
    stars = cell.stars.replace("*", "\\*")
    return f"{text}{stars} {cell.interval}{f' ({cell.note})' if cell.note else ''}".replace("  ", " ").rstrip()


def escape(text: str) -> str:
    """Text as a cell of a Markdown table."""
    return text.replace("|", "\\|")


def write_cases(path: Path, rows: Sequence[evaluate.Row]) -> None:
    """``cases.csv``: one line per number (long format), decimal points; a missing value is ``nan``."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow("class" if name == "class_name" else name for name in FIELDS)
    writer.writerows(dataclasses.astuple(row) for row in rows)
    files.write_atomically(path, buffer.getvalue())


def read_cases(path: Path) -> list[evaluate.Row]:
    """The rows of a ``cases.csv``.

    Raises:
        DataError: when it is missing or not what ``write_cases`` writes.
    """
    header = ["class" if name == "class_name" else name for name in FIELDS]
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            first, *lines = csv.reader(stream)
        if first != header:
            raise ValueError(f"its columns are {', '.join(first)}")
        return [
            evaluate.Row(*(_NUMBERS.get(name, str)(text) for name, text in zip(FIELDS, line, strict=True)))
            for line in lines
        ]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); remove its folder and evaluate again.") from error


def write_summary(
    path: Path,
    rows: Sequence[evaluate.Row],
    class_names: Sequence[str],
    method: str,
    source: str,
    targets: Sequence[str],
    paths: Mapping[str, tuple[str, str]] | None = None,
    prompt_jitter: Sequence[Any] = (),
    about: Mapping[str, Any] | None = None,
) -> None:
    """``summary.json``: nnU-Net's keys for one method, and everything else under ``calsegx``.

    nnU-Net's ``metric_per_case`` (one entry per case, seed and domain), ``mean`` (by label index) and
    ``foreground_mean`` are over all domains of ``method``; its ``Dice`` is our DSC.  ``IoU``, ``TP``, ``FP``, ``FN``,
    ``TN``, ``n_pred`` and ``n_ref`` are there as nnU-Net v2 writes them, among our own metrics.  Missing values are
    null.

    Args:
        path: the file to write.
        rows: all rows.
        class_names: K names, of the labels 1..K.
        method: the method that nnU-Net's keys describe.
        source: the source domain.
        targets: the target domains.
        paths: case id -> (prediction file, reference file); null where not given.
        prompt_jitter: ``robustness.Line``s, under ``calsegx``; empty: not asked for, and left out.
        about: more to say under ``calsegx``.
    """
    labels = {name: str(index) for index, name in enumerate(class_names, start=1)}
    cases: dict[tuple[str, int, str], dict[str, dict[str, float]]] = {}
    for row in rows:
        if row.method == method and row.class_name in labels:
            by_label = cases.setdefault((row.case_id, row.seed, row.domain), {})
            value = int(row.value) if row.metric in evaluate.COUNTS else row.value
            by_label.setdefault(labels[row.class_name], {})[_nnunet_name(row)] = value
    per_case = []
    for (case_id, seed, domain), by_label in cases.items():
        prediction, reference = (paths or {}).get(case_id, (None, None))
        per_case.append(
            {
                "metrics": by_label,
                "prediction_file": prediction,
                "reference_file": reference,
                "case_id": case_id,
                "seed": seed,
                "domain": domain,
            }
        )
    mean = {label: _mean_of([c[label] for c in cases.values() if label in c]) for label in labels.values()}
    gaps = [g for target in targets for g in evaluate.generalisation_gaps(rows, source, target)]
    content = {
        "metric_per_case": per_case,
        "mean": mean,
        "foreground_mean": _mean_of(list(mean.values())),
        "calsegx": {
            "method": method,
            "summary": [dataclasses.asdict(summary) for summary in evaluate.summarise(rows)],
            "gaps": [dataclasses.asdict(gap) for gap in gaps],
            **({"prompt_jitter": [dataclasses.asdict(line) for line in prompt_jitter]} if prompt_jitter else {}),
            **(about or {}),
        },
    }
    files.write_atomically(path, json.dumps(without_nan(content), indent=2, allow_nan=False) + "\n")


def _nnunet_name(row: evaluate.Row) -> str:
    if row.region != evaluate.VOLUME:
        return f"{row.metric} [{row.region}]"
    return "Dice" if row.metric == evaluate.DSC else row.metric


def _mean_of(entries: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for entry in entries for name in entry)
    found = {name: [e[name] for e in entries if name in e and not math.isnan(e[name])] for name in names}
    return {name: sum(values) / len(values) if values else math.nan for name, values in found.items()}


def without_nan(value: Any) -> Any:
    """Nested values for JSON, which has no NaN: null in its place."""
    if isinstance(value, dict):
        return {key: without_nan(member) for key, member in value.items()}
    if isinstance(value, list):
        return [without_nan(member) for member in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
