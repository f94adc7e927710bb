import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from calsegx.interfaces import InputError, UsageError
from calsegx.metrics import binning, calibration


def literal_bins(confidences, corrects, bins):
    """Lists of (confidence, correct) per right-closed bin, 0 in the first."""
    edges = np.linspace(0, 1, bins + 1).tolist()
    members = [[] for _ in range(bins)]
    for confidence, correct in zip(confidences, corrects, strict=True):
        for i in range(bins):
            if edges[i] < confidence <= edges[i + 1] or (i == 0 and confidence == 0):
                members[i].append((confidence, correct))
    return members


def literal_scores(probabilities, labels, bins):
    confidences, corrects, brier, nll = [], [], 0.0, 0.0
    for row, label in zip(probabilities.tolist(), labels.tolist(), strict=True):
        confidences.append(max(row))
        corrects.append(row.index(max(row)) == label)
        brier += sum((p - (k == label)) ** 2 for k, p in enumerate(row))
        nll -= math.log(row[label])
    total = len(confidences)
    gaps = [
        (len(m) / total, abs(sum(c for c, _ in m) - sum(a for _, a in m)) / len(m))
        for m in literal_bins(confidences, corrects, bins)
        if m
    ]
    return sum(w * g for w, g in gaps), max(g for _, g in gaps), brier / total, nll / total


def random_softmax(rng, voxels, classes, scale=2.0):
    return special.softmax(rng.normal(size=(voxels, classes)) * scale, axis=1)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("bins", [1, 7, 15])
def test_softmax_literal(classes, bins):
    rng = np.random.default_rng(4)
    probabilities, labels = random_softmax(rng, 300, classes), rng.integers(0, classes, 300)
    sums = calibration.calibration_statistics(probabilities, labels, bins=bins)
    got = (sums.ece(), sums.mce(), sums.brier(), sums.nll())
    assert got == pytest.approx(literal_scores(probabilities, labels, bins), rel=1e-12)


def test_binary_equals_two_class_softmax():
    rng = np.random.default_rng(5)
    p, y = rng.random(400), rng.integers(0, 2, 400)
    p[:3], y[:3] = 0.5, 0  # ties: the lowest class wins, so all three are correct
    binary = calibration.calibration_statistics(p, y)
    softmax = calibration.calibration_statistics(np.stack([1 - p, p], axis=1), y)
    np.testing.assert_array_equal(binary.count, softmax.count)
    np.testing.assert_array_equal(binary.top_label.hit_sum, softmax.top_label.hit_sum)
    assert binary.nll() == pytest.approx(softmax.nll())
    assert 2 * binary.brier() == pytest.approx(softmax.brier())


def test_foreground_reliability_literal():
    rng = np.random.default_rng(6)
    p, y = rng.random(500), rng.integers(0, 2, 500).astype(bool)
    p[:3] = (0.0, 1.0, 0.2)
    curve = calibration.calibration_statistics(p, y, bins=5, score="foreground").reliability_curve()
    for i, members in enumerate(literal_bins(p.tolist(), y.tolist(), 5)):
        assert curve.count[i] == len(members)
        assert curve.confidence[i] == pytest.approx(sum(c for c, _ in members) / len(members))
        assert curve.accuracy[i] == pytest.approx(sum(a for _, a in members) / len(members))


def assert_equal(got, want, *, exact):
    """Equal counts, and equal float sums: ``exact`` or up to rounding."""
    for bins, others in ((got.top_label, want.top_label), (got.classes, want.classes)):
        for a, b in zip(bins, others, strict=True):
            np.testing.assert_allclose(a, b, rtol=0 if exact or a.dtype == np.int64 else 1e-12)
    np.testing.assert_array_equal(got.label_count, want.label_count)
    np.testing.assert_allclose(got.brier_sum, want.brier_sum, rtol=0 if exact else 1e-12)
    assert got.nll_sum == pytest.approx(want.nll_sum, rel=1e-12)


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 400), max_size=3), st.sampled_from(["right", "left"]))
@settings(max_examples=25, deadline=None)
def test_merged_parts_equal_the_whole_exactly(seed, cuts, binning):
    # Multiples of 2^-10 add without rounding, so any difference would be a fault of the sums.
    rng = np.random.default_rng(seed)
    p, y = rng.integers(0, 1025, 400) / 1024, rng.integers(0, 2, 400)
    whole = calibration.calibration_statistics(p, y, binning=binning)
    borders = [0, *sorted(cuts), 400]
    parts = [
        calibration.calibration_statistics(p[a:b], y[a:b], binning=binning)
        for a, b in zip(borders, borders[1:], strict=False)
    ]
    assert_equal(sum(parts[1:], parts[0]), whole, exact=True)
    assert_equal(parts[0].merge(sum(parts[-2::-1], parts[-1])), whole + parts[0], exact=True)
    shuffled = rng.permutation(400)
    assert_equal(calibration.calibration_statistics(p[shuffled], y[shuffled], binning=binning), whole, exact=True)


