"""Intensity normalisations: ``(voxels, config) -> float32`` from 0 to 255, what the encoder was pretrained on.

A new one is one more registered function.  They raise ValueError for a volume that they would silently spoil.
"""

from collections.abc import Callable

import numpy as np

from calsegx import configs
from calsegx.registry import Registry

registry: Registry[Callable[[np.ndarray, configs.DataConfig], np.ndarray]] = Registry(
    "intensity normalisation", "calsegx.data.intensity"
)

Z_RANGE = 3.0  # standard deviations on either side of the mean that are kept
MEDSAM_PERCENTILES = (0.5, 99.5)
MOST_NEGATIVE = 0.01  # of the voxels, in an image whose voxels above 0 are the brain or the head


@registry.register("percentile")
def percentile(voxels: np.ndarray, config: configs.DataConfig) -> np.ndarray:
    """Map the ``lower_percentile`` and ``upper_percentile`` of the voxels above 0 to 0 and 255, clipped.

    The voxels above 0 are the brain in a skull-stripped image, and the head in any other.

    Raises:
        ValueError: when the two are equal, no voxel is above 0, or more than one in a hundred is clearly below 0
            (z-scores, CT): half of the tissue would silently become black.
    """
    low, high = _percentiles(voxels, config.lower_percentile, config.upper_percentile)
    return np.clip((voxels - np.float32(low)) * np.float32(255 / (high - low)), 0, 255).astype(np.float32)


@registry.register("z_score")
def z_score(voxels: np.ndarray, config: configs.DataConfig) -> np.ndarray:
    """``127.5 (1 + z / 3)``, clipped, with ``z = (x - mean) / sd`` of the voxels above 0; the others become 0.

    Raises:
        ValueError: as ``percentile``.
    """
    inside = _above_zero(voxels)
    mean, sd = float(inside.mean(dtype=np.float64)), float(inside.std(dtype=np.float64))
    if not sd > 1e-6 * abs(mean):
        raise ValueError(f"its voxels above 0 are constant ({mean:.6g})")
    scaled = 127.5 + (voxels - np.float32(mean)) * np.float32(127.5 / (Z_RANGE * sd))
    return np.where(voxels > 0, np.clip(scaled, 0, 255), 0).astype(np.float32)


@registry.register("medsam_mr")
def medsam_mr(voxels: np.ndarray, config: configs.DataConfig) -> np.ndarray:
    """MedSAM's rule for MR: the percentiles 0.5 and 99.5 of the voxels above 0, as whole numbers 0 to 255.

    Source: Ma et al. 2024, "Segment anything in medical images", Methods (preprocessing).

    Raises:
        ValueError: as ``percentile``.
    """
    low, high = _percentiles(voxels, *MEDSAM_PERCENTILES)
    return _whole_numbers(voxels, low, high)


@registry.register("medsam_ct")
def medsam_ct(voxels: np.ndarray, config: configs.DataConfig) -> np.ndarray:
    """MedSAM's rule for CT: clipped to a window of Hounsfield units, then min to 0 and max to 255, whole numbers.

    The window is ``window_centre +- window_width / 2``; 40 and 400 are MedSAM's for soft tissue.  Source: as
    ``medsam_mr``.

    Raises:
        ValueError: when the volume is constant inside the window.
    """
    half = config.window_width / 2
    bottom, top = config.window_centre - half, config.window_centre + half
    low, high = (float(np.clip(end, bottom, top)) for end in (voxels.min(), voxels.max()))
    if not high > low:
        raise ValueError(f"it is constant ({low:.6g}) inside the window from {bottom:g} to {top:g}")
    return _whole_numbers(voxels, low, high)


def normalise(voxels: np.ndarray, config: configs.DataConfig) -> np.ndarray:
    """``voxels`` as float32 from 0 to 255 by the rule that ``config.intensity`` names.

    Raises:
        UsageError: for an unknown name.
        ValueError: of the rule, for a volume that it cannot take.
    """
    return registry.get(config.intensity)(voxels, config)


def negative_share(voxels: np.ndarray) -> float:
    """How much of the image is clearly negative: below -5 % of its largest magnitude."""
    largest = max(-float(voxels.min()), float(voxels.max()))
    return float(np.count_nonzero(voxels < -0.05 * largest) / voxels.size)


def _percentiles(voxels: np.ndarray, lower: float, upper: float) -> tuple[float, float]:
    low, high = np.percentile(_above_zero(voxels), [lower, upper])
    if not high > low:
        raise ValueError(f"its voxels above 0 are constant ({low:.6g}) between the percentiles {lower} and {upper}")
    return low, high


def _whole_numbers(voxels: np.ndarray, low: float, high: float) -> np.ndarray:
    # In this order and in float64, as published: in float32 some whole numbers come out just below, and are one less.
    scaled = (np.clip(voxels.astype(np.float64), low, high) - low) / (high - low) * 255
    return np.floor(scaled).astype(np.float32)


def _above_zero(voxels: np.ndarray) -> np.ndarray:
    negative = negative_share(voxels)
    if negative > MOST_NEGATIVE:
        raise ValueError(
            f"{negative:.0%} of its voxels are negative; expected magnitudes with the background near 0 "
            "(add a constant to z-scores; --config.data.intensity=medsam_ct is for CT)"
        )
    inside = voxels[voxels > 0]
    if not inside.size:
        raise ValueError("it has no voxel above 0")
    return inside
