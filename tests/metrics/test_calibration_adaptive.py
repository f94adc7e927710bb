import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from calsegx.interfaces import InputError, UsageError
from calsegx.metrics import adaptive, calibration, parity


def sample(seed, voxels, classes=4, scale=3.0):
    rng = np.random.default_rng(seed)
    return special.softmax(scale * rng.normal(size=(voxels, classes)), axis=1), rng.integers(0, classes, voxels)


def literal_tace(probabilities, labels, threshold, ranges):
    total = 0.0
    for k in range(probabilities.shape[1]):
        pairs = sorted((p, y == k) for p, y in zip(probabilities[:, k], labels, strict=True) if p > threshold)
        for part in np.array_split(np.array(pairs, float).reshape(-1, 2), ranges):
            total += abs(part[:, 0].mean() - part[:, 1].mean()) if len(part) else 0.0
    return total / (probabilities.shape[1] * ranges)


@pytest.mark.parametrize(
    ("threshold", "ranges", "voxels"), [(1e-3, 15, 201), (0.0, 7, 50), (0.2, 15, 31), (0.999, 3, 9)]
)
def test_tace_literal(threshold, ranges, voxels):
    probabilities, labels = sample(0, voxels)
    got = adaptive.tace(probabilities, labels, threshold=threshold, ranges=ranges)
    assert got == pytest.approx(literal_tace(probabilities, labels, threshold, ranges), rel=1e-9, abs=1e-15)


def test_hand_computed():
    p, y = np.array([0.9, 0.1, 0.6, 0.3]), np.array([1, 0, 0, 1])
    # Ranges (.1, .3) with one hit of two and (.6, .9) with one of two.
    assert adaptive.ace_adaptive(p, y, ranges=2) == pytest.approx((0.3 + 0.25) / 2)
    assert adaptive.tace(p, y, threshold=0.2, ranges=2) == pytest.approx((0.05 + 0.1) / 2)
    # Confidences .6 (wrong), .7 (wrong), .9, .9 (right).
    assert adaptive.top_label_ace(p, y, ranges=2) == pytest.approx((1.3 + 0.2) / 4)


def test_ace_is_tace_without_a_threshold_and_equals_ece_in_one_range():
    probabilities, labels = sample(1, 300)
    assert adaptive.ace_adaptive(probabilities, labels) == adaptive.tace(probabilities, labels, threshold=0.0)
    one_bin = calibration.calibration_statistics(probabilities, labels, bins=1)
    assert adaptive.ace_adaptive(probabilities, labels, ranges=1) == pytest.approx(one_bin.cece())
    assert adaptive.top_label_ace(probabilities, labels, ranges=1) == pytest.approx(one_bin.ece())


