import math

import numpy as np
import pytest

from calsegx.evaluation import compare, evaluate
from tests.evaluation import synthetic

KEY = evaluate.CaseKey("sam_ft", 42, "case_1", "subject_1", "A", "test")
SPACING = (2.0, 1.0, 1.0)


def cube(value=1):
    truth = np.zeros((6, 10, 10), np.uint8)
    truth[2:4, 3:7, 3:7] = value
    return truth


def get(rows, metric, class_name=evaluate.ALL, region=evaluate.VOLUME):
    (row,) = (r for r in rows if (r.metric, r.class_name, r.region) == (metric, class_name, region))
    return row


def test_a_perfect_prediction():
    truth = cube()
    rows, sums = evaluate.evaluate_case((truth == 1)[..., None].astype(np.float32), truth, SPACING, ["tumour"], KEY)
    assert get(rows, evaluate.DSC, "tumour").value == 1
    assert get(rows, evaluate.HD95).value == 0
    for region in evaluate.REGIONS:
        assert get(rows, evaluate.ECE, region=region).value == pytest.approx(0)
        assert get(rows, evaluate.BRIER, region=region).value == pytest.approx(0)
    assert all(row.defined for row in rows)
    assert sums["all"].voxels == truth.size
    assert sums["p>0.01"].voxels == truth.sum()


def test_binary_numbers_by_hand():
    truth = cube()
    probabilities = np.zeros((*truth.shape, 1), np.float32)
    probabilities[2:4, 3:7, 3:9] = 0.8  # 48 voxels, 32 of them foreground
    rows, _ = evaluate.evaluate_case(probabilities, truth, SPACING, ["tumour"], KEY)
    assert get(rows, evaluate.DSC).value == pytest.approx(2 * 32 / (32 + 48))
    assert get(rows, evaluate.ECE, region="p>0.01").value == pytest.approx(0.8 - 32 / 48, abs=1e-6)
    brier = (32 * 0.2**2 + 16 * 0.8**2) / 48
    assert get(rows, evaluate.BRIER, region="p>0.01").value == pytest.approx(brier, abs=1e-6)
    assert get(rows, evaluate.BRIER, region="all").value == pytest.approx(brier * 48 / truth.size, abs=1e-6)
    assert get(rows, evaluate.HD95).value == pytest.approx(2.0)


def test_the_further_numbers_by_hand():
    truth = cube()
    probabilities = np.zeros((*truth.shape, 1), np.float32)
    probabilities[2:4, 3:7, 3:9] = 0.8  # 48 voxels, 32 of them foreground
    probabilities[5, 0, 0] = 0.6  # a lesion that does not exist
    rows, sums = evaluate.evaluate_case(probabilities, truth, SPACING, ["tumour"], KEY)
    assert get(rows, evaluate.PRECISION).value == pytest.approx(32 / 49)
    assert get(rows, evaluate.RECALL).value == 1
    assert get(rows, evaluate.VOLUME_DIFFERENCE).value == pytest.approx(17 * 2 / 1000)
    assert get(rows, evaluate.LESION_F1).value == pytest.approx(2 * 0.5 / 1.5)
    # Two slices thick, so every voxel is of the surface: 32 and 49; 8 of these are 1 mm from the truth, 8 are 2 mm.
    stray = math.sqrt(4**2 + 3**2 + 3**2)
    assert get(rows, evaluate.ASSD).value == pytest.approx((8 * 1 + 8 * 2 + stray) / (32 + 49))
    assert get(rows, evaluate.NSD).value == pytest.approx(80 / 81)
    region = "p>0.01"
    gaps = [48 / 49 * (0.8 - 32 / 48), 1 / 49 * 0.6]  # of the foreground's bins
    assert get(rows, evaluate.CECE, region=region).value == pytest.approx(sum(gaps), abs=1e-6)
    assert get(rows, evaluate.MCE, region=region).value == pytest.approx(0.6, abs=1e-6)
    assert 0 < get(rows, evaluate.TACE, region=region).value < 1
    # On the true foreground alone a perfect mask with doubt looks wrong, and the stray lesion is not seen.
    assert get(rows, evaluate.ECE, region="gt_fg").value == pytest.approx(0.2, abs=1e-6)
    assert sums["gt_fg"].voxels == 32
    assert {row.region for row in rows} == {evaluate.VOLUME, *evaluate.REGIONS}


def test_calibration_is_measured_on_the_regions_that_are_asked_for():
    truth = cube()
    rows, sums = evaluate.evaluate_case(truth[..., None] * 0.4, truth, SPACING, ["tumour"], KEY, ("union", "pred_fg"))
    assert list(sums) == ["union", "pred_fg"]
    assert (sums["union"].voxels, sums["pred_fg"].voxels) == (32, 0)
    assert not get(rows, evaluate.CECE, region="pred_fg").defined


