"""Outlines of the procedural drawings: simple shapes and a brain-like stack of layers.

An outline is a *level* ``[S, S]``: positive inside, zero on the border, in about pixels of distance, so that
``sigmoid(level / softness)`` is its soft mask and ``level > 0`` its hard one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.fft
import scipy.ndimage

NOISE_SIGMAS = (0.7, 2.2, 4.0, 9.0, 20.0)  # pixels in a frame of 128, scaled with the frame


class Noise:
    """Periodic Gaussian random fields of one drawing, unit variance, one per entry of ``NOISE_SIGMAS``.

    A field is drawn once and then shifted at random: a new field for the price of a copy.
    """

    def __init__(self, rng: np.random.Generator, size: int) -> None:
        rows, columns = scipy.fft.fftfreq(size)[:, None], scipy.fft.rfftfreq(size)[None]
        squared = (rows**2 + columns**2).astype(np.float32)
        self._rng, self._size, self._fields = rng, size, []
        for sigma in NOISE_SIGMAS:
            white = scipy.fft.rfft2(rng.standard_normal((size, size), dtype=np.float32))
            white *= np.exp(-2 * (np.pi * sigma * size / 128) ** 2 * squared)
            white[0, 0] = 0
            field = scipy.fft.irfft2(white, s=(size, size))
            self._fields.append((field / field.std()).astype(np.float32))

    def field(self, scale: int) -> np.ndarray:
        """A randomly shifted field ``[S, S]`` of the smoothness ``NOISE_SIGMAS[scale]``."""
        return np.roll(self._fields[scale], self._rng.integers(0, self._size, 2), axis=(0, 1))


@dataclass(frozen=True)
class Frame:
    """Rotated and stretched coordinates around the centre of a shape, in pixels."""

    u: np.ndarray  # [S, S]
    v: np.ndarray  # [S, S]

    @property
    def radius(self) -> np.ndarray:
        """Distance from the centre ``[S, S]``."""
        return np.hypot(self.u, self.v)

    @property
    def angle(self) -> np.ndarray:
        """Polar angle in radians ``[S, S]``."""
        return np.arctan2(self.v, self.u)


def frame(size: int, centre: tuple[float, float], turn: float, stretch: float) -> Frame:
    """Coordinates around ``centre = (y, x)``, turned by ``turn`` radians and stretched along ``u``."""
    y, x = np.ogrid[:size, :size]
    y, x = (y - centre[0]).astype(np.float32), (x - centre[1]).astype(np.float32)
    cosine, sine, root = np.float32(np.cos(turn)), np.float32(np.sin(turn)), np.float32(np.sqrt(stretch))
    return Frame((cosine * x + sine * y) / root, (cosine * y - sine * x) * root)


def _wave(rng: np.random.Generator, at: Frame, strength: float) -> np.ndarray:
    """A random Fourier series of the polar angle, of order 2 to 9."""
    angle, total = at.angle, np.zeros_like(at.u)
    for order in rng.choice(np.arange(2, 10), 3, replace=False):
        phase = np.float32(rng.uniform(0, 2 * np.pi))
        total += np.float32(strength / np.sqrt(order)) * np.cos(order * angle + phase)
    return total


def _ellipse(rng: np.random.Generator, at: Frame, radius: float, noise: Noise) -> np.ndarray:
    return radius - at.radius


def _star(rng: np.random.Generator, at: Frame, radius: float, noise: Noise) -> np.ndarray:
    return radius * (1 + _wave(rng, at, rng.uniform(0.1, 0.4))) - at.radius


def _blob(rng: np.random.Generator, at: Frame, radius: float, noise: Noise) -> np.ndarray:
    field = noise.field(3) + rng.uniform(0, 0.5) * noise.field(2 if radius > 10 else 1)
    return radius * (1 + rng.uniform(0.15, 0.45) * field) - at.radius


def _rectangle(rng: np.random.Generator, at: Frame, radius: float, noise: Noise) -> np.ndarray:
    corner = radius * rng.uniform(0.05, 0.5)
    u, v = np.abs(at.u) - radius + corner, np.abs(at.v) - radius + corner
    return corner - np.where((u > 0) & (v > 0), np.hypot(u, v), np.maximum(u, v))


def _polygon(rng: np.random.Generator, at: Frame, radius: float, noise: Noise) -> np.ndarray:
    sides = rng.integers(3, 8)
    angles = 2 * np.pi * (np.arange(sides) + rng.uniform(-0.25, 0.25, sides)) / sides
    planes = [np.float32(np.cos(a)) * at.u + np.float32(np.sin(a)) * at.v for a in angles]
    return radius * 0.85 - np.maximum.reduce(planes)


def _ring(rng: np.random.Generator, at: Frame, radius: float, noise: Noise) -> np.ndarray:
    width = max(radius * rng.uniform(0.15, 0.5), 2.5)
    wobble = 1 + (_wave(rng, at, rng.uniform(0.05, 0.25)) if rng.random() < 0.5 else 0)
    level = width / 2 - np.abs(at.radius - (radius - width / 2) * wobble)
    if rng.random() < 0.3:  # an arc
        level = np.minimum(level, (rng.uniform(0.4, 0.85) * np.pi - np.abs(at.angle)) * radius)
    return level


def _crescent(rng: np.random.Generator, at: Frame, radius: float, noise: Noise) -> np.ndarray:
    shift = radius * rng.uniform(0.35, 0.8)
    bite = np.hypot(at.u, at.v - shift) - radius * rng.uniform(0.75, 1.05)
    return np.minimum(radius - at.radius, bite)


def _band(rng: np.random.Generator, at: Frame, radius: float, noise: Noise) -> np.ndarray:
    length, width = radius * rng.uniform(1.2, 2.2), max(radius * rng.uniform(0.12, 0.4), 1.5)
    waves = np.float32(rng.uniform(0.5, 2.5) * np.pi / length)
    curve = radius * rng.uniform(0.1, 0.6) * np.sin(waves * at.u + np.float32(rng.uniform(0, 6.3)))
    curve = curve + radius * 0.15 * noise.field(3)
    return np.minimum(width - np.abs(at.v - curve), length - np.abs(at.u))


def _folds(rng: np.random.Generator, at: Frame, radius: float, noise: Noise) -> np.ndarray:
    scale = 3 if radius > 25 else 2
    width = rng.uniform(0.35, 0.8)
    fold = (width - np.abs(noise.field(scale))) * NOISE_SIGMAS[scale]
    return np.minimum(fold, radius * (1 + 0.1 * noise.field(4)) - at.radius)


Shape = Callable[[np.random.Generator, Frame, float, Noise], np.ndarray]
SHAPES: dict[str, tuple[Shape, float]] = {  # name -> (outline, how often)
    "ellipse": (_ellipse, 0.18),
    "star": (_star, 0.14),
    "blob": (_blob, 0.22),
    "rectangle": (_rectangle, 0.11),
    "polygon": (_polygon, 0.08),
    "ring": (_ring, 0.09),
    "crescent": (_crescent, 0.06),
    "band": (_band, 0.07),
    "folds": (_folds, 0.05),
}


def outline(
    rng: np.random.Generator, noise: Noise, size: int, centre: tuple[float, float], radius: float
) -> np.ndarray:
    """A random shape of ``SHAPES``, connected, of about ``radius`` pixels: level ``[S, S]``."""
    functions, odds = zip(*SHAPES.values(), strict=True)
    shape = functions[rng.choice(len(functions), p=odds)]
    stretch = np.exp(abs(rng.normal(0, 0.45)))
    at = frame(size, centre, rng.uniform(0, 2 * np.pi), min(stretch, 3.0))
    return _largest_piece(shape(rng, at, radius, noise).astype(np.float32))


def _largest_piece(level: np.ndarray) -> np.ndarray:
    pieces, count = scipy.ndimage.label(level > 0)
    if count <= 1:
        return level
    largest = 1 + np.argmax(np.bincount(pieces.ravel())[1:])
    # The margin keeps the soft border of the piece, and the other pieces go with theirs.
    near = scipy.ndimage.binary_dilation(pieces == largest, iterations=3)
    return np.where(near & ((pieces == largest) | (pieces == 0)), level, np.float32(-1e3))


TISSUES = ("scalp", "skull", "fluid", "grey", "white", "oedema", "rim", "core", "deep grey")


@dataclass(frozen=True)
class Layer:
    """One tissue of the head: its level, the layer that contains it and its column of a tissue table."""

    level: np.ndarray  # [S, S]
    inside: int  # index in the list of layers, -1: none
    tissue: int  # index into TISSUES


def head(rng: np.random.Generator, noise: Noise, size: int, extent: tuple[int, int]) -> list[Layer]:
    """A brain-like slice, parents before children.

    Scalp and skull (or a stripped brain), fluid, folded grey and white matter, ventricles, deep grey matter
    and up to two lesions of nested regions.  With ``r`` the elliptic radius (skin: 1), the depth below the
    brain's surface is ``d = .8 - r`` and the sulci are valleys around the zero set of a random field ``f``:
    ``D = d - a exp(-(f / .28)^2)``; the cortex is ``0 < D < t`` and the white matter ``D > t``.
    """
    height, width = extent
    centre = (height * rng.uniform(0.45, 0.55), width * rng.uniform(0.45, 0.55))
    turn = rng.normal(0, 0.15) if rng.random() < 0.7 else rng.uniform(0, 2 * np.pi)
    at = frame(size, centre, turn, 1.0)
    long = min(height, width) / 2 * rng.uniform(0.75, 1.02)
    short = long * rng.uniform(0.74, 0.98)
    x, y = at.u / short, at.v / long
    r = np.hypot(x, y) + 0.02 * noise.field(4) + 0.01 * noise.field(3)

    brain = rng.uniform(0.79, 0.85)
    depth = brain - r
    fold = noise.field(2) + 0.35 * noise.field(1)
    folded = depth - rng.uniform(0.08, 0.3) * np.exp(-((fold / 0.28) ** 2))
    fissure = np.exp(-(((x + 0.012 * noise.field(3)) / 0.03) ** 2)) * (depth < rng.uniform(0.15, 0.4))
    folded = folded - 0.17 * fissure
    layers: list[Layer] = []
    if rng.random() < 0.7:  # otherwise skull-stripped
        skull = rng.uniform(0.91, 0.95)
        layers += [Layer((1 - r) * short, -1, 0), Layer((skull - r) * short, 0, 1)]
    cavity = len(layers)
    layers.append(Layer((brain + rng.uniform(0.015, 0.05) - r) * short, cavity - 1, 2))
    grey = len(layers)
    cortex = rng.uniform(0.06, 0.1)
    layers += [Layer(folded * short, cavity, 3), Layer((folded - cortex) * short, grey, 4)]
    if rng.random() < 0.7:
        side = np.abs(x) - rng.uniform(0.24, 0.3)
        nuclei = rng.uniform(0.09, 0.16) - np.hypot(side, 0.6 * (y - 0.05))
        layers.append(Layer(nuclei * short, grey + 1, 8))
    if rng.random() < 0.9:
        reach, wide = rng.uniform(0.22, 0.42), rng.uniform(0.03, 0.1)
        bow = np.abs(np.abs(x) - 0.07 - rng.uniform(0.3, 0.9) * (y + 0.03) ** 2)
        layers.append(Layer((wide * np.sqrt(np.clip(1 - (y / reach) ** 2, 0, 1)) - bow) * short, grey + 1, 2))
    for _ in range(rng.choice(3, p=[0.1, 0.65, 0.25])):
        layers += _lesion(rng, noise, (x, y), depth, short, cavity, len(layers))
    return layers


def _lesion(
    rng: np.random.Generator,
    noise: Noise,
    at: tuple[np.ndarray, np.ndarray],
    depth: np.ndarray,
    scale: float,
    inside: int,
    first: int,
) -> list[Layer]:
    """A lesion of one to three nested regions: oedema, rim, core."""
    distance, angle = rng.uniform(0.1, 0.55), rng.uniform(0, 2 * np.pi)
    radius, squeeze = rng.uniform(0.12, 0.42), rng.uniform(0.7, 1.4)
    u = (at[0] - distance * np.cos(angle)) * squeeze
    v = (at[1] - distance * np.sin(angle)) / squeeze
    rho = np.hypot(u, v) / radius + 0.2 * noise.field(3) + 0.08 * noise.field(2)
    within = (depth + 0.01) * scale
    whole = _largest_piece(np.minimum((1 - rho) * radius * scale, within))
    inner = rng.uniform(0.45, 0.75)
    level = (inner - rho - 0.08 * noise.field(2)) * radius * scale
    rim = np.minimum(whole, level)
    thickness = inner * rng.uniform(0.25, 0.5) * radius * scale
    core = np.minimum(rim, level - thickness + 2 * radius * noise.field(2))
    regions = [Layer(whole, inside, 5), Layer(rim, first, 6), Layer(core, first + 1, 7)]
    return regions[: rng.choice([1, 2, 3], p=[0.2, 0.25, 0.55])]
