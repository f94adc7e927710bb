"""Other intensities: receive fields, contrast and noise."""

from collections.abc import Sequence

import numpy as np

from calsegx.data import corruptions


@corruptions.registry.register("bias_field")
def bias_field(
    voxels: np.ndarray,
    spacing_mm: Sequence[float],
    level: int,
    rng: np.random.Generator,
    *,
    spread: Sequence[float] = (0.05, 0.12, 0.22, 0.35, 0.5),
) -> np.ndarray:
    """A receive field that is stronger on one side: ``x exp(p)``, ``p`` a random polynomial of order 3.

    ``p = sum c_ijk d^i h^j w^k`` over ``1 <= i + j + k <= 3`` with coordinates from -1 to 1 and ``c`` from U(-1, 1),
    shifted and scaled to mean 0 and standard deviation ``spread`` over the head, outside of which it stays between the
    head's extremes.  A background of 0 stays 0.

    Source: TorchIO's RandomBiasField (order 3, coefficients up to 0.5); the scaling makes the level, not the draw, say
    how strong it is.
    """
    del spacing_mm
    d, h, w = (np.linspace(-1, 1, size) if size > 1 else np.zeros(1) for size in voxels.shape)
    order = np.add.outer(np.add.outer(range(4), range(4)), range(4))
    coefficients = rng.uniform(-1, 1, order.shape) * ((order >= 1) & (order <= 3))
    field = np.polynomial.polynomial.polygrid3d(d, h, w, coefficients)
    inside = field[mask] if (mask := corruptions.head(voxels)).any() else field
    if not (deviation := inside.std()):
        return voxels
    field = (np.clip(field, inside.min(), inside.max()) - inside.mean()) / deviation
    return voxels * np.exp(corruptions.at(spread, level) * field)


@corruptions.registry.register("gamma")
def gamma(
    voxels: np.ndarray,
    spacing_mm: Sequence[float],
    level: int,
    rng: np.random.Generator,
    *,
    log_exponent: Sequence[float] = (0.1, 0.2, 0.35, 0.55, 0.85),
) -> np.ndarray:
    """Another contrast curve: ``r (x / r)^exp(b)``, ``b`` plus or minus the level's value, ``r`` the bright end.

    A background of exactly 0 stays 0; background noise grows where the exponent is below 1.

    Source: TorchIO's RandomGamma (``b`` up to 0.3), which normalises to 0..1 first.
    """
    del spacing_mm
    exponent = np.exp(corruptions.at(log_exponent, level) * rng.choice([-1, 1]))
    bright = corruptions.reference(voxels)
    return bright * (voxels / bright) ** exponent if bright else voxels


@corruptions.registry.register("contrast_swap")
def contrast_swap(
    voxels: np.ndarray,
    spacing_mm: Sequence[float],
    level: int,
    rng: np.random.Generator,
    *,
    share: Sequence[float] = (0.1, 0.2, 0.3, 0.75, 1.0),
) -> np.ndarray:
    """The contrast of another sequence: ``(1 - a) x + a (low + high - x)`` within the head, ``a`` the ``share``.

    ``low`` and ``high`` are the head's 0.5th and 99.5th percentile; level 3 leaves 40 % of the
    contrast, at level 5 bright is dark, as from T1 to T2.  Nothing is random, and outside the head nothing changes.

    Source: MR sequences with opposite contrasts; the inversion is the simplest such map.
    """
    del spacing_mm, rng
    mask = corruptions.head(voxels)
    if not mask.any():
        return voxels
    low, high = np.percentile(voxels[mask], [0.5, 99.5])
    weight = corruptions.at(share, level)
    return np.where(mask, np.maximum((1 - weight) * voxels + weight * (low + high - voxels), 0), voxels)


@corruptions.registry.register("gaussian_noise")
def gaussian_noise(
    voxels: np.ndarray,
    spacing_mm: Sequence[float],
    level: int,
    rng: np.random.Generator,
    *,
    sigma: Sequence[float] = (0.01, 0.02, 0.03, 0.04, 0.05),
) -> np.ndarray:
    """``max(x + n, 0)``, ``n`` normal with standard deviation ``sigma`` of the bright end.

    The background, too, becomes noisy; what falls below 0 is 0, as in any magnitude image.

    Source: the shift test of MbLS (Murugesan et al., Medical Image Analysis 2023): 0 to 0.05 of the range.
    """
    del spacing_mm
    noise = corruptions.at(sigma, level) * corruptions.reference(voxels)
    return np.maximum(voxels + noise * rng.standard_normal(voxels.shape), 0)


@corruptions.registry.register("rician_noise")
def rician_noise(
    voxels: np.ndarray,
    spacing_mm: Sequence[float],
    level: int,
    rng: np.random.Generator,
    *,
    sigma: Sequence[float] = (0.02, 0.04, 0.07, 0.11, 0.16),
) -> np.ndarray:
    """``sqrt((x + n_1)^2 + n_2^2)``: noise in both parts of the complex signal, ``sigma`` of the bright end.

    A background of 0 becomes Rayleigh noise with mean ``sigma sqrt(pi / 2)``.

    Source: Gudbjartsson and Patz, Magnetic Resonance in Medicine 1995.
    """
    del spacing_mm
    noise = corruptions.at(sigma, level) * corruptions.reference(voxels)
    real, imaginary = noise * rng.standard_normal((2, *voxels.shape))
    return np.hypot(voxels + real, imaginary)
