"""Which label ids of the files make which class: ``tumour=1+2+3`` or ``core=1,oedema=2,rim=3``.

Classes exclude each other; class index 0 is the background, 1..K are the classes in the order given.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calsegx.interfaces import DataError, UsageError

FLAG = "--config.data.classes"
_EXAMPLE = "expected name=ids, for example tumour=1+2+3 or core=1,oedema=2"
_NAME = re.compile(r"[\w .+()-]+")
_MOST_CLASSES = 254  # class indices are uint8


@dataclass(frozen=True)
class ClassMap:
    """K classes, and the label ids of the files behind each."""

    names: tuple[str, ...]  # of the classes 1..K
    ids: tuple[tuple[int, ...], ...]  # of the classes 1..K
    known: frozenset[int]  # every id that a file may hold; those of no class are background


def parse(spec: str, dataset_labels: Mapping[str, int]) -> ClassMap:
    """The classes that ``spec`` asks for; an empty ``spec`` makes every label above 0 a class.

    Raises:
        UsageError: for a malformed ``spec``, an id that the dataset does not declare, an id in two classes,
            or an empty ``spec`` where the dataset declares no labels.
    """
    declared = frozenset(dataset_labels.values())
    if spec.strip():
        classes = _parse_spec(spec)
    else:
        above_zero = sorted((value, name) for name, value in dataset_labels.items() if value > 0)
        classes = {name: (value,) for value, name in above_zero}
        if not classes:
            raise UsageError(f"The dataset declares no labels, so name the classes with {FLAG}; {_EXAMPLE}.")
    if len(classes) > _MOST_CLASSES:
        raise UsageError(f"{FLAG} gives {len(classes)} classes; at most {_MOST_CLASSES} are supported.")
    for name in classes:
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"The class name {name!r} cannot be part of a file name; use letters, digits, space, dot, plus, minus, "
                f"underscore or brackets (rename it with {FLAG})."
            )
    used = frozenset(value for ids in classes.values() for value in ids)
    if declared and not used <= declared:
        listing = ", ".join(f"{name}={value}" for name, value in dataset_labels.items())
        raise UsageError(f"{FLAG}={spec!r} uses the ids {sorted(used - declared)}; the dataset declares {listing}.")
    return ClassMap(tuple(classes), tuple(classes.values()), frozenset({0}) | used | declared)


def to_indices(class_map: ClassMap, voxels: np.ndarray, path: Path) -> np.ndarray:
    """Class indices uint8 0..K of the label ids in ``voxels`` (integers, any shape); ``path``: for messages.

    Raises:
        DataError: for ids that neither the dataset nor the classes name.
    """
    present = np.unique(voxels)
    unknown = [int(value) for value in present if int(value) not in class_map.known]
    if unknown:
        raise DataError(
            f"{path} holds the label ids {_first(unknown)}; expected only {_first(sorted(class_map.known))}: correct "
            f"the file, or name the ids in dataset.json or {FLAG}."
        )
    index_of = {value: index for index, ids in enumerate(class_map.ids, start=1) for value in ids}
    table = np.array([index_of.get(int(value), 0) for value in present], dtype=np.uint8)
    return table[np.searchsorted(present, voxels)]


def to_file_ids(class_map: ClassMap, indices: np.ndarray) -> np.ndarray:
    """The way back: each class's first label id, as uint8 or, for ids above 255, uint16 or uint32."""
    ids = np.array([0, *(ids[0] for ids in class_map.ids)])
    return ids.astype(np.min_scalar_type(ids.max()))[indices]


def _parse_spec(spec: str) -> dict[str, tuple[int, ...]]:
    classes: dict[str, tuple[int, ...]] = {}
    owner: dict[int, str] = {}
    for part in spec.split(","):
        name, equals, values = (piece.strip() for piece in part.partition("="))
        numbers = [value.strip() for value in values.split("+")]
        if not name or not equals or not all(value.isascii() and value.isdigit() for value in numbers):
            raise UsageError(f"{FLAG}={spec!r}: {part.strip()!r} is not a class; {_EXAMPLE}.")
        if name in classes or name == "background":
            raise UsageError(f"{FLAG}={spec!r}: the name {name!r} is taken; every class needs its own.")
        classes[name] = tuple(int(value) for value in numbers)
        for value in classes[name]:
            if value == 0:
                raise UsageError(f"{FLAG}={spec!r}: id 0 is the background; leave it out.")
            if value in owner:
                raise UsageError(f"{FLAG}={spec!r}: id {value} stands twice; every id belongs to one class.")
            owner[value] = name
    return classes


def _first(values: list[int], most: int = 12) -> str:
    return ", ".join(map(str, values[:most])) + (f" and {len(values) - most} more" if len(values) > most else "")
