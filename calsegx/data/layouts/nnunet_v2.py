"""nnU-Net v2 raw datasets, read as they are.

Without a ``cases.tsv`` every case counts as a subject of its own, and the scanner is unknown.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calsegx.data import layouts
from calsegx.interfaces import Case, DataError, Dataset

IMAGE_ENDINGS = (".nii.gz", ".nii")


@layouts.registry.register("nnunet_v2")
def read(root: Path) -> Dataset | None:
    """A dataset.json with channel_names, labels and file_ending beside imagesTr or imagesTs.

    ``imagesTr`` and ``labelsTr`` hold the cases to split, ``imagesTs`` (with ``labelsTs``, if there is one)
    the test cases.  Images are named ``<case>_<4-digit channel><file_ending>``, labels
    ``<case><file_ending>``.  A ``dataset`` in dataset.json names the files of the cases to split instead.

    Raises:
        DataError: for a malformed dataset.json, a missing channel, or an image without its label and vice
            versa.
    """
    description_path = root / "dataset.json"
    if not description_path.is_file():
        return None
    description = read_description(description_path)
    if "channel_names" not in description:  # nnU-Net v1 and the Decathlon say "modality"
        return None
    if "dataset" not in description and not any((root / name).is_dir() for name in ("imagesTr", "imagesTs")):
        return None
    channels = parse_channels(description_path, description, "channel_names")
    labels = parse_labels(description_path, description)
    ending = description.get("file_ending")
    if ending not in IMAGE_ENDINGS:
        raise DataError(f"{description_path}: file_ending is {ending!r}; expected one of {', '.join(IMAGE_ENDINGS)}.")
    if "dataset" in description:
        training, where = _listed_cases(description_path, description["dataset"], channels), "'dataset' lists"
    else:
        training, where = _cases(root, "Tr", "", channels, ending), "imagesTr holds"
    if training:
        check_number(description_path, description, len(training), where)
    cases = (*training, *_cases(root, "Ts", "test", channels, ending))
    if not cases:
        raise DataError(f"{root} holds no image that ends in {ending} in imagesTr or imagesTs; check file_ending.")
    return Dataset(root, cases, channels, labels)


def read_description(path: Path) -> dict[str, Any]:
    """The content of a dataset.json.

    Raises:
        DataError: when it is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(f"{path} is not readable JSON ({error}); correct it.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}; expected a JSON object.")
    return content


def parse_labels(path: Path, description: Mapping[str, Any]) -> dict[str, int]:
    """The labels of a dataset.json: ``{"background": 0, "tumour": 1, ...}``.

    Regions, ``{"whole": [1, 2, 3], "core": [2, 3], ...}``, overlap, the ids in the files do not: every id is named
    after the smallest region that holds it, and with the id itself where that name is another id's too (``whole_1``).

    Raises:
        DataError: for another form, an ignore label or ids used twice.
    """
    labels = description.get("labels")
    if not isinstance(labels, dict):
        raise DataError(f'{path}: labels are missing; expected for example {{"background": 0, "tumour": 1}}.')
    regions: dict[str, frozenset[int]] = {}
    for name, value in labels.items():
        ids = value if isinstance(value, list) else [value]
        if not ids or not all(type(one) is int and one >= 0 for one in ids):  # a bool is an int, too
            raise DataError(
                f"{path}: label {name!r} is {value!r}; expected name: id with a non-negative integer id, or a list of "
                "them (nnU-Net v2)."
            )
        if name == "ignore":
            raise DataError(f"{path}: the label 'ignore' ({value}) is not supported; relabel those voxels.")
        if (name == "background") != (0 in ids) or (0 in ids and len(ids) > 1):
            raise DataError(f"{path}: the label with the id 0 must be 'background', and only that; got {labels}.")
        if frozenset(ids) in regions.values():
            raise DataError(f"{path}: two labels have the same id ({labels}); give each its own.")
        regions[name] = frozenset(ids)
    owner = {
        value: min((name for name in regions if value in regions[name]), key=lambda name: len(regions[name]))
        for value in sorted(frozenset[int]().union(*regions.values()))
    }
    owners = list(owner.values())
    exclusive = {name if owners.count(name) == 1 else f"{name}_{value}": value for value, name in owner.items()}
    if len(exclusive) < len(owner):
        raise DataError(f"{path}: the ids of the regions {labels} get the same names; rename a region.")
    return exclusive


