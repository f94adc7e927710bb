"""Every registered loss where derivatives are fragile: ties, saturation, one class, one voxel; and its symmetries.

One compiled function per loss and number of logits: value, gradient, and the gradient of the gradient's squared norm.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calsegx import losses

BOTH = [(name, count) for name in losses.names() for count in (1, 4) if (name, count) != ("bce", 4)]
NEIGHBOURS = {"bwcr", "nacl", "nacl_penalty", "svls"}  # a voxel's place matters
SHAPES = ((1, 1), (2, 3, 2))  # two, because compiling is what takes the time


def sample(count: int, shape: tuple[int, ...], batch: int = 4, seed: int = 0):
    """Logits and labels of pairs: samples 2i and 2i + 1 have the same labels, as ``bwcr`` asks."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(batch, *shape, count)).astype(np.float32)
    labels = rng.integers(0, max(count, 2), size=(batch // 2, *shape)).astype(np.int32)
    return logits, np.repeat(labels, 2, axis=0)


def extremes(count: int, shape: tuple[int, ...]):
    """Zero, saturated and mixed logits, each with labels of all classes and of one; one batch of 36 samples."""
    logits, labels = sample(count, shape, batch=2)
    right = np.eye(count)[labels] if count > 1 else np.where(labels > 0, 1.0, -1.0)[..., None]
    kinds = np.stack([0 * logits, 0 * logits + 1e4, 0 * logits - 1e4, 1e4 * np.sign(logits), 1e4 * right, -1e4 * right])
    targets = np.stack([labels, 0 * labels, 0 * labels + max(count, 2) - 1])
    kinds, targets = np.broadcast_arrays(kinds[:, None], targets[None, ..., None])
    # The first two axes and the samples become the batch; pairs stay together.
    return kinds.reshape(-1, *shape, count).astype(np.float32), targets[..., 0].reshape(-1, *shape)


@functools.cache
def everything(name: str):
    """Jitted: value, gradient and second derivative for samples of all shapes at once."""

    def total(logits, labels):
        values = losses.get(name)(logits, labels)
        return jnp.sum(values), values

    def penalty(logits, labels):
        gradient, values = jax.grad(total, has_aux=True)(logits, labels)
        return jnp.sum(jnp.square(gradient)), (gradient, values)

    def derivatives(logits, labels):
        second, (first, values) = jax.grad(penalty, has_aux=True)(logits, labels)
        return values, first, second

    return jax.jit(lambda pairs: [derivatives(*pair) for pair in pairs])


@pytest.mark.parametrize(("name", "count"), BOTH)
def test_derivatives_are_finite(name: str, count: int):
    inputs = [extremes(count, shape) for shape in SHAPES]
    for (logits, _), (values, first, second) in zip(inputs, everything(name)(inputs), strict=True):
        assert values.shape == logits.shape[:1] and first.shape == second.shape == logits.shape
        for array in (values, first, second):
            assert array.dtype == jnp.float32
            assert np.isfinite(array).all()


@pytest.mark.parametrize(("name", "count"), BOTH)
def test_jit_vmap_and_the_order_of_samples_and_voxels(name: str, count: int):
    logits, labels = sample(count, (3, 2))
    order = [2, 3, 0, 1]  # pairs stay together
    saturated = np.concatenate([logits[:2], 0 * logits[2:] + 1e4])
    moved = [np.roll(array[:, ::-1], 1, axis=2) for array in (logits, labels)]
    variants = [(logits, labels), (logits[order], labels[order]), (saturated, labels), moved]
    batched = [np.stack(arrays) for arrays in zip(*variants, strict=True)]
    compiled, permuted, beside, shuffled = np.asarray(jax.jit(jax.vmap(losses.get(name)))(*batched))

    def assert_close(actual, expected):
        np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=1e-6)

    assert_close(compiled, losses.get(name)(jnp.asarray(logits), jnp.asarray(labels)))
    assert_close(permuted, compiled[order])
    assert_close(beside[:2], compiled[:2])  # the other samples' saturation does not matter
    if name not in NEIGHBOURS:
        assert_close(shuffled, compiled)
