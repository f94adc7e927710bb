"""Prompts: CalSAM's protocol, derived from reference labels, and a user's own clicks from a file."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

from calsegx.interfaces import Case, DataError, Prompts, Volume

BACKGROUND, FOREGROUND, BOX_START, BOX_END, PADDING = 0, 1, 2, 3, -1
_COLUMNS = ("case_id", "i", "j", "k", "label")


@dataclass(frozen=True)
class Clicks:
    """The clicks of one case, as the file gives them."""

    path: Path
    lines: np.ndarray  # [N] line numbers in the file
    voxels: np.ndarray  # [N, 3] 0-based indices along the image file's own axes
    labels: np.ndarray  # [N] 1 foreground, 0 background, 2 and 3 two opposite corners of a box


def points_from_labels(foreground: np.ndarray, spacing_mm: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """One foreground and one background point per slice, from the reference mask (CalSAM's protocol).

    Foreground: the mask's centroid, or, where that lies outside the mask (rings, several parts), the mask
    pixel nearest to it.  Background: the pixel farthest from the mask, the first in row order on ties.

    Args:
        foreground: bool ``[n, H, W]``.
        spacing_mm: of rows and columns.

    Returns:
        Points float32 ``[n, 2, 2]``, ``(x, y)`` in native pixels, foreground first, and their labels int32
        ``[n, 2]``.  An empty mask has no points and a mask that fills the slice no background point: label
        -1 at (0, 0).
    """
    points = np.zeros((len(foreground), 2, 2), np.float32)
    labels = np.full((len(foreground), 2), PADDING, np.int32)
    for mask, point, label in zip(foreground, points, labels, strict=True):
        if not mask.any():
            continue
        point[0], label[0] = _centre(mask, spacing_mm), FOREGROUND
        if not mask.all():
            distance = np.asarray(ndimage.distance_transform_edt(~mask, sampling=spacing_mm))
            row, column = np.unravel_index(np.argmax(distance), mask.shape)
            point[1], label[1] = (column, row), BACKGROUND
    return points, labels


def boxes_from_labels(foreground: np.ndarray) -> np.ndarray:
    """Tight boxes float32 ``[n, 4]``: first and last mask pixel ``(x0, y0, x1, y1)``, as MedSAM has them.

    Raises:
        ValueError: for a slice without foreground.
    """
    boxes = np.zeros((len(foreground), 4), np.float32)
    for mask, box in zip(foreground, boxes, strict=True):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if not len(rows):
            raise ValueError("a box needs foreground in every slice")
        box[:] = columns[0], rows[0], columns[-1], rows[-1]
    return boxes


def read_clicks(path: Path) -> dict[str, Clicks]:
    """A user's clicks: a tab-separated file with the columns ``case_id i j k label``.

    ``i j k`` are 0-based voxel indices along the image file's own axes, as viewers show them.  Labels: 1
    foreground, 0 background, 2 and 3 two opposite corners of a box (in one slice of the working orientation).

    Raises:
        DataError: naming the line and column of what is wrong.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            rows = [[cell.strip() for cell in row] for row in csv.reader(stream, delimiter="\t")]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"The clicks file {path} cannot be read ({error}); expected tab-separated text.") from error
    if not rows or tuple(rows[0]) != _COLUMNS:
        found = rows[0] if rows else "nothing"
        raise DataError(f"{path}, line 1: expected the tab-separated columns {', '.join(_COLUMNS)}; got {found}.")
    by_case: dict[str, list[tuple[int, ...]]] = {}
    for line, row in enumerate(rows[1:], start=2):
        if not any(row):
            continue
        if len(row) != len(_COLUMNS) or not row[0]:
            raise DataError(f"{path}, line {line}: expected {len(_COLUMNS)} fields ({', '.join(_COLUMNS)}); got {row}.")
        by_case.setdefault(row[0], []).append((line, *(_integer(path, line, n, row) for n in range(1, 5))))
    if not by_case:
        raise DataError(f"{path} holds no clicks; add one line per click.")
    tables = {case_id: np.array(table) for case_id, table in by_case.items()}
    return {case_id: Clicks(path, table[:, 0], table[:, 1:4], table[:, 4]) for case_id, table in tables.items()}


def check_clicks(clicks: Mapping[str, Clicks], cases: Sequence[Case], protocol: str) -> None:
    """Before any work: every case has clicks, every click a case, and all are of the model's protocol.

    Raises:
        DataError: naming the case.
    """
    known = {case.case_id for case in cases}
    for case_id in known:
        case_clicks(clicks, case_id)
    for case_id, table in clicks.items():
        if case_id not in known:
            raise DataError(f"{table.path}, line {table.lines[0]}: {case_id!r} is not among the cases to predict.")
        _check_protocol(table, case_id, protocol)


def case_clicks(clicks: Mapping[str, Clicks], case_id: str) -> Clicks:
    """The clicks of one case.

    Raises:
        DataError: when there are none.
    """
    if case_id not in clicks:
        path = next(iter(clicks.values())).path if clicks else "The clicks file"
        raise DataError(f"{path} has no clicks for case {case_id!r}; add some, or leave the case out.")
    return clicks[case_id]


