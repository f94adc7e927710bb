"""BraTS as it is downloaded: the names and label ids of 2017-2021 and those of 2023 and later.

Both give the same channels and label names; the ids stay those of the files, so predictions go back to them:
enhancing tumour is 4 until 2021 and 3 since 2023.
"""

import csv
import re
from collections.abc import Mapping
from pathlib import Path

from calsegx.data import layouts
from calsegx.data.layouts import trees
from calsegx.interfaces import Case, DataError, Dataset

# What stands between the case and the channel in a file's name -> channel -> its name in files.
CHANNELS: Mapping[str, Mapping[str, str]] = {
    "_": {"T1": "t1", "T1c": "t1ce", "T2": "t2", "FLAIR": "flair"},
    "-": {"T1": "t1n", "T1c": "t1c", "T2": "t2w", "FLAIR": "t2f"},
}
UNTIL_2021 = {"background": 0, "necrotic_core": 1, "oedema": 2, "enhancing_tumour": 4}
SINCE_2023 = {"background": 0, "necrotic_core": 1, "oedema": 2, "enhancing_tumour": 3}
PAEDIATRIC = {"background": 0, "enhancing_tumour": 1, "non_enhancing_core": 2, "cyst": 3, "oedema": 4}
_DEPTH = 3  # <download>/HGG/<case>
_INSTITUTION = re.compile(r"(brats1[789]_([a-z0-9]+)_\w+)_\d+", re.IGNORECASE)  # subject, centre, time point
_TIME_POINT = re.compile(r"(BraTS-[A-Za-z-]+-\d+)-\d{3}")


@layouts.registry.register("brats")
def read(root: Path) -> Dataset | None:
    """BraTS folders <case>/<case>_{t1,t1ce,t2,flair,seg} or, since 2023, <case>/<case>-{t1n,t1c,t2w,t2f,seg}.

    Until 2019 the case's name holds the centre, in 2020 a ``name_mapping.csv`` beside the cases gives it.  The last
    number of a name of 2017-2019 and since 2023 is a time point: the subject is what stands before it.  Cases without
    ``seg``, as in the validation data, get the split test.

    Raises:
        DataError: for a case that lacks a modality, has no ``seg`` although others beside it do, or is there twice,
            and for two label conventions in one dataset.
    """
    found: dict[str, dict[Path, dict[str, Path]]] = {separator: {} for separator in CHANNELS}
    for folder in trees.folders(root, _DEPTH):
        for separator, channels in CHANNELS.items():
            files = trees.images(folder, folder.name + separator)
            if files.keys() & set(channels.values()):
                found[separator][folder] = files
    # The contrast-enhanced T1 is in the name of no other dataset's files.
    found = {s: files for s, files in found.items() if any(CHANNELS[s]["T1c"] in names for names in files.values())}
    if not found:
        return None
    first: dict[str, Path] = {}  # label ids -> the first folder that has them
    for separator, files in found.items():
        for folder in files:
            first.setdefault(str(_labels(separator, folder)), folder)
    if len(first) > 1:
        raise DataError(
            f"{' and '.join(map(str, first.values()))} have different label ids; name the folder of one release and "
            "sub-challenge."
        )
    ((separator, files),) = found.items()
    older = {parent: _older_names(parent) for parent in {folder.parent for folder in files}}
    cases = [
        _case(folder, names, CHANNELS[separator], older[folder.parent].get(folder.name, folder.name))
        for folder, names in files.items()
    ]
    _check_labels(dict(zip(files, cases, strict=True)))
    return Dataset(root, trees.distinct(root, cases), tuple(CHANNELS[separator]), _labels(separator, next(iter(files))))


def _labels(separator: str, folder: Path) -> Mapping[str, int]:
    if separator == "_":
        return UNTIL_2021
    return PAEDIATRIC if folder.name.startswith("BraTS-PED-") else SINCE_2023


def _case(folder: Path, files: Mapping[str, Path], channels: Mapping[str, str], older_name: str) -> Case:
    for name in channels.values():
        if name not in files:
            raise DataError(f"Case {folder.name!r} has no {name!r} image in {folder}; add it or move the case away.")
    # BraTS20_Training_355 is published with W39_1998.09.19_Segm.nii for its segmentation.
    label = files.get("seg") or next(iter(sorted(folder.glob("*_Segm.nii*"))), None)
    institution, time_point = _INSTITUTION.fullmatch(older_name), _TIME_POINT.fullmatch(folder.name)
    return Case(
        case_id=folder.name,
        subject_id=institution[1] if institution else time_point[1] if time_point else folder.name,
        images={channel: files[name] for channel, name in channels.items()},
        label=label,
        split="" if label else "test",
        centre=institution[2] if institution else "",
    )


def _check_labels(cases: Mapping[Path, Case]) -> None:
    """Of the folders beside each other all have a label, or none."""
    labelled = {folder.parent: folder for folder, case in cases.items() if case.label}
    for folder, case in cases.items():
        if case.label is None and folder.parent in labelled:
            raise DataError(
                f"Case {case.case_id!r} in {folder} has no 'seg' file, but {labelled[folder.parent]} has one; add it "
                "or move the case away."
            )


def _older_names(folder: Path) -> dict[str, str]:
    """Names of 2020 -> the same cases' names of 2019 or before, of ``name_mapping.csv`` if it is there."""
    names: dict[str, str] = {}
    for path in sorted(folder.glob("name_mapping*.csv")):
        try:
            rows = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines()))
        except (OSError, ValueError, csv.Error) as error:
            raise DataError(f"{path} cannot be read as comma-separated text ({error}); download it again.") from error
        for row in rows:
            older = sorted(cell for cell in row if _INSTITUTION.fullmatch(cell))  # "BraTS19" sorts before "Brats18"
            for cell in row:
                if cell.startswith("BraTS20_") and older:
                    names[cell] = older[0]
    return names
