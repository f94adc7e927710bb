"""DSC++: soft Dice at gamma 1, the formula, its limits, and powers that have no second derivative at 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calsegx.interfaces import UsageError
from calsegx.losses import overlap


def problem(count: int):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(2, 5, 4, count)), jnp.float32)
    return logits, jnp.asarray(rng.integers(0, max(count, 2), size=(2, 5, 4)))


@pytest.mark.parametrize("include_background", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_gamma_one_is_soft_dice(count: int, include_background: bool):
    logits, labels = problem(count)
    options = {"smooth": 1e-5, "include_background": include_background}
    actual = overlap.dice_plus_plus(logits, labels, gamma=1.0, **options)
    np.testing.assert_allclose(actual, overlap.dice(logits, labels, **options), rtol=1e-5)


def test_closed_form():
    probability = jnp.asarray([0.25, 0.5, 0.75])
    logits, labels = jnp.log(probability / (1 - probability))[None, :, None], jnp.asarray([[0, 1, 1]])
    hits, errors = 2 * 1.25, 0.25**3 + 0.5**3 + 0.25**3
    actual = overlap.dice_plus_plus(logits, labels, gamma=3.0, smooth=0.0)
    np.testing.assert_allclose(actual, 1 - hits / (hits + errors), rtol=1e-6)


@pytest.mark.parametrize("count", [1, 3])
def test_limits(count: int):
    _, labels = problem(count)
    right = jnp.where(labels > 0, 1.0, -1.0)[..., None] if count == 1 else 2.0 * jax.nn.one_hot(labels, count)
    np.testing.assert_allclose(overlap.dice_plus_plus(1e3 * right, labels), 0, atol=1e-6)
    # An error of the same size costs less than in Dice.
    assert (overlap.dice_plus_plus(right, labels) < overlap.dice(right, labels)).all()


@pytest.mark.parametrize("gamma", [1.0, 1.3, 2.0, 2.5])
@pytest.mark.parametrize("clip", [0.0, 1e-7])
def test_derivatives_of_sure_voxels_are_finite(gamma: float, clip: float):
    logits, labels = problem(3)

    def total(logits):
        return jnp.sum(overlap.dice_plus_plus(logits, labels, gamma=gamma, clip=clip))

    for scale in (0.0, 30.0, 1e4):
        gradient, pull = jax.vjp(jax.grad(total), scale * logits)
        assert np.isfinite(gradient).all()
        assert np.isfinite(pull(gradient)[0]).all()


def test_a_gamma_below_one_is_refused():
    with pytest.raises(UsageError, match="'dice_plus_plus' needs gamma of at least 1, got 0.5; 1 is soft Dice"):
        overlap.dice_plus_plus(*problem(1), gamma=0.5)
