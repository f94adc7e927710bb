"""The toy decoder of the Fisher goldens, a random problem for it, and jitted steps that the tests share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from calsegx.losses import composite, cross_entropy, fisher


def decode(params, z):
    return jnp.tanh(z @ params["W1"].T + params["b1"]) @ params["W2"].T + params["b2"]


def bce(params, z, labels):
    return cross_entropy.ce(decode(params, z), labels)


def pair(params, z, labels):
    logits = decode(params, z)
    return composite.sam(logits, labels), cross_entropy.ce(logits, labels)


def problem(seed: int = 0):
    """(params, z, labels): the toy decoder of the goldens, in float32."""
    rng = np.random.default_rng(seed)
    shapes = {"W1": (7, 5), "b1": (7,), "W2": (1, 7), "b2": (1,)}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    z = jnp.asarray(rng.normal(size=(3, 4, 5, 5)), jnp.float32)
    return params, z, jnp.asarray(rng.integers(0, 2, size=(3, 4, 5)))


@functools.cache
def compiled(loss_fn, **options):
    return jax.jit(fisher.value_and_grad(loss_fn, **options))


def assert_close(actual, expected, rtol: float = 2e-5):
    def leaf(a, e):
        np.testing.assert_allclose(a, e, rtol=rtol, atol=rtol * np.abs(e).max())

    jax.tree.map(leaf, actual, expected)


def flat(tree):
    """All leaves of a tree as one vector in float64."""
    return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])


def relative_error(actual, expected):
    actual, expected = flat(actual), flat(expected)
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)
