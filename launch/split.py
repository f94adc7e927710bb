"""Make a file of folds: by subject, stratified by domain and lesion load, checked for leaks.

python -m launch.split --data=DATASET --protocol=kfold --folds=5 --domain=centre --output=splits.json

Protocols: random (one fold), kfold, leave_one_domain_out (leave-one-centre-out: a fold per centre), domain (scanner
split: a fold per domain to train on, tested on all others, or as ``--source`` and ``--target`` say).  A run uses a fold
with --config.data.splits=splits.json --config.data.fold=0.  ``--check=splits_final.json`` makes no folds: it checks a
file, of this script or nnU-Net's.  Every image is read, to find copies under another name, and every label.
"""

import os
from collections.abc import Mapping, Sequence
from concurrent import futures
from pathlib import Path

import numpy as np
from absl import flags

from calsegx.data import cases as case_tools
from calsegx.data import classes, folds, splits
from calsegx.interfaces import Case, Dataset, UsageError
from calsegx.training import progress
from launch import common

# A dataset that declares no labels: every id is foreground.
ANY_LABEL = classes.ClassMap(("foreground",), (tuple(range(1, 256)),), frozenset(range(256)))


def split(
    data: Path,
    protocol: str,
    options: folds.Options,
    output: Path,
    *,
    layout: str = "auto",
    spec: str = "",
    lesion_load: bool = True,
) -> str:
    """Make, check and write folds.

    Args:
        data: the dataset's folder.
        protocol: of ``folds.PROTOCOLS``.
        options: of the protocol.
        output: the file to write.
        layout: of the dataset.
        spec: the classes that count as lesion, as --config.data.classes; empty: all labels.
        lesion_load: stratify by it, and refuse a part without foreground; else no label is read.

    Returns:
        The table of the folds.

    Raises:
        InputError: for options or data that do not fit, and for a leak; nothing is written then.
    """
    dataset = case_tools.read(data, layout)
    splits.check_output(output, dataset)
    folds.make(dataset, protocol, options)  # refuses what it can before every file is read
    cases = folds.labelled(dataset)
    hashes, volumes = read(cases, class_map(dataset, spec) if lesion_load else None)
    made = folds.make(dataset, protocol, options, volumes)
    for fold in made:
        splits.check(dataset, fold, f"Fold {fold['name']!r} of {data}", hashes)
    splits.write(output, made)
    return table(dataset, made, options.domain, volumes)


def check(
    data: Path, path: Path, domain: str, *, layout: str = "auto", spec: str = "", lesion_load: bool = True
) -> str:
    """Check a file of folds, this script's or nnU-Net's; returns the table of its folds.

    Raises:
        InputError: for a file that cannot be used, a leak, or a part without foreground.
    """
    dataset = case_tools.read(data, layout)
    found = splits.read(path)
    for number, fold in enumerate(found):
        splits.check(dataset, fold, f"{path}, fold {number}")  # before every file is read
    hashes, volumes = read(dataset.cases, class_map(dataset, spec) if lesion_load else None)
    for number, fold in enumerate(found):
        splits.check(dataset, fold, f"{path}, fold {number}", hashes)
        folds.check_parts(fold, f"{path}, fold {number},", volumes)
    return table(dataset, found, domain, volumes)


def class_map(dataset: Dataset, spec: str) -> classes.ClassMap:
    """The classes that count as lesion.

    Raises:
        UsageError: for classes that the dataset does not have.
    """
    spec = spec or dataset.default_classes
    try:
        return classes.parse(spec, dataset.labels) if spec or dataset.labels else ANY_LABEL
    except UsageError as error:
        raise UsageError(str(error).replace(classes.FLAG, "--classes")) from error


def read(
    cases: Sequence[Case], foreground: classes.ClassMap | None
) -> tuple[dict[str, frozenset[str]], dict[str, float]]:
    """By case id the hashes of the images and, where there is a label, the foreground in ml.

    Raises:
        DataError: for a file that cannot be read.
    """

    def one(case: Case) -> tuple[frozenset[str], float | None]:
        volume = folds.foreground_ml(case, foreground) if foreground and case.label else None
        return splits.image_hashes(case), volume

    hashes, volumes = {}, {}
    with progress.Progress("Reading", len(cases), "cases") as bar:
        pool = futures.ThreadPoolExecutor(os.cpu_count())  # decompressing and hashing release the interpreter's lock
        try:
            for done, (case, (found, volume)) in enumerate(zip(cases, pool.map(one, cases), strict=True), start=1):
                hashes[case.case_id] = found
                if volume is not None:
                    volumes[case.case_id] = volume
                bar.update(done, case.case_id)
        finally:  # also after Ctrl-C
            pool.shutdown(cancel_futures=True)
    return hashes, volumes


