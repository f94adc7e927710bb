"""First and second derivatives of a loss, against differences and at the extremes; each compiled once."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

STEP = 1e-5  # of central differences in float64


def against_differences(function, *arguments, atol=1e-5, rtol=1e-5):
    """Derivatives of a function's values along one direction, forward and reverse, agree with central differences.

    The values are added up with random weights.  In float64, and to the second order, each way over each: reverse over
    reverse is what the gradient of a gradient's norm is made of.  A rule must not change the value either.
    """
    with jax.enable_x64():
        point, unravel = ravel_pytree(jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), arguments))
        rng = np.random.default_rng(0)
        weights = rng.normal(1, 0.5, jax.eval_shape(function, *unravel(point)).shape)
        direction = rng.normal(size=point.shape)

        def value(x):
            return jnp.sum(weights * function(*unravel(x)))

        def slope(x):
            return jax.jvp(value, (x,), (direction,))[1]

        @jax.jit
        def everything(x):
            gradient = jax.grad(value)
            with_value, found = jax.value_and_grad(value)(x)
            products = (
                jax.jvp(gradient, (x,), (direction,))[1],
                jax.grad(slope)(x),
                jax.grad(lambda x: jnp.vdot(gradient(x), direction))(x),
            )
            values = jnp.stack([value(x), jax.jvp(value, (x,), (direction,))[0], with_value])
            return values, slope(x), found, jax.jvp(slope, (x,), (direction,))[1], products

        points = (np.asarray(point) + sign * STEP * direction for sign in (-1, 0, 1))
        low, found, high = (jax.tree.map(np.asarray, everything(x)) for x in points)
    values, forward, gradient, curvature, products = found
    np.testing.assert_allclose(values, values[0], rtol=1e-12)
    slopes, change, second = ((b - a) / (2 * STEP) for a, b in zip(low[:3], high[:3], strict=True))
    np.testing.assert_allclose([forward, direction @ gradient], slopes[:2], atol=atol, rtol=rtol)
    np.testing.assert_allclose(curvature, change, atol=atol, rtol=rtol)
    for product in products:
        np.testing.assert_allclose(product, second, atol=atol, rtol=rtol)


def check(loss, count, scale=1.0):
    """Both derivatives of ``count`` logits agree with finite differences in float64."""
    labels = np.asarray([[0, 1, 1, 0]])
    against_differences(lambda z: loss(z, labels), scale * np.random.default_rng(0).normal(size=(1, 4, count)))


def check_extremes(loss, draw, count):
    """Value, gradient and second derivative are finite at equal and saturated logits, also of one class or voxel."""

    def norm(z, labels):
        return jnp.sum(jnp.square(jax.grad(lambda x: jnp.sum(loss(x, labels)))(z)))

    everything = jax.jit(lambda z, labels: (loss(z, labels), *jax.value_and_grad(norm)(z, labels)))
    for shape in ((1, 2, 3), (1, 1, 1)):
        logits, labels = map(np.asarray, draw(shape, count))
        for z in (0 * logits, 1e4 * np.sign(logits), 0 * logits + 1e4, 0 * logits - 1e4):
            for target in (labels, 0 * labels, 0 * labels + 1):
                assert all(np.isfinite(values).all() for values in everything(z, target))
