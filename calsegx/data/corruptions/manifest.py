"""The manifest of a corrupted dataset: how its images were made, and what they are to the last bit."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import scipy

import calsegx
from calsegx import files
from calsegx.data import corruptions, nifti
from calsegx.interfaces import DataError

FILE_NAME = "manifest.json"
CLEAN = "clean"  # the domain of the unchanged copies, which the corrupted ones are compared with


def describe(names: Iterable[str]) -> dict[str, Any]:
    """The definitions that the voxels depend on, and the software that made them, for who finds a difference."""
    parameters = {name: corruptions.parameters(name) for name in sorted(names)}
    software = {"calsegx": calsegx.__version__, "numpy": np.__version__, "scipy": scipy.__version__}
    return {
        "version": corruptions.VERSION,
        "steps": corruptions.STEPS,
        "parameters": parameters,
        "made_with": software,
    }


def read(path: Path) -> dict[str, Any]:
    """The manifest: what ``describe`` gives, and ``files``, an entry by name.

    Raises:
        DataError: when it is missing, damaged, or of other definitions than these.
    """
    nifti.require_file(path, "the manifest")
    try:
        record = files.unseal(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); get it again, or write to a new folder.") from error
    mine = describe(record["parameters"])
    if any(record[key] != mine[key] for key in ("version", "steps", "parameters")):
        raise DataError(
            f"{path} was made with other definitions of the corruptions (version {record['version']}, here "
            f"{mine['version']}); use calsegx {record['made_with']['calsegx']}, or write to a new folder."
        )
    return record


def voxels_sha256(voxels: np.ndarray) -> str:
    """SHA-256 of the voxels ``[D, H, W]`` in C order, little-endian, in the type of the file."""
    return hashlib.sha256(voxels.astype(voxels.dtype.newbyteorder("<")).tobytes()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes; empty when there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
