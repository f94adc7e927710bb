import numpy as np
import pytest
from scipy import special

from calsegx.interfaces import InputError, UsageError
from calsegx.metrics import calibration, parity


@pytest.fixture(scope="module")
def case():
    """Three of four classes occur; one probability is exactly 0."""
    rng = np.random.default_rng(0)
    probabilities = special.softmax(3 * rng.normal(size=(500, 4)), axis=1)
    probabilities[0] = (0.0, 0.5, 0.25, 0.25)
    return probabilities, rng.integers(0, 3, 500)


def literal_class_ece(scores, hits, bins, lowest, weights):
    total = 0.0
    for i in range(bins):
        lower = i / bins if i else -1  # 0 belongs to the first bin
        inside = [j for j in range(len(scores)) if lower < scores[j] <= (i + 1) / bins and scores[j] > lowest]
        total += abs(sum(hits[j] - scores[j] for j in inside))
    return total / (len(scores) if weights == "voxels" else sum(s > lowest for s in scores))


def test_cece_literal(case):
    probabilities, labels = case
    each = [literal_class_ece(probabilities[:, k], labels == k, 15, -1, "voxels") for k in range(4)]
    sums = calibration.calibration_statistics(probabilities, labels)
    np.testing.assert_allclose(sums.class_ece(), each, rtol=1e-9)
    dropped = calibration.calibration_statistics(probabilities, labels, above=0.0)
    each = [literal_class_ece(probabilities[:, k], labels == k, 15, 0, "voxels") for k in range(4)]
    np.testing.assert_allclose(dropped.class_ece(), each, rtol=1e-9)
    assert dropped.cece() == pytest.approx(np.mean(each))
    assert dropped.cece(reduction="sum") == pytest.approx(np.sum(each))
    assert dropped.cece(classes="foreground") == pytest.approx(np.mean(each[1:]))
    assert dropped.cece(classes="present") == pytest.approx(np.mean(each[:3]))


def test_equal_width_tace_literal(case):
    probabilities, labels = case
    sums = calibration.calibration_statistics(probabilities, labels, above=0.05)
    each = [literal_class_ece(probabilities[:, k], labels == k, 15, 0.05, "survivors") for k in range(4)]
    assert sums.tace_equalwidth() == pytest.approx(np.mean(each))
    assert sums.tace_equalwidth(classes="present") == pytest.approx(np.mean(each[:3]))


def test_binary_cece_has_two_classes():
    p, y = np.array([0.9, 0.2, 0.7]), np.array([1, 0, 0])
    sums = calibration.calibration_statistics(p, y)
    foreground = calibration.calibration_statistics(p, y, score="foreground")
    assert sums.class_ece()[1] == pytest.approx(foreground.ece())
    assert sums.cece() == pytest.approx(sums.class_ece().mean())


def test_class_curves_and_errors_are_those_of_each_class(case):
    probabilities, labels = case
    sums = calibration.calibration_statistics(probabilities, labels)
    curves = sums.class_reliability_curves()
    for k in range(4):
        alone = calibration.calibration_statistics(probabilities[:, k], labels == k, score="foreground")
        np.testing.assert_array_equal(curves.count[k], alone.count)
        np.testing.assert_allclose(curves.accuracy[k], alone.reliability_curve().accuracy)
        assert sums.class_ece()[k] == pytest.approx(alone.ece())
        assert sums.classes.maximum()[k] == pytest.approx(alone.mce())
        assert sums.classes.average()[k] == pytest.approx(alone.ace_nonempty())
        assert sums.brier_sum[k] / 500 == pytest.approx(alone.brier())


def test_brier_scores(case):
    probabilities, labels = case
    sums = calibration.calibration_statistics(probabilities, labels)
    targets = np.eye(4)[labels]
    assert sums.brier() == pytest.approx(np.square(probabilities - targets).sum(axis=1).mean())
    assert sums.brier("mean") == pytest.approx(sums.brier() / 4)
    correct = probabilities.argmax(axis=1) == labels
    assert sums.brier("top_label") == pytest.approx(np.square(probabilities.max(axis=1) - correct).mean())


def test_perfect_and_uniform_limits():
    labels = np.repeat([0, 1, 2, 3], 5)
    perfect = calibration.calibration_statistics(np.eye(4)[labels], labels, above=1e-3)
    found = (perfect.ece(), perfect.cece(), perfect.mce(), perfect.rmsce(), perfect.brier(), perfect.nll())
    assert (*found, perfect.tace_equalwidth()) == (0.0,) * 7
    uniform = calibration.calibration_statistics(np.full((20, 4), 0.25), labels)
    assert (uniform.ece(), uniform.cece()) == (0.0, 0.0)
    assert uniform.brier() == 0.75
    assert uniform.nll() == pytest.approx(np.log(4))


def test_a_calibrated_sampler_is_calibrated_except_where_labels_choose():
    rng = np.random.default_rng(1)
    probabilities = special.softmax(3 * rng.normal(size=(40_000, 4)) + [3, 0, 0, 0], axis=1)
    labels = (rng.random((40_000, 1)) > probabilities.cumsum(axis=1)[:, :3]).sum(axis=1)
    found = {}
    for name, kept in (("all", slice(None)), ("pred_fg", probabilities.argmax(axis=1) > 0), ("gt_fg", labels > 0)):
        sums = calibration.calibration_statistics(probabilities[kept], labels[kept])
        found[name] = (sums.ece(), sums.cece())
    print("ECE and CECE of a perfectly calibrated sampler:", found)
    assert max(*found["all"], *found["pred_fg"]) < 0.015
    assert found["gt_fg"][1] > 10 * found["all"][1] and found["gt_fg"][0] > 10 * found["all"][0]


def test_a_threshold_is_needed_and_options_are_checked(case):
    sums = calibration.calibration_statistics(*case)
    with pytest.raises(UsageError, match="above=1e-3"):
        sums.tace_equalwidth()
    with pytest.raises(UsageError, match="not one of all, foreground, present"):
        sums.cece(classes="some")
    with pytest.raises(UsageError, match="not one of mean, sum"):
        sums.cece(reduction="max")


def test_crac_seg_brier_of_a_perfect_prediction_is_not_zero():
    labels = np.zeros((1, 5, 5), int)
    labels[0, 2, 2] = 1
    perfect = np.eye(2)[labels]
    assert parity.crac_seg_brier(perfect, labels) == pytest.approx(2 * (8 / 9) ** 2)
    assert calibration.calibration_statistics(perfect.reshape(-1, 2), labels.ravel()).brier() == 0.0
    assert np.isnan(parity.crac_seg_brier(perfect, np.zeros_like(labels)))
    with pytest.raises(InputError, match="slices of a volume as a batch"):
        parity.crac_seg_brier(perfect[0], labels[0])


def test_marginloss_adaptive_ece_is_blind_to_constant_confidence():
    probabilities, labels = np.full((30, 2), 0.5), np.ones(30, int)
    assert parity.marginloss_adaptive_ece(probabilities, labels) == 0.0
    assert calibration.calibration_statistics(probabilities, labels).ece() == 0.5
    assert np.isnan(parity.marginloss_adaptive_ece(np.zeros((0, 2)), np.zeros(0, int)))
