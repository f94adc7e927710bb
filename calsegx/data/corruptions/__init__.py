"""Corruptions of MR images: what the next hospital may send, in five levels, the same for everyone.

A corruption is one registered function ``(voxels, spacing_mm, level, rng, *, parameters) -> voxels``: non-negative
float64 ``[D, H, W]`` in and float64 of the same shape out, level 1 (hardly visible) to 5 (severe).  A keyword-only
parameter holds its five values, one per level.  Multiplying the image by a number multiplies the result by it.
``corrupt`` is what users call: it seeds, shifts images that go below 0, and rounds.

Bit for bit: everything is computed in float64 and rounded at the end, to the integers of the file or to 1/65535 of the
input's range, so that the last bits, in which Fourier transforms and machines differ, do not show.
"""

import hashlib
import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from scipy import ndimage

from calsegx.interfaces import UsageError
from calsegx.registry import Registry

VERSION = 1  # of all definitions; another one gives other voxels
LEVELS = (1, 2, 3, 4, 5)
STEPS = 65535  # of the input's range, to which what is not stored as integers is rounded


class Corruption(Protocol):
    """A corruption; see the package's docstring."""

    def __call__(  # noqa: D102
        self, voxels: np.ndarray, spacing_mm: Sequence[float], level: int, rng: np.random.Generator, /
    ) -> np.ndarray: ...


registry: Registry[Corruption] = Registry("corruption", "calsegx.data.corruptions")


def names() -> list[str]:
    """The names of all corruptions, sorted."""
    return registry.names()


def parameters(name: str) -> dict[str, Any]:
    """The corruption's parameters, each with its values for levels 1 to 5.

    Raises:
        UsageError: for an unknown name; the message names the nearest.
    """
    options = inspect.signature(registry.get(name)).parameters.values()
    return {p.name: list(p.default) for p in options if p.kind is inspect.Parameter.KEYWORD_ONLY}


def generator(*key: str | int) -> np.random.Generator:
    """PCG64 seeded with SHA-256 of the key: the same numbers on every platform, whatever else was drawn."""
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))


def corrupt(
    name: str,
    voxels: np.ndarray,
    spacing_mm: Sequence[float],
    level: int,
    case_id: str,
    channel: str = "",
    dtype: np.dtype | type = np.float32,
) -> np.ndarray:
    """One corrupted image, which depends on the arguments alone.

    An image that goes below 0 (z-scores, CT) is shifted to start at 0 and shifted back afterwards.

    Args:
        name: of the corruption.
        voxels: ``[D, H, W]``, finite, in any unit.
        spacing_mm: of ``D``, ``H`` and ``W``.
        level: 1 to 5.
        case_id: part of the seed.
        channel: part of the seed; channels are scans of their own.
        dtype: of the result: an integer type (rounded, cut off at its ends) or float32 (rounded to 1/65535 of the
            input's range).

    Raises:
        UsageError: for an unknown corruption or level.
    """
    if level not in LEVELS:
        nearest = min(LEVELS, key=lambda known: abs(known - level))
        raise UsageError(f"There is no corruption level {level}; levels are 1 to 5, the nearest is {nearest}.")
    floor = min(float(voxels.min()), 0.0)
    rng = generator(case_id, channel, name, level)
    found = registry.get(name)(voxels.astype(np.float64) - floor, spacing_mm, level, rng) + floor
    if np.issubdtype(dtype, np.integer):
        limits = np.iinfo(dtype)
        return np.clip(np.rint(found), limits.min, limits.max).astype(dtype)
    extent = float(voxels.max()) - float(voxels.min()) or abs(float(voxels.max()))  # of a constant image its value
    step = extent / STEPS
    return (np.rint(found / step) * step if step else found).astype(dtype)


def at(values: Sequence[Any], level: int) -> Any:
    """A parameter's value at a level."""
    return values[level - 1]


def reference(voxels: np.ndarray) -> float:
    """The bright end of the image: its 99.5th percentile above 0, which networks see as 255; 0 for an empty image."""
    inside = voxels[voxels > 0]
    return float(np.percentile(inside, 99.5)) if inside.size else 0.0


def head(voxels: np.ndarray) -> np.ndarray:
    """Where the head is, bool ``[D, H, W]``: above 15 % of ``reference``, no specks, every slice's holes filled."""
    mask = voxels > 0.15 * reference(voxels)
    cross = ndimage.generate_binary_structure(2, 1)
    return np.stack([ndimage.binary_fill_holes(ndimage.median_filter(plane, footprint=cross)) for plane in mask])
