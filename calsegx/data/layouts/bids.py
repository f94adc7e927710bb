"""BIDS: raw anatomical images, with masks in one pipeline's folder under ``derivatives``."""

import collections
import csv
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calsegx.data import layouts, side_table
from calsegx.data.layouts import nnunet_v2, trees
from calsegx.interfaces import Case, DataError, Dataset

MASKS = ("dseg", "mask")
_NO_IMAGES = (*MASKS, "probseg", "defacemask")
_REMEDY = "write a cases.tsv that names the files"


@layouts.registry.register("bids")
def read(root: Path) -> Dataset | None:
    """BIDS: dataset_description.json beside sub-*/[ses-*/]anat with *_T1w and others; masks in derivatives/*.

    A channel is a suffix (``T1w``) that every case has, with its entities (``acq-a_T1w``) where a case has several of
    it.  Masks are ``derivatives/*/sub-*/**/*_{dseg,mask}``, without ``desc-brain_mask``; one in the image's own space
    counts for more than one with ``space-``.  Names of labels come from ``*_dseg.tsv``; a ``mask`` is 1.  Centre,
    scanner and field strength come from participants.tsv, else from the first channel's JSON.  Cases without a mask get
    the split test.

    Raises:
        DataError: when no channel is common to all cases, or masks of several pipelines, or several of one case, leave
            a choice.
    """
    if not (root / "dataset_description.json").is_file():
        return None
    files = _images(root)
    if not files:
        return None
    channels = _common(root, files)
    masks = _masks(root, list(files))
    table = root / "participants.tsv"
    participants = side_table.read(table) if table.is_file() else {}
    cases = []
    for case_id, images in files.items():
        subject = case_id.split("_")[0]
        case = Case(
            case_id=case_id,
            subject_id=subject,
            images={channel: images[channel] for channel in channels},
            label=masks.get(case_id),
            split="" if case_id in masks else "test",
        )
        domain = _sidecar(root, images[channels[0]]) | participants.get(side_table.plain(subject), {})
        cases.append(dataclasses.replace(case, **domain))
    return Dataset(root, tuple(cases), channels, _labels(masks))


def _images(root: Path) -> dict[str, dict[str, Path]]:
    """Case ``sub-x[_ses-y]`` -> channel -> file."""
    files: dict[str, dict[str, Path]] = {}
    for folder in sorted([*root.glob("sub-*/anat"), *root.glob("sub-*/ses-*/anat")]):
        case_id = "_".join(folder.relative_to(root).parts[:-1])
        found = trees.images(folder, f"{case_id}_")
        found = {name: path for name, path in found.items() if _suffix(name) not in _NO_IMAGES}
        if found:
            files[case_id] = found
    several = {
        suffix
        for found in files.values()
        for suffix, count in collections.Counter(map(_suffix, found)).items()
        if count > 1
    }
    return {
        case_id: {name if _suffix(name) in several else _suffix(name): path for name, path in found.items()}
        for case_id, found in files.items()
    }


def _suffix(name: str) -> str:
    return name.rsplit("_", 1)[-1]


def _common(root: Path, files: Mapping[str, Mapping[str, Path]]) -> tuple[str, ...]:
    channels = set.intersection(*(set(found) for found in files.values()))
    if not channels:
        listing = "; ".join(f"{case_id}: {', '.join(found)}" for case_id, found in list(files.items())[:3])
        raise DataError(f"{root} has no image that every case has ({listing}; ...); {_REMEDY}.")
    return tuple(sorted(channels))


def _masks(root: Path, case_ids: list[str]) -> dict[str, Path]:
    """Case -> its mask, of the one pipeline that has masks."""
    found: dict[Path, dict[str, dict[str, Path]]] = {}  # pipeline -> case -> name -> file
    for pipeline in sorted(path for path in root.glob("derivatives/*") if path.is_dir()):
        for case_id in case_ids:
            subject = pipeline / case_id.split("_")[0]
            places = [subject, *sorted(path for path in subject.rglob("*") if path.is_dir())]
            names = {name: path for place in places for name, path in trees.images(place, f"{case_id}_").items()}
            masks = {n: p for n, p in names.items() if _suffix(n) in MASKS and not n.endswith("desc-brain_mask")}
            if masks:
                found.setdefault(pipeline, {})[case_id] = masks
    if len(found) > 1:
        raise DataError(f"{' and '.join(map(str, found))} all hold masks; {_REMEDY} of one of them.")
    chosen = {}
    for case_id, masks in next(iter(found.values()), {}).items():
        own = {name: path for name, path in masks.items() if "space-" not in name} or masks
        if len(own) > 1:
            raise DataError(f"Case {case_id!r} has several masks ({', '.join(map(str, own.values()))}); {_REMEDY}.")
        chosen[case_id] = next(iter(own.values()))
    return chosen


def _labels(masks: Mapping[str, Path]) -> Mapping[str, int]:
    """Label name -> id, for all cases the same; empty when a ``dseg`` comes without its table."""
    declared: dict[str, Path] = {}  # the labels as text -> the first mask that has them
    labels: Mapping[str, int] = {}
    for path in masks.values():
        stem = path.name.split(".nii")[0]
        if stem.endswith("mask"):
            labels = {"background": 0, "lesion" if "lesion" in stem.lower() else "mask": 1}
        else:
            pipeline = next(parent for parent in path.parents if parent.parent.name == "derivatives")
            tables = [path.with_name(f"{stem}.tsv"), *sorted(pipeline.glob("*dseg.tsv"), key=lambda t: -len(t.name))]
            table = next((t for t in tables if t.is_file() and stem.endswith(t.stem)), None)
            labels = _read_labels(table) if table else {}
        declared.setdefault(json.dumps(labels), path)
    if len(declared) > 1:
        raise DataError(f"{' and '.join(map(str, declared.values()))} have different labels; {_REMEDY}.")
    return labels


def _read_labels(path: Path) -> Mapping[str, int]:
    """The columns ``index`` and ``name`` of a ``*_dseg.tsv``."""
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines(), delimiter="\t"))
        pairs = [(row["name"].strip(), int(row["index"])) for row in rows]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{path} needs the columns index (integers) and name ({error!r}); correct it.") from error
    labels = {"background" if index == 0 else name: index for name, index in pairs}
    if len(labels) < len(pairs):
        raise DataError(f"{path} gives one name to two labels; give each its own.")
    return nnunet_v2.parse_labels(path, {"labels": {"background": 0, **labels}})


def _sidecar(root: Path, image: Path) -> dict[str, str]:
    """Centre, scanner and field strength of the image's JSON, and of the whole dataset's for its suffix."""
    stem = image.name.split(".nii")[0]
    content: dict[str, Any] = {}
    for path in (root / f"{_suffix(stem)}.json", image.with_name(f"{stem}.json")):
        if path.is_file():
            content |= nnunet_v2.read_description(path)

    def joined(*keys: str) -> str:
        return " ".join(str(content[key]).strip() for key in keys if content.get(key))

    return {
        "centre": joined("InstitutionName"),
        "scanner": joined("Manufacturer", "ManufacturersModelName"),
        "field_strength": joined("MagneticFieldStrength"),
    }
