"""Protocols that make folds: by subject, stratified by domain and lesion load, the same for the same seed.

random               one fold: train, val and test by fractions
kfold                every subject is test in one fold; val is drawn from the others
leave_one_domain_out one fold per domain (leave-one-centre-out): all its cases are test, the others train and val
domain               one fold per domain (scanner split): train on it, test on it and on all others, or one of them
"""

import difflib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from calsegx import configs
from calsegx.data import cases as case_tools
from calsegx.data import classes, preprocessing, splits
from calsegx.interfaces import Case, DataError, Dataset, UsageError

BINS = 4  # of lesion load, within a domain: quartiles; subjects without a lesion are a bin of their own


@dataclass(frozen=True)
class Options:
    """What the protocols can be told; a fraction is of the subjects of the domains that are trained on."""

    domain: str = configs.DataConfig.domain  # scanner or centre
    folds: int = 5  # kfold
    val_fraction: float = configs.DataConfig.val_fraction
    test_fraction: float = configs.DataConfig.test_fraction  # random; domain: of the source, to measure the gap
    seed: int = 0
    source: str = ""  # domain: train on this one; empty: on each in turn
    target: str = ""  # domain: test on this one; empty: on all others


@dataclass(frozen=True)
class Subject:
    """A person, with the cases of each domain; most have one domain."""

    name: str
    cases: Mapping[str, Sequence[str]]  # domain -> case ids
    load: float  # foreground in ml, mean over the cases; 0 where it is not known

    def of(self, *domains: str) -> list[str]:
        """The ids of the cases in these domains; without any, of all cases."""
        return sorted(case_id for domain in domains or self.cases for case_id in self.cases.get(domain, ()))


def make(
    dataset: Dataset, protocol: str, options: Options, volumes: Mapping[str, float] | None = None
) -> list[splits.Fold]:
    """The folds of a protocol; splits that the dataset names play no role.

    Only cases with a label are drawn, or all where none has one.

    Args:
        dataset: in any order of cases.
        protocol: of ``PROTOCOLS``.
        options: see ``Options``.
        volumes: case id -> foreground in ml (``foreground_ml``); None: stratify by domain alone.

    Returns:
        Folds as in ``splits.Fold``, with a name; no part is empty, and none is without foreground if ``volumes`` are
        given.  The numbers of test subjects per domain and bin of two folds of ``kfold`` differ by at most one.

    Raises:
        UsageError: for an option that does not fit the dataset.
        DataError: when the dataset has too few subjects or domains, or a part would be empty or without foreground.
    """
    for name, value in (("val", options.val_fraction), ("test", options.test_fraction)):
        if not 0 < value < 1:
            raise UsageError(f"--{name}_fraction={value} must be above 0 and below 1.")
    if options.val_fraction + options.test_fraction >= 1:
        raise UsageError("--val_fraction and --test_fraction must leave subjects to train on: their sum is 1 or more.")
    subjects = order(_subjects(dataset, options.domain, volumes or {}), options.seed)
    if protocol in BY_DOMAIN:
        _check_domains(dataset, subjects, options.domain)
    found = PROTOCOLS[protocol](subjects, options)
    for fold in found:
        check_parts(fold, f"The fold {fold['name']!r} of {len(subjects)} subject(s) in {dataset.root}", volumes or {})
    return found


def check_parts(fold: splits.Fold, where: str, volumes: Mapping[str, float]) -> None:
    """Refuse a fold of which a part is empty or, as far as ``volumes`` (case id -> ml) tell, without foreground.

    Raises:
        DataError: naming ``where`` and the part.
    """
    for part in splits.PARTS:
        if part in fold:
            known = [volumes[case_id] for case_id in fold[part] if case_id in volumes]
            if not fold[part] or (known and not any(known)):
                lacks = "case with foreground" if fold[part] else "case"
                raise DataError(
                    f"{where} has no {lacks} in {part}; add subjects, or try another --seed, other fractions or fewer "
                    "--folds."
                )


