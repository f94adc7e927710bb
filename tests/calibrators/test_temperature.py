"""Temperature scaling: the exact optimum, streaming, and data that say nothing about a temperature."""

import json

import numpy as np
import pytest

from calsegx import calibrators
from calsegx.calibrators import temperature
from calsegx.interfaces import DataError, UsageError


def simulate(voxels: int, classes: int, true_temperature: float, seed: int = 0):
    """Logits that are too large by ``true_temperature``: labels are drawn from softmax(logits / T)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=2, size=(voxels, classes))
    full = np.concatenate([np.zeros_like(logits), logits], axis=1) if classes == 1 else logits
    labels = np.argmax(full + rng.gumbel(size=full.shape), axis=1)
    return true_temperature * logits, labels


def nll(logits, labels, t: float) -> float:
    full = np.concatenate([np.zeros_like(logits), logits], axis=1) if logits.shape[1] == 1 else logits
    full = full / t
    log_sum = np.log(np.sum(np.exp(full - full.max(1, keepdims=True)), axis=1)) + full.max(1)
    return float(np.mean(log_sum - full[np.arange(len(labels)), labels]))


@pytest.mark.parametrize("classes", [1, 2, 4])
def test_finds_the_optimum(classes: int):
    logits, labels = simulate(20_000, classes, true_temperature=2.5)
    result = temperature.fit([(logits, labels)])
    t = result["temperature"]
    assert result["identifiable"] is True
    assert abs(t - 2.5) < 0.15  # the sampling error of 20 000 voxels
    np.testing.assert_allclose(result["nll_before"], nll(logits, labels, 1), rtol=1e-12)
    np.testing.assert_allclose(result["nll_after"], nll(logits, labels, t), rtol=1e-12)
    for step in (1e-4, -1e-4):
        assert result["nll_after"] < nll(logits, labels, t * (1 + step))
    assert result["voxels"] == result["voxels_seen"] == 20_000
    assert json.loads(json.dumps(result)) == result


def test_scaling_the_logits_scales_the_temperature():
    logits, labels = simulate(2_000, 3, true_temperature=1)
    one = temperature.fit([(logits, labels)])["temperature"]
    three = temperature.fit([(3 * logits, labels)])["temperature"]
    np.testing.assert_allclose(three, 3 * one, rtol=1e-9)
    np.testing.assert_allclose(temperature.fit([(logits.astype(np.float32), labels)])["temperature"], one, rtol=1e-5)


@pytest.mark.parametrize("criterion", ["ece", "nll"])
def test_grid_search(criterion: str):
    logits, labels = simulate(20_000, 3, true_temperature=2.5)
    found = temperature.grid_search(logits, labels, criterion=criterion)
    assert abs(found - temperature.fit([(logits, labels)])["temperature"]) < (0.2 if criterion == "ece" else 0.06)
    assert temperature.grid_search(logits / 100, labels, criterion=criterion) == 0.1
    assert temperature.grid_search(100 * logits, labels, criterion="nll") == np.cumsum(np.full(100, 0.1))[-1] != 10


def test_a_sigmoid_is_a_softmax_over_zero_and_itself():
    logits, labels = simulate(2_000, 1, true_temperature=2)
    two = np.concatenate([np.zeros_like(logits), logits], axis=1)
    assert temperature.fit([(logits, labels)]) == temperature.fit([(two, labels)])


def test_chunks_do_not_matter():
    logits, labels = simulate(3_000, 3, true_temperature=2)
    whole = temperature.fit([(logits, labels)], max_voxels=700, seed=5)
    pieces = zip(np.split(logits, [10, 10, 1500]), np.split(labels, [10, 10, 1500]), strict=True)  # one is empty
    parts = temperature.fit(pieces, max_voxels=700, seed=5)
    assert whole["voxels"] == 700
    assert whole["voxels_seen"] == 3_000
    for name in ("temperature", "nll_before", "nll_after"):
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-12)
    assert parts["voxels"] == 700
    assert temperature.fit([(logits, labels)], max_voxels=700, seed=6)["temperature"] != whole["temperature"]


def test_the_subsample_is_uniform():
    """The early voxels say T = 4, the later ones T = 1: a sample must see both in proportion."""
    early, late = simulate(4_000, 2, 4.0, seed=1), simulate(4_000, 2, 1.0, seed=2)
    chunks = [(a[i : i + 500], b[i : i + 500]) for a, b in (early, late) for i in range(0, 4_000, 500)]
    everything = temperature.fit(chunks)["temperature"]
    sample = temperature.fit(chunks, max_voxels=2_000)["temperature"]
    assert temperature.fit([late])["temperature"] < 1.2 < everything < 3.5 < temperature.fit([early])["temperature"]
    np.testing.assert_allclose(sample, everything, rtol=0.15)


@pytest.mark.parametrize("scale", [1e-3, 1, 1e4])
def test_perfectly_separable_voxels(scale: float):
    labels = np.arange(30) % 3
    logits = scale * np.eye(3)[labels]
    result = temperature.fit([(logits, labels)])
    assert result["identifiable"] is False
    assert result["temperature"] == 1
    assert result["nll_after"] == result["nll_before"]
    assert "no voxel is wrong" in result["reason"]


def test_other_data_without_a_temperature():
    labels = np.arange(30) % 3
    for logits in (np.zeros((30, 3)), -np.eye(3)[labels], np.full((30, 1), -1e-3)):  # flat, all wrong, too small
        result = temperature.fit([(logits, labels % (2 if logits.shape[1] == 1 else 3))])
        assert (result["identifiable"], result["temperature"]) == (False, 1.0)


def test_apply():
    logits = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    scaled = temperature.apply({"temperature": 2.0}, logits)
    np.testing.assert_array_equal(scaled, logits / 2)
    assert scaled.dtype == np.float32


def test_registered():
    calibrator = calibrators.get("temperature")
    assert calibrator.spatial is False
    logits, labels = simulate(500, 2, true_temperature=2)
    params = calibrator.fit([(logits, labels)], provenance={"split": "val"})
    assert params.pop("provenance") == {"split": "val"}
    assert params | {"provenance": {}} == temperature.fit([(logits, labels)])
    np.testing.assert_array_equal(calibrator.apply(params, logits), logits / params["temperature"])
    with pytest.raises(UsageError, match="no calibrator named 'temperatur'.*'temperature'"):
        calibrators.get("temperatur")


def test_bad_data():
    logits, labels = simulate(10, 3, true_temperature=1)
    for chunks in ([], [(logits[:0], labels[:0])]):
        with pytest.raises(DataError, match="got no voxels"):
            temperature.fit(chunks)
    with pytest.raises(DataError, match="not finite"):
        temperature.fit([(logits * np.nan, labels)])
    with pytest.raises(DataError, match=r"labels from 0 to 3, but the logits know the classes 0 to 2"):
        temperature.fit([(logits, np.append(labels[:-2], [0, 3]))])
    with pytest.raises(DataError, match=r"needs logits \[n, L\] and integer labels \[n\]"):
        temperature.fit([(logits, labels[:-1])])
    with pytest.raises(DataError, match="integer labels"):
        temperature.fit([(logits, labels.astype(float))])
    with pytest.raises(DataError, match="different numbers of logits"):
        temperature.fit([(logits, labels), (logits[:, :2], labels % 2)])
    with pytest.raises(UsageError, match="'ece' and 'nll', got 'mce'"):
        temperature.grid_search(logits, labels, criterion="mce")
    with pytest.raises(UsageError, match="max_voxels of at least 1, got 0"):
        temperature.fit([(logits, labels)], max_voxels=0)
