"""What is in a dataset: a summary in words, domains from a side table, and the index as a cases.tsv."""

import csv
import dataclasses
import difflib
import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calsegx import files
from calsegx.data import cases, images, side_table
from calsegx.data.layouts import table
from calsegx.interfaces import Case, DataError, Dataset, UsageError

DESCRIPTION = "dataset.json"
_CUBIC_MM = 1000.0  # per millilitre


@dataclass(frozen=True)
class Measured:
    """Size of a case, in working axes: slices, rows, columns."""

    shape: tuple[int, ...]  # voxels
    spacing_mm: tuple[float, ...]
    volumes_ml: dict[int, float]  # label id in the file -> its volume; without background


def measure(
    dataset: Dataset,
    workers: int,
    headers_only: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Measured]:
    """Grid of every case's first channel and volumes of its labels, ``workers`` cases at a time.

    Args:
        dataset: its files are only read.
        workers: threads; decompression runs in parallel.
        headers_only: read no label file; ``volumes_ml`` is then empty.
        progress: called with the number of cases that are done.

    Raises:
        DataError: for a file that cannot be used; the rest is not read then.
    """
    pool = futures.ThreadPoolExecutor(workers)
    try:
        running = [pool.submit(_measure, case, dataset.channels[0], headers_only) for case in dataset.cases]
        for done, future in enumerate(futures.as_completed(running), start=1):
            future.result()  # raises now, not after the rest is read
            progress(done)
        return [future.result() for future in running]
    finally:
        pool.shutdown(cancel_futures=True)  # also after Ctrl-C


def describe(layout: str, dataset: Dataset, measured: Sequence[Measured]) -> list[str]:
    """Lines about cases, channels, grids, labels and domains; ``measured`` is that of ``measure``."""
    subjects = len({case.subject_id for case in dataset.cases})
    unlabelled = sum(case.label is None for case in dataset.cases)
    shapes = Counter("x".join(map(str, m.shape)) for m in measured)
    spacing = np.array([m.spacing_mm for m in measured])
    statistics = (np.min(spacing, 0), np.median(spacing, 0), np.max(spacing, 0))
    low, middle, high = (" x ".join(f"{value:.3g}" for value in row) for row in statistics)
    lines = [
        f"Layout: {layout}",
        f"Cases: {len(dataset.cases)} of {subjects} subjects" + f", {unlabelled} without a label" * bool(unlabelled),
        f"Channels: {', '.join(dataset.channels)}",
        f"Shape (slices x rows x columns): {_counted(shapes)}",
        f"Spacing in mm (slices x rows x columns): median {middle}, from {low} to {high}",
        *_label_lines(dataset, measured),
    ]
    if dataset.default_classes:
        lines.append(f"Classes, unless others are asked for: {dataset.default_classes}")
    for title, column in (("Centres", "centre"), ("Scanners", "scanner"), ("Field strengths", "field_strength")):
        lines.append(f"{title}: {_counted(Counter(cases.domain(case, column) for case in dataset.cases))}")
    if unused := cases.unused_files(dataset):
        lines.append(f"Not used: {len(unused)} image files, for example {unused[0].relative_to(dataset.root)}")
    lines.append(f"Splits: {_counted(Counter(case.split or 'not assigned' for case in dataset.cases))}")
    return lines


def add_metadata(dataset: Dataset, path: Path) -> tuple[Dataset, list[str]]:
    """The dataset with centre, scanner and field strength of a side table, and what the table and it do not share.

    What the table says of a subject replaces what the layout says.

    Raises:
        DataError: for an unreadable table, one that says nothing of these, or one of other subjects.
    """
    images.require_file(path, "--metadata")
    rows = side_table.read(path)
    if not any(rows.values()):
        names = ", ".join(name for names in side_table.COLUMNS.values() for name in names)
        raise DataError(f"{path} gives no subject a centre, scanner or field strength; expected a column of {names}.")
    subjects = dict.fromkeys(side_table.plain(case.subject_id) for case in dataset.cases)
    absent, unknown = [s for s in subjects if s not in rows], [s for s in rows if s not in subjects]
    if len(absent) == len(subjects):
        near = difflib.get_close_matches(absent[0], unknown, n=1)
        raise DataError(
            f"{path} names none of the dataset's subjects ({_first(absent)}), but {_first(unknown)}"
            + (f"; is {near[0]!r} the subject {absent[0]!r}?" if near else "; name them as the dataset does.")
        )
    notes = []
    if absent:
        notes.append(f"{path} has no line for {len(absent)} subjects of the dataset: {_first(absent)}")
    if unknown:
        notes.append(f"{path} names {len(unknown)} subjects that the dataset does not have: {_first(unknown)}")
    filled = tuple(
        dataclasses.replace(case, **rows.get(side_table.plain(case.subject_id), {})) for case in dataset.cases
    )
    return dataclasses.replace(dataset, cases=filled), notes


