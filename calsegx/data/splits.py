"""Splits by subject: two scans of one person never lie on both sides of a split.

A file of folds is a JSON list, ``[{"name": "...", "train": [case ids], "val": [...], "test": [...]}, ...]``: nnU-Net's
``splits_final.json`` with two more keys, which nnU-Net ignores.
"""

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from calsegx import files
from calsegx.data import images as image_files
from calsegx.interfaces import Case, DataError, Dataset, UsageError

PARTS = ("train", "val", "test")
Fold = Mapping[str, Any]  # part -> list of case ids, and perhaps a name
T = TypeVar("T")


def assign(dataset: Dataset, val_fraction: float, test_fraction: float, seed: int = 0) -> Dataset:
    """Give every case without a split one; cases that have one keep it.

    Subjects are drawn, not cases: all cases of a subject go together, and join the subject's other cases if
    those have a split.  The draw is even over scanners and centres.  A split that the dataset names already
    is not drawn: with test cases given, only train and val are.  A fraction above 0 yields at least one
    subject as long as one is left to train on.  The order of the subjects is that of SHA-256(seed, subject),
    so it depends on nothing else.

    Args:
        dataset: its cases may have splits.
        val_fraction: of the subjects to draw, 0..1.
        test_fraction: of the subjects to draw, 0..1.
        seed: of the draw; the same for every training seed, so that runs can be compared.

    Raises:
        DataError: when a subject has cases in two splits.
    """
    given: dict[str, str] = {}  # subject -> split
    for case in dataset.cases:
        if case.split and given.setdefault(case.subject_id, case.split) != case.split:
            raise DataError(
                f"Subject {case.subject_id!r} is in the splits {given[case.subject_id]!r} and {case.split!r} of "
                f"{dataset.root} (case {case.case_id!r}); put all cases of a subject into one split."
            )
    # Unlabelled test images, as nnU-Net folders have them, are for prediction; they name no split to evaluate on.
    named = {case.split for case in dataset.cases if case.split and case.label is not None}
    strata = {}
    for case in dataset.cases:
        if case.subject_id not in given:
            strata.setdefault(case.subject_id, (case.scanner, case.centre))
    subjects = sorted(strata, key=lambda subject: (strata[subject], shuffled(subject, seed)))
    drawn = dict.fromkeys(subjects, "train")
    for split, fraction in (("test", test_fraction), ("val", val_fraction)):
        if split in named:
            continue
        free = [subject for subject in subjects if drawn[subject] == "train"]
        for subject in evenly(free, rounded(fraction * len(subjects), len(free))):
            drawn[subject] = split
    split_of = {**drawn, **given}
    cases = tuple(dataclasses.replace(case, split=split_of[case.subject_id]) for case in dataset.cases)
    return dataclasses.replace(dataset, cases=cases)


def read(path: Path) -> list[Fold]:
    """The folds of a file: this project's, or nnU-Net's ``splits_final.json``; other keys of a fold are ignored.

    Raises:
        UsageError: when there is no such file, or it holds anything else.
    """
    form = 'expected a list of folds such as [{"train": ["case1"], "val": ["case2"], "test": ["case3"]}]'
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise UsageError(f"The file of folds {path} does not exist; make one with launch.split.") from error
    except (ValueError, OSError) as error:
        raise UsageError(f"{path} is not readable JSON ({error}); {form}.") from error
    if not isinstance(content, list) or not content:
        raise UsageError(f"{path} holds no list of folds; {form}.")
    folds = []
    for number, fold in enumerate(content):
        parts = {part: fold[part] for part in PARTS if part in fold} if isinstance(fold, dict) else {}
        lists = all(isinstance(ids, list) and all(isinstance(i, str) for i in ids) for ids in parts.values())
        if not {"train", "val"} <= parts.keys() or not lists:
            raise UsageError(f"{path}, fold {number}: the lists train and val of case ids are missing; {form}.")
        folds.append({"name": str(fold.get("name", "")), **parts})
    return folds


def check_output(path: Path, dataset: Dataset) -> None:
    """Refuse a place for a file of folds, before the work.

    Raises:
        UsageError: when it lies in the dataset's folder, or is a folder.
    """
    files.check_outside(path, dataset.root, "--output")
    if path.is_dir():
        raise UsageError(f"--output={path} is a folder; name a file in it, such as {path / 'splits.json'}.")


