"""PNG pictures in and out, strictly: 8- or 16-bit grey values, or 8-bit colours.

Pillow alone scales 2-bit grey values to 0..255, halves 16-bit colours to 8 bits and stops reading at the last row.
Here a file's own header decides, and the file is read to its end, checksums included.
"""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from calsegx import files
from calsegx.data import nifti
from calsegx.interfaces import DataError, Volume

COLOURS = ("red", "green", "blue")
GREY = ("grey",)
ENDING = ".png"
# (slice, row, column, 1) -> RAS+: rows run to posterior, columns to the left, as in the working orientation (SPL)
_AFFINE = np.array([[0.0, 0, -1, 0], [0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
_ORIENTATION = np.array([[2.0, 1], [1, 1], [0, 1]])  # a click's i is the column (x), j the row (y), k is 0
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY, _COLOUR, _PALETTE = 0, 2, 3  # the PNG header's colour types; those with alpha are 4 and 6
_PROBABILITY_SCALE = 65535


@dataclass(frozen=True)
class PictureHeader:
    """What ``write`` needs to know of the picture that was read; stands where a NIfTI header would."""

    shape: tuple[int, int]  # rows, columns


def channels(path: Path) -> tuple[str, ...]:
    """``("red", "green", "blue")`` for a colour picture, ``("grey",)`` for a grey one.

    Raises:
        DataError: as ``read``.
    """
    return COLOURS if _load(path).ndim == 3 else GREY


def read_grid(path: Path) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Shape ``(1, H, W)`` and spacing in mm.

    Raises:
        DataError: as ``read``.
    """
    return (1, *_load(path).shape[:2]), (1.0, 1.0, 1.0)


def read_reference(path: Path) -> Volume:
    """The grid of a picture: a volume as of ``read``, of zeros that take no memory.

    Raises:
        DataError: as ``read``.
    """
    return _volume(np.broadcast_to(np.uint8(0), _load(path).shape[:2]))


def read(path: Path, colour: int | None = None) -> Volume:
    """Read a picture as one slice, float32 ``[1, H, W]``, row 0 on top, pixels of 1 mm.

    Args:
        path: ends in ``.png``.
        colour: 0 red, 1 green, 2 blue of a colour picture; None for a grey one.

    Raises:
        DataError: for a missing, empty, truncated or damaged file, one that is not a PNG, a palette, an alpha
            channel, fewer than 8 bits, colours of 16 bits, several frames, or colours where ``colour`` is None and vice
            versa.
    """
    pixels = _load(path)
    if colour is None and pixels.ndim == 3:
        raise DataError(f"{path} is a colour picture; expected a grey one, as the first of the dataset: convert it.")
    if colour is not None and pixels.ndim == 2:
        raise DataError(f"{path} is a grey picture; expected a colour one, as the first of the dataset: convert it.")
    if colour is not None and not 0 <= colour < len(COLOURS):
        raise DataError(f"{path} has the colours 0 red, 1 green and 2 blue; got the volume {colour}.")
    return _volume((pixels if colour is None else pixels[..., colour]).astype(np.float32))


def read_labels(path: Path) -> Volume:
    """Read a mask as int32 ``[1, H, W]``; its grey values are the label ids.

    Raises:
        DataError: as ``read``, and for colours.
    """
    pixels = _load(path)
    if pixels.ndim == 3:
        raise DataError(f"{path} is a colour picture; expected a mask: save the label ids as grey values.")
    return _volume(pixels.astype(np.int32))


def read_probabilities(path: Path) -> Volume:
    """Read probabilities as ``write`` stores them: float32 ``[1, H, W]``, 0..1.

    Raises:
        DataError: as ``read``, and for other pictures than grey ones of 16 bits.
    """
    pixels = _load(path)
    if pixels.dtype != np.uint16:
        raise DataError(f"{path} is no probability map; expected grey values of 16 bits, of which 65535 is 1.")
    return _volume((pixels / _PROBABILITY_SCALE).astype(np.float32))


def write(path: Path, array: np.ndarray, like: Volume, dtype: type) -> None:
    """Write ``array [1, H, W]`` as a grey PNG of ``like``'s size.  The file appears whole or not at all.

    Args:
        path: ends in ``.png``.
        array: label ids, or probabilities 0..1.
        like: a volume that ``read`` gave.
        dtype: ``np.uint8`` or ``np.uint16`` for labels; ``np.float32`` for probabilities, which are stored in 16 bits:
            65535 is 1.

    Raises:
        ValueError: when shape, values, type or file name do not fit.
        InputError: when the file cannot be written.
    """
    if path.suffix != ENDING:
        raise ValueError(f"the name must end in {ENDING}; got {path}")
    if array.shape != (1, *like.header.shape):
        raise ValueError(f"{path}: the array has the shape {array.shape}, the picture {like.header.shape}")
    kind = np.dtype(dtype)
    if kind.kind == "f":
        if not np.all((array >= 0) & (array <= 1)):
            raise ValueError(f"{path}: probabilities must be in 0..1; got {array.min()} to {array.max()}")
        pixels = np.rint(array[0].astype(float) * _PROBABILITY_SCALE).astype(np.uint16)
    elif kind in (np.uint8, np.uint16):
        pixels = array[0].astype(kind)
        if not np.array_equal(pixels, array[0]):
            raise ValueError(f"{path}: the values do not fit {kind.name}; they reach {array.max()}")
    else:
        raise ValueError(f"{path}: a PNG holds uint8 or uint16 labels or float probabilities; got {kind.name}")
    packed = io.BytesIO()
    Image.fromarray(pixels).save(packed, "PNG")
    files.write_atomically(path, packed.getvalue())


def _volume(pixels: np.ndarray) -> Volume:
    header = PictureHeader((pixels.shape[0], pixels.shape[1]))
    return Volume(pixels[None], _AFFINE.copy(), (1.0, 1.0, 1.0), _ORIENTATION.copy(), header)


def _load(path: Path) -> np.ndarray:
    """uint8 or uint16 ``[H, W]``, or uint8 ``[H, W, 3]``."""
    content = nifti.read_content(path)
    if not content.startswith(_SIGNATURE):
        raise DataError(
            f"{path} is not a PNG file, whatever its name says (another format, or a git-lfs pointer to a file that "
            "was not downloaded); convert or download it."
        )
    try:
        Image.open(io.BytesIO(content)).verify()  # the chunks' checksums, to the last
        image = Image.open(io.BytesIO(content))
        _check_kind(path, content, image)
        return np.array(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is truncated or damaged ({error}); copy or download it again.") from error


def _check_kind(path: Path, content: bytes, image: Image.Image) -> None:
    bits, colour_type = content[24], content[25]  # of the header chunk, which is first
    problem = ""
    if getattr(image, "n_frames", 1) > 1:
        problem = f"is animated ({getattr(image, 'n_frames', 1)} frames); save one frame"
    elif colour_type == _PALETTE:
        problem = "has a palette, so that its values are not intensities or ids; save it as 8-bit grey or colour"
    elif colour_type not in (_GREY, _COLOUR) or "transparency" in image.info:
        problem = "has an alpha channel (transparency); save it without"
    elif bits < 8:
        problem = f"has {bits} bit(s) per pixel; save it with 8"
    elif bits > 8 and colour_type == _COLOUR:
        problem = "has 16 bits per colour; save it with 8"
    if problem:
        raise DataError(f"{path} {problem}.")
