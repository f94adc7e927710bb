"""NIfTI files in and out, strictly.

nibabel alone loads the header of a truncated file, never reads a gzip trailer, and invents an affine when a
file has none.  Here a file is read to its last byte before anything is believed, and what is written lies on
exactly the grid that was read.
"""

import difflib
import gzip
import io
import itertools
import math
import struct
import zlib
from pathlib import Path

import nibabel
import numpy as np
from nibabel import orientations, spatialimages, wrapstruct

from calsegx import files
from calsegx.interfaces import DataError, Volume

WORKING_AXES = {  # slice axis -> where D, H and W run to; row 0 of a slice is on top, as radiologists look at it
    "axial": ("S", "P", "L"),
    "coronal": ("P", "I", "L"),
    "sagittal": ("L", "I", "P"),
}
ENDINGS = (".nii.gz", ".nii")
GRID_TOLERANCE_MM = 1e-2  # at the farthest corner: above the noise of float32 affines and quaternions
INTEGER_TOLERANCE = 1e-3  # labels stored with a scale factor come back as 1.00000002
_MILLIMETRES = {"unknown": 1.0, "mm": 1.0, "meter": 1000.0, "micron": 0.001}
_GZIP_LEVEL = 1  # as nibabel: higher levels cost seconds per probability map and save little
_HEADER_ERRORS = (
    spatialimages.HeaderDataError,
    wrapstruct.WrapStructError,
    ValueError,
    OverflowError,
    OSError,
    KeyError,
    struct.error,
)


def read(path: Path, volume: int | None = None, slice_axis: str = "axial") -> Volume:
    """Read an image as float32 ``[D, H, W]`` in the working orientation (see ``interfaces.Volume``).

    Trailing axes of length 1 are dropped, a 2-D file becomes one slice.  Where sform and qform are both set,
    the sform counts; units other than millimetres are converted in ``affine`` and ``spacing_mm``.

    Args:
        path: the file.
        volume: which volume of a 4-D file, counted from 0; None: the file must hold one.
        slice_axis: of ``WORKING_AXES``.

    Raises:
        DataError: for a missing, empty, truncated or damaged file, a file that is not what its name says,
            several volumes where one is expected or fewer than asked for, colours or complex numbers, a missing or
            unusable affine, NaN or infinite voxels.
    """
    header, data = _load(path, volume)
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused below
        data = data.astype(np.float32)
    return _to_working(path, header, data, slice_axis)


def read_labels(path: Path, slice_axis: str = "axial") -> Volume:
    """Read a label file as int32 ``[D, H, W]``; values within 1e-3 of an integer are rounded.

    Raises:
        DataError: as ``read``, and for fractional values (a probability map) or ids beyond 32 bits.
    """
    header, data = _load(path)
    if data.dtype.kind == "f":
        _check_finite(path, data)
        rounded = np.rint(data)
        fractional = np.abs(data - rounded) > INTEGER_TOLERANCE
        if fractional.any():
            raise DataError(
                f"{path} is not a label file: {np.count_nonzero(fractional)} voxels are not integers (for example "
                f"{data[fractional][0]:.4g}); expected one integer per class, so threshold a probability map first."
            )
        data = rounded
    if data.size and max(abs(float(data.min())), abs(float(data.max()))) > np.iinfo(np.int32).max:
        raise DataError(f"{path} holds label ids beyond 32 bits; expected small integers, one per class.")
    return _to_working(path, header, data.astype(np.int32), slice_axis)


