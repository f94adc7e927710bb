import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from calsegx.interfaces import InputError, UsageError
from calsegx.metrics import binning, calibration, device

OPTIONS = [
    {},
    {"bins": 7, "binning": "left"},
    {"bins": 10, "binning": "torchmetrics"},
    {"above": 1e-3},
    {"bins": 5, "above": 0.0},
]
COUNTS = (0, 2)  # of Bins: count, score_sum, hit_sum


def softmax(seed, voxels=9001, classes=4):
    rng = np.random.default_rng(seed)
    probabilities = special.softmax(6 * rng.normal(size=(voxels, classes)), axis=1).astype(np.float32)
    # Values on bin edges, as float32 has them, and saturated ones.
    for row, edge in enumerate(np.linspace(0, 1, 16).astype(np.float32)):
        probabilities[row] = 0
        probabilities[row, :2] = edge, 1 - edge
    return probabilities, rng.integers(0, classes, voxels)


def assert_same(got, want):
    for a, b in ((got.top_label, want.top_label), (got.classes, want.classes)):
        for place, (x, y) in enumerate(zip(a, b, strict=True)):
            assert x.dtype == y.dtype
            if place in COUNTS:
                np.testing.assert_array_equal(x, y)
            else:
                np.testing.assert_allclose(x, y, rtol=2e-6, atol=1e-9)
    np.testing.assert_array_equal(got.label_count, want.label_count)
    np.testing.assert_allclose(got.brier_sum, want.brier_sum, rtol=2e-6)
    assert got.top_label_brier_sum == pytest.approx(want.top_label_brier_sum, rel=2e-6)
    assert got.nll_sum == pytest.approx(want.nll_sum, rel=2e-6)


@pytest.mark.parametrize("options", OPTIONS)
def test_device_equals_host(options):
    probabilities, labels = softmax(0)
    mask = np.random.default_rng(1).random(len(labels)) < 0.3
    sums = device.calibration_sums(jnp.asarray(probabilities), jnp.asarray(labels), jnp.asarray(mask), **options)
    shown = {name: value for name, value in options.items() if name != "bins"}
    got = device.to_statistics(sums, **shown)
    assert_same(got, calibration.calibration_statistics(probabilities[mask], labels[mask], **options))
    assert (got + got).voxels == 2 * mask.sum()


def test_binary_device_equals_host():
    rng = np.random.default_rng(2)
    p = (rng.integers(0, 1025, 5000) / 1024).astype(np.float32)  # 1 - p is exact
    labels = rng.random(5000) < p
    got = device.to_statistics(device.calibration_sums(p, labels), binary=True, score="foreground")
    want = calibration.calibration_statistics(p, labels, score="foreground")
    assert_same(got, want)
    assert got.ece() == pytest.approx(want.ece(), rel=1e-6)
    assert got.brier() == pytest.approx(want.brier(), rel=1e-6)


def test_inside_jit_and_added_up():
    probabilities, labels = softmax(3)

    @jax.jit
    def both(p, y):
        halves = [device.calibration_sums(part, of) for part, of in ((p[:4000], y[:4000]), (p[4000:], y[4000:]))]
        return jax.tree.map(jnp.add, *halves)

    got = device.to_statistics(both(probabilities, labels))
    assert_same(got, calibration.calibration_statistics(probabilities, labels))


def test_edges_in_float64():
    with jax.enable_x64(True):
        edges = binning.edges(10, "right")
        probabilities = np.stack([edges, 1 - edges], axis=1)
        labels = np.zeros(len(edges), int)
        for name in binning.BINNINGS:
            sums = device.calibration_sums(jnp.asarray(probabilities), jnp.asarray(labels), bins=10, binning=name)
            got = device.to_statistics(sums, binning=name)
            assert_same(got, calibration.calibration_statistics(probabilities, labels, bins=10, binning=name))


def test_no_voxels_and_rounding_outside_the_range():
    sums = device.calibration_sums(jnp.zeros((0, 3)), jnp.zeros(0, int))
    assert np.isnan(device.to_statistics(sums).ece())
    sums = device.calibration_sums(jnp.array([[1.000001, -1e-6]]), jnp.zeros(1, int))
    got = device.to_statistics(sums)
    assert (got.ece(), got.count.sum()) == (0.0, 1)


def test_half_precision_is_taken_as_float32():
    probabilities, labels = softmax(4, voxels=300)
    half = jnp.asarray(probabilities, jnp.bfloat16)
    got = device.to_statistics(device.calibration_sums(half, labels))
    want = device.to_statistics(device.calibration_sums(half.astype(jnp.float32), labels))
    assert got.ece() == want.ece()


def test_bad_input_is_refused():
    with pytest.raises(InputError, match="do not fit"):
        device.calibration_sums(jnp.zeros((3, 2)), jnp.zeros(2, int))
    with pytest.raises(UsageError, match="not one of right"):
        device.calibration_sums(jnp.zeros((3, 2)), jnp.zeros(3, int), binning="middle")
    with pytest.raises(UsageError, match="not one of top_label"):
        device.to_statistics(device.calibration_sums(jnp.zeros((3, 2)), jnp.zeros(3, int)), score="top")
