"""A procedural head: tissues, folds and a lesion on one fine grid, before any scanner has looked at it.

Everything is in millimetres of the patient (RAS+, origin near the centre of the head); smooth Gaussian random
fields make each head different.  ``phantoms.render`` then samples one head with one scanner.
"""

import enum
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.fft
import scipy.ndimage

from calsegx.interfaces import UsageError

KINDS = ("tumour", "stroke")
WORK_SPACING_MM = (1.5, 1.5, 2.0)
WORK_EXTENT_MM = (168.0, 198.0, 160.0)
HEAD_RADII_MM = (73.0, 90.0, 70.0)
NECROTIC_CORE, OEDEMA, ENHANCING_RIM = 1, 2, 3  # BraTS 2023 ids
LESION = 1  # the one label of kind "stroke"


class Tissue(enum.IntEnum):
    """Rows of the tissue tables."""

    AIR = 0
    SCALP = 1
    SKULL = 2
    MARROW = 3
    CSF = 4
    GREY = 5
    DEEP_GREY = 6
    WHITE = 7
    HYPERINTENSITY = 8  # small bright white-matter spots that are no tumour
    VESSEL = 9  # takes up contrast agent like a tumour's rim
    OEDEMA = 10
    RIM = 11
    CORE = 12
    STROKE = 13


@dataclass(frozen=True)
class Anatomy:
    """One patient's head on the working grid.

    Oedema and stroke are in ``soft_weight``, not in ``tissue``: their border fades, so the labelled border is
    one of several a reader could have drawn.
    """

    kind: str  # "tumour" or "stroke"
    affine: np.ndarray  # [4, 4] working-grid indices (x, y, z, 1) -> RAS+ mm
    tissue: np.ndarray  # [x, y, z] uint8, Tissue
    label: np.ndarray  # [x, y, z] uint8, label ids of the files
    soft_weight: np.ndarray  # [x, y, z] float32 in 0..1, share of oedema (or stroke) in the voxel
    fine_texture: np.ndarray  # [x, y, z] float32, unit variance
    smooth_texture: np.ndarray  # [x, y, z] float32, unit variance
    enhancement: float  # 0..1, how much contrast agent the rim takes up


class _Grid(NamedTuple):
    shape: tuple[int, int, int]
    spacing: np.ndarray
    x: np.ndarray  # [x, 1, 1] mm, RAS+
    y: np.ndarray  # [1, y, 1]
    z: np.ndarray  # [1, 1, z]


class _Lesion(NamedTuple):
    centre: np.ndarray  # [3] mm
    radius: float  # mm
    distance: np.ndarray  # [x, y, z] distance to the nearest lobe in units of its radius


def make_anatomy(rng: np.random.Generator, kind: str = "tumour", *, scale: float = 1.0) -> Anatomy:
    """Draw one patient.

    The brain is a perturbed ellipsoid of relative depth ``d``.  Grey matter is where
    ``d > a exp(-(f / w)^2)`` with a random field ``f``, so the zero set of ``f`` becomes the sulci; white
    matter starts a little deeper and farther from it.  A tumour is the set ``rho < 1`` where ``rho`` is the
    distance to a few random ellipsoids plus random fields plus a toll for grey matter and CSF (oedema
    follows white matter), and in it an enhancing rim around a necrotic core.

    Args:
        rng: the patient's own generator; the result depends on nothing else.
        kind: ``"tumour"`` (labels 1 necrotic core, 2 oedema, 3 enhancing rim) or ``"stroke"`` (label 1).
        scale: resolution; 1 gives voxels of 1.5 x 1.5 x 2 mm, 0.5 twice as wide.  The head keeps its size.

    Raises:
        UsageError: for an unknown kind or a scale outside 0.2..2.
    """
    check_options(kind, scale)
    grid = _grid(scale)
    lesion = _place_lesion(rng, grid, kind)
    tissue, depth = _head(rng, grid, lesion)
    if kind == "tumour":
        label, soft_weight = _grow_tumour(rng, grid, lesion, tissue, depth)
    else:
        label, soft_weight = _grow_stroke(rng, grid, lesion, tissue, depth)
    affine = np.diag([*grid.spacing, 1.0])
    affine[:3, 3] = grid.x[0, 0, 0], grid.y[0, 0, 0], grid.z[0, 0, 0]
    return Anatomy(
        kind=kind,
        affine=affine,
        tissue=tissue,
        label=label,
        soft_weight=soft_weight,
        fine_texture=random_field(rng, grid.shape, grid.spacing, 1.8),
        smooth_texture=random_field(rng, grid.shape, grid.spacing, 9.0),
        enhancement=float(rng.uniform(0.55, 1.0)),
    )