def write(path: Path, array: np.ndarray, like: Volume, dtype: type) -> None:
    """Write ``array [D, H, W]`` on the grid of ``like``'s file: its shape, affines, their codes and units.

    The voxels are stored unscaled (slope 1, intercept 0).  The same array gives the same bytes.  The file
    appears whole or not at all.

    Args:
        path: ends in ``.nii.gz`` or ``.nii``.
        array: in the working orientation.
        like: a volume that was read; its voxels are not used.
        dtype: of the file, e.g. ``np.uint8`` for labels, ``np.float32`` for probabilities.

    Raises:
        ValueError: when shape, values or file name do not fit.
        InputError: when the file cannot be written.
    """
    if not path.name.endswith(ENDINGS):
        raise ValueError(f"the name must end in .nii or .nii.gz; got {path}")
    voxels = array.astype(dtype)
    if np.issubdtype(dtype, np.integer) and not np.array_equal(voxels, array):
        raise ValueError(f"{path}: the values do not fit {np.dtype(dtype).name}; they reach {array.max()}")
    shape = like.header.get_data_shape()
    data = orientations.apply_orientation(voxels, _inverse(like.orientation))
    if data.shape != _three_axes(shape):
        raise ValueError(f"{path}: the array has {data.shape} voxels in the file's axes, the grid {shape}")
    header = like.header.copy()
    header.extensions.clear()  # they describe the input file, and may name the patient
    header.set_data_dtype(dtype)
    header["cal_min"] = header["cal_max"] = 0  # the input's display window
    image_class = nibabel.Nifti2Image if isinstance(header, nibabel.Nifti2Header) else nibabel.Nifti1Image
    image = image_class(data.reshape(shape), header.get_best_affine(), header)
    content = image.to_bytes()
    if path.name.endswith(".gz"):
        packed = io.BytesIO()
        with gzip.GzipFile("", "wb", _GZIP_LEVEL, packed, mtime=0) as stream:
            stream.write(content)
        content = packed.getvalue()
    files.write_atomically(path, content)


def same_grid(first: Volume, first_path: Path, second: Volume, second_path: Path) -> float:
    """Check that two volumes lie on the same voxels: equal shape, corners within ``GRID_TOLERANCE_MM``.

    The comparison is made in the working orientation, so the files may store their axes in different orders.
    Returns how far apart the corners lie, in millimetres.

    Raises:
        DataError: with both grids and the remedy.
    """
    remedy = f"resample {second_path.name} to the grid of {first_path.name} (nearest neighbour for labels)"
    shapes = first.voxels.shape, second.voxels.shape
    if shapes[0] != shapes[1]:
        raise DataError(
            f"{first_path} and {second_path} have different shapes (slices, rows, columns): {shapes[0]} and "
            f"{shapes[1]}; {remedy}."
        )
    distance = corner_distance(shapes[0], first.affine, second.affine)
    if not distance <= GRID_TOLERANCE_MM:
        raise DataError(
            f"{first_path} and {second_path} lie up to {distance:.4g} mm apart: their affines, in working axes, are "
            f"{_format(first.affine)} and {_format(second.affine)}; {remedy}, or correct the wrong header."
        )
    return distance


def corner_distance(shape: tuple[int, ...], first: np.ndarray, second: np.ndarray) -> float:
    """How far apart two affines ``[4, 4]`` put the corners of a volume of ``shape``, at most."""
    corners = np.array([(*c, 1) for c in itertools.product(*((0, n - 1) for n in shape))], dtype=float)
    return float(np.linalg.norm((corners @ (first - second).T)[:, :3], axis=1).max())


def require_file(path: Path, role: str = "") -> None:
    """Check that ``path`` is a file; ``role`` says what asks for it, e.g. ``case s01, label``.

    Raises:
        DataError: naming the nearest file in the same folder.
    """
    where = f" ({role})" if role else ""
    if path.is_dir():
        raise DataError(f"{path}{where} is a folder; expected an image file.")
    if path.is_file():
        return
    if path.is_symlink():
        raise DataError(
            f"{path}{where} is a link to {path.readlink()}, which is not there; restore that file (git annex get, "
            "datalad get)."
        )
    if path.exists():
        raise DataError(f"{path}{where} is no regular file; expected an image file.")
    if not path.parent.is_dir():
        raise DataError(f"{path}{where} does not exist, nor does its folder; check the path.")
    names = sorted(entry.name for entry in path.parent.iterdir())
    near = difflib.get_close_matches(path.name, names, n=1)
    raise DataError(
        f"{path}{where} does not exist; "
        + (f"the nearest name in that folder is {near[0]!r}." if near else "its folder has no similar name.")
    )


