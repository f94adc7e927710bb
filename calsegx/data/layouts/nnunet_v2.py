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
    ``<case><file_ending>``.

    Raises:
        DataError: for a malformed dataset.json, a missing channel, or an image without its label and vice
            versa.
    """
    description_path = root / "dataset.json"
    if not description_path.is_file() or not any((root / name).is_dir() for name in ("imagesTr", "imagesTs")):
        return None
    description = read_description(description_path)
    if "channel_names" not in description:  # nnU-Net v1 and the Decathlon say "modality"
        return None
    channels = _channels(description_path, description["channel_names"])
    labels = parse_labels(description_path, description)
    ending = description.get("file_ending")
    if ending not in IMAGE_ENDINGS:
        raise DataError(f"{description_path}: file_ending is {ending!r}; expected one of {', '.join(IMAGE_ENDINGS)}.")
    if "dataset" in description:
        raise DataError(f"{description_path}: a 'dataset' list of files is not read; write a cases.tsv instead.")
    training = _cases(root, "Tr", "", channels, ending)
    expected = description.get("numTraining")
    if expected is not None and training and expected != len(training):
        raise DataError(
            f"{description_path}: numTraining is {expected}, imagesTr holds {len(training)} cases; add the missing "
            "files or correct the number."
        )
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
    except (ValueError, OSError) as error:
        raise DataError(f"{path} is not readable JSON ({error}); correct it.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}; expected a JSON object.")
    return content


def parse_labels(path: Path, description: Mapping[str, Any]) -> dict[str, int]:
    """The labels of a dataset.json: ``{"background": 0, "tumour": 1, ...}``.

    Raises:
        DataError: for another form, regions, an ignore label or an id used twice.
    """
    labels = description.get("labels")
    if not isinstance(labels, dict):
        raise DataError(f'{path}: labels are missing; expected for example {{"background": 0, "tumour": 1}}.')
    for name, value in labels.items():
        if isinstance(value, list):
            raise DataError(
                f"{path}: label {name!r} is a region {value}; list the plain ids there and give the region with "
                f"--config.data.classes={name}={'+'.join(map(str, value))}."
            )
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise DataError(
                f"{path}: label {name!r} is {value!r}; expected name: id with a non-negative integer id (nnU-Net v2)."
            )
        if name == "ignore":
            raise DataError(f"{path}: the label 'ignore' ({value}) is not supported; relabel those voxels.")
    if len(set(labels.values())) < len(labels):
        raise DataError(f"{path}: two labels have the same id ({labels}); give each its own.")
    if labels.get("background", 0) != 0 or any(v == 0 and k != "background" for k, v in labels.items()):
        raise DataError(f"{path}: the label with the id 0 must be 'background'; got {labels}.")
    return labels


def _channels(path: Path, channel_names: Any) -> tuple[str, ...]:
    expected = 'expected {"0": "T1", "1": "FLAIR", ...} with consecutive numbers and distinct names'
    if not isinstance(channel_names, dict) or not channel_names:
        raise DataError(f"{path}: channel_names is {channel_names!r}; {expected}.")
    numbers = [str(index) for index in range(len(channel_names))]
    names = [channel_names.get(number) for number in numbers]
    if not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
        raise DataError(f"{path}: channel_names is {channel_names!r}; {expected}.")
    return tuple(str(name) for name in names)


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
