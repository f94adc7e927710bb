"""A user's own prompts: points and boxes from a table or a JSON file, in voxels or in millimetres."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from calsegx.data import frames, images
from calsegx.data.prompts import BACKGROUND, BOX_END, BOX_START, FOREGROUND, PADDING
from calsegx.interfaces import Case, DataError, Prompts, Volume

_VOXEL, _WORLD = ("i", "j", "k"), ("x", "y", "z")
_FORMS = '{"i": .., "j": .., "k": .., "label": ..}, {"x": .., "y": .., "z": .., "label": ..} or {"box": [6 indices]}'
_EDGE = 0.5 + 1e-3  # of a voxel: how far from the centre of the outermost one a point may lie


@dataclass(frozen=True)
class Clicks:
    """The clicks of one case, as the file gives them."""

    path: Path
    places: Sequence[str]  # [N] where in the file each stands: "line 3", or "case[2]" of a JSON file
    coordinates: np.ndarray  # float [N, 3]
    world: np.ndarray  # bool [N]: RAS+ millimetres, or else 0-based voxel indices along the image file's own axes
    labels: np.ndarray  # [N] 1 foreground, 0 background, 2 and 3 two opposite corners of a box


class _Click(NamedTuple):
    case_id: str
    place: str
    coordinates: tuple[float, ...]
    world: bool
    label: int


def read_clicks(path: Path) -> dict[str, Clicks]:
    """A user's clicks by case: a table (``.csv`` with commas, else with tabs) or ``.json``.

    A table has the columns ``case_id i j k label`` or ``case_id x y z label``; a JSON file maps a case to a list of
    objects with the same keys, or ``{"box": [i0, j0, k0, i1, j1, k1]}``.  ``i j k`` are 0-based voxel indices along the
    image file's own axes, as viewers show them; ``x y z`` are RAS+ millimetres.  Labels: 1 foreground, 0 background, 2
    and 3 two opposite corners of a box (in one slice of the working orientation).

    Raises:
        DataError: naming the line and column, or the JSON entry, of what is wrong.
    """
    read = _from_json if path.suffix.lower() == ".json" else _from_table
    by_case: dict[str, list[_Click]] = {}
    try:
        for click in read(path, path.read_text(encoding="utf-8-sig")):
            by_case.setdefault(click.case_id, []).append(click)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"The clicks file {path} cannot be read ({error}); expected a table or JSON.") from error
    if not by_case:
        raise DataError(f"{path} holds no clicks; add one line per click.")
    return {
        case_id: Clicks(
            path,
            [click.place for click in found],
            np.array([click.coordinates for click in found], float),
            np.array([click.world for click in found]),
            np.array([click.label for click in found]),
        )
        for case_id, found in by_case.items()
    }


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
            raise DataError(f"{table.path}, {table.places[0]}: {case_id!r} is not among the cases to predict.")
        _check_protocol(table, case_id, protocol)


def check_places(
    clicks: Mapping[str, Clicks], cases: Sequence[Case], protocol: str, channel: str, slice_axis: str = "axial"
) -> None:
    """Before any work: the clicks of every case fit its image, whose header alone is read.

    An image without a readable header is passed over here; it is refused by name when its case is read.

    Args:
        clicks: of ``check_clicks``.
        cases: of ``check_clicks``.
        protocol: the model's.
        channel: whose grid the clicks are on: the model's first.
        slice_axis: the model's.

    Raises:
        DataError: as ``from_clicks``.
    """
    for case in cases:
        try:
            reference = images.read_reference(case.images[channel], slice_axis)
        except DataError:
            continue
        from_clicks(case_clicks(clicks, case.case_id), case.case_id, reference, protocol)


def asked(protocol: str) -> str:
    """What a user is to give a model of ``protocol``, in words."""
    if protocol == "gt_box":
        return "a box (corners of the labels 2 and 3) on every slice to segment"
    where = "the target" if protocol == "volume_points" else "the target in every slice to segment"
    return f"clicks (label 1 on {where}, 0 beside it)"


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
    table: Clicks, case_id: str, volume: Volume, protocol: str, geometry: frames.FrameGeometry | None = None
) -> tuple[np.ndarray, Prompts]:
    """Slices int ``[n]`` with clicks, and their prompts in native ``(x, y)`` pixels.

    With points a slice has at least one foreground point; the slices' points are padded (label -1) to the same
    number, at least two.  With ``gt_box`` a slice has one corner 2 and one corner 3.  With ``volume_points`` the
    clicks are those of the volume, and every slice gets all of them.

    A working grid with other slices gets a click on the slice that holds the click's; clicks of several slices of the
    file may come together there (of boxes: the box round them).

    Args:
        table: of ``read_clicks``.
        case_id: for messages.
        volume: the image's grid.
        protocol: the model's.
        geometry: of the case; None: the working grid is the file's.

    Raises:
        DataError: for clicks outside the image or incomplete slices.
    """
    _check_protocol(table, case_id, protocol)
    voxels = _to_working(table, case_id, volume)
    if protocol == "volume_points":
        _check_foreground(table, case_id, np.arange(len(voxels)), "the volume")
        depth = geometry.depths[1] if geometry else len(volume.voxels)
        points = np.tile(voxels[:, [2, 1]].astype(np.float32), (depth, 1, 1))
        return np.arange(depth), Prompts(points=points, labels=np.tile(table.labels.astype(np.int32), (depth, 1)))
    holding = frames.working_slices(voxels[:, 0], geometry) if geometry else voxels[:, 0]
    slices = np.unique(holding)
    sources = [np.flatnonzero(holding == number) for number in slices]
    if protocol == "gt_box":
        _check_corners(table, case_id, voxels)
        corners = [voxels[rows][:, [2, 1]] for rows in sources]
        boxes = [(*found.min(axis=0), *found.max(axis=0)) for found in corners]  # in any order of the corners
        return slices, Prompts(boxes=np.array(boxes, np.float32))
    for number in np.unique(voxels[:, 0]):
        _check_foreground(table, case_id, np.flatnonzero(voxels[:, 0] == number), "the slice of this click")
    points = np.zeros((len(slices), max(2, *map(len, sources)), 2), np.float32)
    labels = np.full(points.shape[:2], PADDING, np.int32)
    for row, here in enumerate(sources):
        points[row, : len(here)] = voxels[here][:, [2, 1]]
        labels[row, : len(here)] = table.labels[here]
    return slices, Prompts(points=points, labels=labels)


def _from_table(path: Path, text: str) -> Iterator[_Click]:
    separator, name = (",", "comma") if path.suffix.lower() == ".csv" else ("\t", "tab")
    rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text), delimiter=separator)]
    header = tuple(rows[0]) if rows else ()
    if header not in (("case_id", *_VOXEL, "label"), ("case_id", *_WORLD, "label")):
        raise DataError(
            f"{path}, line 1: expected the {name}-separated columns case_id, i, j, k, label (voxel indices) or "
            f"case_id, x, y, z, label (millimetres); got {', '.join(header) or 'nothing'}."
        )
    world = header[1:4] == _WORLD
    for line, row in enumerate(rows[1:], start=2):
        if not any(row):
            continue
        if len(row) != len(header) or not row[0]:
            raise DataError(f"{path}, line {line}: expected {len(header)} fields ({', '.join(header)}); got {row}.")
        numbers = []
        for column, cell in zip(header[1:], row[1:], strict=True):
            integer = column == "label" or not world
            try:
                value = int(cell) if integer else float(cell)
            except ValueError:
                value = cell  # what it is not is said below, as for JSON
            numbers.append(_number(f"{path}, line {line}, column {column}", column, value))
        yield _Click(row[0], f"line {line}", tuple(numbers[:3]), world, numbers[3])


def _from_json(path: Path, text: str) -> Iterator[_Click]:
    try:
        content = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}); expected a list of clicks for every case id.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected an object with a list of clicks for every case id.")
    for case_id, entries in content.items():
        if not isinstance(entries, list):
            raise DataError(f"{path}, {case_id}: expected a list of clicks; got {entries!r}.")
        for number, entry in enumerate(entries):
            place = f"{case_id}[{number}]"
            keys = tuple(entry) if isinstance(entry, dict) else ()
            axes = next((axes for axes in (_VOXEL, _WORLD) if set(keys) == {*axes, "label"}), None)
            if axes:
                found = [_number(f"{path}, {place}, {key}", key, entry[key]) for key in (*axes, "label")]
                yield _Click(case_id, place, tuple(found[:3]), axes == _WORLD, int(found[3]))
            elif keys == ("box",) and isinstance(entry["box"], list) and len(entry["box"]) == 6:
                found = [_number(f"{path}, {place}, box", "box", value) for value in entry["box"]]
                yield _Click(case_id, place, tuple(found[:3]), False, BOX_START)
                yield _Click(case_id, place, tuple(found[3:]), False, BOX_END)
            else:
                raise DataError(f"{path}, {place}: expected {_FORMS}; got {json.dumps(entry)}.")


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; Python would keep the last of two equal keys and say nothing."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} stands there twice")
    return found


def _number(where: str, column: str, value: Any) -> Any:
    """A cell as it is, if it is what its column holds."""
    kind = float if column in _WORLD else int
    if isinstance(value, bool) or not isinstance(value, int | kind) or not abs(value) < 1e9:
        expected = {
            "label": "is not an integer; expected a label 0..3.",
            **dict.fromkeys(_WORLD, "is not a number; expected RAS+ millimetres."),
        }
        voxel = "is not an integer; expected a 0-based voxel index (millimetres are named x, y, z)."
        raise DataError(f"{where}: {value!r} {expected.get(column, voxel)}")
    if column == "label" and value not in (BACKGROUND, FOREGROUND, BOX_START, BOX_END):
        raise DataError(f"{where}: {value}; expected 1 (foreground), 0 (background), 2 or 3 (box corners).")
    return value


def _to_working(table: Clicks, case_id: str, volume: Volume) -> np.ndarray:
    """``[N, 3]`` indices (slice, row, column) of clicks."""
    targets, flips = volume.orientation.astype(int).T
    shape = np.array(volume.voxels.shape)[targets]  # along the file's axes
    homogeneous = np.concatenate([table.coordinates, np.ones((len(table.coordinates), 1))], axis=1)
    working = (homogeneous @ np.linalg.inv(volume.affine).T)[:, targets]
    as_world = np.where(flips == 1, working, shape - 1 - working)
    as_voxels = table.coordinates
    position = np.where(table.world[:, None], as_world, as_voxels)
    outside = np.flatnonzero(~_inside(position, shape))
    if len(outside):
        first = outside[0]
        given = ", ".join(f"{value:g}" for value in table.coordinates[first])
        size = " x ".join(map(str, shape))
        if table.world[first]:
            there = ", ".join(f"{value:.1f}" for value in as_world[first])
            text = f"({given}) mm is voxel ({there}), outside the image of case {case_id!r} of {size} voxels"
            hint = "they would be inside as voxel indices, which are named i, j, k"
            fits = _inside(as_voxels[first], shape)
        else:
            text = f"the voxel ({given}) is outside the image of case {case_id!r} of {size} voxels, counted from 0"
            hint = "they would be inside as millimetres, which are named x, y, z"
            fits = _inside(as_world[first], shape)
        remedy = hint if fits else "give positions in the image file itself, not in a resized picture or another image"
        raise DataError(f"{table.path}, {table.places[first]}: {text}; {remedy}.")
    index = np.clip(np.rint(position), 0, shape - 1).astype(int)
    found = np.empty_like(index)
    found[:, targets] = np.where(flips == 1, index, shape - 1 - index)
    return found


def _inside(position: np.ndarray, shape: np.ndarray) -> np.ndarray:
    return np.all((position >= -_EDGE) & (position <= shape - 1 + _EDGE), axis=-1)


def _check_foreground(table: Clicks, case_id: str, rows: np.ndarray, where: str) -> None:
    if FOREGROUND not in table.labels[rows]:
        raise DataError(
            f"{table.path}, {table.places[rows[0]]}: {where} in case {case_id!r} has only background clicks; add a "
            "foreground click (label 1)."
        )


def _check_corners(table: Clicks, case_id: str, voxels: np.ndarray) -> None:
    for number in np.unique(voxels[:, 0]):
        here = np.flatnonzero(voxels[:, 0] == number)
        where = f"{table.path}, {table.places[here[0]]}"
        if sorted(table.labels[here]) != [BOX_START, BOX_END]:
            raise DataError(
                f"{where}: a slice of case {case_id!r} needs one corner of label 2 and one of label 3; got the labels "
                f"{table.labels[here].tolist()}, so give every slice its own box."
            )
        first, second = voxels[here][:, 1:]
        if (first == second).any():
            raise DataError(f"{where}: the box in case {case_id!r} has no area; give two opposite corners.")


def _check_protocol(table: Clicks, case_id: str, protocol: str) -> None:
    if protocol == "none":
        raise DataError(
            f"{table.path}, {table.places[0]}: the model was trained without prompts (protocol none), so it takes no "
            "clicks; leave the file out."
        )
    box = (table.labels == BOX_START) | (table.labels == BOX_END)
    wrong = np.flatnonzero(~box if protocol == "gt_box" else box)
    if len(wrong):
        kind, labels = ("boxes", "2 and 3") if protocol == "gt_box" else ("points", "0 and 1")
        raise DataError(
            f"{table.path}, {table.places[wrong[0]]}: the model was trained with {kind} (protocol {protocol}); "
            f"expected the labels {labels} in case {case_id!r}, got {table.labels[wrong[0]]}."
        )
