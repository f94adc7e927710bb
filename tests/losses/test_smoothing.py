"""Label smoothing, ECP and SVLS: cases by hand, limits, one logit as two classes, derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calsegx import losses
from calsegx.interfaces import UsageError
from calsegx.losses import cross_entropy, neighbourhood, smoothing
from tests.losses import derivatives

LOSSES = {
    "label_smoothing": smoothing.label_smoothing,
    "ecp": smoothing.ecp,
    "ecp as coded": functools.partial(smoothing.ecp, mean_over_classes=True),
    "svls": smoothing.svls,
}
EAGER, LOSSES = LOSSES, {name: jax.jit(loss) for name, loss in LOSSES.items()}
ALL = pytest.mark.parametrize("name", LOSSES)
QUARTERS = jnp.log(jnp.asarray([[[1.0, 3.0]]]))  # p = (1/4, 3/4), one voxel


def draw(shape, count, seed=0, scale=3.0):
    rng = np.random.default_rng(seed)
    logits = scale * rng.normal(size=(*shape, count))
    return logits.astype(np.float32), rng.integers(0, max(count, 2), size=shape, dtype=np.int32)


def test_label_smoothing_by_hand():
    expected = -(0.1 * np.log(1 / 4) + 0.9 * np.log(3 / 4))
    value = smoothing.label_smoothing(QUARTERS, jnp.asarray([[1]]), smoothing=0.2)
    np.testing.assert_allclose(value, [expected], rtol=1e-6)


def test_label_smoothing_is_linear_between_ce_and_uniform_targets():
    logits, labels = draw((2, 3, 4), 3)
    none, half, full = (smoothing.label_smoothing(logits, labels, smoothing=s) for s in (0.0, 0.5, 1.0))
    np.testing.assert_allclose(none, cross_entropy.ce(logits, labels), rtol=1e-6)
    np.testing.assert_allclose(full, -jnp.mean(jax.nn.log_softmax(logits), axis=(1, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(half, (none + full) / 2, rtol=1e-6)


def test_ecp_by_hand():
    entropy = -(np.log(1 / 4) / 4 + 3 * np.log(3 / 4) / 4)
    value = smoothing.ecp(QUARTERS, jnp.asarray([[1]]), weight=0.3)
    np.testing.assert_allclose(value, [-np.log(3 / 4) - 0.3 * entropy], rtol=1e-6)
    uniform = smoothing.ecp(jnp.zeros((1, 5, 4)), jnp.zeros((1, 5), int), weight=0.3)
    np.testing.assert_allclose(uniform, [0.7 * np.log(4)], rtol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_ecp_as_coded_has_a_kth_of_the_weight(count):
    logits, labels = draw((2, 7), count)
    coded = smoothing.ecp(logits, labels, weight=0.4, mean_over_classes=True)
    np.testing.assert_allclose(coded, smoothing.ecp(logits, labels, weight=0.4 / max(count, 2)), rtol=1e-5)


def test_svls_by_hand():
    """One dimension: a quarter of the target comes from either neighbour, whatever sigma is."""
    labels = jnp.asarray([[0, 1, 1]])
    for sigma in (0.5, 2.0):
        targets = smoothing.svls_targets(labels, 2, sigma=sigma)
        np.testing.assert_allclose(targets[0, :, 1], [0.25, 0.75, 1], rtol=1e-6)
    logits, _ = draw((1, 3), 2)
    value = smoothing.svls(logits, labels)
    np.testing.assert_allclose(value[0], -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)), rtol=1e-6)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("sigma", [0.02, 0.5, 2.0])
def test_svls_kernel(dimensions, sigma):
    kernel = neighbourhood.svls_kernel(dimensions, sigma)
    assert kernel.shape == (3,) * dimensions
    assert kernel[(1,) * dimensions] == 1
    np.testing.assert_allclose(kernel.sum(), 2, rtol=1e-12)
    for step in range(1, dimensions):  # one axis more away from the centre
        nearer, farther = ((0,) * n + (1,) * (dimensions - n) for n in (step, step + 1))
        np.testing.assert_allclose(kernel[farther], kernel[nearer] * np.exp(-0.5 / sigma**2), rtol=1e-12)


@pytest.mark.parametrize("shape", [(2, 5), (2, 4, 5), (1, 3, 4, 2)])
def test_svls_targets(shape):
    _, labels = draw(shape, 4)
    targets = smoothing.svls_targets(labels, 4, sigma=1.0)
    np.testing.assert_allclose(jnp.sum(targets, axis=-1), 1, rtol=1e-6)
    assert (jnp.take_along_axis(targets, labels[..., None], axis=-1) >= 0.5).all()
    logits, _ = draw(shape, 4, seed=1)
    axes = tuple(range(1, len(shape)))
    flipped = smoothing.svls(jnp.flip(logits, axes), jnp.flip(labels, axes))
    np.testing.assert_allclose(flipped, smoothing.svls(logits, labels), rtol=1e-6)
    np.testing.assert_allclose(
        smoothing.svls(logits, 0 * labels + 2), cross_entropy.ce(logits, 0 * labels + 2), rtol=1e-6
    )


@ALL
def test_one_logit_is_two_classes(name):
    logits, labels = draw((2, 3, 4), 1)
    two = jnp.concatenate([-logits / 2, logits / 2], axis=-1)
    np.testing.assert_allclose(LOSSES[name](logits, labels), LOSSES[name](two, labels), rtol=1e-6)
    # For one logit every label above 0 is foreground, as in cross-entropy.
    np.testing.assert_array_equal(LOSSES[name](logits, 7 * labels), LOSSES[name](logits, labels))


@ALL
def test_only_differences_of_logits_matter(name):
    logits, labels = draw((2, 6), 3)
    logits = jnp.round(4 * logits) / 4  # the shift below loses no digit
    np.testing.assert_array_equal(LOSSES[name](logits + 2.0**20, labels), LOSSES[name](logits, labels))


@ALL
@pytest.mark.parametrize("count", [1, 3])
def test_one_value_per_sample(name, count):
    logits, labels = draw((3, 2, 4), count)
    values = LOSSES[name](logits, labels)
    assert values.shape == (3,)
    assert values.dtype == jnp.float32
    order = jnp.asarray([2, 0, 1])
    np.testing.assert_allclose(EAGER[name](logits[order], labels[order]), values[order], rtol=1e-6)
    alone = jax.jit(jax.vmap(lambda z, y: LOSSES[name](z[None], y[None])[0]))(logits, labels)
    np.testing.assert_allclose(alone, values, rtol=1e-6)
    halves = logits.astype(jnp.bfloat16)
    assert LOSSES[name](halves, labels).dtype == jnp.float32
    np.testing.assert_array_equal(LOSSES[name](halves, labels), LOSSES[name](halves.astype(jnp.float32), labels))


@ALL
@pytest.mark.parametrize("count", [1, 3])
def test_derivatives(name, count):
    derivatives.check(LOSSES[name], count, scale=1.0)
    derivatives.check_extremes(LOSSES[name], draw, count)


def test_registered_and_errors():
    logits, labels = draw((2, 4), 3)
    for name in ("label_smoothing", "ecp", "svls"):
        assert losses.get(name) is getattr(smoothing, name)
        with pytest.raises(ValueError, match="need labels"):
            LOSSES[name](logits, labels[:1])
        with pytest.raises(ValueError, match="must be integers"):
            LOSSES[name](logits, labels.astype(jnp.float32))
    for value in (-0.1, 1.1):
        with pytest.raises(UsageError, match=f"smoothing in \\[0, 1\\], got {value}"):
            smoothing.label_smoothing(logits, labels, smoothing=value)
    with pytest.raises(UsageError, match="must be positive, got -1"):
        smoothing.svls(logits, labels, sigma=-1.0)