def from_clicks(
    table: Clicks, case_id: str, volume: Volume, protocol: str, depths: tuple[int, int] | None = None
) -> tuple[np.ndarray, Prompts]:
    """Slices int ``[n]`` with clicks, and their prompts in native ``(x, y)`` pixels.

    With points a slice has at least one foreground point; the slices' points are padded (label -1) to the same
    number, at least two.  With ``gt_box`` a slice has one corner 2 and one corner 3.  With ``volume_points`` the
    clicks are those of the volume, and every slice gets all of them.

    Args:
        table: of ``read_clicks``.
        case_id: for messages.
        volume: the image's grid.
        protocol: the model's.
        depths: number of slices of the file and of the working grid that is asked for; None: the file's own.

    Raises:
        DataError: for clicks outside the image or incomplete slices.
    """
    _check_protocol(table, case_id, protocol)
    working = _to_working(table, case_id, volume)
    if depths is not None:  # the working slice that holds the middle of the file's
        working[:, 0] = (2 * working[:, 0] + 1) * depths[1] // (2 * depths[0])
    slices = np.unique(working[:, 0])
    if protocol == "volume_points":
        return _on_every_slice(table, case_id, working, depths[1] if depths else len(volume.voxels))
    if protocol == "gt_box":
        return slices, Prompts(boxes=_boxes(table, case_id, working, slices))
    most = max(2, *(np.count_nonzero(working[:, 0] == number) for number in slices))
    points = np.zeros((len(slices), most, 2), np.float32)
    labels = np.full((len(slices), most), PADDING, np.int32)
    for row, number in enumerate(slices):
        here = np.flatnonzero(working[:, 0] == number)
        _check_foreground(table, case_id, here, "the slice of this click")
        points[row, : len(here)] = working[here][:, [2, 1]]
        labels[row, : len(here)] = table.labels[here]
    return slices, Prompts(points=points, labels=labels)


def _on_every_slice(table: Clicks, case_id: str, working: np.ndarray, depth: int) -> tuple[np.ndarray, Prompts]:
    _check_foreground(table, case_id, np.arange(len(working)), "the volume")
    points = np.tile(working[:, [2, 1]].astype(np.float32), (depth, 1, 1))
    return np.arange(depth), Prompts(points=points, labels=np.tile(table.labels.astype(np.int32), (depth, 1)))


def _check_foreground(table: Clicks, case_id: str, rows: np.ndarray, where: str) -> None:
    if FOREGROUND not in table.labels[rows]:
        raise DataError(
            f"{table.path}, line {table.lines[rows[0]]}: {where} in case {case_id!r} has only background clicks; add a "
            "foreground click (label 1)."
        )


def _centre(mask: np.ndarray, spacing_mm: tuple[float, float]) -> tuple[float, float]:
    pixels = np.argwhere(mask)
    centroid = pixels.mean(axis=0)
    if not mask[tuple(np.rint(centroid).astype(int))]:
        distance = np.square((pixels - centroid) * spacing_mm).sum(axis=1)
        centroid = pixels[np.argmin(distance)]
    return centroid[1], centroid[0]


def _boxes(table: Clicks, case_id: str, working: np.ndarray, slices: np.ndarray) -> np.ndarray:
    boxes = np.zeros((len(slices), 4), np.float32)
    for row, number in enumerate(slices):
        here = np.flatnonzero(working[:, 0] == number)
        if sorted(table.labels[here]) != [BOX_START, BOX_END]:
            raise DataError(
                f"{table.path}, line {table.lines[here[0]]}: a slice of case {case_id!r} needs one corner of label 2 "
                f"and one of label 3; got the labels {table.labels[here].tolist()}."
            )
        corners = working[here][:, [2, 1]]
        if (corners[0] == corners[1]).any():
            raise DataError(
                f"{table.path}, line {table.lines[here[0]]}: the box in case {case_id!r} has no area; give two "
                "opposite corners."
            )
        boxes[row] = *corners.min(axis=0), *corners.max(axis=0)  # in any order of the corners
    return boxes


def _to_working(table: Clicks, case_id: str, volume: Volume) -> np.ndarray:
    """``[N, 3]`` indices (slice, row, column) of clicks given along the file's axes."""
    working = np.empty_like(table.voxels)
    for axis, (target, flip) in enumerate(volume.orientation.astype(int)):
        size = volume.voxels.shape[target]
        index = table.voxels[:, axis]
        outside = np.flatnonzero((index < 0) | (index >= size))
        if len(outside):
            first = outside[0]
            raise DataError(
                f"{table.path}, line {table.lines[first]}, column {'ijk'[axis]}: {index[first]} is outside the image "
                f"of case {case_id!r}; expected a voxel index from 0 to {size - 1}, not millimetres."
            )
        working[:, target] = index if flip == 1 else size - 1 - index
    return working


def _check_protocol(table: Clicks, case_id: str, protocol: str) -> None:
    box = (table.labels == BOX_START) | (table.labels == BOX_END)
    wrong = np.flatnonzero(~box if protocol == "gt_box" else box)
    if len(wrong):
        kind, labels = ("boxes", "2 and 3") if protocol == "gt_box" else ("points", "0 and 1")
        raise DataError(
            f"{table.path}, line {table.lines[wrong[0]]}: the model was trained with {kind} (protocol {protocol}); "
            f"expected the labels {labels} in case {case_id!r}, got {table.labels[wrong[0]]}."
        )


def _integer(path: Path, line: int, column: int, row: Sequence[str]) -> int:
    try:
        value = int(row[column])
    except ValueError as error:
        raise DataError(
            f"{path}, line {line}, column {_COLUMNS[column]}: {row[column]!r} is not an integer; expected "
            + ("a label 0..3." if column == 4 else "a 0-based voxel index.")
        ) from error
    if column == 4 and value not in (BACKGROUND, FOREGROUND, BOX_START, BOX_END):
        raise DataError(
            f"{path}, line {line}, column label: {value}; expected 1 (foreground), 0 (background), 2 or 3 (box "
            "corners)."
        )
    return value
