"""Lower resolution: blur in all directions, and thicker voxels along one."""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from calsegx.data import corruptions


@corruptions.registry.register("blur")
def blur(
    voxels: np.ndarray,
    spacing_mm: Sequence[float],
    level: int,
    rng: np.random.Generator,
    *,
    millimetres: Sequence[float] = (0.8, 1.2, 1.8, 2.6, 3.6),
) -> np.ndarray:
    """Convolution with a Gaussian of standard deviation ``millimetres`` along all three axes.

    Nothing is random.  Voxels much larger than the blur do not change.  Beyond the border the image is mirrored.

    Source: TorchIO's RandomBlur (standard deviation up to 2 mm).
    """
    del rng
    return ndimage.gaussian_filter(voxels, corruptions.at(millimetres, level) / np.array(spacing_mm), mode="reflect")


@corruptions.registry.register("anisotropic")
def anisotropic(
    voxels: np.ndarray,
    spacing_mm: Sequence[float],
    level: int,
    rng: np.random.Generator,
    *,
    factor: Sequence[float] = (1.5, 2.0, 3.0, 4.0, 6.0),
) -> np.ndarray:
    """Voxels ``factor`` times as long along one axis: box averages, interpolated linearly back to the grid.

    The axis is drawn from those with the finest voxels (to 1 %) and more than one of them: in a scan of thick slices
    they are the rows and the columns.  The background stays, but for a rim of one long voxel around the head.

    Source: TorchIO's RandomAnisotropy (one axis, factor 1.5 to 5), which drops voxels where scanners average.
    """
    axes = [axis for axis in range(3) if voxels.shape[axis] > 1]
    if not axes:
        return voxels
    finest = min(spacing_mm[axis] for axis in axes)
    axis = int(rng.choice([axis for axis in axes if spacing_mm[axis] <= 1.01 * finest]))
    matrix = _there_and_back(voxels.shape[axis], corruptions.at(factor, level))
    return np.moveaxis(np.moveaxis(voxels, axis, -1) @ matrix.T, -1, axis)


def _there_and_back(size: int, factor: float) -> np.ndarray:
    """``[size, size]``: averages over boxes of ``size / round(size / factor)`` voxels, then linear interpolation."""
    count = max(int(round(size / factor)), 1)
    edges = np.linspace(0, size, count + 1)
    voxel = np.arange(size)
    overlap = np.minimum(edges[1:, None], voxel + 1) - np.maximum(edges[:-1, None], voxel)
    average = np.maximum(overlap, 0) * count / size
    centres = (edges[:-1] + edges[1:]) / 2
    back = np.stack([np.interp(voxel + 0.5, centres, unit) for unit in np.eye(count)], axis=1)
    return back @ average