def check_folder(dataset: Dataset, folder: Path) -> None:
    """Check that ``write_cases`` may write to ``folder``.

    Raises:
        UsageError: when it lies in the dataset, or holds another index.
    """
    files.check_outside(folder, dataset.root, "--output")
    for name, content in _contents(dataset).items():
        path = folder / name
        if path.exists() and not (path.is_file() and path.read_bytes() == content.encode()):
            raise UsageError(f"{path} is there already, with other content; name another folder or move it away.")


def write_cases(dataset: Dataset, folder: Path) -> Path:
    """Write the index as ``cases.tsv`` with absolute paths, and ``dataset.json``; returns the table's path.

    The layout ``table`` reads the same cases, labels and default classes from it.

    Raises:
        UsageError: as ``check_folder``.
        InputError: when the files cannot be written.
    """
    check_folder(dataset, folder)
    for name, content in reversed(_contents(dataset).items()):  # the table last: with it the folder is a dataset
        files.write_atomically(folder / name, content)
    return folder / table.FILE_NAME


def _contents(dataset: Dataset) -> dict[str, str]:
    chosen = [channel for channel in dataset.channels if any(channel in case.volumes for case in dataset.cases)]
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
    columns = table.COLUMNS
    files_of = [f"image:{channel}" for channel in dataset.channels] + [f"volume:{channel}" for channel in chosen]
    writer.writerow([*columns[:2], *files_of, *columns[2:]])
    for case in dataset.cases:
        writer.writerow(
            [
                case.case_id,
                case.subject_id,
                *(case.images[channel].absolute() for channel in dataset.channels),
                *(case.volumes.get(channel, "") for channel in chosen),
                case.label.absolute() if case.label else "",
                *(getattr(case, column) for column in columns[3:]),
            ]
        )
    description: dict[str, object] = {"labels": dict(dataset.labels)}
    if dataset.default_classes:
        description["default_classes"] = dataset.default_classes
    return {
        table.FILE_NAME: stream.getvalue(),
        DESCRIPTION: json.dumps(description, indent=2, ensure_ascii=False) + "\n",
    }


def _measure(case: Case, channel: str, headers_only: bool) -> Measured:
    shape, spacing = images.read_grid(case.images[channel])
    volumes: dict[int, float] = {}
    if case.label is not None and not headers_only:
        label = images.read_labels(case.label)
        ids, counts = np.unique(label.voxels[label.voxels != 0], return_counts=True)
        voxel_ml = float(np.prod(label.spacing_mm)) / _CUBIC_MM
        volumes = {int(value): int(count) * voxel_ml for value, count in zip(ids, counts, strict=True)}
    return Measured(shape, spacing, volumes)


def _label_lines(dataset: Dataset, measured: Sequence[Measured]) -> list[str]:
    """One line per label: in how many cases, and its volume in those."""
    names = {value: name for name, value in dataset.labels.items() if value != 0}
    found = {value for m in measured for value in m.volumes_ml}
    labelled = sum(case.label is not None for case in dataset.cases)
    lines = [f"Labels: {len(names)} declared"]
    for value in sorted(names.keys() | found):
        volumes = [m.volumes_ml[value] for m in measured if value in m.volumes_ml]
        line = f"  {value} {names.get(value, '(not declared)')}"
        if found:
            line += f": in {len(volumes)} of {labelled} cases"
        if volumes:
            line += f", median {np.median(volumes):.4g} ml, from {min(volumes):.4g} to {max(volumes):.4g}"
        lines.append(line)
    return lines


def _counted(counts: Counter[str], most: int = 12) -> str:
    listing = ", ".join(f"{name} ({count})" for name, count in counts.most_common(most))
    return listing + (f" and {len(counts) - most} more" if len(counts) > most else "")


def _first(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
