"""A whole dataset, read to its last byte: every case's own findings, and those that need all cases at once."""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass
from typing import Any

from calsegx.data import cases as case_tools
from calsegx.data.examine import LABEL, Contents, Examined, Finding, absent, examine
from calsegx.interfaces import Case, Dataset

LEVELS = ("error", "warning", "note")
MOST_WORKERS = 16
FEWEST_SUBJECTS = 2  # of a domain: one alone cannot be both trained and tested on


@dataclass(frozen=True)
class Report:
    """What was found in a dataset."""

    dataset: Dataset
    examined: tuple[Examined, ...]  # in the dataset's order
    findings: tuple[Finding, ...]  # errors first, then by check and case

    def count(self, level: str) -> int:
        """How many findings of a level."""
        return sum(finding.level == level for finding in self.findings)

    def dataset_fails(self) -> bool:
        """Whether there is an error that no case has for itself, such as a subject in two splits."""
        return any(finding.level == "error" and not finding.case_id for finding in self.findings)

    def failing(self) -> dict[str, str]:
        """The cases with errors: each one's first sentence by case id."""
        failing: dict[str, str] = {}
        for finding in self.findings:
            if finding.level == "error" and finding.case_id:
                failing.setdefault(finding.case_id, finding.message)
        return failing

    def to_json(self) -> dict[str, Any]:
        """Findings, and what every readable file holds, as JSON values."""
        return {
            "dataset": str(self.dataset.root),
            "valid": not self.count("error"),
            "counts": {level: self.count(level) for level in LEVELS},
            "findings": [finding._asdict() for finding in self.findings],
            "cases": {
                item.case.case_id: {
                    "subject_id": item.case.subject_id,
                    "files": {role: contents._asdict() for role, contents in item.files.items()},
                }
                for item in self.examined
            },
        }


def verify(dataset: Dataset, workers: int = 0, done: Callable[[int, str], None] | None = None) -> Report:
    """Read every file of every case and check it; nothing that is wrong with one case stops another.

    Args:
        dataset: of ``layouts.detect``; its files need not exist.
        workers: threads, since decompression, hashing and sorting run beside each other; 0: two for each core, because
            one of the two often waits for the interpreter, at most 16, because each holds about 200 MB.
        done: called with the number of cases done and the last one's id.
    """
    workers = workers or min(2 * (os.cpu_count() or 1), MOST_WORKERS)
    pool = futures.ThreadPoolExecutor(workers, thread_name_prefix="verify")
    examined: list[Examined] = []
    try:
        for item in pool.map(lambda case: examine(case, dataset.labels), dataset.cases):
            examined.append(item)
            if done:
                done(len(examined), item.case.case_id)
    finally:
        pool.shutdown(cancel_futures=True)  # else Ctrl-C would wait for all cases
    findings = [finding for item in examined for finding in item.findings]
    findings += [Finding("error", "case-id", case.case_id, "", said) for case, said in case_tools.problems(dataset)]
    for check in (_duplicates, _subjects, _splits, _domains, _labels, _unused):
        findings += check(dataset, examined)
    place = {case.case_id: number for number, case in enumerate(dataset.cases)} | {"": len(dataset.cases)}
    findings.sort(key=lambda finding: (LEVELS.index(finding.level), finding.check, place[finding.case_id]))
    return Report(dataset, tuple(examined), tuple(findings))


def _duplicates(dataset: Dataset, examined: Sequence[Examined]) -> Iterator[Finding]:
    """Files with the same voxels; constant ones are found for themselves."""
    by_hash: dict[str, list[tuple[Case, str, Contents]]] = defaultdict(list)
    for item in examined:
        for role, contents in item.files.items():
            if not contents.constant:
                by_hash[contents.sha256].append((item.case, role, contents))
    for first, *others in by_hash.values():
        for other in others:
            # An image that equals a label is the image's fault, whichever comes first.
            pair = (other, first) if other[1] == LABEL != first[1] else (first, other)
            (kept_case, kept_role, kept), (case, role, contents) = pair
            if kept_role == LABEL != role:
                level, check, remedy = "error", "label-as-image", "one of them is in the other's place: export it again"
            elif case.case_id == kept_case.case_id:
                level, check, remedy = "warning", "duplicate", "check that no modality is missing or given twice"
            elif role == LABEL:
                level, check, remedy = "warning", "duplicate", "check that it belongs to that image"
            elif case.subject_id == kept_case.subject_id:
                level, check, remedy = "warning", "duplicate", "remove one of the two cases"
            else:
                level, check = "error", "duplicate"
                remedy = "it could be trained and tested on: remove one, or give both the same subject_id"
            yield Finding(
                level,
                check,
                case.case_id,
                contents.file,
                f"{contents.file} ({role} of {case.case_id!r}) has the same voxels as {kept.file} ({kept_role} of "
                f"{kept_case.case_id!r}); {remedy}.",
            )