def write(path: Path, folds: Sequence[Fold]) -> None:
    """Write a file of folds, whole or not at all.

    Raises:
        UsageError: when it would replace anything else, such as folds that runs refer to.
    """
    content = json.dumps(folds, indent=2) + "\n"
    if path.exists() and path.read_bytes() != content.encode():
        raise UsageError(f"--output={path} exists and holds something else; remove it or name another file.")
    files.write_atomically(path, content)


def choose(path: Path, number: int) -> Fold:
    """One fold of a file.

    Raises:
        UsageError: as ``read``, and when it has no such fold.
    """
    folds = read(path)
    if not 0 <= number < len(folds):
        raise UsageError(
            f"--config.data.fold={number} is not in {path}, which has {len(folds)} fold(s), numbered from 0 to "
            f"{len(folds) - 1}."
        )
    return folds[number]


def apply(dataset: Dataset, fold: Fold, where: str) -> Dataset:
    """The dataset with the fold's splits, checked; a case in no part has the split ``""`` and is not used.

    Test cases of the dataset's own (nnU-Net's imagesTs) stay test cases where the fold has no part ``test``.

    Raises:
        UsageError, DataError: as ``check``.
    """
    check(dataset, fold, where)
    split_of = _split_of(dataset, fold)
    cases = tuple(dataclasses.replace(case, split=split_of.get(case.case_id, "")) for case in dataset.cases)
    return dataclasses.replace(dataset, cases=cases)


def check(dataset: Dataset, fold: Fold, where: str, hashes: Mapping[str, Iterable[str]] | None = None) -> None:
    """Refuse a fold that leaks: no case, subject or image may be in two parts.

    So the calibration's data (``val``) are never the test's.

    Args:
        dataset: whose cases the fold names.
        fold: to check.
        where: the fold is found, for messages: a file and a number.
        hashes: case id -> ``image_hashes``; without them images are not compared.

    Raises:
        UsageError: for a case that the dataset does not have.
        DataError: for a leak.
    """
    known = {case.case_id: case for case in dataset.cases}
    listed: dict[str, str] = {}
    for part in PARTS:
        for case_id in fold.get(part, ()):
            if case_id not in known:
                near = difflib.get_close_matches(case_id, known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise UsageError(f"{where}: {part} names the case {case_id!r}, which {dataset.root} lacks.{hint}")
            if case_id in listed:
                raise DataError(f"{where}: case {case_id!r} is in {listed[case_id]} and again in {part}; remove one.")
            listed[case_id] = part
    subjects: dict[str, tuple[str, str]] = {}  # subject -> (part, case)
    images: dict[str, tuple[str, str]] = {}  # hash -> (part, case)
    for case_id, part in _split_of(dataset, fold).items():
        subject = known[case_id].subject_id
        other, first = subjects.setdefault(subject, (part, case_id))
        if other != part:
            raise DataError(
                f"{where}: subject {subject!r} is in {other} (case {first!r}) and in {part} (case {case_id!r}); put "
                "all cases of a subject into one part."
            )
        for digest in hashes[case_id] if hashes else ():
            other, first = images.setdefault(digest, (part, case_id))
            if other != part:
                raise DataError(
                    f"{where}: cases {first!r} in {other} and {case_id!r} in {part} hold the same image under two "
                    "subjects; give both the subject_id of one subject in cases.tsv, or remove one."
                )


def image_hashes(case: Case) -> frozenset[str]:
    """``images.voxels_sha256`` of each of the case's images: copies are found whatever their files look like.

    Raises:
        DataError: for a file that cannot be read.
    """
    return frozenset(
        image_files.voxels_sha256(image_files.read(path, case.volumes.get(channel)).voxels)
        for channel, path in case.images.items()
    )


def evenly(items: Sequence[T], count: int) -> list[T]:
    """``count`` of the items, spread evenly over their order."""
    positions = np.floor((np.arange(count) + 0.5) * len(items) / max(count, 1)).astype(int)
    return [items[position] for position in positions]


def rounded(share: float, available: int) -> int:
    """How many of the ``available`` a share above 0 is: at least one, but never all."""
    return max(min(max(round(share), 1), available - 1), 0) if share > 0 else 0


def shuffled(name: str, seed: int) -> str:
    """A sort key that puts names into an order that only they and the seed determine."""
    return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()


def _split_of(dataset: Dataset, fold: Fold) -> dict[str, str]:
    given = {case_id: part for part in PARTS for case_id in fold.get(part, ())}
    if "test" not in fold:
        kept = {case.case_id: "test" for case in dataset.cases if case.split == "test"}
        return {**kept, **given}
    return given
