"""Splits by subject: two scans of one person never lie on both sides of a split."""

import dataclasses
import hashlib

import numpy as np

from calsegx.interfaces import DataError, Dataset


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
    subjects = sorted(strata, key=lambda subject: (strata[subject], _shuffled(subject, seed)))
    drawn = dict.fromkeys(subjects, "train")
    for split, fraction in (("test", test_fraction), ("val", val_fraction)):
        if split in named:
            continue
        free = [subject for subject in subjects if drawn[subject] == "train"]
        for subject in _evenly(free, fraction * len(subjects)):
            drawn[subject] = split
    split_of = {**drawn, **given}
    cases = tuple(dataclasses.replace(case, split=split_of[case.subject_id]) for case in dataset.cases)
    return dataclasses.replace(dataset, cases=cases)


def _evenly(subjects: list[str], share: float) -> list[str]:
    """About ``share`` of the subjects, spread evenly over their order; never all of them."""
    count = min(max(round(share), 1), len(subjects) - 1) if share > 0 else 0
    if count <= 0:
        return []
    positions = np.floor((np.arange(count) + 0.5) * len(subjects) / count).astype(int)
    return [subjects[position] for position in positions]


def _shuffled(subject: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}:{subject}".encode()).hexdigest()