def check_options(kind: str, scale: float) -> None:
    """Refuse with a UsageError what ``make_anatomy`` cannot draw, before work starts."""
    if kind not in KINDS:
        raise UsageError(f"The phantom kind {kind!r} is unknown; use one of: {', '.join(KINDS)}.")
    if not 0.2 <= scale <= 2.0:
        raise UsageError(f"The phantom scale is {scale}; give a number from 0.2 (tiny, for tests) to 2.")


def random_field(
    rng: np.random.Generator, shape: Sequence[int], spacing_mm: Sequence[float] | np.ndarray, sigma_mm: float
) -> np.ndarray:
    """White noise smoothed by a Gaussian of ``sigma_mm``; periodic, float32, mean 0 and variance 1."""
    half = (*shape[:-1], shape[-1] // 2 + 1)
    spectrum = rng.standard_normal((*half[:-1], 2 * half[-1]), dtype=np.float32).view(np.complex64)
    for axis, (size, spacing) in enumerate(zip(shape, spacing_mm, strict=True)):
        frequency = (np.fft.rfftfreq if axis == len(shape) - 1 else np.fft.fftfreq)(size, spacing)
        gain = np.exp(-2.0 * (np.pi * sigma_mm * frequency) ** 2).astype(np.float32)
        spectrum *= gain.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    spectrum.flat[0] = 0.0
    field = np.asarray(scipy.fft.irfftn(spectrum, s=tuple(shape), overwrite_x=True))
    field /= field.std()
    return field


def _grid(scale: float) -> _Grid:
    spacing = np.array(WORK_SPACING_MM) / scale
    columns, rows, slices = (int(round(n / step)) for n, step in zip(WORK_EXTENT_MM, spacing, strict=True))
    shape = (columns, rows, slices)
    axes = [np.arange(n) - (n - 1) / 2 for n in shape]
    x, y, z = np.ix_(*(np.float32(axis * step) for axis, step in zip(axes, spacing, strict=True)))
    return _Grid(shape, spacing, x, y, z)


def _ellipsoid(grid: _Grid, centre: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """``sqrt(p' M p)`` of the positions ``p`` relative to the centre."""
    x, y, z = grid.x - centre[0], grid.y - centre[1], grid.z - centre[2]
    m = matrix.astype(np.float32)
    squared = (m[0, 0] * x + 2 * m[0, 1] * y + 2 * m[0, 2] * z) * x
    squared += (m[1, 1] * y + 2 * m[1, 2] * z) * y + m[2, 2] * z * z
    return np.sqrt(np.maximum(squared, 0.0, out=squared), out=squared)


def _random_shape(rng: np.random.Generator, radius: float, spread: float) -> np.ndarray:
    """Matrix of a randomly turned ellipsoid with radii ``radius * exp(N(0, spread))``."""
    turn, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    radii = radius * np.exp(np.clip(rng.normal(0.0, spread, 3), -2 * spread, 2 * spread))
    return (turn / radii**2) @ turn.T


def _place_lesion(rng: np.random.Generator, grid: _Grid, kind: str) -> _Lesion:
    radius = rng.uniform(18.0, 38.0) if kind == "tumour" else rng.uniform(16.0, 36.0)
    direction = rng.standard_normal(3) * [1.0, 1.0, 0.6]
    centre = direction / np.linalg.norm(direction) * rng.uniform(0.25, 0.5) * np.array(HEAD_RADII_MM)
    centre[0] = np.copysign(max(abs(centre[0]), 16.0), centre[0])
    centre[2] = np.clip(centre[2], -18.0, 28.0) + 4.0
    distance = _ellipsoid(grid, centre, _random_shape(rng, radius, 0.33))
    for _ in range(rng.integers(1, 4)):
        lobe = centre + rng.normal(0.0, 0.6 * radius, 3)
        size = radius * rng.uniform(0.4, 0.75)
        np.minimum(distance, _ellipsoid(grid, lobe, _random_shape(rng, size, 0.25)), out=distance)
    return _Lesion(centre, radius, distance)


def _head(rng: np.random.Generator, grid: _Grid, lesion: _Lesion) -> tuple[np.ndarray, np.ndarray]:
    """Tissues without the lesion but displaced by it, and the depth below the brain's hull in head radii."""
    field = functools.partial(random_field, rng, grid.shape, grid.spacing)
    radii = np.array(HEAD_RADII_MM) * rng.uniform(0.95, 1.04, 3)
    egg = radii[0] * (1.0 - 0.10 * grid.y / radii[1])  # the forehead is narrower than the back of the head
    radius = np.sqrt((grid.x / egg) ** 2 + (grid.y / radii[1]) ** 2 + (grid.z / radii[2]) ** 2)
    radius += 0.016 * field(30.0)
    depth = 0.83 - radius

    # Mass effect: what is drawn at p is the anatomy of a point nearer to the lesion's centre.
    push = np.exp(-(lesion.distance**2)) * rng.uniform(0.25, 0.45)
    warp = 2.5 * field(14.0)
    x = grid.x - push * (grid.x - lesion.centre[0]) + warp
    y = grid.y - push * (grid.y - lesion.centre[1]) - warp
    z = grid.z - push * (grid.z - lesion.centre[2]) + warp

    coarse, fine = field(6.0), field(3.4)
    fold = (coarse + 0.35 * fine) ** 2
    reach = rng.uniform(0.24, 0.32) * (1.0 - 1.6 * push)  # a lesion's pressure closes the sulci around it
    sulci = np.maximum(reach * np.exp(-fold / rng.uniform(0.17, 0.24) ** 2), 0.36 * np.exp(-((x / 2.6) ** 2)))
    cortex = 0.045 + np.maximum((reach + 0.02) * np.exp(-fold / 0.55**2), 0.36 * np.exp(-((x / 6.5) ** 2)))

    tissue = np.full(grid.shape, Tissue.AIR, np.uint8)
    tissue[radius < 1.0] = Tissue.SCALP
    tissue[radius < 0.945] = Tissue.SKULL
    tissue[np.abs(radius - 0.905 - 0.004 * coarse) < 0.014] = Tissue.MARROW
    tissue[radius < 0.87] = Tissue.CSF
    tissue[depth > sulci] = Tissue.GREY
    tissue[depth > cortex] = Tissue.WHITE
    _posterior_fossa(tissue, depth, fine, x, y, z)
    spots = (field(4.0) > rng.uniform(2.3, 2.9)) & (tissue == Tissue.WHITE) & (depth > 0.2)
    tissue[spots] = Tissue.HYPERINTENSITY
    _deep_structures(rng, tissue, depth, fine, x, y, z)
    sinus = ((grid.x / 4.5) ** 2 + ((radius - 0.84) / 0.035) ** 2 < 1.0) & (grid.z - grid.y > 10.0)
    tissue[sinus | ((tissue == Tissue.CSF) & (depth < 0.2) & (depth > -0.03) & (fine > 1.7))] = Tissue.VESSEL
    return tissue, depth


def _posterior_fossa(
    tissue: np.ndarray, depth: np.ndarray, fine: np.ndarray, x: np.ndarray, y: np.ndarray, z: np.ndarray
) -> None:
    """Cerebellum with fine leaves below a sloping tentorium, and a brain stem in front of it."""
    below = z + 34.0 - 0.35 * (y + 40.0)  # negative under the tentorium
    fossa = (below < 2.0) & (y < -8.0) & (depth > 0.0)
    tissue[fossa] = Tissue.CSF
    cerebellum = fossa & (below < 0.0) & (depth > 0.02)
    tissue[cerebellum & (np.abs(fine) > 0.12)] = Tissue.GREY
    tissue[cerebellum & (depth > 0.10) & (np.abs(fine) > 0.75)] = Tissue.WHITE
    stem = (x / 13.0) ** 2 + ((y + 12.0) / 12.0) ** 2
    low = (z < -30.0) & (depth > -0.03)
    tissue[low & (stem < 1.4)] = Tissue.CSF
    tissue[low & (stem < 1.0)] = Tissue.WHITE
    tissue[low & ((x / 7.0) ** 2 + ((y + 27.0) / 4.5) ** 2 < 1.0) & (z > -50.0)] = Tissue.CSF


def _deep_structures(
    rng: np.random.Generator,
    tissue: np.ndarray,
    depth: np.ndarray,
    fine: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    z: np.ndarray,
) -> None:
    """Caudate, putamen, thalamus, two curved lateral ventricles with plexus, third ventricle."""
    side = np.abs(x)
    nuclei = (((26, 6, 0), (6, 16, 12)), ((11, -10, -1), (8, 13, 9)), ((14, 19, 8), (5, 10, 10)))
    for (cx, cy, cz), (rx, ry, rz) in nuclei:
        inside = ((side - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 + ((z - cz) / rz) ** 2 < rng.uniform(0.85, 1.2)
        tissue[inside & (depth > 0.15)] = Tissue.DEEP_GREY
    size = rng.uniform(0.65, 1.25)
    along = (y + 4.0) / 44.0
    bend = along**2
    lateral = (side - 5.0 - 17.0 * bend) ** 2 + (0.55 * (z - 14.0 + 16.0 * bend)) ** 2
    ventricles = lateral < (6.0 * size) ** 2 * (1.0 - bend**2)
    ventricles &= (depth > 0.12) & (side > 1.2)  # the septum stays
    third = (side < 1.6 * size) & (np.abs(y + 4.0) < 13.0) & (np.abs(z + 5.0) < 11.0)
    tissue[ventricles | third] = Tissue.CSF
    tissue[ventricles & (fine > 0.8) & (y < -12.0) & (z < 14.0)] = Tissue.VESSEL


def _islands(mask: np.ndarray) -> np.ndarray:
    """The components of a mask other than the largest."""
    components = np.zeros(mask.shape, np.int32)
    scipy.ndimage.label(mask, output=components)
    sizes = np.bincount(components.ravel())
    sizes[0] = 0
    return mask & (components != sizes.argmax())


def _falx_toll(grid: _Grid, lesion: _Lesion) -> np.ndarray:
    """A toll for crossing the midline away from the lesion: the falx lets little through."""
    return np.maximum(-np.copysign(1.0, lesion.centre[0]) * grid.x, 0.0) / 14.0


def _grow_tumour(
    rng: np.random.Generator, grid: _Grid, lesion: _Lesion, tissue: np.ndarray, depth: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Write rim and core into ``tissue``; return the label and the soft weight of the oedema."""
    field = functools.partial(random_field, rng, grid.shape, grid.spacing)
    grey = (tissue == Tissue.GREY) | (tissue == Tissue.DEEP_GREY)
    fluid = (tissue == Tissue.CSF) | (tissue == Tissue.VESSEL)
    rho = lesion.distance + 0.32 * field(10.0) + 0.12 * field(5.0) + _falx_toll(grid, lesion)
    rho += 0.42 * grey + 2.0 * fluid + 2.0 * (depth < 0.01)
    rho[_islands(rho < 1.2)] += 2.0

    core_radius = max(lesion.radius * rng.uniform(0.38, 0.66), 9.0)
    core_centre = lesion.centre + rng.normal(0.0, 0.15 * lesion.radius, 3)
    ball = _ellipsoid(grid, core_centre, _random_shape(rng, core_radius, 0.22))
    bud = core_centre + rng.normal(0.0, 0.6 * core_radius, 3)
    np.minimum(ball, _ellipsoid(grid, bud, _random_shape(rng, 0.6 * core_radius, 0.25)), out=ball)
    ball += 0.14 * field(8.0) + 0.5 * _falx_toll(grid, lesion)
    solid = (ball < 1.0) & (depth > 0.03)
    # The erosion closes the rim around the core; how thick it is beyond that, the second field says.
    inner = ball < rng.uniform(0.5, 0.85) + 0.16 * field(5.0)
    necrotic = inner & np.asarray(scipy.ndimage.binary_erosion(solid), bool)

    label = np.where(rho < 1.0, np.uint8(OEDEMA), np.uint8(0))
    label[solid] = ENHANCING_RIM
    label[necrotic] = NECROTIC_CORE
    tissue[solid] = Tissue.RIM
    tissue[necrotic] = Tissue.CORE
    return label, _soft(rng, rho, fluid | solid | (depth < 0.0))


def _grow_stroke(
    rng: np.random.Generator, grid: _Grid, lesion: _Lesion, tissue: np.ndarray, depth: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """An infarct takes grey and white matter alike; only CSF and the midline stop it."""
    fluid = (tissue == Tissue.CSF) | (tissue == Tissue.VESSEL)
    rho = lesion.distance + 0.24 * random_field(rng, grid.shape, grid.spacing, 9.0)
    rho += 0.10 * random_field(rng, grid.shape, grid.spacing, 4.5) + 2.0 * _falx_toll(grid, lesion)
    rho += 2.0 * fluid + 2.0 * (depth < 0.01)
    rho[_islands(rho < 1.2)] += 2.0
    label = np.where(rho < 1.0, np.uint8(LESION), np.uint8(0))
    return label, _soft(rng, rho, fluid | (depth < 0.0))


def _soft(rng: np.random.Generator, rho: np.ndarray, outside: np.ndarray) -> np.ndarray:
    weight = rng.uniform(0.6, 1.0) / (1.0 + np.exp(np.clip((rho - 1.0) / 0.10, -20.0, 20.0)))
    weight[outside] = 0.0
    return weight.astype(np.float32)