def parse_channels(path: Path, description: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """The channels of a dataset.json, ``{"0": "T1", "1": "FLAIR"}`` under ``key``.

    Raises:
        DataError: for another form, gaps in the numbers, or a name used twice.
    """
    found = description[key]
    names = [found.get(str(index)) for index in range(len(found))] if isinstance(found, dict) else []
    if not names or not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
        raise DataError(
            f'{path}: {key} is {found!r}; expected {{"0": "T1", "1": "FLAIR", ...}} with consecutive numbers and '
            "distinct names."
        )
    return tuple(map(str, names))


def check_number(path: Path, description: Mapping[str, Any], found: int, where: str) -> None:
    """Check numTraining, if it is given, against the cases that ``where`` has.

    Raises:
        DataError: when they differ.
    """
    expected = description.get("numTraining", found)
    if expected != found:
        raise DataError(
            f"{path}: numTraining is {expected}, {where} {found} cases; add the missing files or correct the number."
        )


def _listed_cases(path: Path, listed: Any, channels: tuple[str, ...]) -> tuple[Case, ...]:
    """The cases of dataset.json's ``dataset``: ``{case: {"images": [...], "label": ...}}``, relative to its folder."""
    if not isinstance(listed, dict):
        raise DataError(f"{path}: dataset is a {type(listed).__name__}; expected case: its images and label.")
    cases = []
    for case_id, entry in sorted(listed.items()):
        images, label = (entry.get("images"), entry.get("label")) if isinstance(entry, dict) else (None, None)
        if not isinstance(images, list) or not all(isinstance(name, str) and name for name in [*images, label]):
            raise DataError(
                f'{path}: case {case_id!r} of dataset is {entry!r}; expected {{"images": [paths], "label": path}}.'
            )
        if len(images) != len(channels):
            raise DataError(
                f"{path}: case {case_id!r} of dataset has {len(images)} images; expected one for each of the channels "
                f"{', '.join(channels)}."
            )
        files = {channel: path.parent / name for channel, name in zip(channels, images, strict=True)}
        cases.append(Case(case_id, case_id, files, path.parent / str(label), split=""))
    return tuple(cases)


def _cases(root: Path, suffix: str, split: str, channels: tuple[str, ...], ending: str) -> tuple[Case, ...]:
    """The cases of imagesTr and labelsTr, or of imagesTs and (if it is there) labelsTs."""
    images_folder, labels_folder = root / f"images{suffix}", root / f"labels{suffix}"
    images: dict[str, dict[int, Path]] = {}
    for path in _image_files(images_folder, ending):
        match = re.fullmatch(r"(.+)_(\d{4})", path.name.removesuffix(ending))
        if not match:
            raise DataError(f"{path} is not named <case>_<4 digits>{ending}; rename it or move it away.")
        images.setdefault(match[1], {})[int(match[2])] = path
    labels = {path.name.removesuffix(ending): path for path in _image_files(labels_folder, ending)}
    for case_id in sorted(labels.keys() - images.keys()):
        raise DataError(f"{labels[case_id]} has no image {case_id}_0000{ending} in {images_folder}; add it.")
    for case_id in sorted(images):
        for number in range(len(channels)):
            if number not in images[case_id]:
                raise DataError(
                    f"Case {case_id!r} has no file {images_folder / f'{case_id}_{number:04d}{ending}'} (channel "
                    f"{channels[number]!r}); add it or remove the case."
                )
        if max(images[case_id]) >= len(channels):
            extra = images[case_id][max(images[case_id])]
            raise DataError(f"{extra} is a channel that dataset.json does not name; it names {len(channels)}.")
        if case_id not in labels and (suffix == "Tr" or labels_folder.is_dir()):
            raise DataError(f"Case {case_id!r} has no label {labels_folder / (case_id + ending)}; add it.")
    return tuple(
        Case(
            case_id=case_id,
            subject_id=case_id,
            images={channel: images[case_id][number] for number, channel in enumerate(channels)},
            label=labels.get(case_id),
            split=split,
        )
        for case_id in sorted(images)
    )


def _image_files(folder: Path, ending: str) -> list[Path]:
    if not folder.is_dir():
        return []
    paths = sorted(p for p in folder.iterdir() if not p.name.startswith(".") and p.name.endswith(IMAGE_ENDINGS))
    for path in paths:
        if not path.name.endswith(ending):
            raise DataError(f"{path} does not end in {ending}, the file_ending of dataset.json; convert or move it.")
    return paths
