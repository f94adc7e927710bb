"""First and second derivatives of a loss, against differences and at the extremes."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.test_util import check_grads


def check(loss, count, scale=1.0):
    """Both derivatives of ``count`` logits agree with finite differences in float64."""
    with jax.enable_x64():
        labels = jnp.asarray([[0, 1, 1, 0]])
        logits = jnp.asarray(scale * np.random.default_rng(0).normal(size=(1, 4, count)))
        check_grads(jax.jit(lambda z: jnp.sum(loss(z, labels))), (logits,), order=2, atol=1e-5, rtol=1e-5)


def check_extremes(loss, draw, count):
    """Value, gradient and second derivative are finite at equal and saturated logits, also of one class or voxel."""

    def norm(z, labels):
        return jnp.sum(jnp.square(jax.grad(lambda x: jnp.sum(loss(x, labels)))(z)))

    both = jax.jit(jax.value_and_grad(norm))
    for shape in ((1, 2, 3), (1, 1, 1)):
        logits, labels = draw(shape, count)
        for z in (0 * logits, 1e4 * jnp.sign(logits), 0 * logits + 1e4, 0 * logits - 1e4):
            for target in (labels, 0 * labels, 0 * labels + 1):
                value, gradient = both(z, target)
                assert np.isfinite(value) and np.isfinite(gradient).all()
                assert np.isfinite(loss(z, target)).all()