def _subjects(dataset: Dataset, examined: Sequence[Examined]) -> Iterator[Finding]:
    splits: dict[str, set[str]] = defaultdict(set)
    for case in dataset.cases:
        if case.split:
            splits[case.subject_id].add(case.split)
    for subject, found in splits.items():
        if len(found) > 1:
            yield _whole(
                "error",
                "splits",
                f"Subject {subject!r} of {dataset.root} is in the splits {', '.join(sorted(found))}; put all cases of "
                "a subject into one split.",
            )


def _splits(dataset: Dataset, examined: Sequence[Examined]) -> Iterator[Finding]:
    """Splits whose labels are all empty."""
    labelled: dict[str, list[bool]] = defaultdict(list)
    for item in examined:
        if item.case.split and LABEL in item.files:
            labelled[item.case.split].append(set(item.files[LABEL].ids) != {0})
    for split, positive in labelled.items():
        if not any(positive):
            yield _whole(
                "error",
                "splits",
                f"No label of the {len(positive)} cases in the split {split!r} of {dataset.root} has foreground; move "
                "a case with a lesion there.",
            )


def _unused(dataset: Dataset, examined: Sequence[Examined]) -> Iterator[Finding]:
    del examined
    if unused := case_tools.unused_files(dataset):
        yield _whole(
            "note",
            "unused",
            f"{dataset.root} holds {len(unused)} image files that no case uses, for example "
            f"{unused[0].relative_to(dataset.root)}; if a case or modality is missing, check their names.",
        )


def _domains(dataset: Dataset, examined: Sequence[Examined]) -> Iterator[Finding]:
    """Domains by scanner and by centre: unknown, only one, or with too few subjects."""
    counts: dict[str, Counter[str]] = {}
    for column in ("scanner", "centre"):
        pairs = {(case_tools.domain(case, column), case.subject_id) for case in dataset.cases}
        counts[column] = Counter(name for name, _ in pairs)
    known = {column: found for column, found in counts.items() if set(found) != {case_tools.UNKNOWN}}
    if not known:
        yield _whole(
            "warning",
            "domains",
            f"{dataset.root} says neither scanner nor centre of any case, so there is no domain shift to measure; add "
            "a column to cases.tsv, or a side table with launch.index --metadata.",
        )
    for column, found in known.items():
        if len(found) == 1:
            only = f"All cases of {dataset.root} have the {column} {next(iter(found))!r}"
            yield _whole("note", "domains", f"{only}; to measure a shift, test on another dataset.")
            continue
        for name, subjects in found.items():
            if subjects < FEWEST_SUBJECTS:
                yield _whole(
                    "warning",
                    "domains",
                    f"The {column} {name!r} of {dataset.root} has {subjects} subject, too few to train and test on; "
                    "add some or join it with another.",
                )


def _labels(dataset: Dataset, examined: Sequence[Examined]) -> Iterator[Finding]:
    """Ids over all cases: undeclared, with gaps, or never found."""
    found = sorted({i for item in examined if LABEL in item.files for i in item.files[LABEL].ids if i})
    if not found:
        return
    listing = ", ".join(map(str, found))
    if not dataset.labels:
        example = ",".join(f"class_{i}={i}" for i in found[:3])
        yield _whole(
            "warning",
            "label-ids",
            f"{dataset.root} does not say what its label ids {listing} mean; name them in dataset.json or with for "
            f"example --config.data.classes={example}.",
        )
    if found != list(range(1, found[-1] + 1)):
        yield _whole(
            "note", "label-ids", f"The label ids {listing} of {dataset.root} have gaps; predictions keep these ids."
        )
    never = absent(dataset.labels, found)
    if never:
        yield _whole(
            "warning",
            "empty-label",
            f"No label file of {dataset.root} has a voxel of {', '.join(never)}, which cannot be learnt; correct the "
            "files, or leave the class out with --config.data.classes.",
        )


def _whole(level: str, check: str, message: str) -> Finding:
    """A finding about no single case."""
    return Finding(level, check, "", "", message)
