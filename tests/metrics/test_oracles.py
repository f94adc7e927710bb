"""Metrics beside MONAI, torchmetrics, scikit-image, scikit-posthocs and statsmodels, where they are installed.

They are imported inside the tests, because MONAI takes seconds.
"""

import warnings

import numpy as np
import pytest
from scipy import ndimage, special

from calsegx.metrics import calibration, overlap, ranks, statistics, surface
from calsegx.uncertainty import scores

SPACING = (1.5, 0.7, 2.0)


def blobs(seed, shape=(9, 12, 10)):
    """Two overlapping masks of several objects."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=shape)
    noises = [shared + 0.7 * rng.normal(size=shape) for _ in range(2)]
    return [ndimage.gaussian_filter(noise, 1.5) > 0.05 for noise in noises]


def monai(function, *masks, **options):
    """A MONAI metric of two masks."""
    torch, metrics = pytest.importorskip("torch"), pytest.importorskip("monai.metrics")
    tensors = [torch.from_numpy(mask)[None, None].float() for mask in masks]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI calls its own deprecated functions
        return getattr(metrics, function)(*tensors, include_background=True, **options).item()


@pytest.mark.parametrize("seed", range(3))
def test_overlap_beside_monai(seed):
    found = overlap.overlap_counts(*blobs(seed)).finalise(SPACING)
    assert monai("compute_dice", *blobs(seed)) == pytest.approx(found.dsc.value, rel=1e-6)
    assert monai("compute_iou", *blobs(seed)) == pytest.approx(found.iou.value, rel=1e-6)


def test_empty_masks_beside_monai():
    full, empty = blobs(0)[0], np.zeros((9, 12, 10), bool)
    for masks in ((full, empty), (empty, full), (empty, empty)):
        found = overlap.overlap_counts(*masks)
        ignored, agree = (found.finalise(SPACING, empty=e).dsc.value for e in ("nan_without_truth", "agree"))
        assert monai("compute_dice", *masks) == pytest.approx(ignored, nan_ok=True)
        assert monai("compute_dice", *masks, ignore_empty=False) == pytest.approx(agree)


@pytest.mark.parametrize("seed", range(3))
def test_distances_beside_monai(seed):
    found = surface.surface_scores(*blobs(seed), SPACING, tolerance_mm=1.6)
    for function, options, ours in (
        ("compute_hausdorff_distance", {}, found.hd),
        ("compute_hausdorff_distance", {"percentile": 95}, found.hd95),
        ("compute_average_surface_distance", {}, found.asd),
        ("compute_average_surface_distance", {"symmetric": True}, found.assd),
        ("compute_surface_dice", {"class_thresholds": [1.6]}, found.nsd),
    ):
        got = monai(function, *blobs(seed), spacing=[list(SPACING)], **options)
        assert got == pytest.approx(ours.value, rel=1e-5), (function, options)


@pytest.mark.parametrize("seed", range(3))
def test_hausdorff_beside_scikit_image(seed):
    # Its masks are point sets and its distances voxels, so it gets the surfaces.
    masks = blobs(seed, (17, 20))
    distance = pytest.importorskip("skimage.metrics").hausdorff_distance(*(surface.surface(mask) for mask in masks))
    assert surface.surface_scores(*masks, (1.0, 1.0), tolerance_mm=1).hd.value == pytest.approx(distance)


@pytest.mark.parametrize("bins", [16, 256])
def test_otsu_beside_scikit_image(bins):
    rng = np.random.default_rng(bins)
    for image in (rng.gamma(1, size=(20, 30)), np.concatenate([rng.normal(0, 1, 200), rng.normal(6, 2, 90)])):
        expected = pytest.importorskip("skimage.filters").threshold_otsu(image, nbins=bins)
        assert scores.otsu_threshold(image, bins=bins) == pytest.approx(expected)


def torchmetrics(kind, probabilities, labels, bins, **options):
    """L1, L2 and maximal calibration error of torchmetrics."""
    functional = pytest.importorskip("torchmetrics.functional.classification")
    tensors = [pytest.importorskip("torch").from_numpy(values) for values in (probabilities, labels)]
    function = getattr(functional, f"{kind}_calibration_error")
    return [function(*tensors, n_bins=bins, norm=norm, **options).item() for norm in ("l1", "l2", "max")]


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_beside_torchmetrics(bins):
    rng = np.random.default_rng(bins)
    probabilities = special.softmax(3 * rng.normal(size=(800, 4)), axis=1).astype(np.float32)
    labels = rng.integers(0, 4, 800)
    expected = torchmetrics("multiclass", probabilities, labels, bins, num_classes=4)
    # No score lies on an edge or is 1, so that the sides on which bins are closed do not matter.
    for binning in ("torchmetrics", "left", "right"):
        sums = calibration.calibration_statistics(probabilities, labels, bins=bins, binning=binning)
        assert [sums.ece(), sums.rmsce(), sums.mce()] == pytest.approx(expected, rel=1e-4)


def test_calibration_of_saturated_scores_beside_torchmetrics():
    """Scores of exactly 1 have a bin of their own there, so a fault of 0.9..1 does not cancel theirs."""
    p = np.concatenate([np.ones(50), np.full(50, 0.95)]).astype(np.float32)
    y = np.concatenate([np.repeat([0, 1], [8, 42]), np.ones(50, int)])
    expected = torchmetrics("binary", p, y, 10)
    theirs, ours = (
        calibration.calibration_statistics(p, y, bins=10, score="foreground", binning=binning)
        for binning in ("torchmetrics", "right")
    )
    assert [theirs.ece(), theirs.rmsce(), theirs.mce()] == pytest.approx(expected, rel=1e-5)
    assert (theirs.ece(), ours.ece()) == pytest.approx((0.105, 0.055))


@pytest.mark.parametrize("bins", [10, 15])
def test_binary_calibration_beside_torchmetrics(bins):
    rng = np.random.default_rng(bins)
    p, y = rng.random(700).astype(np.float32), rng.integers(0, 2, 700)
    sums = calibration.calibration_statistics(p, y, bins=bins, score="foreground")
    assert [sums.ece(), sums.rmsce(), sums.mce()] == pytest.approx(torchmetrics("binary", p, y, bins), rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_holm_beside_statsmodels(seed):
    rng = np.random.default_rng(seed)
    p = np.concatenate([rng.random(6) ** 4, [0.0, 1.0], np.repeat(rng.random() / 20, 2)])
    expected = pytest.importorskip("statsmodels.stats.multitest").multipletests(p, method="holm")[1]
    np.testing.assert_allclose(statistics.holm(p), expected, rtol=1e-12)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("methods", [3, 7])
def test_nemenyi_beside_scikit_posthocs(methods, tied):
    values = np.random.default_rng(methods).normal(size=(methods, 14)) + np.arange(methods)[:, None] / 3
    values = np.round(values) if tied else values
    expected = pytest.importorskip("scikit_posthocs").posthoc_nemenyi_friedman(values.T).to_numpy()
    np.testing.assert_allclose(ranks.nemenyi(values, True), expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(ranks.nemenyi(-values, False), expected, rtol=1e-9, atol=1e-12)
