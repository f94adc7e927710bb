"""The contract of every registered loss: shapes, precision, derivatives to order 2, limits, errors."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calsegx import losses
from calsegx.interfaces import UsageError
from calsegx.losses import confidence, cross_entropy, overlap
from tests.losses import derivatives as differences

NAMES = ("bce", "ce", "cmp", "dice", "sam")
BOTH = [(name, count) for name in NAMES for count in (1, 3) if (name, count) != ("bce", 3)]


def sample(count: int, shape: tuple[int, ...], seed: int = 0, batch: int = 2):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(batch, *shape, count)).astype(np.float32)
    labels = rng.integers(0, max(count, 2), size=(batch, *shape)).astype(np.int32)
    return logits, labels


@functools.cache
def evaluate(name: str):
    return jax.jit(losses.get(name))


@functools.cache
def derivatives(name: str):
    """Value, gradient, and the gradient of the gradient's squared norm, as the Fisher penalty needs it."""

    def total(logits, labels):
        return jnp.sum(losses.get(name)(logits, labels))

    def penalty(logits, labels):
        gradient = jax.grad(total)(logits, labels)
        return jnp.sum(jnp.square(gradient)), gradient

    def everything(logits, labels):
        second, first = jax.grad(penalty, has_aux=True)(logits, labels)
        return losses.get(name)(logits, labels), first, second

    return jax.jit(everything)


def test_names():
    assert set(NAMES) <= set(losses.names())
    assert losses.get("dice") is overlap.dice
    with pytest.raises(UsageError, match="There is no loss named 'dise'.*Did you mean 'dice'"):
        losses.get("dise")


def test_options_are_checked():
    loss = losses.registry.bind("cmp", {"threshold": 1.0})
    logits, labels = sample(1, (3,))
    np.testing.assert_array_equal(loss(logits, labels), confidence.cmp(logits, labels, threshold=1.0))
    with pytest.raises(UsageError, match="'cmp' has no option 'tau'; it has: threshold, temperature"):
        losses.registry.bind("cmp", {"tau": 1.0})


def test_import_is_light():
    heavy = "{'flax', 'torch', 'nibabel'}"
    code = f"import sys; from calsegx import losses; losses.names(); print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("name", "count"), BOTH)
def test_one_value_per_sample_for_any_spatial_shape(name: str, count: int):
    flat_logits, flat_labels = sample(count, (12,))
    expected = evaluate(name)(flat_logits, flat_labels)
    assert expected.shape == (2,)
    assert expected.dtype == jnp.float32
    for shape in ((3, 4), (2, 3, 2)):
        value = evaluate(name)(flat_logits.reshape(2, *shape, count), flat_labels.reshape(2, *shape))
        np.testing.assert_allclose(value, expected, rtol=2e-6)
    # A sample's value does not depend on the others, nor on jit.
    alone = losses.get(name)(flat_logits[1:], flat_labels[1:])
    np.testing.assert_allclose(alone, expected[1:], rtol=2e-6)


@pytest.mark.parametrize(("name", "count"), BOTH)
def test_half_precision_logits_are_reduced_in_float32(name: str, count: int):
    logits, labels = sample(count, (12,))
    halves = logits.astype(jnp.bfloat16)
    value = evaluate(name)(halves, labels)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, evaluate(name)(halves.astype(jnp.float32), labels), rtol=1e-6)


@pytest.mark.parametrize(("name", "count"), BOTH)
@pytest.mark.parametrize("kind", ["zero", "high", "low", "mixed"])
def test_derivatives_are_finite(name: str, count: int, kind: str):
    logits, labels = sample(count, (3, 4))
    signs = {"zero": 0 * logits, "high": 0 * logits + 1, "low": 0 * logits - 1, "mixed": jnp.sign(logits)}
    logits = 1e4 * signs[kind]
    largest = max(count, 2) - 1
    for target in (labels, 0 * labels, 0 * labels + largest):  # all classes, one class only
        for array in derivatives(name)(logits, target):
            assert np.isfinite(array).all()


@pytest.mark.parametrize(("name", "count"), BOTH)
def test_single_pixel(name: str, count: int):
    logits, labels = sample(count, (1, 1), batch=4)
    for scale in (0, 1, 1e4):
        for array in derivatives(name)(scale * logits, labels):
            assert np.isfinite(array).all()


@pytest.mark.parametrize(("name", "count"), BOTH)
def test_gradients_to_second_order(name: str, count: int):
    rng = np.random.default_rng(3)
    logits, labels = rng.normal(size=(1, 4, count)), rng.integers(0, max(count, 2), size=(1, 4))
    differences.against_differences(lambda z: losses.get(name)(z, labels), logits)


@pytest.mark.parametrize("count", [1, 3])
def test_limits(count: int):
    _, labels = sample(count, (6,))
    right = jnp.where(labels > 0, 1, -1)[..., None] if count == 1 else 2 * jax.nn.one_hot(labels, 3) - 1
    for name in ("ce", "dice", "sam"):
        np.testing.assert_allclose(evaluate(name)(1e3 * right, labels), 0, atol=1e-5)
    np.testing.assert_allclose(evaluate("cmp")(1e3 * right, labels), 1 / 1025, rtol=1e-4)  # sigmoid(-10 log 2)
    np.testing.assert_allclose(evaluate("cmp")(-1e3 * right, labels), 1)
    uniform = jnp.zeros((2, 6, count))
    np.testing.assert_allclose(evaluate("ce")(uniform, labels), np.log(max(count, 2)), rtol=1e-6)
    if count == 1:
        np.testing.assert_allclose(evaluate("cmp")(uniform, labels), 0.5)  # log 2 is the boundary
        np.testing.assert_allclose(evaluate("dice")(-1e3 * right, labels), 1, atol=1e-4)


def test_closed_form_dice():
    probability = jnp.asarray([0.25, 0.5, 0.75])
    logits = jnp.log(probability / (1 - probability))[None, :, None]
    labels = jnp.asarray([[0, 1, 1]])
    np.testing.assert_allclose(overlap.dice(logits, labels, smooth=0.0), 1 - 2 * 1.25 / 3.5, rtol=1e-6)
    np.testing.assert_allclose(overlap.dice(logits, labels, smooth=0.0, squared=True), 1 - 2 * 1.25 / 2.875, rtol=1e-6)
    np.testing.assert_allclose(overlap.dice(logits, labels, smooth=0.0, jaccard=True), 1 - 1.25 / 2.25, rtol=1e-6)


def test_one_logit_is_a_softmax_over_zero_and_itself():
    logits, labels = sample(1, (8,))
    two = jnp.concatenate([jnp.zeros_like(logits), logits], axis=-1)
    np.testing.assert_allclose(cross_entropy.bce(logits, labels), cross_entropy.ce(two, labels), rtol=1e-6)
    np.testing.assert_array_equal(cross_entropy.bce(logits, labels), cross_entropy.ce(logits, labels))
    np.testing.assert_allclose(
        overlap.dice(logits, labels), overlap.dice(two, labels, include_background=False), rtol=1e-6
    )


def test_bad_arguments():
    logits, labels = sample(3, (4,))
    with pytest.raises(UsageError, match="'bce' needs one logit per voxel .* got 3; use 'ce'"):
        cross_entropy.bce(logits, labels)
    for name in ("ce", "dice", "sam", "cmp"):
        with pytest.raises(ValueError, match="need labels"):
            losses.get(name)(logits, labels[:1])
        with pytest.raises(ValueError, match="must be integers"):
            losses.get(name)(logits, labels.astype(jnp.float32))