def test_a_missed_class_counts_as_undefined_and_costs_the_diagonal():
    truth = cube()
    rows, _ = evaluate.evaluate_case(np.zeros((*truth.shape, 1)), truth, SPACING, ["tumour"], KEY)
    assert get(rows, evaluate.DSC).value == 0
    distance = get(rows, evaluate.HD95)
    assert not distance.defined
    assert distance.value == pytest.approx(math.hypot(12, 10, 10))
    assert math.isnan(get(rows, evaluate.ECE, region="p>0.01").value)  # nothing predicted, no voxels
    assert not get(rows, evaluate.ECE, region="p>0.01").defined


def test_a_class_that_both_lack_is_left_out_of_the_mean_and_counted():
    truth = cube(2)
    probabilities = np.zeros((*truth.shape, 2))
    probabilities[..., 1] = truth == 2
    rows, _ = evaluate.evaluate_case(probabilities, truth, SPACING, ["core", "oedema"], KEY)
    assert math.isnan(get(rows, evaluate.DSC, "core").value)
    assert math.isnan(get(rows, evaluate.HD95, "core").value)
    assert get(rows, evaluate.DSC).value == 1
    assert not get(rows, evaluate.DSC).defined and not get(rows, evaluate.DSC, "core").defined  # counted
    assert get(rows, evaluate.ECE, region="all").value == pytest.approx(0)


def test_multi_class_calibration_is_of_the_top_label():
    truth = cube(2)
    probabilities = np.zeros((*truth.shape, 2))
    probabilities[truth == 2] = [0.3, 0.6]
    rows, _ = evaluate.evaluate_case(probabilities, truth, SPACING, ["core", "oedema"], KEY)
    assert get(rows, evaluate.ECE, region="p>0.01").value == pytest.approx(0.4, abs=1e-6)
    brier = 0.1**2 + 0.3**2 + 0.4**2
    assert get(rows, evaluate.BRIER, region="p>0.01").value == pytest.approx(brier, abs=1e-6)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="must agree on D H W K"):
        evaluate.evaluate_case(np.zeros((6, 10, 10, 2)), cube(), SPACING, ["tumour"], KEY)


def row(seed, case, value, defined=True, domain="A", method="m", subject=None):
    subject = subject or case
    return evaluate.Row(method, seed, case, subject, domain, "test", "all", "DSC", "volume", value, defined)


def test_summary_is_the_mean_over_cases_then_seeds():
    rows = [row(1, "a", 0.5), row(1, "b", 0.7), row(2, "a", 0.9), row(2, "b", math.nan, False)]
    (summary,) = evaluate.summarise(rows)
    assert summary.mean == pytest.approx((0.6 + 0.9) / 2)
    assert summary.sd_seeds == pytest.approx(0.3 / math.sqrt(2))
    assert (summary.seeds, summary.cases, summary.values, summary.undefined) == (2, 2, 4, 1)
    (single,) = evaluate.summarise(rows[:2])
    assert single.sd_seeds is None
    (nothing,) = evaluate.summarise(rows[3:])
    assert math.isnan(nothing.mean)


def test_gap_is_positive_for_degradation_in_either_direction():
    rows = synthetic.rows(["sam_ft"], noise=0.0)
    gaps = {(g.metric, g.region, g.class_name): g for g in evaluate.generalisation_gaps(rows, "A", "B")}
    assert gaps[evaluate.DSC, "volume", "all"].mean == pytest.approx(0.14, abs=0.02)
    assert gaps[evaluate.ECE, "p>0.01", "all"].mean == pytest.approx(0.09, abs=1e-6)
    assert gaps[evaluate.HD95, "volume", "all"].mean > 0
    assert evaluate.generalisation_gaps(rows, "A", "C") == []


def test_comparison_pairs_by_subject_and_reports_the_seeds():
    rows = []
    for seed, effect in ((1, 0.1), (2, 0.2)):
        for subject in range(8):
            for image in range(2):  # the second image repeats the first: no new evidence
                base = 0.5 + 0.03 * subject
                case = f"{subject}.{image}"
                rows.append(row(seed, case, base + effect, method="new", subject=str(subject)))
                rows.append(row(seed, case, base, method="old", subject=str(subject)))
    found = compare.compare(compare.index(rows), "new", "old", "A", "DSC", "volume")
    assert found.difference == pytest.approx(0.15)
    assert found.subjects == 8
    assert found.sd_seeds == pytest.approx(0.1 / math.sqrt(2))
    assert found.verdict == compare.BETTER
    swapped = compare.compare(compare.index(rows), "old", "new", "A", "DSC", "volume")
    assert swapped.verdict == compare.WORSE


@pytest.mark.parametrize("subjects", [0, 1, 5])
def test_few_subjects_give_no_verdict(subjects):
    rows = [row(1, str(s), 0.5 + 0.1 * (m == "new"), method=m) for s in range(subjects) for m in ("new", "old")]
    found = compare.compare(compare.index(rows), "new", "old", "A", "DSC", "volume")
    assert found.verdict == compare.TOO_FEW
    assert found.subjects == subjects
