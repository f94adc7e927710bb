"""Likelihoods of predicted distributions against scipy, their limits, and their derivatives at the edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from calsegx.uncertainty import likelihood
from tests.losses import derivatives

SHAPE = (2, 3, 4)


def heads(seed=0):
    """mean, spread, beta, target, prediction."""
    rng = np.random.default_rng(seed)
    mean, prediction = rng.normal(size=SHAPE), rng.uniform(size=SHAPE)
    return mean, rng.uniform(0.3, 2, SHAPE), rng.uniform(0.5, 4, SHAPE), rng.integers(0, 2, SHAPE) * 1.0, prediction


def per_sample(values):
    return values.reshape(2, -1).mean(axis=1)


def test_gaussian_against_scipy():
    with jax.enable_x64():
        mean, sigma, _, target, prediction = heads()
        expected = per_sample(-scipy.stats.norm.logpdf(target, mean, sigma)) - np.log(2 * np.pi) / 2
        np.testing.assert_allclose(likelihood.gaussian_nll(mean, sigma, target), expected, rtol=1e-12)
        found = likelihood.penalised_gaussian_nll(mean, sigma, target, prediction, weight=0.3)
        np.testing.assert_allclose(found, expected + 0.3 * per_sample((mean - prediction) ** 2), rtol=1e-12)


def test_generalised_gaussian_against_scipy():
    with jax.enable_x64():
        mean, alpha, beta, target, _ = heads()
        expected = per_sample(-scipy.stats.gennorm.logpdf(target, beta, mean, alpha))
        np.testing.assert_allclose(likelihood.generalised_gaussian_nll(mean, alpha, beta, target), expected, rtol=1e-12)
        variance = likelihood.generalised_gaussian_variance(alpha, beta)
        np.testing.assert_allclose(variance, scipy.stats.gennorm.var(beta, scale=alpha), rtol=1e-11)


def test_beta_two_is_a_gaussian_and_infinity_a_uniform_density():
    with jax.enable_x64():
        mean, sigma, _, target, _ = heads()
        gaussian = likelihood.gaussian_nll(mean, sigma, target) + np.log(2 * np.pi) / 2
        found = likelihood.generalised_gaussian_nll(mean, np.sqrt(2) * sigma, 2.0, target)
        np.testing.assert_allclose(found, gaussian, rtol=1e-12)
        np.testing.assert_allclose(likelihood.generalised_gaussian_variance(sigma, 2.0), sigma**2 / 2, rtol=1e-12)
        found = likelihood.generalised_gaussian_nll(0 * mean, 3.0, np.inf, 0.5 + 0 * mean)
        np.testing.assert_allclose(found, np.log(6.0), atol=0.01)
        np.testing.assert_allclose(likelihood.generalised_gaussian_variance(sigma, np.inf), sigma**2 / 3, rtol=0.02)


@pytest.mark.parametrize("beta", [0.7, 1.0, 2.0, 8.0])
def test_it_is_a_density(beta):
    with jax.enable_x64():
        target = np.linspace(-80, 80, 400_001)
        nll = jax.vmap(lambda y: likelihood.generalised_gaussian_nll(jnp.full(1, 0.2), 1.3, beta, y[None])[0])(target)
        density = np.exp(-np.asarray(nll))
        np.testing.assert_allclose(scipy.integrate.simpson(density, x=target), 1, atol=1e-3)


def test_fitting_finds_the_standard_deviation():
    with jax.enable_x64():
        target = np.random.default_rng(1).normal(0.3, 0.7, size=(1, 4000))
        mean, sigma = target.mean(), target.std()

        def loss(parameters):
            return likelihood.gaussian_nll(jnp.full_like(target, parameters[0]), parameters[1], target)[0]

        np.testing.assert_allclose(jax.grad(loss)(jnp.asarray([mean, sigma])), 0, atol=1e-12)
        assert loss(jnp.asarray([mean, sigma])) < loss(jnp.asarray([mean, 1.05 * sigma]))


@pytest.mark.parametrize("function", ["gaussian", "generalised", "bayescap"])
def test_gradients_to_second_order(function):
    mean, spread, beta, target, prediction = (np.asarray(a[:1, :1]) for a in heads(2))
    values = {
        "gaussian": lambda m, s, b: likelihood.penalised_gaussian_nll(m, s, target, prediction),
        "generalised": lambda m, s, b: likelihood.generalised_gaussian_nll(m, s, b, target),
        "bayescap": lambda m, s, b: likelihood.bayescap(m, s, b, target, prediction),
    }[function]
    derivatives.against_differences(values, mean, spread, beta)


def test_finite_at_the_edges_in_float32():
    def values(*heads):
        return likelihood.gaussian_nll(*heads[:2], heads[3]) + likelihood.generalised_gaussian_nll(*heads)

    def norm(*heads):
        gradient = jax.grad(lambda *a: jnp.sum(values(*a)), argnums=(0, 1, 2))(*heads)
        return sum(jnp.sum(jnp.tanh(g)) for g in gradient), (values(*heads), gradient)

    both = jax.jit(jax.grad(norm, argnums=(0, 1, 2), has_aux=True))
    ones = jnp.ones((1, 2), jnp.float32)
    for residual in (0.0, 1e-12, 1.0, 1e4):
        for spread in (0.0, 1e-3, 1.0, 1e4):
            for beta in (0.0, 0.3, 1.0, 2.0, 1e6):
                for array in jax.tree.leaves(both(residual * ones, spread * ones, beta * ones, 0 * ones)):
                    assert np.isfinite(array).all(), (residual, spread, beta)
    for beta in (0.0, 1e6):
        assert np.isfinite(likelihood.generalised_gaussian_variance(ones, beta * ones)).all()


def test_clamps_do_not_hide_what_is_not_a_number():
    ones = jnp.ones((1, 2))
    assert np.isnan(likelihood.gaussian_nll(ones, jnp.nan * ones, ones)).all()
    assert np.isnan(likelihood.generalised_gaussian_nll(ones, ones, jnp.nan * ones, ones)).all()


def test_single_precision_and_shapes():
    mean, spread, beta, target, _ = heads()
    single = [jnp.asarray(a, jnp.float32) for a in (mean, spread, beta, target)]
    value = jax.jit(likelihood.generalised_gaussian_nll)(*single)
    assert value.dtype == jnp.float32
    assert value.shape == (2,)
    np.testing.assert_allclose(value, per_sample(-scipy.stats.gennorm.logpdf(target, beta, mean, spread)), rtol=2e-5)
    halves = [a.astype(jnp.bfloat16) for a in single]
    assert likelihood.generalised_gaussian_nll(*halves).dtype == jnp.float32
    with pytest.raises(ValueError, match="broadcast"):
        likelihood.gaussian_nll(single[0], single[1], single[3][..., :2])


def test_bayescap_as_published():
    with jax.enable_x64():
        mean, alpha, beta, target, prediction = heads()
        a, b = 1 / alpha + 1e-4, beta + 1e-4
        residual = np.clip(np.abs(mean - target) * a * b, 1e-4, 1e3)
        expected = per_sample(residual - np.log(a) + scipy.special.gammaln(1 / b) - np.log(b))
        np.testing.assert_allclose(likelihood.bayescap_nll(mean, 1 / alpha, beta, target), expected, rtol=1e-12)
        found = likelihood.bayescap(mean, 1 / alpha, beta, target, prediction)
        np.testing.assert_allclose(found, per_sample(np.abs(mean - prediction)) + 0.05 * expected, rtol=1e-12)
        a, b = 1 / alpha + 1e-5, beta + 1e-2
        variance = scipy.special.gamma(3 / b) / scipy.special.gamma(1 / b) / a**2
        np.testing.assert_allclose(likelihood.bayescap_variance(1 / alpha, beta), variance, rtol=1e-11)
        # Its residual is linear in beta: the likelihood for beta = 1 alone.
        for shape, agrees in ((1.0, True), (2.0, False)):
            options = {"alpha_floor": 0.0, "beta_floor": 0.0}
            linear = likelihood.bayescap_nll(mean, 1 / alpha, np.full(SHAPE, shape), target, **options) + np.log(2)
            power = likelihood.generalised_gaussian_nll(mean, alpha, shape, target)
            assert np.allclose(linear, power, rtol=1e-9) == agrees
