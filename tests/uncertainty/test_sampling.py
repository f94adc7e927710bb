"""Statistics over several predictions of one image."""

import numpy as np
import pytest
import scipy.stats

from calsegx.interfaces import InputError
from calsegx.uncertainty import sampling


def passes(count=5, classes=3, seed=0, shape=(2, 3, 4)):
    rng = np.random.default_rng(seed)
    if classes == 1:
        return rng.uniform(size=(count, *shape, 1))
    return rng.dirichlet(np.ones(classes), size=(count, *shape))


@pytest.mark.parametrize("classes", [1, 3])
def test_against_the_formulas(classes):
    stack = passes(classes=classes)
    found = sampling.statistics(stack)
    np.testing.assert_allclose(found.mean, stack.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.variance, stack.var(axis=0, ddof=1).mean(axis=-1), rtol=1e-12)
    complete = np.concatenate([1 - stack, stack], axis=-1) if classes == 1 else stack
    entropy = scipy.stats.entropy(complete.mean(axis=0), axis=-1)
    np.testing.assert_allclose(found.entropy, entropy, rtol=1e-12)
    information = entropy - scipy.stats.entropy(complete, axis=-1).mean(axis=0)
    np.testing.assert_allclose(found.mutual_information, information, rtol=1e-9)
    # One foreground probability and its two classes say the same.
    if classes == 1:
        both = sampling.statistics(complete)
        np.testing.assert_allclose(both.mutual_information, found.mutual_information, rtol=1e-12)
        np.testing.assert_allclose(both.variance, found.variance, rtol=1e-12)


def test_passes_may_come_one_by_one_in_any_order():
    stack = passes(count=7)
    whole = sampling.statistics(stack)
    for one, other in zip(sampling.statistics(iter(stack[::-1])), whole, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9)


def test_samples_stay_apart():
    stack = passes()
    alone = sampling.statistics(stack[:, :1])
    np.testing.assert_array_equal(alone.variance, sampling.statistics(stack).variance[:1])


def test_limits():
    agreed = np.repeat(passes(count=1), 4, axis=0)
    found = sampling.statistics(agreed)
    np.testing.assert_allclose(found.variance, 0, atol=1e-30)
    np.testing.assert_allclose(found.mutual_information, 0, atol=1e-15)
    assert (found.mutual_information >= 0).all()
    sure = np.stack([np.eye(2)[[0]], np.eye(2)[[1]]])  # certain, and contradicting each other
    found = sampling.statistics(sure)
    np.testing.assert_allclose(found.entropy, np.log(2))
    np.testing.assert_allclose(found.mutual_information, np.log(2))
    np.testing.assert_allclose(found.variance, 0.5)


def test_precision():
    assert {a.dtype for a in sampling.statistics(passes().astype(np.float16))} == {np.dtype(np.float32)}
    # A small spread about a large mean survives single precision.
    stack = (0.9 + 1e-4 * passes(count=50, classes=1)).astype(np.float32)
    exact = stack.astype(np.float64).var(axis=0, ddof=1)[..., 0]
    np.testing.assert_allclose(sampling.statistics(stack).variance, exact, rtol=1e-2)


def test_errors():
    with pytest.raises(InputError, match="at least two, got 1"):
        sampling.statistics(passes(count=1))
    with pytest.raises(InputError, match="at least two, got 0"):
        sampling.statistics([])
    with pytest.raises(InputError, match=r"Pass 1 has the shape \(2, 3, 4, 3\), those before \(1, 3, 4, 3\)"):
        sampling.statistics([passes()[0, :1], passes()[0]])
    for wrong in (1.5, -0.1, np.nan):
        with pytest.raises(InputError, match="Pass 0 holds values outside"):
            sampling.statistics(np.full((2, 3, 1), wrong))
