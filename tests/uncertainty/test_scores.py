"""Otsu's threshold, the uncertain area and its error as a prediction of quality."""

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import numpy as np
import pytest

from calsegx.interfaces import InputError
from calsegx.uncertainty import scores


def separation(values, threshold):
    """Between-class variance of the values themselves, for a threshold."""
    low, high = values[values <= threshold], values[values > threshold]
    return low.size * high.size * (low.mean() - high.mean()) ** 2 if low.size and high.size else 0.0


def test_two_groups_are_told_apart():
    rng = np.random.default_rng(0)
    image = np.concatenate([rng.normal(0.1, 0.02, 300), rng.normal(0.8, 0.05, 100)]).reshape(20, 20)
    assert 0.1 < scores.otsu_threshold(image) < 0.8
    np.testing.assert_allclose(scores.uncertain_area(image), 0.25, atol=0.01)


@pytest.mark.parametrize("seed", range(4))
def test_no_threshold_separates_better(seed):
    values = np.random.default_rng(seed).gamma(1.5, size=400)
    found = separation(values, scores.otsu_threshold(values, bins=4096))
    best = max(separation(values, t) for t in values)
    assert found > 0.999 * best


def test_first_of_equal_thresholds():
    # Every threshold between the two values separates equally well.
    image = np.repeat([0.1, 0.9], [5, 3])
    np.testing.assert_allclose(scores.otsu_threshold(image), 0.1 + 0.8 / 512, rtol=1e-12)
    np.testing.assert_allclose(scores.otsu_threshold(image, bins=4), 0.2, rtol=1e-12)
    assert scores.uncertain_area(image) == 3 / 8


@pytest.mark.parametrize("value", [0.0, 0.37, -2.0, 1e-300, 1e300])
def test_constant_map(value):
    image = np.full((6, 6), value)
    assert scores.otsu_threshold(image) == value
    assert scores.uncertain_area(image) == 0


def test_constant_up_to_rounding():
    image = np.full((6, 6), 0.37)
    image[0, 0] = np.nextafter(0.37, 1)  # too little for a histogram of 256 bins
    assert scores.uncertain_area(image) == 0
    assert scores.uncertain_area(np.full((2, 2), 0.1, np.float32)) == 0


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(
    hypothesis.extra.numpy.arrays(np.float32, (3, 4), elements=st.floats(0, 1, width=32)), st.sampled_from([0.25, 4.0])
)
def test_scale_free_and_within_the_range(image, factor):
    threshold, area = scores.otsu_threshold(image), scores.uncertain_area(image)
    assert image.min() <= threshold <= image.max()
    assert 0 <= area < 1
    assert scores.uncertain_area(factor * image.astype(np.float64)) == area
    assert scores.uncertain_area(image.reshape(-1)[::-1]) == area


def test_quality_error():
    np.testing.assert_allclose(scores.quality_error([0.2, 0.5], [0.1, 0.8]), 0.05)
    assert scores.quality_error([0.2], [0.2]) == 0


def test_errors():
    for image in (np.asarray([0.1, np.nan]), np.asarray([0.1, np.inf])):
        with pytest.raises(InputError, match="got 2 values, 1 of them not finite"):
            scores.uncertain_area(image)
    with pytest.raises(InputError, match="got 0 values"):
        scores.otsu_threshold(np.zeros((0, 3)))
    with pytest.raises(InputError, match="and 1 bins"):
        scores.otsu_threshold(np.arange(3), bins=1)
    with pytest.raises(InputError, match=r"got shapes \(2,\) and \(1,\)"):
        scores.quality_error([0.1, 0.2], [0.1])
    with pytest.raises(InputError, match="two empty masks"):
        scores.quality_error([0.1, 0.2], [0.1, np.nan])
    with pytest.raises(InputError, match="two empty masks"):
        scores.quality_error([], [])
