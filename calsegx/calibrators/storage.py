"""Saved calibrators, and the rule that none is fitted on what it is tested on."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from calsegx import calibrators, files
from calsegx.interfaces import DataError, InputError, UsageError

VERSION = 1  # of the file


def save(path: Path, name: str, params: Mapping[str, Any]) -> None:
    """Writes the params of the calibrator ``name`` as JSON, with the SHA-256 of the content, whole or not at all.

    Raises:
        UsageError: for an unknown name, or params that are not plain JSON values.
        InputError: when the disk refuses.
    """
    calibrators.get(name)
    try:
        content = json.loads(json.dumps(params, allow_nan=False))  # keys are text from here on, as after loading
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"The params of the calibrator {name!r} cannot be saved ({error}); numbers, text, lists and mappings can, "
            "so check the provenance."
        ) from error
    files.write_atomically(path, _encode(name, content))


def load(path: Path) -> tuple[str, dict[str, Any]]:
    """``(name, params)`` as ``save`` wrote them: the file must be the very bytes that its content encodes to.

    Raises:
        InputError: for a file that is missing, damaged (one byte is enough), of another version, or of a calibrator
            that is not registered here.
    """
    try:
        found = path.read_bytes()
        document = json.loads(found)
        version, name, params = document["version"], document["calibrator"], document["params"]
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a calibrator's file.") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is not a calibrator, or damaged; fit it again.") from error
    if version != VERSION:
        raise DataError(f"{path} is of version {version}, expected {VERSION}; fit it again with this calsegx.")
    if not (isinstance(name, str) and isinstance(params, dict)) or found != _encode(name, params).encode():
        raise DataError(f"{path} is damaged: its content and its SHA-256 differ; copy it or fit it again.")
    if ":" not in name:  # code from outside the tree is imported only where it is used
        calibrators.get(name)
    return name, params


def check_split(split: str, subjects_fit: Iterable[str], subjects_test: Iterable[str]) -> None:
    """Refuses to fit a calibrator on what it is tested on.

    Args:
        split: the split whose cases the calibrator is fitted on, e.g. ``val``.
        subjects_fit: the subjects of these cases.
        subjects_test: the subjects of the test split.

    Raises:
        UsageError: for the split ``test``, or subjects that are in both.
    """
    if split == "test":
        raise UsageError("A calibrator cannot be fitted on the split 'test', which it is tested on; choose 'val'.")
    both = sorted(set(subjects_fit) & set(subjects_test))
    if both:
        more = f" and {len(both) - 3} more" if len(both) > 3 else ""
        raise UsageError(
            f"A calibrator cannot be fitted on subjects of the test split: {', '.join(both[:3])}{more} are in both; "
            "split the data by subject."
        )


def _encode(name: str, params: Mapping[str, Any]) -> str:
    content = {"version": VERSION, "calibrator": name, "params": params}
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=1) + "\n"
