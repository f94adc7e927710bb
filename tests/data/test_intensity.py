"""Intensity normalisations against their rules, written out."""

import numpy as np
import pytest

from calsegx import configs
from calsegx.data import intensity
from calsegx.interfaces import UsageError

RULES = ("percentile", "z_score", "medsam_mr", "medsam_ct")


def normalised(voxels, rule="percentile", **settings):
    return intensity.normalise(np.asarray(voxels, np.float32), configs.DataConfig(intensity=rule, **settings))


def head(seed=0):
    """Whole numbers, half of them background."""
    rng = np.random.default_rng(seed)
    return np.rint(rng.gamma(4, 120, (12, 20, 20)) * (rng.random((12, 20, 20)) < 0.5))


def hounsfield(seed=0):
    return np.rint(np.random.default_rng(seed).uniform(-1024, 1500, (8, 20, 20)))


def test_normalise_intensity():
    voxels = np.concatenate([np.zeros(500), np.arange(1, 1001)]).astype(np.float32)
    normal = normalised(voxels)
    assert normal.dtype == np.float32
    assert (normal.min(), normal.max()) == (0, 255)
    assert normal[1000] == pytest.approx(127.5, abs=0.3)


@pytest.mark.parametrize(("lower", "upper"), [(0.5, 99.5), (0, 100), (5, 90)])
def test_percentile(lower, upper):
    voxels = head()
    low, high = np.percentile(voxels[voxels > 0], [lower, upper])
    expected = np.clip((voxels - low) / (high - low), 0, 1) * 255
    ours = normalised(voxels, lower_percentile=lower, upper_percentile=upper)
    np.testing.assert_allclose(ours, expected, atol=1e-3)


def test_z_score():
    voxels = head()
    z = (voxels - voxels[voxels > 0].mean()) / voxels[voxels > 0].std()
    expected = np.where(voxels > 0, np.clip(z, -3, 3) / 6 * 255 + 127.5, 0)
    np.testing.assert_allclose(normalised(voxels, "z_score"), expected, atol=1e-3)
    # What a gain does to the scanner's numbers does not matter.
    np.testing.assert_allclose(normalised(voxels * 7, "z_score"), expected, atol=1e-3)


# The rules of MedSAM's pre_CT_MR.py as its authors describe them: clip, min-max to 0..255, background 0, uint8.
def medsam(image, lower, upper):
    clipped = np.clip(image, lower, upper)
    return (clipped - np.min(clipped)) / (np.max(clipped) - np.min(clipped)) * 255.0


@pytest.mark.parametrize("seed", range(5))
def test_medsam_mr(seed):
    image = head(seed)
    lower, upper = np.percentile(image[image > 0], 0.5), np.percentile(image[image > 0], 99.5)
    expected = medsam(image, lower, upper)
    expected[image == 0] = 0
    np.testing.assert_array_equal(normalised(image, "medsam_mr"), np.uint8(expected))


@pytest.mark.parametrize(("centre", "width"), [(40, 400), (40, 80), (-600, 1500), (33, 77)])
def test_medsam_ct(centre, width):
    image = hounsfield()
    expected = np.uint8(medsam(image, centre - width / 2, centre + width / 2))
    ours = normalised(image, "medsam_ct", window_centre=centre, window_width=width)
    np.testing.assert_array_equal(ours, expected)
    assert (ours.min(), ours.max()) == (0, 255)  # saturated voxels too, whatever rounding does


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_gives_float32_from_0_to_255(rule):
    for gain in (1e-3, 1, 1e5):
        voxels = hounsfield() if rule == "medsam_ct" else head() * gain
        before = voxels.copy()
        ours = normalised(voxels, rule)
        assert ours.dtype == np.float32 and ours.shape == voxels.shape
        assert 0 <= ours.min() < ours.max() <= 255
        np.testing.assert_array_equal(voxels, before)


@pytest.mark.parametrize("rule", RULES)
def test_constant_volumes_are_refused(rule):
    with pytest.raises(ValueError, match="constant"):
        normalised(np.full(9, 3.0), rule)
    with pytest.raises(ValueError, match="constant" if rule == "medsam_ct" else "no voxel above 0"):
        normalised(np.zeros(9), rule)


def test_what_lies_outside_the_window_is_refused():
    with pytest.raises(ValueError, match=r"constant \(240\) inside the window from -160 to 240"):
        normalised([300.0, 900.0], "medsam_ct")


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "medsam_ct"])
def test_negative_volumes_are_refused_but_not_a_few_negative_voxels(rule):
    with pytest.raises(ValueError, match=r"% of its voxels are negative.*medsam_ct is for CT"):
        normalised(hounsfield(), rule)
    voxels = head()
    voxels[voxels == 0] = -1.0  # the ringing of an interpolation
    assert normalised(voxels, rule)[voxels < 0].max() == 0


def test_unknown_rules_are_refused():
    with pytest.raises(UsageError, match=r"'zscore'.*z_score"):
        normalised(head(), "zscore")
