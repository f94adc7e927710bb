"""The readings of CMP, and the experimental margin between probabilities."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calsegx.interfaces import UsageError
from calsegx.losses import confidence, cross_entropy


def problem(count: int, scale: float = 2.0):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(scale * rng.normal(size=(2, 5, 4, count)), jnp.float32)
    return logits, jnp.asarray(rng.integers(0, max(count, 2), size=(2, 5, 4)))


@pytest.mark.parametrize("count", [1, 4])
def test_formulas(count: int):
    logits, labels = problem(count)
    loss = np.asarray(cross_entropy.per_voxel(logits, labels), np.float64)
    wrong = 1 - np.exp(-loss)
    expected = {
        "sigmoid": 1 / (1 + np.exp(-(loss - 1.2) / 0.3)),
        "softplus": 0.3 * np.log1p(np.exp((loss - 1.2) / 0.3)),
        "focal": np.where(1 - wrong <= 0.3, wrong**3 * loss, 0),
    }
    for variant, values in expected.items():
        actual = confidence.cmp(
            logits, labels, threshold=1.2, temperature=0.3, variant=variant, confidence=0.3, gamma=3
        )
        np.testing.assert_allclose(actual, values.mean(axis=(1, 2)), rtol=2e-5)


def test_gradient_of_the_most_confident_errors():
    """By the logit: vanishing for ``sigmoid``, that of cross-entropy for the others."""
    labels = jnp.asarray([[1]])

    def slope_of(variant: str) -> float:
        gradient = jax.grad(lambda z: confidence.cmp(z, labels, variant=variant)[0])
        return gradient(jnp.full((1, 1, 1), -8.0)).item()

    gradients = {variant: slope_of(variant) for variant in confidence.VARIANTS}
    assert abs(gradients["sigmoid"]) < 1e-6
    np.testing.assert_allclose(gradients["softplus"], -1, rtol=1e-3)
    assert gradients["focal"] < -0.99
    # The derivative of the softplus reading by the loss is the value of Eq. 4.
    logits, labels = problem(1)
    slope = jax.grad(lambda shift: -confidence.cmp(logits, labels, threshold=shift, variant="softplus")[0])(0.9)
    np.testing.assert_allclose(slope, confidence.cmp(logits, labels, threshold=0.9)[0], rtol=1e-5)


@pytest.mark.parametrize("count", [1, 2])
def test_the_focal_mask_holds_the_boundary(count: int):
    logits, labels = jnp.zeros((1, 3, count)), jnp.asarray([[0, 1, 1]])
    np.testing.assert_allclose(
        confidence.cmp(logits, labels, variant="focal", confidence=0.5), 0.25 * math.log(2), rtol=1e-6
    )
    np.testing.assert_array_equal(confidence.cmp(logits, labels, variant="focal", confidence=0.499), 0)


@pytest.mark.parametrize("margin", [0.0, 0.3])
@pytest.mark.parametrize("count", [2, 4])
def test_probability_margin(count: int, margin: float):
    logits, labels = problem(count)
    ordered = np.sort(np.asarray(jax.nn.softmax(logits), np.float64), axis=-1)
    expected = np.maximum(ordered[..., -1] - ordered[..., -2] - margin, 0).mean(axis=(1, 2))
    np.testing.assert_allclose(confidence.probability_margin(logits, labels, margin=margin), expected, rtol=2e-5)
    np.testing.assert_array_equal(  # where all classes tie
        jax.grad(lambda z: confidence.probability_margin(z, labels, margin=margin).sum())(0 * logits), 0
    )


def test_probability_margin_of_one_logit_is_that_of_two():
    logits, labels = problem(1)
    two = jnp.concatenate([0 * logits, logits], axis=-1)
    np.testing.assert_allclose(
        confidence.probability_margin(logits, labels), confidence.probability_margin(two, labels), rtol=1e-5
    )
    gap = jax.grad(lambda z: confidence.probability_margin(z, labels, margin=0.0).sum())
    np.testing.assert_array_equal(gap(0 * logits), 0)


def test_bad_options():
    logits, labels = problem(1)
    with pytest.raises(UsageError, match="no variant 'hard'; use one of sigmoid, softplus, focal"):
        confidence.cmp(logits, labels, variant="hard")
    for options in ({"confidence": 1.0}, {"confidence": 0.0}, {"gamma": -1.0}):
        with pytest.raises(UsageError, match="confidence between 0 and 1 and gamma of at least 0"):
            confidence.cmp(logits, labels, variant="focal", **options)
    for margin in (-0.1, 1.1):
        with pytest.raises(UsageError, match="a margin from 0 to 1"):
            confidence.probability_margin(logits, labels, margin=margin)
