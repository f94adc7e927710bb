"""Sums of losses in one line: what they are worth, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calsegx import losses
from calsegx.interfaces import UsageError
from calsegx.losses import expression


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    return rng.normal(size=(3, 6, 5, 4)).astype(np.float32), rng.integers(0, 4, (3, 6, 5), dtype=np.int32)


def outside(logits, labels, *, scale=1.0):
    return scale * jnp.mean(logits, axis=(1, 2, 3))


def test_a_sum_is_the_sum_of_its_terms(problem):
    loss = expression.parse("sam + 0.5*cmp + 0.1*mbls_penalty(margin=5)")
    bound = losses.registry.bind("mbls_penalty", {"margin": 5})
    expected = losses.get("sam")(*problem) + 0.5 * losses.get("cmp")(*problem) + 0.1 * bound(*problem)
    np.testing.assert_allclose(jax.jit(loss)(*problem), expected, rtol=1e-6)
    assert loss(*problem).shape == (3,)


def test_options_are_numbers_words_and_truth_values(problem):
    loss = expression.parse("dice(include_background=False) + mbls(distance=l2, weight=0.2, dice=True)")
    first = losses.registry.bind("dice", {"include_background": False})
    second = losses.registry.bind("mbls", {"distance": "l2", "weight": 0.2, "dice": True})
    np.testing.assert_allclose(loss(*problem), first(*problem) + second(*problem), rtol=1e-6)


def test_code_from_outside_the_tree(problem):
    loss = expression.parse("ce + 2*tests.losses.test_expression:outside(scale=3)")
    np.testing.assert_allclose(
        loss(*problem), losses.get("ce")(*problem) + 6 * jnp.mean(problem[0], axis=(1, 2, 3)), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("weight", "values"),  # at 0, 1/4, 1/2 and all of the run
    [
        ("0.3", [0.3, 0.3, 0.3, 0.3]),
        ("linear(0, 0.1)", [0.0, 0.025, 0.05, 0.1]),
        ("linear(0.2, 0, 0.5)", [0.2, 0.1, 0.0, 0.0]),
        ("linear(start=0, end=1, until=1/2)", [0.0, 0.5, 1.0, 1.0]),
        ("cosine(0.2, 0)", [0.2, 0.1 + 0.1 * np.cos(np.pi / 4), 0.1, 0.0]),
        ("step(0.1, 10, 1/2)", [0.1, 0.1, 1.0, 10.0]),
    ],
)
def test_weights_follow_the_run(weight, values, problem):
    loss = jax.jit(expression.parse(f"{weight}*ce"))
    single = losses.get("ce")(*problem)
    for progress, value in zip((0.0, 0.25, 0.5, 1.0), values, strict=True):
        np.testing.assert_allclose(loss(*problem, jnp.float32(progress)), value * single, rtol=1e-5, atol=1e-7)


def test_pairs_are_announced():
    assert expression.parse("ce + 0.5*bwcr").paired and not expression.parse("sam").paired


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("sam +", "cannot be read"),
        ("sam - cmp", "a part that is no weighted loss, 'sam - cmp'"),
        ("sam + 0.5", "a part that is no weighted loss, '0.5'"),
        ("dicee", "There is no loss named 'dicee'.*Did you mean 'dice'"),
        ("mbls(margn=5)", "has no option 'margn'"),
        ("mbls(5)", "an option without its name"),
        ("mbls(margin=__import__('os'))", r"option value \"__import__\('os'\)\""),
        ("-1*ce", "weights must be at least 0"),
        ("ce*2", "where a number or a schedule"),
        ("ramp(0, 1)*ce", r"'ramp\(0, 1\)' where a number or a schedule \(linear, cosine, step\) belongs"),
        ("linear(0)*ce", "a schedule with other arguments"),
        ("linear(0, 1, 2)*ce", "over 2.0 of the run"),
        ("step(0, 1, 0)*ce", "over 0.0 of the run"),
        ("1e400*ce", "where a number"),
        ("linear(0, 0.1, until=0)*ce", "over 0.0 of the run"),
        ("linear(-1, 0.1)*ce", "a schedule with start=-1.0; weights must be at least 0"),
        ("mbls(margin=abc)", r"mbls\(margin='abc'\); margin must be a number of at least 0"),
        ("mbls(margin=True)", "margin must be a number"),
        ("mbls(weight=1e400)", "weight must be a number"),
        ("cmp(temperature=0)", "temperature must be a number above 0"),
        ("dice(include_background=no)", "include_background must be True or False"),
        ("mbls(distance=2)", "distance must be a word"),
        ("nosuchmodule:loss", "cannot be loaded"),
    ],
)
def test_what_cannot_be_read_is_refused_with_a_reason(text, message):
    with pytest.raises(UsageError, match=message):
        expression.parse(text)