@pytest.mark.parametrize("classes", [None, 3])
def test_chunks_do_not_change_the_statistics(monkeypatch, classes):
    rng = np.random.default_rng(7)
    p = rng.random(1000) if classes is None else random_softmax(rng, 1000, classes)
    y = rng.integers(0, classes or 2, 1000)
    whole = calibration.calibration_statistics(p, y)
    streamed = calibration.empty(classes)
    for start in range(0, 1000, 300):
        streamed = streamed.update(p[start : start + 300], y[start : start + 300])
    assert_equal(streamed, whole, exact=False)
    monkeypatch.setattr(binning.chunks, "__kwdefaults__", {"size": 64})
    assert_equal(calibration.calibration_statistics(p, y), whole, exact=False)


def test_memory_does_not_grow_with_the_voxels():
    def peak(voxels):
        p, y = np.full((voxels, 4), 0.25, np.float32), np.zeros(voxels, np.uint8)
        tracemalloc.start()
        calibration.calibration_statistics(p, y)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(4 * binning.CHUNK) < 1.1 * peak(2 * binning.CHUNK)


def test_precisions_agree():
    rng = np.random.default_rng(9)
    p, y = random_softmax(rng, 5000, 4).astype(np.float32), rng.integers(0, 4, 5000)
    single, double = (calibration.calibration_statistics(p.astype(t), y) for t in (np.float32, np.float64))
    np.testing.assert_array_equal(single.classes.count, double.classes.count)
    np.testing.assert_allclose(single.brier_sum, double.brier_sum, rtol=1e-7)
    assert single.nll() == pytest.approx(double.nll(), rel=1e-7)
    half = calibration.calibration_statistics(p.astype(np.float16), y)
    assert half.ece() == calibration.calibration_statistics(p.astype(np.float16).astype(np.float32), y).ece()


@pytest.mark.parametrize("bins", [1, 5, 10, 15, 49, 98])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scores_on_edges_and_beside_them(bins, dtype):
    edges = binning.edges(bins, "right")
    np.testing.assert_allclose(edges, np.linspace(0, 1, bins + 1), rtol=0, atol=2e-16)
    near = edges.astype(dtype)
    p = np.clip(np.concatenate([near, np.nextafter(near, dtype(0)), np.nextafter(near, dtype(1))]), 0, 1)
    right, left = binning.slots(p, bins, "right"), binning.slots(p, bins, "left")
    for score, slot, other in zip(p.astype(np.float64), right, left, strict=True):
        assert slot == (score > edges).sum()
        assert other == (score >= edges).sum() - 1


def test_binnings_differ_in_where_the_edges_go():
    p, y = np.array([0.0, 0.25, 0.5, 1.0, 1.0]), np.array([0, 1, 0, 1, 1])
    counts = {
        name: calibration.calibration_statistics(p, y, bins=4, score="foreground", binning=name).count.tolist()
        for name in binning.BINNINGS
    }
    assert counts == {"right": [2, 1, 0, 2], "left": [1, 1, 1, 2], "torchmetrics": [1, 1, 1, 0, 2]}
    dropped = calibration.calibration_statistics(p, y, bins=4, score="foreground", above=0.0)
    assert dropped.count.tolist() == [1, 1, 0, 2]
    assert dropped.voxels == 5


def test_hand_computed():
    # Two bins: (0, .5] holds .25 (miss), (.5, 1] holds .75 (miss) and 1 (hit).
    p, y = np.array([0.25, 0.75, 1.0]), np.array([0, 0, 1])
    sums = calibration.calibration_statistics(p, y, bins=2, score="foreground")
    assert sums.ece() == pytest.approx((0.25 + 0.75) / 3)
    assert sums.mce() == pytest.approx(0.375)
    assert sums.ace_nonempty() == pytest.approx((0.25 + 0.375) / 2)
    assert sums.rmsce() == pytest.approx(math.sqrt(0.25**2 / 3 + 2 * 0.375**2 / 3))
    assert sums.brier() == pytest.approx((0.25**2 + 0.75**2) / 3)
    # Of the top label: confidences .75 (right), .75 (wrong), 1 (right).
    assert sums.brier("top_label") == pytest.approx((0.25**2 + 0.75**2) / 3)
    assert sums.brier("sum") == pytest.approx(2 * (0.25**2 + 0.75**2) / 3)
    assert sums.nll() == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 3)


