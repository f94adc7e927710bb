"""The cases of a dataset: loading, choosing by split and domain, and fingerprints."""

import difflib
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from calsegx import configs
from calsegx.data import images, layouts, splits
from calsegx.interfaces import Case, DataError, Dataset, UsageError

UNKNOWN = "unknown"


def load(config: configs.DataConfig) -> Dataset:
    """The dataset in ``config.root``, every case with a split, every file present.

    The splits are those of the fold that ``config`` names; without one, the dataset's own and drawn ones.

    Raises:
        UsageError: when no root is given, the layout is unknown, or there is no such fold.
        DataError: when the folder is not a dataset, a file is missing, case names clash, or a subject leaks.
    """
    if not config.root:
        raise UsageError("--config.data.root is empty; give the dataset's folder.")
    if config.fold and not config.splits:
        raise UsageError(f"--config.data.fold={config.fold} needs a file of folds; name it with --config.data.splits.")
    dataset = read(Path(config.root), config.layout)
    if config.splits:
        path = Path(config.splits)
        return splits.apply(dataset, splits.choose(path, config.fold), f"{path}, fold {config.fold}")
    return splits.assign(dataset, config.val_fraction, config.test_fraction)


def read(root: Path, layout: str = "auto") -> Dataset:
    """The dataset in ``root`` with the splits that it names itself, every file present.

    Raises:
        UsageError: when the layout is unknown.
        DataError: when the folder is not a dataset, a file is missing, or case names clash.
    """
    dataset = layouts.detect(root, layout)
    check(dataset)
    return dataset


def domain(case: Case, column: str) -> str:
    """The case's domain: its ``scanner`` or ``centre``; ``unknown`` where the dataset does not say."""
    return getattr(case, column) or UNKNOWN


def domains(dataset: Dataset, column: str) -> tuple[str, ...]:
    """All domains of the dataset, sorted."""
    return tuple(sorted({domain(case, column) for case in dataset.cases}))


def select(
    dataset: Dataset, config: configs.DataConfig, split: str, domain_name: str | None = None
) -> tuple[Case, ...]:
    """The cases of a split, and of one domain if named.

    ``train`` and ``val`` hold only cases of the source domain, if ``config.source`` names one, and every one
    of them has a label.  ``test`` holds all domains.

    Args:
        dataset: from ``load``.
        config: for ``domain`` (the column) and ``source``.
        split: train, val or test.
        domain_name: one domain only; None for all.

    Raises:
        UsageError: for an unknown source or domain.
        DataError: when no case is left, or one to train on has no label.
    """
    known = domains(dataset, config.domain)
    wanted = [("the domain", domain_name)] if domain_name is not None else []
    if config.source:
        _one_domain(config.source, f"--config.data.source={config.source!r}", known, config.domain)
        if split in ("train", "val"):
            wanted.append(("--config.data.source", config.source))
    if domain_name is not None:
        _one_domain(domain_name, f"The domain {domain_name!r}", known, config.domain)
    chosen = tuple(
        case
        for case in dataset.cases
        if case.split == split and all(domain(case, config.domain) == name for _, name in wanted)
    )
    if not chosen:
        raise DataError(
            f"{dataset.root} has no case in the split {split!r}"
            + "".join(f" with {what} {name!r}" for what, name in wanted)
            + f"; it has {_census(dataset, config.domain)}: add subjects, or name the splits in cases.tsv "
            "or --config.data.splits."
        )
    for case in chosen:
        if split in ("train", "val") and case.label is None:
            raise DataError(
                f"Case {case.case_id!r} of the split {split!r} has no label file; add it or use split test."
            )
    return chosen


