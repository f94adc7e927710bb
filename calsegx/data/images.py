"""Image and label files of any kind that is read: NIfTI volumes, and PNG pictures as volumes of one slice."""

import hashlib
import math
from pathlib import Path

import numpy as np

from calsegx.data import nifti, pictures
from calsegx.data.nifti import require_file as require_file
from calsegx.interfaces import UsageError, Volume

ENDINGS = (*nifti.ENDINGS, pictures.ENDING)
MOST_IDS = 32  # of labels that nobody declared; more are an image, or the grey edges of a smoothed mask


def read(path: Path, volume: int | None = None, slice_axis: str = "axial") -> Volume:
    """Read an image as float32 ``[D, H, W]``; see ``nifti.read`` and ``pictures.read``.

    Args:
        path: its ending says what it is; what is not a picture is held to be NIfTI.
        volume: which volume of a 4-D file, or colour of a picture, from 0; None where the file holds one.
        slice_axis: which of the body's planes are the slices ``D``: axial, coronal or sagittal.

    Raises:
        DataError: for an unusable file.
        UsageError: for another slice axis than axial with a picture.
    """
    if _is_picture(path, slice_axis):
        return pictures.read(path, volume)
    return nifti.read(path, volume=volume, slice_axis=slice_axis)


def read_labels(path: Path, slice_axis: str = "axial") -> Volume:
    """Read a label file as int32 ``[D, H, W]``; arguments and errors as ``read``."""
    if _is_picture(path, slice_axis):
        return pictures.read_labels(path)
    return nifti.read_labels(path, slice_axis=slice_axis)


def read_grid(path: Path) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Shape and spacing in mm of a file, without its voxels; see ``nifti.read_grid``.

    Raises:
        DataError: for a file without a readable header.
    """
    return pictures.read_grid(path) if _is_picture(path, "axial") else nifti.read_grid(path)


def read_reference(path: Path, slice_axis: str = "axial") -> Volume:
    """The grid of a file, with zeros for voxels; of NIfTI files the header alone is read.

    Raises:
        DataError: for a file without a readable header, and an unusable picture.
        UsageError: as ``read``.
    """
    if _is_picture(path, slice_axis):
        return pictures.read_reference(path)
    return nifti.read_reference(path, slice_axis)


def count_volumes(path: Path) -> int:
    """How many volumes a NIfTI file holds by its header, or how many colours a picture: 1 or 3.

    Raises:
        DataError: as ``read_reference``.
    """
    if _is_picture(path, "axial"):
        return len(pictures.channels(path))
    return math.prod(nifti.read_reference(path).header.get_data_shape()[3:])


def voxels_sha256(voxels: np.ndarray) -> str:
    """SHA-256 of shape and float32 values: the same for one image in other types, orientations and compressions."""
    digest = hashlib.sha256(str(voxels.shape).encode())
    digest.update(np.ascontiguousarray(voxels, dtype=np.float32).data)
    return digest.hexdigest()


def write(stem_path: Path, array: np.ndarray, like: Volume, dtype: type) -> Path:
    """Write ``array [D, H, W]`` on ``like``'s grid as a file of ``like``'s kind, and return its path.

    Args:
        stem_path: the file without its ending: ``.png`` or ``.nii.gz`` is added.
        array: in the working orientation.
        like: a volume that was read.
        dtype: ``np.uint8`` or ``np.uint16`` for labels, ``np.float32`` for probabilities.

    Raises:
        ValueError: when shape or values do not fit.
        InputError: when the file cannot be written.
    """
    if isinstance(like.header, pictures.PictureHeader):
        path = stem_path.with_name(stem_path.name + pictures.ENDING)
        pictures.write(path, array, like, dtype)
    else:
        path = stem_path.with_name(f"{stem_path.name}.nii.gz")
        nifti.write(path, array, like, dtype)
    return path


def _is_picture(path: Path, slice_axis: str) -> bool:
    picture = path.suffix.lower() == pictures.ENDING
    if picture and slice_axis != "axial":
        raise UsageError(
            f"--config.data.slice_axis={slice_axis} does not suit {path}: a picture has one plane; leave it."
        )
    return picture