def test_pooled_is_not_the_mean_over_cases():
    over = calibration.calibration_statistics(np.full(100, 0.9), np.repeat([0, 1], [30, 70]))
    under = calibration.calibration_statistics(np.full(300, 0.9), np.repeat([0, 1], [10, 290]))
    assert over.ece() == pytest.approx(0.2)
    assert under.ece() == pytest.approx(290 / 300 - 0.9)
    assert (over + under).ece() == pytest.approx(0.0, abs=1e-12)


def test_no_voxels_is_nan_with_count_zero():
    for probabilities in (np.zeros(0), np.zeros((0, 3))):
        sums = calibration.calibration_statistics(probabilities, np.zeros(0, int))
        assert sums.voxels == 0 and sums.count.sum() == 0
        errors = (sums.ece(), sums.mce(), sums.rmsce(), sums.ace_nonempty(), sums.cece(), sums.cece(classes="present"))
        assert all(math.isnan(v) for v in (*errors, sums.brier(), sums.brier("top_label"), sums.nll()))
        assert np.isnan(sums.reliability_curve().accuracy).all()


def test_saturated_wrong_voxel_has_finite_nll():
    sums = calibration.calibration_statistics(np.array([1.0, 0.0], np.float32), np.array([0, 1]))
    assert sums.nll() == pytest.approx(24 * math.log(2))
    assert sums.brier() == 1.0 and sums.ece() == 1.0
    exact = calibration.calibration_statistics(np.array([1e-12, 1 - 1e-12]), np.array([1, 0]))
    assert exact.nll() == pytest.approx(12 * math.log(10))


def test_calibrated_samples_have_small_ece_and_nll_equal_to_entropy():
    rng = np.random.default_rng(8)
    probabilities = random_softmax(rng, 60_000, 3)
    labels = (rng.random((60_000, 1)) > probabilities.cumsum(axis=1)[:, :2]).sum(axis=1)
    sums = calibration.calibration_statistics(probabilities, labels)
    assert sums.ece() < 0.01
    assert sums.nll() == pytest.approx(special.entr(probabilities).sum(axis=1).mean(), rel=0.02)


def test_rounding_outside_the_range_is_tolerated():
    sums = calibration.calibration_statistics(np.array([1.000001, -1e-7]), np.array([1, 0]))
    assert sums.nll() == 0.0 and sums.ece() == 0.0


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        (np.array([0.5, np.nan]), np.array([0, 1]), "without NaN"),
        (np.array([0.5, 1.2]), np.array([0, 1]), "apply the sigmoid"),
        (np.array([0.5, 0.2]), np.array([0, 2]), r"expected 0\.\.1"),
        (np.array([0.5, 0.2]), np.array([0.0, 1.0]), "expected integers"),
        (np.array([0.5, 0.2]), np.array([0]), "do not fit"),
        (np.full((2, 1), 0.5), np.array([0, 1]), "do not fit"),
        (np.full((2, 2, 2), 0.5), np.zeros((2, 2), int), "do not fit"),
        (np.full((2, 3), 0.5), np.array([0, 1]), "do not sum to 1"),
    ],
)
def test_bad_input_is_refused(probabilities, labels, message):
    with pytest.raises(InputError, match=message):
        calibration.calibration_statistics(probabilities, labels)


def test_bad_options_are_refused():
    p, y = np.array([0.5]), np.array([1])
    with pytest.raises(UsageError, match="not one of top_label, foreground"):
        calibration.calibration_statistics(p, y, score="top")
    with pytest.raises(UsageError, match="at least 1"):
        calibration.calibration_statistics(p, y, bins=0)
    with pytest.raises(InputError, match="one foreground probability"):
        calibration.calibration_statistics(np.array([[0.5, 0.5]]), y, score="foreground")
    with pytest.raises(UsageError, match="cannot be added"):
        calibration.calibration_statistics(p, y) + calibration.calibration_statistics(p, y, bins=10)
    with pytest.raises(UsageError, match="cannot be added"):
        calibration.calibration_statistics(p, y) + calibration.calibration_statistics(p, y, score="foreground")
    with pytest.raises(UsageError, match="not one of right"):
        calibration.calibration_statistics(p, y, binning="middle")
    with pytest.raises(UsageError, match="not one of sum, mean, top_label"):
        calibration.calibration_statistics(p, y).brier("mse")
    with pytest.raises(InputError, match="expected those of 3 classes"):
        calibration.empty(3).update(p, y)