def table(dataset: Dataset, found: Sequence[splits.Fold], domain: str, volumes: Mapping[str, float]) -> str:
    """A line per part of each fold: cases, subjects, the median of the lesion volumes, and both counts by domain."""
    known = {case.case_id: case for case in dataset.cases}
    lines = []
    for number, fold in enumerate(found):
        lines.append(f"fold {number}" + (f" ({fold['name']})" if fold["name"] else ""))
        unused = len(known)
        for part in splits.PARTS:
            members = [known[case_id] for case_id in fold.get(part, ())]
            unused -= len(members)
            if members:
                sizes = [volumes[case.case_id] for case in members if case.case_id in volumes]
                lesion = f"{np.median(sizes):.2f} ml" if sizes else "not known"
                counts = f"{len(members):4} cases of {len({case.subject_id for case in members}):4} subjects"
                lines.append(f"  {part:5} {counts}, median lesion {lesion:>10}; {_by_domain(members, domain)}")
        if unused:
            lines.append(f"  {unused} of the dataset's cases in no part")
    return "\n".join(lines)


def _by_domain(cases: Sequence[Case], column: str) -> str:
    found: dict[str, list[str]] = {}
    for case in cases:
        found.setdefault(case_tools.domain(case, column), []).append(case.subject_id)
    counts = (f"{name} {len(own)} of {len(set(own))}" for name, own in sorted(found.items()))
    return f"{column} {', '.join(counts)}"


def define_flags() -> None:
    """``--data``, what to do, and where the file goes."""
    flags.DEFINE_string("data", None, "The dataset's folder; it is not written to.", required=True)
    flags.DEFINE_string("layout", "auto", "A dataset layout, or auto.")
    flags.DEFINE_enum("protocol", None, list(folds.PROTOCOLS), "How folds are made.")
    flags.DEFINE_string("output", "", "The file of folds to write.")
    flags.DEFINE_string("check", "", "Make no folds, check those of this file, e.g. nnU-Net's splits_final.json.")
    flags.DEFINE_enum("domain", folds.Options.domain, ["scanner", "centre"], "The column that names the domain.")
    flags.DEFINE_integer("folds", folds.Options.folds, "kfold: how many.")
    flags.DEFINE_float("val_fraction", folds.Options.val_fraction, "Of the subjects of the domains trained on.")
    flags.DEFINE_float("test_fraction", folds.Options.test_fraction, "The same; for random and domain.")
    flags.DEFINE_integer("seed", folds.Options.seed, "Of the draw.")
    flags.DEFINE_string("source", "", "domain: train on this one; default: on each in turn.")
    flags.DEFINE_string("target", "", "domain: test on this one; default: on all others.")
    flags.DEFINE_string("classes", "", "What counts as lesion, as --config.data.classes; default: all labels.")
    flags.DEFINE_bool("lesion_load", True, "Stratify by lesion volume too; reads every label.")


def main() -> None:
    """Make or check folds, and say what is in them."""
    f = flags.FLAGS
    shared = {"layout": f.layout, "spec": f.classes, "lesion_load": f.lesion_load}
    if bool(f.check) == bool(f.protocol) or bool(f.output) != bool(f.protocol):
        raise UsageError("Give --protocol and --output to make folds, or --check to check a file of them.")
    if f.check:
        print(check(Path(f.data), Path(f.check), f.domain, **shared))
        print(f"No leak in {f.check}; use it with --config.data.splits={f.check} --config.data.fold=0")
        return
    names = ("domain", "folds", "val_fraction", "test_fraction", "seed", "source", "target")
    options = folds.Options(**{name: getattr(f, name) for name in names})
    print(split(Path(f.data), f.protocol, options, Path(f.output), **shared))
    print(f"The folds are in {f.output}; use one with --config.data.splits={f.output} --config.data.fold=0")


if __name__ == "__main__":
    common.run(main, define_flags)