@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.sampled_from([0.0, 1e-3, 0.3]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_streaming_stays_within_its_bound(seed, ranges, threshold, tied):
    probabilities, labels = sample(seed, 400, classes=3)
    if tied:  # float32 saturation and coarse scores
        probabilities = np.round(probabilities * 64) / 64
        probabilities[:, 0] = 1 - probabilities[:, 1:].sum(axis=1)
        probabilities = np.clip(probabilities, 0, 1)
    exact = adaptive.tace(probabilities, labels, threshold=threshold, ranges=ranges)
    streamed = adaptive.adaptive_statistics(probabilities, labels, threshold=threshold)
    assert abs(streamed.tace(ranges=ranges) - exact) <= streamed.error_bound(ranges=ranges) + 1e-12


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_streaming_is_close_for_many_voxels(scale):
    probabilities, labels = sample(2, 40_000, scale=scale)
    streamed = adaptive.adaptive_statistics(probabilities.astype(np.float32), labels)
    exact = adaptive.tace(probabilities.astype(np.float32), labels)
    assert abs(streamed.tace() - exact) < 1e-4
    assert streamed.error_bound() < 5e-3


def test_sub_bins_keep_the_order_and_the_width():
    scores = np.sort(np.concatenate([10.0 ** -np.linspace(0, 12, 3000), 1 - 10.0 ** -np.linspace(0, 12, 3000)]))
    for values in (scores, scores.astype(np.float32)):
        cell = adaptive._sub_bin(values)
        assert (np.diff(cell) >= 0).all() and cell[0] >= 0 and cell[-1] < adaptive.SUB_BINS
        values = values.astype(np.float64)
        for i in np.unique(cell):
            assert np.ptp(values[cell == i]) <= adaptive._width(np.array([i]))[0]


def test_merged_parts_equal_the_whole_exactly():
    rng = np.random.default_rng(3)
    p, y = rng.integers(0, 1025, 3000) / 1024, rng.integers(0, 2, 3000)
    whole = adaptive.adaptive_statistics(p, y)
    merged = adaptive.adaptive_statistics(p[:1000], y[:1000]).update(p[1000:], y[1000:])
    other = adaptive.adaptive_statistics(p[1000:], y[1000:]) + adaptive.adaptive_statistics(p[:1000], y[:1000])
    shuffled = rng.permutation(3000)
    for found in (merged, other, adaptive.adaptive_statistics(p[shuffled], y[shuffled])):
        assert found.voxels == 3000
        for name in ("count", "score_sum", "hit_sum"):
            np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))
        assert found.tace() == whole.tace()


def test_limits():
    for found in (adaptive.tace, adaptive.ace_adaptive, adaptive.top_label_ace, parity.nixon_tace):
        assert np.isnan(found(np.zeros((0, 3)), np.zeros(0, int)))
        assert found(np.eye(3)[[0, 1, 2, 0]], np.array([0, 1, 2, 0])) == 0.0
    nothing = adaptive.adaptive_statistics(np.zeros((0, 3)), np.zeros(0, int))
    assert np.isnan(nothing.tace()) and np.isnan(nothing.error_bound())
    # No score of the foreground is above the threshold.
    below = adaptive.adaptive_statistics(np.zeros(4), np.zeros(4, int))
    assert (below.tace(), below.error_bound()) == (0.0, 0.0)


def test_nixon_keeps_ties_together_and_equals_tace_where_ranges_are_even():
    probabilities, labels = sample(4, 300)
    got = parity.nixon_tace(probabilities, labels, ranges=15)
    assert got == pytest.approx(adaptive.ace_adaptive(probabilities, labels, ranges=15), rel=1e-12)
    constant, labels = np.full((10, 2), 0.5), np.repeat([0, 1], 5)
    assert parity.nixon_tace(constant, labels, ranges=2) == 0.0
    assert adaptive.ace_adaptive(constant, labels, ranges=2) == 0.5  # sorted labels: tied scores are cut by order
    assert adaptive.adaptive_statistics(constant, labels, threshold=0.0).tace(ranges=2) == 0.0


def test_calibrated_scores_have_small_errors():
    rng = np.random.default_rng(5)
    p = rng.beta(0.5, 0.5, 60_000)
    y = rng.random(60_000) < p
    assert adaptive.ace_adaptive(p, y) < 0.01
    assert adaptive.tace(p, y) < 0.01


def test_bad_input_is_refused():
    probabilities, labels = sample(6, 10)
    with pytest.raises(UsageError, match="at least 1"):
        adaptive.tace(probabilities, labels, ranges=0)
    with pytest.raises(InputError, match="do not fit"):
        adaptive.tace(probabilities[:5], labels)
    with pytest.raises(InputError, match="do not sum to 1"):
        adaptive.top_label_ace(probabilities / 2, labels)
    sums = adaptive.adaptive_statistics(probabilities, labels)
    with pytest.raises(UsageError, match="cannot be added"):
        sums + adaptive.adaptive_statistics(probabilities, labels, threshold=0.5)
    with pytest.raises(InputError, match="expected 4 classes"):
        sums.update(np.full((2, 2), 0.5), np.zeros(2, int))
