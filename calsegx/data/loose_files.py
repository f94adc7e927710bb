"""Image files that are in no dataset: a folder of them, or a list, as a trained model is given them to predict.

One file is one case, named after it: ``p01.nii.gz`` is the case ``p01``.  A model of several channels takes one file
per channel, numbered from 0 in the order of the model's channels as nnU-Net does (``p01_0000.nii.gz``,
``p01_0001.nii.gz``; also ``_0000`` alone for one channel), or one file that holds them all: a fourth axis, or the
colours of a PNG picture.  Masks are no cases: see ``is_result``.
"""

import contextlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from calsegx.data import cases as case_tools
from calsegx.data import images, layouts, pictures
from calsegx.interfaces import Case, DataError, Dataset

# Below 100: ``scan_2019`` is a name.
_NUMBERED = re.compile(r"(.+)_(00\d\d)")
_RESULT = re.compile(r"_prob-|[_-](uncertainty|seg|mask|label|labels|dseg|probseg)$", re.IGNORECASE)


def of_folder(root: Path, channels: Sequence[str]) -> Dataset | None:
    """The image files in ``root`` as unlabelled cases; None when it is a dataset of some layout, which goes first.

    Subfolders and hidden files are not looked at.  What ``is_result`` by its name is left out, which is said on stderr.

    Args:
        root: the folder.
        channels: the model's, each once, in its order.

    Raises:
        DataError: for a folder without images, and as ``of_files``.
    """
    if layouts.first_match(root) is not None:
        return None
    every = [path for path in sorted(root.iterdir()) if _ending(path) and not path.name.startswith(".")]
    left_out = [path for path in every if is_result(path)]
    chosen = [path for path in every if not is_result(path)]
    if not chosen:
        raise DataError(
            f"{root} is a dataset of no known layout and holds no image ({' or '.join(images.ENDINGS)}) beside "
            f"{len(left_out)} masks or predictions; name the folder in which the images lie, or write a cases.tsv."
        )
    if left_out:
        names = ", ".join(path.name for path in left_out[:3]) + (", ..." if len(left_out) > 3 else "")
        print(f"note: left out as masks or predictions, by their names: {len(left_out)} ({names})", file=sys.stderr)
    return of_files(chosen, channels, root)


def of_files(paths: Sequence[Path], channels: Sequence[str], root: Path) -> Dataset:
    """The files as unlabelled cases, sorted by name; headers are read, voxels are not.

    Args:
        paths: in any order.
        channels: the model's, each once, in its order.
        root: the dataset's folder, for messages.

    Raises:
        DataError: for a file that is missing or no image, one case twice, a channel that is missing or too many, and
            files of one case with different numbers of voxels.  Files without a readable header are passed over: they
            are refused by name when they are read.
    """
    cases: dict[str, dict[int | None, Path]] = {}
    for path in paths:
        images.require_file(path, "an image to predict")
        ending = _ending(path)
        if not ending:
            raise DataError(f"{path} is no image that can be read; expected a name in {' or '.join(images.ENDINGS)}.")
        stem = path.name[: -len(ending)]
        numbered = _NUMBERED.fullmatch(stem)
        case_id, number = (numbered[1], int(numbered[2])) if numbered else (stem, None)
        files = cases.setdefault(case_id, {})
        if files and (number in files or None in (number, *files)):
            other = files.get(number) or next(iter(files.values()))
            raise DataError(f"{other} and {path} are both of the case {case_id!r}; rename one or move it away.")
        files[number] = path
    found = tuple(_case(case_id, cases[case_id], channels) for case_id in sorted(cases))
    dataset = Dataset(root, found, tuple(channels), {})
    case_tools.check(dataset)
    return dataset


def is_result(path: Path) -> bool:
    """Whether a file is a mask or a prediction by its name.

    It holds ``_prob-``, ends (before ``.nii.gz`` or ``.png``) in ``uncertainty``, ``seg``, ``mask``, ``label``,
    ``labels``, ``dseg`` or ``probseg`` after ``_`` or ``-``, or lies beside a JSON file of its own name that
    ``launch.predict`` wrote.
    """
    stem = path.name[: -len(_ending(path))]
    record = path.with_name(f"{stem}.json")
    return bool(_RESULT.search(stem)) or (record.is_file() and b'"made_from"' in record.read_bytes())


def _ending(path: Path) -> str:
    return next((ending for ending in images.ENDINGS if path.name.lower().endswith(ending)), "")


def _case(case_id: str, files: dict[int | None, Path], channels: Sequence[str]) -> Case:
    if None in files:
        return _in_one_file(case_id, files[None], channels)
    order = ", ".join(f"{number:04d} {name}" for number, name in enumerate(channels))
    for number, name in enumerate(channels):
        if number not in files:
            raise DataError(
                f"Case {case_id!r} has no file {case_id}_{number:04d} (channel {name!r}) in "
                f"{next(iter(files.values())).parent}; the model's channels are {order} (a name "
                "that ends in _00 and two digits is a channel: rename what is none)."
            )
    for number, path in files.items():
        if number is not None and number >= len(channels):
            raise DataError(f"{path} is a channel that the model does not have; number its channels as {order}.")
    by_channel = {name: files[number] for number, name in enumerate(channels)}
    shapes = {}
    for path in by_channel.values():
        with contextlib.suppress(DataError):  # it is refused by name when the case is read, and stops no other
            shapes[path] = images.read_grid(path)[0]
    for path, shape in shapes.items():
        first = next(iter(shapes))
        if shape != shapes[first]:
            raise DataError(
                f"{first} and {path} have different shapes (slices, rows, columns): {shapes[first]} and {shape}; "
                "resample one to the other's grid."
            )
    return Case(case_id, case_id, by_channel, None, split="test")


def _in_one_file(case_id: str, path: Path, channels: Sequence[str]) -> Case:
    """The channels are the file's volumes, or a picture's colours."""
    picture = path.suffix.lower() == pictures.ENDING
    try:
        count = images.count_volumes(path)
    except DataError:
        count = len(channels)  # it is refused by name when the case is read, and stops no other
    if picture and count > 1 and set(channels) <= set(pictures.COLOURS):
        volumes = {name: pictures.COLOURS.index(name) for name in channels}
        return Case(case_id, case_id, dict.fromkeys(channels, path), None, split="test", volumes=volumes)
    if count != len(channels):
        kind = "colour(s)" if picture else "volume(s)"
        numbered = f"{case_id}_0000, {case_id}_0001, ..." if len(channels) > 1 else f"one file such as {case_id}_0000"
        raise DataError(
            f"{path} holds {count} {kind}, but the model has {len(channels)} channel(s) ({', '.join(channels)}); give "
            f"a file with as many, or {numbered} in this order."
        )
    volumes = {name: index for index, name in enumerate(channels)} if count > 1 else {}
    return Case(case_id, case_id, dict.fromkeys(channels, path), None, split="test", volumes=volumes)
