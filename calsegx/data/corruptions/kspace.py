"""Artefacts of k-space: rigid motion, ghosting, spikes and Gibbs ringing.

The image is taken as the magnitude of an image without phase.  Rows (``H``) are the direction of phase encoding: where
acquisition takes seconds to minutes, so that motion and pulsation show.  Only that axis is then transformed, because
the others' transforms would be undone unchanged.  Everything passes through the magnitude at the end, so the background
may become brighter than 0 and never darker.
"""

from collections.abc import Sequence

import numpy as np
import scipy.fft
from scipy import ndimage
from scipy.spatial.transform import Rotation

from calsegx.data import corruptions

ROWS = 1


@corruptions.registry.register("motion")
def motion(
    voxels: np.ndarray,
    spacing_mm: Sequence[float],
    level: int,
    rng: np.random.Generator,
    *,
    degrees: Sequence[float] = (1.0, 2.0, 4.0, 8.0, 14.0),
    millimetres: Sequence[float] = (1.0, 2.0, 3.5, 7.0, 12.0),
    movements: Sequence[int] = (2, 3, 4, 6, 8),
) -> np.ndarray:
    """The patient moves ``movements`` times while k-space is acquired, row after row.

    ``|F^-1 sum_s m_s F(T_s x)|``: ``m_s`` are the lines acquired between two movements, ``T_s`` the rigid pose then: a
    turn about a random axis through the centre and a shift in a random direction, each U(1/2, 1) of the level's
    ``degrees`` and ``millimetres``.  Movements are equally spaced in time, each moved by up to 0.3 of the spacing.  The
    lines around the centre of k-space are of the unmoved image, so labels stay where they are.  What comes into
    view repeats the border.  A single slice stays in its plane.

    Source: Shaw et al., MIDL 2019, and TorchIO's RandomMotion (2 movements of up to 10 degrees and 10 mm, times with
    the same jitter), as in ATLAS-C, whose own parameters we do not have.
    """
    count = corruptions.at(movements, level)
    times = (np.arange(1, count + 1) + rng.uniform(-0.3, 0.3, count)) / (count + 1)
    lines = voxels.shape[ROWS]
    poses = [_pose(rng, corruptions.at(degrees, level), corruptions.at(millimetres, level)) for _ in range(count)]
    starts = np.concatenate([[0], np.floor(times * lines).astype(int), [lines]])
    still = int(np.searchsorted(starts, lines // 2, side="right")) - 1  # the part that holds the centre
    spectrum = _shifted_spectrum(voxels)
    moved_parts = [part for part in range(count + 1) if part != still]
    for part, (turn, shift_mm) in zip(moved_parts, poses, strict=True):
        lines_of_part = slice(starts[part], starts[part + 1])
        if starts[part + 1] > starts[part]:
            spectrum[:, lines_of_part] = _shifted_spectrum(_move(voxels, spacing_mm, turn, shift_mm))[:, lines_of_part]
    return _magnitude(spectrum)


@corruptions.registry.register("ghosting")
def ghosting(
    voxels: np.ndarray,
    spacing_mm: Sequence[float],
    level: int,
    rng: np.random.Generator,
    *,
    strength: Sequence[float] = (0.1, 0.25, 0.45, 0.7, 1.0),
) -> np.ndarray:
    """Copies of the head along the rows, from something that moves or pulsates regularly.

    Every ``n``-th line of k-space is multiplied by ``1 - strength``, ``n`` being 2 or 3, which adds ``n - 1``
    copies of ``strength / n``, ``H / n`` rows apart.  The centre line is kept, and with it the mean brightness.

    Source: TorchIO's RandomGhosting (4 to 10 ghosts, strength 0.5 to 1, the centre restored).
    """
    del spacing_mm
    lines = voxels.shape[ROWS]
    weights = np.ones(lines)
    weights[(lines // 2) % (every := int(rng.integers(2, 4))) :: every] = 1 - corruptions.at(strength, level)
    weights[lines // 2] = 1
    return _magnitude(_shifted_spectrum(voxels) * weights[:, None])


@corruptions.registry.register("spikes")
def spikes(
    voxels: np.ndarray,
    spacing_mm: Sequence[float],
    level: int,
    rng: np.random.Generator,
    *,
    intensity: Sequence[float] = (0.08, 0.2, 0.4, 0.8, 1.5),
) -> np.ndarray:
    """One wrong point of k-space: stripes over the whole volume.

    ``|x + intensity * mean(x) * exp(2 pi i k.r)|``: a spike of ``intensity`` times the largest value of k-space, at a
    random whole frequency ``k``, in-plane between 1/20 and 2/5 cycles per voxel.  The background becomes flat haze.

    Source: TorchIO's RandomSpike (one spike, intensity 1 to 3).
    """
    del spacing_mm
    wave = np.ones((1, 1, 1), complex)
    for axis, size in enumerate(voxels.shape):
        low, high = (0, size // 2) if axis == 0 else (size // 20, 2 * size // 5)
        frequency = int(rng.integers(low, high + 1)) * int(rng.choice([-1, 1]))
        along = np.exp(2j * np.pi * frequency * np.arange(size) / size)
        wave = wave * along.reshape([-1 if a == axis else 1 for a in range(3)])
    return np.abs(voxels + corruptions.at(intensity, level) * voxels.mean() * wave)


@corruptions.registry.register("gibbs")
def gibbs(
    voxels: np.ndarray,
    spacing_mm: Sequence[float],
    level: int,
    rng: np.random.Generator,
    *,
    share: Sequence[float] = (0.75, 0.55, 0.4, 0.3, 0.22),
) -> np.ndarray:
    """Ringing beside edges: only the central ``share`` of the frequencies is acquired along rows and columns.

    The rest of k-space is 0 and the grid stays, as a scanner interpolates; nothing is random.

    Source: MONAI's GibbsNoise, with the rectangle of a Cartesian acquisition in place of its disc.
    """
    del spacing_mm, rng
    kept = [np.abs(np.fft.fftfreq(size)) <= corruptions.at(share, level) / 2 for size in voxels.shape[1:]]
    spectrum = np.asarray(scipy.fft.fft2(voxels)) * (kept[0][:, None] & kept[1])
    return np.abs(np.asarray(scipy.fft.ifft2(spectrum)))


def _shifted_spectrum(voxels: np.ndarray) -> np.ndarray:
    """Transformed along the rows, frequency 0 at ``H // 2``."""
    return scipy.fft.fftshift(scipy.fft.fft(voxels, axis=ROWS), axes=ROWS)


def _magnitude(spectrum: np.ndarray) -> np.ndarray:
    return np.abs(np.asarray(scipy.fft.ifft(scipy.fft.ifftshift(spectrum, axes=ROWS), axis=ROWS)))


def _pose(rng: np.random.Generator, degrees: float, millimetres: float) -> tuple[np.ndarray, np.ndarray]:
    """A turn (axis times radians) and a shift in mm, both ``[3]`` along ``D``, ``H``, ``W``."""
    turn, shift = (direction / np.linalg.norm(direction) for direction in rng.standard_normal((2, 3)))
    return turn * np.deg2rad(degrees) * rng.uniform(0.5, 1), shift * millimetres * rng.uniform(0.5, 1)


def _move(voxels: np.ndarray, spacing_mm: Sequence[float], turn: np.ndarray, shift_mm: np.ndarray) -> np.ndarray:
    """The volume turned about its centre and shifted, linearly interpolated; ``turn`` is a rotation vector."""
    if voxels.shape[0] == 1:
        turn, shift_mm = turn * [1, 0, 0], shift_mm * [0, 1, 1]
    spacing, centre = np.array(spacing_mm), (np.array(voxels.shape) - 1) / 2
    matrix = Rotation.from_rotvec(turn).as_matrix() * spacing / spacing[:, None]  # in voxels, rigid in millimetres
    offset = centre - matrix @ (centre + shift_mm / spacing)
    return ndimage.affine_transform(voxels, matrix, offset, order=1, mode="nearest")
