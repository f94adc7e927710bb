"""Negative log-likelihoods of networks that predict a distribution for every voxel, and their variances.

From *On the Out of Distribution Robustness of Foundation Models in Medical Image Segmentation* (Nguyen et al., 2023;
"OOD" below): a network ``({frozen prediction, image}) -> (mean, spread)`` is fitted to the binary mask.  All arrays are
``[B, *spatial]`` or broadcast to the first, else ValueError; losses are ``[B]`` in nats (means over the voxels),
computed in float32 or the arrays' own precision where that is higher.  ``bayescap*`` are the published formulas of the
baseline BayesCap (Upadhyay et al., ECCV 2022), for comparisons: what they compute is not a likelihood.

Clamps, beyond which a parameter has no gradient: ``sigma, alpha >= 1e-6``; ``beta`` in ``[0.1, 100]``; ``|r| / alpha >=
1e-8``, where the density has a cusp for ``beta < 1``.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from calsegx.losses import cross_entropy, elementary

SMALLEST_SPREAD = 1e-6
BETA_RANGE = (0.1, 100.0)
_SMALLEST_RATIO = 1e-8
_LARGEST_LOG_POWER = 40.0  # exp(40)^2 is still finite in float32

Values = Float[Array, "B *spatial"]
Broadcast = Float[Array, "..."] | float


def gaussian_nll(mean: Values, sigma: Broadcast, target: Values) -> Float[Array, " B"]:
    """``mean_v (y - mu)^2 / (2 sigma^2) + log sigma``: OOD Eq. 4, without the constant ``log(2 pi) / 2``.

    The uncertainty is ``sigma^2``; Eq. 1 prints its inverse.

    Args:
        mean: mu.
        sigma: standard deviation, positive.
        target: y, the mask (0 or 1) or any real value.

    Returns:
        One value per sample; not bounded below, as of any density.
    """
    mean, sigma, target = _prepare(mean, sigma, target)
    sigma = _at_least(sigma, SMALLEST_SPREAD)
    return cross_entropy.voxel_mean(jnp.square((target - mean) / sigma) / 2 + jnp.log(sigma))


def penalised_gaussian_nll(
    mean: Values, sigma: Broadcast, target: Values, prediction: Values, *, weight: float = 1.0
) -> Float[Array, " B"]:
    """``gaussian_nll + weight * mean_v (mu - yhat)^2``: OOD Eq. 5; the mean stays near the frozen prediction.

    The square is per voxel; the paper prints a norm inside the sum, and gives no weight.

    Args:
        mean: mu.
        sigma: standard deviation, positive.
        target: y.
        prediction: yhat, of the frozen model.
        weight: lambda.

    Returns:
        One value per sample.
    """
    mean, prediction = _prepare(mean, prediction)
    return gaussian_nll(mean, sigma, target) + weight * cross_entropy.voxel_mean(jnp.square(mean - prediction))


def generalised_gaussian_nll(mean: Values, alpha: Broadcast, beta: Broadcast, target: Values) -> Float[Array, " B"]:
    """``mean_v (|y - mu| / alpha)^beta - log beta + log(2 alpha) + lgamma(1 / beta)``: OOD Eq. 7, with its constants.

    Equals ``-scipy.stats.gennorm.logpdf``.  Written with ``lgamma(1 + 1/beta)``, which needs no ``log beta`` and does
    not cancel for large beta.  ``beta = 2`` (the paper's runs) is a Gaussian with ``sigma = alpha / sqrt(2)``, ``beta =
    1`` a Laplace density, ``beta -> inf`` a uniform one.  Powers above ``exp(40)`` go on linearly in their logarithm.

    Args:
        mean: mu.
        alpha: scale, positive.
        beta: shape, positive.
        target: y.

    Returns:
        One value per sample.
    """
    mean, alpha, beta, target = _prepare(mean, alpha, beta, target)
    alpha, beta = _at_least(alpha, SMALLEST_SPREAD), _between(beta, *BETA_RANGE)
    ratio = _at_least(elementary.absolute(target - mean) / alpha, _SMALLEST_RATIO)
    log_power = beta * jnp.log(ratio)
    excess = jax.nn.relu(log_power - _LARGEST_LOG_POWER)
    power = jnp.exp(log_power - excess) * (1 + excess)
    return cross_entropy.voxel_mean(power + jnp.log(2 * alpha) + jax.lax.lgamma(1 + 1 / beta))


def generalised_gaussian_variance(alpha: Values, beta: Broadcast) -> Values:
    """``alpha^2 Gamma(3 / beta) / Gamma(1 / beta)`` of every voxel: OOD Eq. 8, the uncertainty map; ``> 0``.

    ``alpha^2 / 2`` for ``beta = 2``, ``alpha^2 / 3`` for ``beta -> inf``.

    Args:
        alpha: scale, positive.
        beta: shape, positive.
    """
    alpha, beta = _prepare(alpha, beta)
    alpha, beta = _at_least(alpha, SMALLEST_SPREAD), _between(beta, *BETA_RANGE)
    return jnp.square(alpha) * jnp.exp(jax.lax.lgamma(1 + 3 / beta) - jax.lax.lgamma(1 + 1 / beta)) / 3


def bayescap_nll(
    mean: Values,
    inverse_alpha: Values,
    beta: Values,
    target: Values,
    *,
    alpha_floor: float = 1e-4,
    beta_floor: float = 1e-4,
    smallest: float = 1e-4,
    largest: float = 1e3,
) -> Float[Array, " B"]:
    """BayesCap's ``GenGaussLoss`` as published: ``mean_v clip(|y - mu| a b) - log a + lgamma(1 / b) - log b``.

    ``a = 1/alpha + alpha_floor``, ``b = beta + beta_floor``.  The residual is multiplied by beta, not raised to it, and
    clipped, so this is a generalised Gaussian's likelihood for ``beta = 1`` alone: for comparisons only.

    Args:
        mean: mu.
        inverse_alpha: ``1 / alpha``, what the network predicts.
        beta: shape.
        target: y.
        alpha_floor: added to ``inverse_alpha``; 1e-5 in the README.
        beta_floor: added to ``beta``; 1e-2 in the README.
        smallest: lower bound of the residual; no gradient beyond.
        largest: upper bound of the residual; no gradient beyond.

    Returns:
        One value per sample.
    """
    mean, inverse_alpha, beta, target = _prepare(mean, inverse_alpha, beta, target)
    inverse_alpha, beta = inverse_alpha + alpha_floor, beta + beta_floor
    residual = _between(elementary.absolute(target - mean) * inverse_alpha * beta, smallest, largest)
    return cross_entropy.voxel_mean(residual - jnp.log(inverse_alpha) + jax.lax.lgamma(1 / beta) - jnp.log(beta))


def bayescap(
    mean: Values,
    inverse_alpha: Values,
    beta: Values,
    target: Values,
    prediction: Values,
    *,
    identity_weight: float = 1.0,
    nll_weight: float = 0.05,
    alpha_floor: float = 1e-4,
    beta_floor: float = 1e-4,
) -> Float[Array, " B"]:
    """BayesCap's ``TempCombLoss`` as published: ``identity_weight mean_v |mu - yhat| + nll_weight bayescap_nll``.

    Args:
        mean: mu.
        inverse_alpha: ``1 / alpha``.
        beta: shape.
        target: y.
        prediction: yhat, of the frozen model.
        identity_weight: T1.
        nll_weight: T2.
        alpha_floor: as of ``bayescap_nll``.
        beta_floor: as of ``bayescap_nll``.

    Returns:
        One value per sample.
    """
    nll = bayescap_nll(mean, inverse_alpha, beta, target, alpha_floor=alpha_floor, beta_floor=beta_floor)
    mean, prediction = _prepare(mean, prediction)
    return identity_weight * cross_entropy.voxel_mean(elementary.absolute(mean - prediction)) + nll_weight * nll


def bayescap_variance(
    inverse_alpha: Values, beta: Values, *, alpha_floor: float = 1e-5, beta_floor: float = 1e-2
) -> Values:
    """BayesCap's uncertainty map as published: Eq. 8 with ``alpha = 1 / (1/alpha + floor)``, ``beta + floor``.

    The floors are not those of its loss.  Not clamped: a ``beta`` near 0 overflows, as there.

    Args:
        inverse_alpha: ``1 / alpha``.
        beta: shape.
        alpha_floor: added to ``inverse_alpha``.
        beta_floor: added to ``beta``.
    """
    inverse_alpha, beta = _prepare(inverse_alpha, beta)
    inverse_alpha, beta = inverse_alpha + alpha_floor, beta + beta_floor
    return jnp.exp(jax.lax.lgamma(3 / beta) - jax.lax.lgamma(1 / beta)) / jnp.square(inverse_alpha)


def _prepare(first: Values, *others: Broadcast) -> tuple[Values, ...]:
    """All in at least float32, broadcast to the shape of the first."""
    arrays = [cross_entropy.at_least_float32(jnp.asarray(array)) for array in (first, *others)]
    return tuple(jnp.broadcast_to(array, arrays[0].shape) for array in arrays)


def _at_least(values: Values, lowest: float) -> Values:
    return jnp.where(values <= lowest, lowest, values)  # NaN stays


def _between(values: Values, lowest: float, highest: float) -> Values:
    return jnp.where(values >= highest, highest, _at_least(values, lowest))
