"""The hand-written layout: a ``cases.tsv``, one line per examination, which names files wherever they are.

Columns: ``case_id``, ``subject_id``, ``image:<channel>`` (one or more), ``volume:<channel>`` (which volume of a 4-D
file, or colour of a picture, from 0), ``label``, ``split`` (train, val, test or empty), ``centre``, ``scanner``,
``field_strength``.  Only ``case_id`` and one image are required; further columns are allowed and ignored.  Paths are
relative to the table's folder.
"""

import csv
import difflib
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from calsegx.data import layouts
from calsegx.data.layouts import nnunet_v2
from calsegx.interfaces import Case, DataError, Dataset

FILE_NAME, DESCRIPTION = "cases.tsv", "dataset.json"
COLUMNS = ("case_id", "subject_id", "label", "split", "centre", "scanner", "field_strength")
SPLITS = ("", "train", "val", "test")


@layouts.registry.register("table")
def read(root: Path) -> Dataset | None:
    """A tab-separated cases.tsv with the columns case_id and image:<channel>.

    Label names, and ``default_classes``, come from a ``dataset.json`` in the same folder, if there is one.

    Raises:
        DataError: naming the file, the line and the column.
    """
    path = root / FILE_NAME
    if not path.is_file():
        return None
    header, rows = _read_rows(path)
    channels = tuple(name.removeprefix("image:") for name in header if name.startswith("image:"))
    cases = tuple(_case(path, line, row, channels) for line, row in rows)
    if not cases:
        raise DataError(f"{path} has a header and no cases; add one line per examination.")
    lines: dict[str, int] = {}
    for case, (line, _) in zip(cases, rows, strict=True):
        if case.case_id in lines:
            raise DataError(
                f"{path}, line {line}, column case_id: {case.case_id!r} stands in line {lines[case.case_id]} "
                "already; give every examination its own."
            )
        lines[case.case_id] = line
    description = root / DESCRIPTION
    labels: Mapping[str, int] = {}
    default_classes = ""
    if description.is_file():
        content = nnunet_v2.read_description(description)
        labels = nnunet_v2.parse_labels(description, content)
        default_classes = str(content.get("default_classes") or "")
    return Dataset(root, cases, channels, labels, default_classes)


def contents(dataset: Dataset, path_of: Callable[[Path], str] = lambda path: str(path.absolute())) -> dict[str, str]:
    """The files, name -> text, from which ``read`` gives the dataset again: ``cases.tsv`` and ``dataset.json``.

    Args:
        dataset: its root plays no role.
        path_of: how the table names a file.
    """
    chosen = [channel for channel in dataset.channels if any(channel in case.volumes for case in dataset.cases)]
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
    columns = [f"image:{channel}" for channel in dataset.channels] + [f"volume:{channel}" for channel in chosen]
    writer.writerow([*COLUMNS[:2], *columns, *COLUMNS[2:]])
    for case in dataset.cases:
        writer.writerow(
            [
                case.case_id,
                case.subject_id,
                *(path_of(case.images[channel]) for channel in dataset.channels),
                *(case.volumes.get(channel, "") for channel in chosen),
                path_of(case.label) if case.label else "",
                *(getattr(case, column) for column in COLUMNS[3:]),
            ]
        )
    description: dict[str, object] = {"labels": dict(dataset.labels)}
    if dataset.default_classes:
        description["default_classes"] = dataset.default_classes
    return {
        FILE_NAME: stream.getvalue(),
        DESCRIPTION: json.dumps(description, indent=2, ensure_ascii=False) + "\n",
    }


def _read_rows(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, delimiter="\t", strict=True)
            lines = [(reader.line_num, [cell.strip() for cell in fields]) for fields in reader]
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise DataError(f"{path} cannot be read as tab-separated UTF-8 text ({error}); save it again.") from error
    lines = [(number, fields) for number, fields in lines if any(fields)]
    if not lines:
        raise DataError(f"{path} is empty; expected a header with case_id and image:<channel>.")
    header = lines[0][1]
    _check_header(path, header)
    rows = []
    for number, fields in lines[1:]:
        if len(fields) > len(header):
            raise DataError(f"{path}, line {number}: {len(fields)} fields, but the header has {len(header)} columns.")
        fields += [""] * (len(header) - len(fields))  # editors cut trailing tabs
        rows.append((number, dict(zip(header, fields, strict=True))))
    return header, rows


def _check_header(path: Path, header: list[str]) -> None:
    if len(header) == 1 and any(mark in header[0] for mark in ",; "):
        raise DataError(f"{path}, line 1: no tab in the header {header[0]!r}; separate the columns with tabs.")
    for name in header:
        if header.count(name) > 1:
            raise DataError(f"{path}, line 1: the column {name!r} stands there twice.")
        near = difflib.get_close_matches(name.lower(), COLUMNS, n=1, cutoff=0.8)
        if name and name not in COLUMNS and not name.startswith(("image:", "volume:")) and near:
            raise DataError(f"{path}, line 1: unknown column {name!r}; did you mean {near[0]!r}?")
    if "case_id" not in header:
        raise DataError(f"{path}, line 1: the column case_id is missing; the columns are {', '.join(header)}.")
    images = [name for name in header if name.startswith("image:")]
    if not images or "image:" in images:
        raise DataError(
            f"{path}, line 1: expected a column image:<channel> such as image:T1; the columns are {', '.join(header)}."
        )
    for channel in (name.removeprefix("volume:") for name in header if name.startswith("volume:")):
        if f"image:{channel}" not in images:
            raise DataError(f"{path}, line 1: the column volume:{channel} has no column image:{channel} beside it.")


def _case(path: Path, line: int, row: Mapping[str, str], channels: tuple[str, ...]) -> Case:
    for column in ("case_id", *(f"image:{channel}" for channel in channels)):
        if not row[column]:
            raise DataError(f"{path}, line {line}, column {column}: empty; every case needs it.")
    split = row.get("split", "")
    if split not in SPLITS:
        raise DataError(f"{path}, line {line}, column split: {split!r}; expected train, val, test or nothing.")
    label = row.get("label", "")
    volumes = {channel: row[f"volume:{channel}"] for channel in channels if row.get(f"volume:{channel}")}
    for channel, number in volumes.items():
        if not (number.isascii() and number.isdigit()):
            raise DataError(f"{path}, line {line}, column volume:{channel}: {number!r}; expected 0, 1, 2 or nothing.")
    return Case(
        case_id=row["case_id"],
        subject_id=row.get("subject_id") or row["case_id"],
        images={channel: path.parent / row[f"image:{channel}"] for channel in channels},
        label=path.parent / label if label else None,
        split=split,
        centre=row.get("centre", ""),
        scanner=row.get("scanner", ""),
        field_strength=row.get("field_strength", ""),
        volumes={channel: int(number) for channel, number in volumes.items()},
    )
