"""Datasets of nnU-Net v1 and of the Medical Segmentation Decathlon, read as they are.

Without a ``cases.tsv`` every case counts as a subject of its own, and the scanner is unknown.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calsegx.data import layouts, nifti
from calsegx.data.layouts import nnunet_v2
from calsegx.interfaces import Case, DataError, Dataset


@layouts.registry.register("nnunet_v1")
def read(root: Path) -> Dataset | None:
    """A dataset.json with modality, labels (id: name) and a list training: nnU-Net v1 or the Decathlon.

    ``training`` holds the cases to split, ``test`` the test cases.  The Decathlon's images are the files that are
    listed, 4-D where there are several modalities; those of nnU-Net v1 are ``<case>_<4-digit channel>.nii.gz`` where
    ``<case>.nii.gz`` is listed.  A test case has a label if ``labelsTs`` has one of its name.

    Raises:
        DataError: for a malformed dataset.json, and images that are there in neither form or in both.
    """
    path = root / "dataset.json"
    if not path.is_file():
        return None
    description = nnunet_v2.read_description(path)
    if "modality" not in description or "channel_names" in description:
        return None
    channels = nnunet_v2.parse_channels(path, description, "modality")
    labels = _labels(path, description.get("labels"))
    training, test = (_entries(path, description, key) for key in ("training", "test"))
    nnunet_v2.check_number(path, description, len(training), "'training' lists")
    cases = (
        *(_case(path, channels, image, root / label, "") for image, label in training if not _is_macos(image)),
        *(_case(path, channels, image, _test_label(root, image), "test") for image, _ in test if not _is_macos(image)),
    )
    if not cases:
        raise DataError(f"{path} lists no case in training or test; add some.")
    return Dataset(root, cases, channels, labels)


def _labels(path: Path, labels: Any) -> dict[str, int]:
    """``{"0": "background", "1": "tumour"}`` turned round."""
    if not isinstance(labels, dict) or not all(
        number.isascii() and number.isdigit() and isinstance(name, str) for number, name in labels.items()
    ):
        raise DataError(f'{path}: labels are {labels!r}; expected {{"0": "background", "1": "tumour"}} (nnU-Net v1).')
    turned = {name: int(number) for number, name in labels.items()}
    if len(turned) < len(labels):
        raise DataError(f"{path}: two labels have the same name ({labels}); give each its own.")
    return nnunet_v2.parse_labels(path, {"labels": turned})


def _entries(path: Path, description: Mapping[str, Any], key: str) -> list[tuple[str, str]]:
    """(image, label) of every entry of ``training`` or ``test``; a test entry is the image alone."""
    listed = description.get(key, [])
    if not isinstance(listed, list):
        raise DataError(f"{path}: {key} is a {type(listed).__name__}; expected a list of cases.")
    entries = []
    for entry in listed:
        content = entry if isinstance(entry, dict) else {"image": entry}
        image, label = content.get("image"), content.get("label", "")
        if not isinstance(image, str) or not isinstance(label, str) or (key == "training" and not label):
            expected = '{"image": path, "label": path}' if key == "training" else "the path of an image"
            raise DataError(f"{path}: {key} holds {entry!r}; expected {expected}.")
        if not image.endswith(nifti.ENDINGS):
            raise DataError(f"{path}: {key} names {image!r}; expected a file that ends in .nii.gz or .nii.")
        entries.append((image, label))
    return entries


def _is_macos(image: str) -> bool:
    """Whether the entry is the resource fork that macOS leaves in archives, listed like an image."""
    return Path(image).name.startswith("._")


def _test_label(root: Path, image: str) -> Path | None:
    label = root / "labelsTs" / Path(image).name
    return label if label.is_file() else None


def _case(path: Path, channels: tuple[str, ...], image: str, label: Path | None, split: str) -> Case:
    whole = path.parent / image
    ending = next(ending for ending in nifti.ENDINGS if image.endswith(ending))
    case_id = whole.name.removesuffix(ending)
    parts = [whole.with_name(f"{case_id}_{number:04d}{ending}") for number in range(len(channels) + 1)]
    there = [part for part in parts if part.is_file()]
    if whole.is_file() and there:
        raise DataError(f"Case {case_id!r} has both {whole} and {there[0]}; remove the one that is not its image.")
    if whole.is_file():
        images = dict.fromkeys(channels, whole)
        volumes = {channel: number for number, channel in enumerate(channels)} if len(channels) > 1 else {}
        return Case(case_id, case_id, images, label, split, volumes=volumes)
    if there != parts[:-1]:
        raise DataError(
            f"Case {case_id!r} of {path} has {len(there) or 'no'} images; expected {whole.name} (4-D, Decathlon) or "
            f"{parts[0].name} to {parts[-2].name} (nnU-Net v1) in {whole.parent}, one for each modality."
        )
    return Case(case_id, case_id, dict(zip(channels, there, strict=True)), label, split)
