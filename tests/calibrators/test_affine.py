"""Vector, matrix, Platt and Dirichlet calibration: known parameters come back, nothing runs away."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from calsegx import calibrators
from calsegx.calibrators import affine, dirichlet, voxels
from calsegx.interfaces import DataError, UsageError

NAMES = ("vector", "matrix", "platt", "dirichlet")
WEIGHT = np.array([[0.5, 0.1, 0.0], [-0.2, 0.8, 0.1], [0.0, 0.2, 0.4]])
BIAS = np.array([0.4, -0.7, 0.3])


def draw(true_logits: np.ndarray, seed: int = 1) -> np.ndarray:
    """Labels of these true probabilities."""
    gumbel = np.random.default_rng(seed).gumbel(size=true_logits.shape)
    return np.argmax(true_logits + gumbel, axis=1)


def logits_of(count: int, voxels: int = 40_000, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=2, size=(voxels, count))


def one_logit(voxels: int = 40_000) -> tuple[np.ndarray, np.ndarray]:
    """A logit whose truth is ``0.4 z - 0.9``."""
    logits = logits_of(1, voxels)
    return logits, draw(np.concatenate([np.zeros_like(logits), 0.4 * logits - 0.9], axis=1))


def case(name: str, voxels: int = 40_000) -> tuple[np.ndarray, np.ndarray]:
    if name == "platt":
        return one_logit(voxels)
    logits = logits_of(3, voxels)
    return logits, draw(logits @ WEIGHT.T + BIAS)


def probabilities(logits: np.ndarray) -> np.ndarray:
    return scipy.special.softmax(voxels.as_classes(logits), axis=1)


def nll(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(-np.mean(np.log(probabilities(logits)[np.arange(len(labels)), labels])))


def test_vector_recovers_its_parameters():
    logits = logits_of(3)
    weight, bias = np.array([0.5, 0.9, 0.3]), np.array([0.6, -0.2, -0.4])
    params = calibrators.get("vector").fit([(logits, draw(weight * logits + bias))])
    np.testing.assert_allclose(params["weight"], weight, atol=0.03)
    np.testing.assert_allclose(params["bias"], bias, atol=0.04)


def test_matrix_recovers_its_parameters():
    params = calibrators.get("matrix").fit([case("matrix")])
    # A row added to all rows changes nothing: compare what does not depend on it.
    np.testing.assert_allclose(params["weight"] - np.mean(params["weight"], 0), WEIGHT - WEIGHT.mean(0), atol=0.03)
    np.testing.assert_allclose(params["bias"], BIAS - BIAS.mean(), atol=0.04)
    np.testing.assert_allclose(np.sum(params["weight"], axis=0), 1, atol=1e-9)


@pytest.mark.parametrize("name", ["platt", "vector", "matrix"])
def test_a_single_logit_is_platt_scaling(name: str):
    params = calibrators.get(name).fit([one_logit()])
    np.testing.assert_allclose(np.ravel(params["weight"]), [0.4], atol=0.02)
    np.testing.assert_allclose(params["bias"], [-0.9], atol=0.03)


def test_platt_of_two_logits():
    logits, labels = one_logit()
    one, platt = calibrators.get("platt").fit([(logits, labels)]), calibrators.get("platt")
    shift = np.random.default_rng(3).normal(size=logits.shape)
    pair = np.concatenate([shift, shift + logits], axis=1)
    two = platt.fit([(pair, labels)])
    np.testing.assert_allclose(two["weight"], one["weight"], rtol=1e-9)
    mapped = platt.apply(two, pair)
    np.testing.assert_allclose(mapped.mean(axis=1), pair.mean(axis=1), atol=1e-12)
    np.testing.assert_allclose(probabilities(mapped), probabilities(platt.apply(one, logits)), rtol=1e-9)
    with pytest.raises(DataError, match="two classes, got 3 logits; use vector"):
        platt.fit([case("vector")])
    with pytest.raises(DataError, match="two classes, got 3 logits"):
        platt.apply(two, np.zeros((1, 3)))


def test_dirichlet_recovers_its_parameters():
    log_p = np.log(probabilities(logits_of(3)))
    params = dirichlet.fit([(log_p, draw(log_p @ WEIGHT.T + BIAS))], odir=0)
    np.testing.assert_allclose(params["weight"] - np.mean(params["weight"], 0), WEIGHT - WEIGHT.mean(0), atol=0.05)
    np.testing.assert_allclose(params["bias"] - np.mean(params["bias"]), BIAS - BIAS.mean(), atol=0.06)


def test_dirichlet_objective_is_stationary_in_every_entry():
    logits, labels = case("dirichlet", 2_000)
    params = dirichlet.fit([(logits, labels)], odir=0.02, intercept=0.05)
    log_p = np.log(probabilities(logits))

    def objective(weights: np.ndarray) -> float:
        off = weights[:, :-1] - np.diag(np.diag(weights))
        value = nll(log_p @ weights[:, :-1].T + weights[:, -1], labels)
        return value + 0.02 * np.sum(off**2) + 0.05 * np.sum(weights[:, -1] ** 2)

    best = np.column_stack([params["weight"], params["bias"]])
    np.testing.assert_allclose(params["objective"], objective(best), rtol=1e-12)
    for step in 1e-3 * np.eye(best.size).reshape(-1, *best.shape):
        assert min(objective(best + step), objective(best - step)) > params["objective"]


def test_dirichlet_options():
    chunk = case("dirichlet", 2_000)
    plain = dirichlet.fit([chunk], odir=0.06, intercept=0.03)
    normalised = dirichlet.fit([chunk], odir=0.06 * 6, intercept=0.03 * 3, reg_norm=True)
    np.testing.assert_allclose(normalised["weight"], plain["weight"], atol=1e-6)
    assert dirichlet.fit([chunk], odir=0.06)["intercept"] == 0.06
    reference = dirichlet.fit([chunk], odir=0.06, intercept=0.03, ref_row=True)
    assert reference["weight"][-1] == [0, 0, 0]
    assert reference["bias"][-1] == 0
    assert abs(reference["nll_after"] - plain["nll_after"]) > 1e-5
    free = [dirichlet.fit([chunk], odir=0, ref_row=parity)["nll_after"] for parity in (False, True)]
    np.testing.assert_allclose(*free, rtol=1e-9)  # without penalties the reference row changes nothing
    strong = dirichlet.fit([chunk], odir=1e4)
    assert np.abs(np.array(strong["weight"]) - np.diag(np.diag(strong["weight"]))).max() < 1e-4
    for wrong in ({"odir": -1}, {"intercept": float("nan")}, {"epsilon": 0}):
        with pytest.raises(UsageError, match=f"Dirichlet calibration needs .*{next(iter(wrong))[:5]}"):
            dirichlet.fit([chunk], **wrong)


def test_dirichlet_of_one_logit_is_that_of_two():
    logits, labels = one_logit(3_000)
    one = dirichlet.fit([(logits, labels)], odir=0.1)
    two = dirichlet.fit([(voxels.as_classes(logits), labels)], odir=0.1)
    assert one["weight"] == two["weight"]
    mapped = dirichlet.apply(one, logits)
    assert mapped.shape == logits.shape
    pair = dirichlet.apply(two, voxels.as_classes(logits))
    np.testing.assert_allclose(probabilities(mapped), probabilities(pair), rtol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_lowers_the_likelihood_and_records_it(name: str):
    logits, labels = case(name, 5_000)
    calibrator = calibrators.get(name)
    params = calibrator.fit([(logits, labels)], provenance={"region": "all", "split": "val"})
    np.testing.assert_allclose(params["nll_before"], nll(logits, labels), rtol=1e-12)
    np.testing.assert_allclose(params["nll_after"], nll(calibrator.apply(params, logits), labels), rtol=1e-9)
    assert params["nll_after"] < params["nll_before"] - 0.01
    assert (params["identifiable"], params["voxels"], params["voxels_seen"]) == (True, 5_000, 5_000)
    assert (params["calibrator"], params["provenance"]) == (name, {"region": "all", "split": "val"})
    assert json.loads(json.dumps(params)) == params
    assert calibrator.spatial is False


@pytest.mark.parametrize("name", NAMES)
def test_numpy_and_jax_agree_and_keep_the_shape(name: str):
    logits, labels = case(name, 2_000)
    calibrator = calibrators.get(name)
    params = calibrator.fit([(logits, labels)])
    volume = logits[:120].reshape(2, 3, 4, 5, -1).astype(np.float32)
    on_host = calibrator.apply(params, volume)
    on_device = calibrator.apply(params, jnp.asarray(volume))
    assert isinstance(on_host, np.ndarray)
    assert isinstance(on_device, jnp.ndarray)
    assert on_host.shape == on_device.shape == volume.shape
    assert on_host.dtype == on_device.dtype == np.float32
    np.testing.assert_allclose(on_device, on_host, rtol=2e-5, atol=2e-5)
    if name != "platt":
        with pytest.raises(DataError, match="fitted on 3 logits per voxel, got 4"):
            calibrator.apply(params, np.zeros((5, 4)))


@pytest.mark.parametrize("name", NAMES)
def test_chunks_do_not_matter_and_memory_is_bounded(name: str):
    logits, labels = case(name, 3_000)
    fit = calibrators.get(name).fit
    whole = fit([(logits, labels)], max_voxels=500, seed=3)
    pieces = zip(np.split(logits, [1, 1, 700, 1900]), np.split(labels, [1, 1, 700, 1900]), strict=True)
    assert fit(pieces, max_voxels=500, seed=3) == whole
    assert (whole["voxels"], whole["voxels_seen"]) == (500, 3_000)


def test_the_sample_holds_no_more_than_two_limits_and_a_chunk(monkeypatch: pytest.MonkeyPatch):
    held = []
    smallest = voxels._smallest

    def spy(waiting, *rest):
        held.append(sum(len(numbers) for numbers, *_ in waiting))
        return smallest(waiting, *rest)

    monkeypatch.setattr(voxels, "_smallest", spy)
    _, seen = voxels.sample(((np.zeros((70, 3)),) for _ in range(200)), 100, 0)
    assert seen == 14_000
    assert max(held) <= 2 * 100 + 70


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e4])
def test_separable_voxels_leave_the_logits(name: str, scale: float):
    labels = np.arange(40) % 2
    logits = scale * np.where(labels, 1.0, -1.0)[:, None]
    expect_identity(name, logits, labels, "separable")


@pytest.mark.parametrize("name", NAMES)
def test_an_absent_class_leaves_the_logits(name: str):
    expect_identity(name, logits_of(1, 50), np.zeros(50, int), "no voxel has class 1")


@pytest.mark.parametrize("name", NAMES)
def test_an_optimum_beyond_the_bounds_leaves_the_logits(name: str):
    logits, labels = one_logit(2_000)
    expect_identity(name, 1e-3 * logits, labels, "separable|outside")


@pytest.mark.parametrize("name", NAMES)
def test_saturated_logits_stay_finite(name: str):
    logits, labels = case(name, 500)
    params = calibrators.get(name).fit([(1e4 * logits, labels)])
    assert np.isfinite([*np.ravel(params["weight"]), *params["bias"], params["nll_after"]]).all()
    assert params["nll_after"] < params["nll_before"]


def expect_identity(name: str, logits: np.ndarray, labels: np.ndarray, reason: str) -> None:
    calibrator = calibrators.get(name)
    params = calibrator.fit([(logits, labels)])
    assert params["identifiable"] is False
    assert any(part in params["reason"] for part in reason.split("|"))
    assert params["nll_after"] == params["nll_before"]
    mapped = calibrator.apply(params, logits)
    np.testing.assert_allclose(probabilities(mapped), probabilities(logits), rtol=1e-9, atol=1e-15)


def test_the_gradient_is_that_of_the_likelihood():
    logits, labels = case("matrix", 200)
    weights = np.random.default_rng(2).normal(size=(3, 4))
    _, gradient = affine.likelihood(logits, labels, weights)
    for entry in np.ndindex(weights.shape):
        step = np.zeros_like(weights)
        step[entry] = 1e-6
        up, down = (affine.likelihood(logits, labels, weights + s * step)[0] for s in (1, -1))
        np.testing.assert_allclose(gradient[entry], (up - down) / 2e-6, atol=1e-8)
