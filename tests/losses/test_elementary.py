"""The softmax of few classes, softplus and the distance to the largest logit: JAX's values and all derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from calsegx.losses import elementary

PAIRS = {
    "softmax": (elementary.softmax, jax.nn.softmax),
    "log_softmax": (elementary.log_softmax, jax.nn.log_softmax),
    "softplus": (elementary.softplus, jax.nn.softplus),
    "below_largest": (elementary.below_largest, lambda z: z.max(-1, keepdims=True) - z),
}


@pytest.mark.parametrize("name", PAIRS)
def test_values_and_derivatives(name):
    ours, theirs = PAIRS[name]
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)))
    check_grads(ours, (logits,), order=3, modes=("fwd", "rev"), atol=0.02, rtol=0.02)
    for f in (lambda g: g, jax.jacfwd, jax.jacrev, jax.hessian):
        np.testing.assert_allclose(jax.jit(f(ours))(logits), f(theirs)(logits), atol=2e-6, rtol=1e-6)
    np.testing.assert_array_equal(jax.vmap(ours)(logits), ours(logits))


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "softplus"])
def test_saturated_and_equal_logits(name):
    ours, theirs = PAIRS[name]
    for logits in (jnp.array([1e4, -1e4, 0.0]), jnp.zeros(4), jnp.full(4, -300.0)):
        for f in (lambda g: g, jax.jacrev, jax.hessian):
            found = f(ours)(logits)
            assert jnp.isfinite(found).all()
            np.testing.assert_allclose(found, f(theirs)(logits), atol=1e-6, rtol=1e-6)


def test_softplus_keeps_small_values():
    np.testing.assert_allclose(elementary.softplus(jnp.array([-20.0, -60.0])), np.exp([-20.0, -60.0]), rtol=1e-6)


def test_the_first_of_equal_largest_logits_has_the_gradient():
    gradient = jax.grad(lambda z: elementary.below_largest(z).sum())(jnp.array([0.0, 2.0, 2.0]))
    np.testing.assert_array_equal(gradient, [-1.0, 2.0, -1.0])
