import dataclasses
import math

import numpy as np
import pytest
from scipy import special

from calsegx.interfaces import InputError, UsageError
from calsegx.metrics import calibration
from tests.metrics import golden


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


@pytest.mark.parametrize("name", golden.names("_b15_orig", "_b10_orig"))
def test_ece_and_mce_golden(name):
    inputs, hparams, outputs = golden.cases()[name]
    sums = calibration.calibration_statistics(*golden.multiclass(inputs, hparams["region"]), bins=hparams["n_bins"])
    assert sums.ece() == pytest.approx(float(outputs["ece"]), rel=1e-9)
    assert sums.mce() == pytest.approx(float(outputs["dict_mce"]), rel=1e-9)


@pytest.mark.parametrize("name", golden.names("_b15_reliability"))
def test_reliability_curve_golden(name):
    inputs, hparams, outputs = golden.cases()[name]
    sums = calibration.calibration_statistics(*golden.multiclass(inputs, hparams["region"]))
    curve = sums.reliability_curve()
    np.testing.assert_array_equal(curve.count, outputs["bin_count"])
    np.testing.assert_array_equal(np.isnan(curve.confidence), curve.count == 0)
    # The original stores 0 for an empty bin.
    np.testing.assert_allclose(np.nan_to_num(curve.confidence), outputs["bin_conf"], rtol=1e-9)
    np.testing.assert_allclose(np.nan_to_num(curve.accuracy), outputs["bin_acc"], rtol=1e-9)


@pytest.mark.parametrize("name", golden.names("_scores"))
def test_brier_and_nll_golden(name):
    inputs, hparams, outputs = golden.cases()[name]
    sums = calibration.calibration_statistics(*golden.multiclass(inputs, hparams["region"]))
    assert sums.brier() == pytest.approx(float(outputs["brier_sum"]), rel=1e-9)
    assert sums.nll() == pytest.approx(float(outputs["nll"]), rel=1e-9)


@pytest.mark.parametrize("kind", ["equal", "sat_right", "sat_wrong", "allfg1", "allbg"])
def test_ece_degenerate_golden(kind):
    inputs, _, outputs = golden.cases()[f"dg_{kind}_all"]
    sums = calibration.calibration_statistics(*golden.multiclass(inputs))
    assert sums.ece() == pytest.approx(float(outputs["ece"]), rel=1e-9, abs=1e-12)
    assert np.isfinite(sums.nll())


def test_saturated_confidence_shares_the_last_bin():
    inputs, _, outputs = golden.cases()["saturated_split"]
    probabilities = special.softmax(inputs["logits"], axis=1)
    sums = calibration.calibration_statistics(probabilities, inputs["labels"])
    assert sums.ece() == pytest.approx(float(outputs["ece_rightclosed"]), rel=1e-9)


@pytest.mark.parametrize("bins", [5, 10])
def test_bin_edges_golden(bins):
    inputs, _, outputs = golden.cases()["edges_binary"]
    sums = calibration.calibration_statistics(inputs["p"], inputs["y"], bins=bins, score="foreground")
    np.testing.assert_array_equal(sums.count, outputs[f"ref_count_rightclosed_b{bins}"])
    assert sums.ece() == pytest.approx(float(outputs[f"ref_ece_pos_rightclosed_b{bins}"]), rel=1e-9)


@pytest.mark.parametrize("bins", [15, 10])
def test_binary_golden(bins):
    inputs, _, outputs = golden.cases()["binary_calibration"]
    p, y = special.expit(inputs["logits"]).ravel(), inputs["labels"].ravel()
    top = calibration.calibration_statistics(p, y, bins=bins)
    foreground = calibration.calibration_statistics(p, y, bins=bins, score="foreground")
    true_only = calibration.calibration_statistics(p[y == 1], y[y == 1], bins=bins)
    assert top.ece() == pytest.approx(float(outputs[f"ece_top_b{bins}"]), rel=1e-9)
    assert true_only.ece() == pytest.approx(float(outputs[f"ece_top_fg_b{bins}"]), rel=1e-9)
    assert foreground.ece() == pytest.approx(float(outputs[f"ece_pos_tm_b{bins}"]), rel=1e-5)
    for sums in (top, foreground):
        assert sums.brier() == pytest.approx(float(outputs["brier"]), rel=1e-9)
        assert sums.nll() == pytest.approx(float(outputs["nll"]), rel=1e-9)


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
    np.testing.assert_array_equal(binary.correct_sum, softmax.correct_sum)
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


@pytest.mark.parametrize("score", calibration.SCORES)
def test_merge_equals_whole_exactly(score):
    # Multiples of 2^-10 add without rounding, so any difference would be a fault of the sums.
    rng = np.random.default_rng(7)
    p, y = rng.integers(0, 1025, 3000) / 1024, rng.integers(0, 2, 3000)
    whole = calibration.calibration_statistics(p, y, score=score)
    parts = [
        calibration.calibration_statistics(p[part], y[part], score=score)
        for part in (slice(0, 0), slice(0, 1000), slice(1000, 1001), slice(1001, None))
    ]
    for merged in (sum(parts[1:], parts[0]), sum(parts[-2::-1], parts[-1])):
        for field in dataclasses.fields(whole):
            if field.name != "nll_sum":
                np.testing.assert_array_equal(getattr(merged, field.name), getattr(whole, field.name))
        assert (merged.ece(), merged.mce(), merged.brier()) == (whole.ece(), whole.mce(), whole.brier())
        assert merged.nll() == pytest.approx(whole.nll(), rel=1e-14)


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
        assert all(math.isnan(v) for v in (sums.ece(), sums.mce(), sums.brier(), sums.nll()))
        assert np.isnan(sums.reliability_curve().accuracy).all()


def test_saturated_wrong_voxel_has_finite_nll():
    sums = calibration.calibration_statistics(np.array([1.0, 0.0], np.float32), np.array([0, 1]))
    assert sums.nll() == pytest.approx(24 * math.log(2))
    assert sums.brier() == 1.0 and sums.ece() == 1.0


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