def channels(config: configs.DataConfig, dataset: Dataset) -> tuple[str, str, str]:
    """The three channels that the encoder sees as red, green and blue.

    One name is used three times.  Without ``config.channels``: the dataset's first three, or its only one; of
    two, the second is used twice.

    Raises:
        UsageError: for an unknown name, or any other number of names.
    """
    names = [name.strip() for name in config.channels.split(",") if name.strip()]
    for name in names:
        if name not in dataset.channels:
            near = difflib.get_close_matches(name, dataset.channels, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UsageError(
                f"--config.data.channels names {name!r}; the dataset has {', '.join(dataset.channels)}.{hint}"
            )
    if not names:
        names = list(dataset.channels[:3])
        names += names[1:] if len(names) == 2 else []
    if len(names) == 1:
        names *= 3
    if len(names) != 3:
        raise UsageError(
            f"--config.data.channels must name one or three channels, got {', '.join(names)}; the dataset has "
            f"{', '.join(dataset.channels)}, and a name may be repeated."
        )
    return names[0], names[1], names[2]


def fingerprint(case: Case) -> str:
    """SHA-256 over the bytes of the case's images and label, the channels' names and which volumes they are."""
    digest = hashlib.sha256()
    contents: dict[Path, str] = {}
    for role, path, volume in _files(case):
        if path not in contents:
            try:
                with open(path, "rb") as stream:
                    contents[path] = hashlib.file_digest(stream, "sha256").hexdigest()
            except OSError as error:
                raise DataError(
                    f"{path} (case {case.case_id!r}, {role}) cannot be read ({error.strerror}); check the path and "
                    "the drive."
                ) from error
        index = "" if volume is None else f"\0{volume}"
        digest.update(f"{role}{index}\0{contents[path]}\n".encode())
    return digest.hexdigest()


def problems(dataset: Dataset) -> Iterator[tuple[Case, str]]:
    """Case ids that cannot name a file or stand there twice, and files with two roles, each as a sentence."""
    seen: dict[str, str] = {}
    uses: dict[Path, list[tuple[Case, str, int | None]]] = {}
    for case in dataset.cases:
        # Predictions are named after the case, also on file systems that ignore case.
        if not re.fullmatch(r"[^\s/\\:*?\"<>|.][^/\\:*?\"<>|\t\n]*", case.case_id):
            yield (
                case,
                f"Case {case.case_id!r} of {dataset.root} cannot name a file; use letters, digits, '-' and '_'.",
            )
        other = seen.get(case.case_id.casefold())
        if other is not None:
            how = "stand there twice" if other == case.case_id else "differ only in upper and lower case"
            yield case, f"Cases {other!r} and {case.case_id!r} of {dataset.root} {how}; rename one."
        seen[case.case_id.casefold()] = case.case_id
        for role, path, volume in _files(case):
            for owner, owner_role, owner_volume in uses.setdefault(path, []):
                # The channels of one case may be volumes of one file, and copies of a scan may share its label.
                volumes = owner is case and None not in (volume, owner_volume) and volume != owner_volume
                copies = role == owner_role == "label" and case.subject_id == owner.subject_id
                if not (volumes or copies):
                    yield (
                        case,
                        f"{path} is given as {owner_role} of case {owner.case_id!r} and as {role} of case "
                        f"{case.case_id!r}; give each its own file.",
                    )
                    break
            uses[path].append((case, role, volume))


def unused_files(dataset: Dataset) -> list[Path]:
    """The image files in the dataset's folder that no case uses, sorted; hidden ones do not count."""
    used = {path.absolute() for case in dataset.cases for _, path, _ in _files(case)}
    return [
        path
        for path in sorted(dataset.root.rglob("*"))
        if path.name.lower().endswith(images.ENDINGS) and path.absolute() not in used
        if not any(part.startswith(".") for part in path.relative_to(dataset.root).parts)
    ]


def _files(case: Case) -> list[tuple[str, Path, int | None]]:
    """(role, file, index of the volume) of the images by name, then of the label."""
    files = [(channel, path, case.volumes.get(channel)) for channel, path in sorted(case.images.items())]
    return [*files, ("label", case.label, None)] if case.label else files


def check(dataset: Dataset) -> None:
    """No problems, and files that exist.

    Raises:
        DataError: for the first of ``problems``, and for a file that is not there.
    """
    for _, sentence in problems(dataset):
        raise DataError(sentence)
    for case in dataset.cases:
        for role, path, _ in _files(case):
            images.require_file(path, f"case {case.case_id}, {role}")


def _one_domain(name: str, what: str, known: tuple[str, ...], column: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UsageError(
            f"{what} is no {column} of the dataset; it has {', '.join(known)}.{hint} "
            f"Leave it out to train on all, or name the {column} of every case in cases.tsv."
        )


def _census(dataset: Dataset, column: str) -> str:
    counts: dict[tuple[str, str], int] = {}
    for case in dataset.cases:
        key = (case.split, domain(case, column))
        counts[key] = counts.get(key, 0) + 1
    return ", ".join(f"{count} {split} case(s) of {name}" for (split, name), count in sorted(counts.items()))