def read_content(path: Path) -> bytes:
    """All bytes of a file that must be there and not be empty.

    Raises:
        DataError: when it is not, or cannot be read.
    """
    require_file(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check permissions and the drive.") from error
    if not content:
        raise DataError(f"{path} is empty (0 bytes); copy or download it again.")
    return content


def read_grid(path: Path) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Shape and spacing in mm along the axial working axes (slices, rows, columns), from the header alone.

    Raises:
        DataError: for a file without a readable header, or without an affine.
    """
    header, shape = _read_header(path)
    shape = _three_axes(shape)
    affine = affine_mm(path, header)
    target = orientations.axcodes2ornt(WORKING_AXES["axial"])
    order = np.argsort(orientations.ornt_transform(orientations.io_orientation(affine), target)[:, 0])
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    return tuple(shape[axis] for axis in order), tuple(float(spacing[axis]) for axis in order)


def count_volumes(path: Path) -> int:
    """How many volumes a file holds, from the header alone.

    Raises:
        DataError: for a file without a readable header.
    """
    return math.prod(_read_header(path)[1][3:])


def _read_header(path: Path) -> tuple[nibabel.Nifti1Header, tuple[int, ...]]:
    """The header and the shape it gives, without the voxels."""
    require_file(path)
    try:
        with gzip.open(path) if path.name.endswith(".gz") else open(path, "rb") as stream:
            header = _header(path, stream.read(nibabel.Nifti2Header.sizeof_hdr))
        return header, header.get_data_shape()
    except (EOFError, zlib.error, *_HEADER_ERRORS) as error:
        raise DataError(f"{path} has no readable header ({error}); copy or download it again.") from error


def _header(path: Path, content: bytes) -> nibabel.Nifti1Header:
    """The header that ``content`` starts with, as it stands there."""
    sizes = struct.unpack("<i", content[:4]) + struct.unpack(">i", content[:4]) if len(content) >= 4 else ()
    header_class = nibabel.Nifti1Header if 348 in sizes else nibabel.Nifti2Header if 540 in sizes else None
    if header_class is None or len(content) < header_class.sizeof_hdr:
        raise DataError(f"{path} is not a NIfTI file: it has no NIfTI header; export it again as NIfTI-1.")
    try:
        # check=False: nibabel's check repairs negative zooms and the like, which hides what the file says.
        return header_class.from_fileobj(io.BytesIO(content[: header_class.sizeof_hdr]), check=False)
    except _HEADER_ERRORS as error:
        raise DataError(f"{path} has a damaged NIfTI header ({error}); export or download it again.") from error


def _load(path: Path, volume: int | None = None) -> tuple[nibabel.Nifti1Header, np.ndarray]:
    """Header and scaled voxels ``[X, Y, Z]`` in the file's own axes, of one volume."""
    content = _read_bytes(path)
    header = _header(path, content)
    try:
        shape, dtype = header.get_data_shape(), header.get_data_dtype()
        single = bytes(header["magic"].item()).startswith(b"n+")
        expected = header.get_data_offset() + math.prod(shape) * dtype.itemsize
    except _HEADER_ERRORS as error:
        raise DataError(f"{path} has a damaged NIfTI header ({error}); export or download it again.") from error
    if not single:
        raise DataError(f"{path} is half of a .hdr/.img pair; convert it to one .nii.gz file.")
    if len(shape) < 2 or min(shape) < 1:
        raise DataError(f"{path} has the shape {shape}; expected a volume of at least one voxel along each axis.")
    volumes = math.prod(shape[3:])
    if volume is None and volumes > 1:
        raise DataError(
            f"{path} holds {volumes} volumes (shape {shape}); expected one: name each channel's volume in a column "
            "volume:<channel> of cases.tsv, or split it into one file per channel."
        )
    if volume is not None and not 0 <= volume < volumes:
        raise DataError(
            f"{path} holds {volumes} volume(s) (shape {shape}), but volume {volume} is asked for, counted from 0; "
            "correct the channels of its dataset."
        )
    if dtype.fields or dtype.kind not in "iuf":
        raise DataError(f"{path} holds {dtype} voxels (colour or complex); expected one real number per voxel.")
    if len(content) < expected:
        raise DataError(
            f"{path} is truncated: its header promises {expected} bytes, it has {len(content)}; copy it again."
        )
    try:
        data = header.data_from_fileobj(io.BytesIO(content))
    except _HEADER_ERRORS as error:
        raise DataError(f"{path} cannot be decoded ({error}); export or download it again.") from error
    if volumes == 1:
        return header, data.reshape(_three_axes(shape))
    header.set_data_shape(shape[:3])  # what is written for one volume is one volume
    return header, data.reshape(*shape[:3], volumes, order="F")[..., volume]


def _read_bytes(path: Path) -> bytes:
    """The whole file, decompressed, after the checks that need no header."""
    require_file(path)
    if not path.name.endswith(ENDINGS):
        raise DataError(f"{path} does not end in .nii or .nii.gz; convert it to NIfTI.")
    content = read_content(path)
    if content.startswith(b"version https://git-lfs") or b"/annex/objects/" in content[:500]:
        raise DataError(
            f"{path} is a pointer, not the image: its content was not downloaded; run 'git lfs pull' (or 'git annex "
            "get')."
        )
    is_gzip, named_gzip = content.startswith(b"\x1f\x8b"), path.name.endswith(".gz")
    if is_gzip != named_gzip:
        kind, ending = ("is gzip-compressed", ".nii.gz") if is_gzip else ("is not gzip-compressed", ".nii")
        raise DataError(f"{path} {kind}, against its name; if the content is right, rename it to end in {ending}.")
    if not is_gzip:
        return content
    try:
        return gzip.decompress(content)  # to the end, so the trailer's CRC and length are checked
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path} is truncated or damaged: gzip says {str(error)!r}; copy or download it again."
        ) from error


