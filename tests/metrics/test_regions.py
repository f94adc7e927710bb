import numpy as np
import pytest
from scipy import ndimage, special

from calsegx.interfaces import InputError, UsageError
from calsegx.metrics import calibration, regions

SPACING = (3.0, 1.0, 1.5)
ALL_REGIONS = ("all", "p>0.01", "p>0.5", "pred_fg", "dilated", "union", "gt_fg")


def literal_dilation(mask, spacing):
    result = np.zeros_like(mask)
    for index in np.ndindex(mask.shape):
        points = np.argwhere(mask[index[0]])  # of the same slice only
        distances = np.linalg.norm((points - index[1:]) * np.asarray(spacing[1:]), axis=1)
        result[index] = bool((distances <= 10.0).any())
    return result


@pytest.fixture(scope="module")
def simulated():
    """Log-odds of a blob, unsure inside and sure outside, and labels drawn from these probabilities."""
    rng = np.random.default_rng(0)
    shape = (24, 80, 80)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    noise = ndimage.gaussian_filter(rng.normal(size=shape), 3)
    log_odds = np.minimum(1, 60 * (0.5 - np.linalg.norm(grid, axis=0))) + 0.3 * noise / noise.std()
    return log_odds, rng.random(shape) < special.expit(log_odds)


def ece(log_odds, truth, name):
    p = special.expit(log_odds)
    kept = regions.region(name, p, truth, SPACING, p > 0.5)
    return calibration.calibration_statistics(p[kept], truth[kept]).ece()


def test_label_independent_regions_keep_a_calibrated_model_calibrated(simulated):
    log_odds, truth = simulated
    found = {name: ece(log_odds, truth, name) for name in ALL_REGIONS}
    print("ECE of a perfectly calibrated model:", {name: round(value, 4) for name, value in found.items()})
    for name in ALL_REGIONS:
        if regions.label_independent(name):
            assert found[name] < 0.01, name
    assert found["gt_fg"] > 0.2
    assert found["union"] > 0.03


def test_gt_fg_prefers_the_over_confident_model(simulated):
    log_odds, truth = simulated
    calibrated, over_confident = log_odds, 3 * log_odds
    assert ece(calibrated, truth, "gt_fg") > 0.2  # although nothing is wrong with it
    assert ece(over_confident, truth, "gt_fg") < 0.8 * ece(calibrated, truth, "gt_fg")
    for name in ("all", "p>0.01", "dilated"):
        assert ece(over_confident, truth, name) > 2 * ece(calibrated, truth, name)
    assert ece(over_confident, truth, "p>0.01") > 0.05


def test_all_hides_what_the_region_shows(simulated):
    log_odds, truth = simulated
    assert ece(3 * log_odds, truth, "all") < 0.5 * ece(3 * log_odds, truth, "p>0.01")


def test_masks():
    rng = np.random.default_rng(1)
    p, truth = rng.random((3, 4, 5)), rng.random((3, 4, 5)) < 0.5
    assert regions.region("all", p, truth, SPACING).all()
    np.testing.assert_array_equal(regions.region("p>.25", p, truth, SPACING), p > 0.25)
    np.testing.assert_array_equal(regions.region("p>0", p, truth, SPACING), p > 0)
    predicted = p > 0.7
    for name, want in (("gt_fg", truth), ("pred_fg", predicted), ("union", truth | predicted)):
        found = regions.region(name, p, truth, SPACING, predicted)
        np.testing.assert_array_equal(found, want)
        found[:] = False
    assert truth.any() and predicted.any()  # they were copies


def test_which_regions_look_at_labels():
    independent = [name for name in ALL_REGIONS if regions.label_independent(name)]
    assert independent == ["all", "p>0.01", "p>0.5", "pred_fg"]
    p = np.random.default_rng(2).random((2, 9, 9))
    one, other = np.zeros((2, *p.shape), bool)
    one[0, 0, 0] = other[1, 8, 8] = True
    for name in ALL_REGIONS:
        same = np.array_equal(*(regions.region(name, p, truth, SPACING, p > 0.9) for truth in (one, other)))
        assert same == regions.label_independent(name), name


@pytest.mark.parametrize("spacing", [(3.0, 1.0, 1.5), (1.0, 4.0, 2.5)])
def test_dilation_literal(spacing):
    truth = np.zeros((9, 24, 18), bool)
    truth[4, 10:12, 8] = truth[0, 0, 0] = True
    got = regions.region("dilated", np.zeros(truth.shape), truth, spacing)
    np.testing.assert_array_equal(got, literal_dilation(truth, spacing))
    assert not got.all()


def test_dilation_of_nothing_is_empty():
    empty = np.zeros((3, 4, 5), bool)
    got = regions.region("dilated", np.ones(empty.shape), empty, SPACING)
    assert got.dtype == bool and not got.any()


def test_reports_offer_no_region_of_true_foreground():
    assert "gt_fg" not in regions.REGIONS
    assert [regions.describe(name) for name in regions.REGIONS] == [
        "all voxels",
        "voxels with foreground probability above 0.01",
        "voxels within 10 mm of true foreground in the same slice",
    ]
    assert "misleading" in regions.describe("gt_fg")


@pytest.mark.parametrize("name", ["foreground", "p>1", "p>-0.1", "p>nan", "p<0.1", "p>0.1 ", ""])
def test_unknown_regions_are_refused(name):
    with pytest.raises(UsageError, match="no region named"):
        regions.describe(name)
    with pytest.raises(UsageError, match="no region named"):
        regions.label_independent(name)
    with pytest.raises(UsageError, match="no region named"):
        regions.region(name, np.zeros((1, 1, 1)), np.zeros((1, 1, 1), bool), SPACING)


def test_bad_arrays_are_refused():
    p, truth = np.zeros((2, 2, 2)), np.zeros((2, 2, 2), bool)
    with pytest.raises(InputError, match="boolean"):
        regions.region("all", p, truth.astype(int), SPACING)
    with pytest.raises(InputError, match="same grid"):
        regions.region("all", p[:1], truth, SPACING)
    with pytest.raises(InputError, match="NaN"):
        regions.region("p>0.01", p + np.nan, truth, SPACING)
    with pytest.raises(UsageError, match="needs prediction_foreground"):
        regions.region("union", p, truth, SPACING)
    with pytest.raises(InputError, match="prediction mask is float64"):
        regions.region("pred_fg", p, truth, SPACING, p)
    with pytest.raises(InputError, match="spacing"):
        regions.region("all", p, truth, (1.0, 1.0))