def with_fewer_subjects(dataset: Dataset, fold: splits.Fold, count: int, seed: int) -> splits.Fold:
    """The fold with ``count`` of its training subjects; of one seed a larger count holds those of a smaller one.

    Raises:
        UsageError: when the fold has fewer.
    """
    subject = {case.case_id: case.subject_id for case in dataset.cases}
    drawn = sorted({subject[case_id] for case_id in fold["train"]}, key=lambda name: splits.shuffled(name, seed))
    if count > len(drawn):
        raise UsageError(
            f"few_shot asks for {count} training subjects, but {fold.get('name') or 'the split'} of {dataset.root} has "
            f"{len(drawn)}; ask for at most that."
        )
    kept = set(drawn[:count])
    return {**fold, "train": [case_id for case_id in fold["train"] if subject[case_id] in kept]}


def foreground_ml(case: Case, class_map: classes.ClassMap) -> float:
    """The volume of all classes together, in millilitres.

    Raises:
        DataError: for an unusable label file.
    """
    label = preprocessing.read_label_volume(case, class_map)
    return np.count_nonzero(label.voxels) * label.voxel_ml


def order(subjects: Iterable[Subject], seed: int) -> list[Subject]:
    """The subjects by domain, within it by bin of lesion load, within that as the seed shuffles them.

    What is taken evenly from this order is even over domains and loads.
    """
    strata: dict[tuple[str, ...], list[Subject]] = {}
    for subject in sorted(subjects, key=lambda subject: (subject.load, splits.shuffled(subject.name, seed))):
        strata.setdefault(tuple(sorted(subject.cases)), []).append(subject)
    ordered = []
    for _, members in sorted(strata.items()):
        positive = [subject for subject in members if subject.load > 0]
        bounds = [len(positive) * edge // BINS for edge in range(BINS + 1)]
        bins = [positive[low:high] for low, high in itertools.pairwise(bounds)]
        for found in ([subject for subject in members if subject.load == 0], *bins):
            ordered += sorted(found, key=lambda subject: splits.shuffled(subject.name, seed))
    return ordered


def _random(subjects: Sequence[Subject], options: Options) -> list[splits.Fold]:
    test = splits.evenly(subjects, splits.rounded(options.test_fraction * len(subjects), len(subjects)))
    return [{"name": "random", **_fold(subjects, test, options)}]


def _kfold(subjects: Sequence[Subject], options: Options) -> list[splits.Fold]:
    if not 2 <= options.folds <= len(subjects):
        raise UsageError(f"--folds={options.folds} must be from 2 to the number of subjects, {len(subjects)}.")
    return [
        {"name": f"{first + 1} of {options.folds}", **_fold(subjects, subjects[first :: options.folds], options)}
        for first in range(options.folds)
    ]


def _leave_one_domain_out(subjects: Sequence[Subject], options: Options) -> list[splits.Fold]:
    found = []
    for domain in _domains(subjects):
        away = [subject for subject in subjects if domain in subject.cases]
        rest = [subject for subject in subjects if domain not in subject.cases]
        if len(rest) < 2:
            raise DataError(
                f"Without the {options.domain} {domain!r} {len(rest)} subject(s) are left to train and validate on, as "
                f"{len(away)} have cases there; use --protocol=domain, which takes people seen by both, or add some."
            )
        found.append({"name": f"without {domain}", **_fold(rest, [], options), "test": _ids(away, domain)})
    return found


def _domain(subjects: Sequence[Subject], options: Options) -> list[splits.Fold]:
    """The source's test subjects are first those whom a target has seen too: theirs is a paired comparison.

    A person seen by both who trains does so with the source's cases alone; the targets' are not used then.
    """
    known = _domains(subjects)
    for flag, name in (("source", options.source), ("target", options.target)):
        if name and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UsageError(
                f"--{flag}={name!r} is no {options.domain} of the dataset; it has {', '.join(known)}.{hint}"
            )
    if options.source and options.source == options.target:
        raise UsageError(f"--source and --target are both {options.source!r}; name two, or leave one out.")
    found = []
    for source in [options.source] if options.source else known:
        targets = [name for name in known if name != source and options.target in ("", name)]
        if not targets:
            continue
        pool = [subject for subject in subjects if source in subject.cases]
        away = [subject for subject in subjects if subject.of(*targets) and source not in subject.cases]
        name = f"{source} to {targets[0] if len(targets) == 1 else 'the others'}"
        count = splits.rounded(options.test_fraction * len(pool), len(pool))
        home = _paired(pool, away, targets, count)
        home += splits.evenly([subject for subject in pool if not subject.of(*targets)], count - len(home))
        fold = _fold(pool, home, options, source)
        for target in targets:
            if not any(target in subject.cases for subject in [*home, *away]):
                raise DataError(
                    f"Nobody of the {options.domain} {target!r} is tested in {name!r}: {source!r} has seen all its "
                    f"subjects, and {count} of {len(pool)} are tested; raise --test_fraction, or name --target."
                )
        found.append({"name": name, **fold, "test": _ids([*home, *away], source, *targets)})
    return found


def _paired(pool: Sequence[Subject], away: Sequence[Subject], targets: Sequence[str], count: int) -> list[Subject]:
    """At most ``count`` test subjects whom a target has seen too, shared out among the targets.

    First come those that ``away``, whom the source has not seen, does not test already; of these the scarce ones.
    """
    elsewhere = {domain for subject in away for domain in subject.cases}
    seen = {target: [subject for subject in pool if target in subject.cases] for target in targets}
    chosen: list[Subject] = []
    order = sorted(targets, key=lambda target: (target in elsewhere, len(seen[target])))
    for left, target in zip(range(len(order), 0, -1), order, strict=True):
        free = [subject for subject in seen[target] if subject not in chosen]
        chosen += splits.evenly(free, min(-(-(count - len(chosen)) // left), len(free)))
    free = [subject for subject in pool if subject.of(*targets) and subject not in chosen]
    return chosen + splits.evenly(free, min(count - len(chosen), len(free)))


PROTOCOLS: Mapping[str, Callable[[Sequence[Subject], Options], list[splits.Fold]]] = {
    "random": _random,
    "kfold": _kfold,
    "leave_one_domain_out": _leave_one_domain_out,
    "domain": _domain,
}
BY_DOMAIN = ("leave_one_domain_out", "domain")


def _fold(pool: Sequence[Subject], test: Sequence[Subject], options: Options, *domains: str) -> dict[str, list[str]]:
    """Validate on some of the ``pool`` that are not ``test``, train on the others; cases of ``domains`` only."""
    taken = {subject.name for subject in test}
    free = [subject for subject in pool if subject.name not in taken]
    val = splits.evenly(free, splits.rounded(options.val_fraction * len(pool), len(free)))
    taken |= {subject.name for subject in val}
    train = [subject for subject in free if subject.name not in taken]
    return {"train": _ids(train, *domains), "val": _ids(val, *domains), "test": _ids(test, *domains)}


def _ids(subjects: Iterable[Subject], *domains: str) -> list[str]:
    return sorted(case_id for subject in subjects for case_id in subject.of(*domains))


def _domains(subjects: Iterable[Subject]) -> list[str]:
    return sorted({domain for subject in subjects for domain in subject.cases})


def labelled(dataset: Dataset) -> list[Case]:
    """The cases that are drawn: those with a label, or all where none has one."""
    return [case for case in dataset.cases if case.label is not None] or list(dataset.cases)


def _subjects(dataset: Dataset, column: str, volumes: Mapping[str, float]) -> list[Subject]:
    members: dict[str, list[Case]] = {}
    for case in labelled(dataset):
        members.setdefault(case.subject_id, []).append(case)
    found = []
    for name, own in members.items():
        by_domain: dict[str, list[str]] = {}
        for case in own:
            by_domain.setdefault(case_tools.domain(case, column), []).append(case.case_id)
        load = sum(sorted(volumes.get(case.case_id, 0.0) for case in own)) / len(own)
        found.append(Subject(name, by_domain, load))
    return found


def _check_domains(dataset: Dataset, subjects: Sequence[Subject], column: str) -> None:
    remedy = f"name the {column} of every case in cases.tsv, or add it with launch.index --metadata"
    unknown = [case_id for subject in subjects for case_id in subject.of(case_tools.UNKNOWN)]
    if unknown:
        raise DataError(f"{len(unknown)} case(s) of {dataset.root} have no {column}, such as {unknown[0]!r}; {remedy}.")
    known = _domains(subjects)
    if len(known) < 2:
        raise DataError(
            f"All cases of {dataset.root} have the {column} {known[0]!r}, so no other is left to test on; {remedy}, or "
            f"use another --domain."
        )
    for name in known:
        count = sum(name in subject.cases for subject in subjects)
        if count < 2:
            raise DataError(
                f"The {column} {name!r} of {dataset.root} has {count} subject; a domain needs at least 2, so merge it "
                "with another or leave its cases out of cases.tsv."
            )