def _to_working(path: Path, header: nibabel.Nifti1Header, data: np.ndarray, slice_axis: str) -> Volume:
    _check_finite(path, data)
    affine = affine_mm(path, header)
    target = orientations.axcodes2ornt(WORKING_AXES[slice_axis])
    transform = orientations.ornt_transform(orientations.io_orientation(affine), target)
    working = affine @ orientations.inv_ornt_aff(transform, data.shape)
    voxels = np.ascontiguousarray(orientations.apply_orientation(data, transform))
    depth, height, width = (float(length) for length in np.linalg.norm(working[:3, :3], axis=0))
    return Volume(voxels, working, (depth, height, width), transform, header)


def affine_mm(path: Path, header: nibabel.Nifti1Header) -> np.ndarray:
    """The file's voxel-to-RAS affine in millimetres, checked; else a DataError that names ``path``."""
    axes = min(3, int(header["dim"][0]))
    zooms = np.asarray(header["pixdim"][1 : 1 + axes], dtype=float)
    if not np.all(np.isfinite(zooms)) or not np.all(zooms > 0):
        raise DataError(f"{path} has the voxel size {zooms.tolist()}; expected positive numbers: correct pixdim.")
    try:
        sform, qform = header.get_sform(coded=True)[0], header.get_qform(coded=True)[0]
        scale = _MILLIMETRES[str(header.get_xyzt_units()[0])]
    except _HEADER_ERRORS as error:
        raise DataError(f"{path} has an unusable qform or unit ({error}); correct its header.") from error
    affine = sform if sform is not None else qform
    if affine is None:
        raise DataError(
            f"{path} has no affine (sform and qform codes are both 0), so left and right are unknown; set one of "
            "them from the original scan."
        )
    affine = np.asarray(affine, dtype=float)
    if not np.all(np.isfinite(affine)) or _is_singular(affine):
        raise DataError(f"{path} has an unusable affine {_format(affine)} (NaN or singular); correct its header.")
    if sform is not None and qform is not None:
        axes_of = ["".join(map(str, nibabel.aff2axcodes(a))) for a in (sform, qform)]
        if axes_of[0] != axes_of[1]:
            raise DataError(
                f"{path} says two things about its axes: sform {axes_of[0]}, qform {axes_of[1]}; set the code of the "
                "wrong one to 0."
            )
    return np.diag([scale, scale, scale, 1.0]) @ affine


def _is_singular(affine: np.ndarray) -> bool:
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    return bool(np.any(lengths == 0) or abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-4)


def _check_finite(path: Path, data: np.ndarray) -> None:
    if data.dtype.kind != "f":
        return
    count = data.size - np.count_nonzero(np.isfinite(data))
    if count:
        raise DataError(f"{path} has {count} NaN or infinite voxels of {data.size}; replace them (0 outside the head).")


def _three_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape, 1)[:3]


def _inverse(transform: np.ndarray) -> np.ndarray:
    """The orientation transform that undoes ``transform``."""
    inverse = np.empty_like(transform)
    for axis, (target, flip) in enumerate(transform):
        inverse[int(target)] = (axis, flip)
    return inverse


def _format(affine: np.ndarray) -> str:
    return str([[float(f"{value:.6g}") for value in row] for row in affine[:3]])
