"""The softmax of few classes, softplus and the distance to the largest logit: JAX's values and all derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calsegx.losses import elementary
from tests.losses import derivatives

PAIRS = {
    "softmax": (elementary.softmax, jax.nn.softmax),
    "log_softmax": (elementary.log_softmax, jax.nn.log_softmax),
    "softplus": (elementary.softplus, jax.nn.softplus),
    "below_largest": (elementary.below_largest, lambda z: z.max(-1, keepdims=True) - z),
}


@pytest.mark.parametrize("name", PAIRS)
def test_values_and_derivatives(name):
    ours, theirs = PAIRS[name]
    logits = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    derivatives.against_differences(jax.grad(lambda z: jnp.sum(jnp.sin(ours(z)))), logits)  # of the gradient: order 3
    orders = (lambda g: g, jax.jacfwd, jax.jacrev, jax.hessian)
    found, expected = (jax.jit(lambda z, g=g: [f(g)(z) for f in orders])(logits) for g in (ours, theirs))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6, rtol=1e-6)
    np.testing.assert_array_equal(jax.vmap(ours)(logits), ours(logits))


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "softplus"])
def test_saturated_and_equal_logits(name):
    ours, theirs = PAIRS[name]
    orders = (lambda g: g, jax.jacrev, jax.hessian)
    both = [jax.jit(lambda z, g=g: [f(g)(z) for f in orders]) for g in (ours, theirs)]
    for logits in np.float32([[1e4, -1e4, 0, 0], [0, 0, 0, 0], [-300, -300, -300, -300]]):
        for found, expected in zip(*(f(logits) for f in both), strict=True):
            assert np.isfinite(found).all()
            np.testing.assert_allclose(found, expected, atol=1e-6, rtol=1e-6)


def test_softplus_keeps_small_values():
    np.testing.assert_allclose(elementary.softplus(jnp.array([-20.0, -60.0])), np.exp([-20.0, -60.0]), rtol=1e-6)


def test_the_first_of_equal_largest_logits_has_the_gradient():
    gradient = jax.grad(lambda z: elementary.below_largest(z).sum())(jnp.array([0.0, 2.0, 2.0]))
    np.testing.assert_array_equal(gradient, [-1.0, 2.0, -1.0])
