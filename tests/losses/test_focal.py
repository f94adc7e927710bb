"""Focal loss: limits, the formula, and the log odds it is made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calsegx.interfaces import UsageError
from calsegx.losses import cross_entropy


def problem(count: int):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(3 * rng.normal(size=(2, 5, 4, count)), jnp.float32)
    return logits, jnp.asarray(rng.integers(0, max(count, 2), size=(2, 5, 4)))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_gamma_zero_is_cross_entropy(count: int):
    logits, labels = problem(count)
    for scale in (0.0, 1.0, 3e3):

        def both(logits):
            return cross_entropy.focal(logits, labels, gamma=0.0), cross_entropy.ce(logits, labels)

        (focal, plain), pull = jax.vjp(both, scale * logits)
        np.testing.assert_allclose(focal, plain, rtol=2e-6)
        (gradient,), (expected,) = pull((jnp.ones(2), jnp.zeros(2))), pull((jnp.zeros(2), jnp.ones(2)))
        np.testing.assert_allclose(gradient, expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("gamma", [0.5, 1, 2.0, 3])
@pytest.mark.parametrize("count", [1, 4])
def test_formula(count: int, gamma: float):
    logits, labels = problem(count)
    loss = np.asarray(cross_entropy.per_voxel(logits, labels), np.float64)
    expected = np.mean((1 - np.exp(-loss)) ** gamma * loss, axis=(1, 2))
    np.testing.assert_allclose(cross_entropy.focal(logits, labels, gamma=gamma), expected, rtol=2e-5)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_log_odds_against(count: int):
    logits, labels = problem(count)
    against = cross_entropy.log_odds_against(logits, labels)
    np.testing.assert_allclose(jax.nn.softplus(against), cross_entropy.per_voxel(logits, labels), rtol=2e-5, atol=1e-6)
    # A confident right voxel: 1 - p is below what 1 - exp(-l) can resolve.
    sure = jnp.where(labels > 0, 60.0, -60.0)[..., None] if count == 1 else 60.0 * jax.nn.one_hot(labels, count)
    expected = -60 + np.log(max(count, 2) - 1)
    np.testing.assert_allclose(cross_entropy.log_odds_against(sure, labels), expected, rtol=1e-6)


def test_a_negative_gamma_is_refused():
    with pytest.raises(UsageError, match="'focal' needs gamma of at least 0, got -1"):
        cross_entropy.focal(*problem(1), gamma=-1)
