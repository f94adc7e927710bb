"""The record of the training cases: its numbers written out, and whether it tells what is unlike them."""

import json

import numpy as np
import pytest

from calsegx.data import frames, training_domain
from calsegx.data.training_domain import Look

SIZE = 12  # features; as few as are all kept apart


def look(rng, shift=0.0, count=10, intensities=((1, 40, 200),)):
    """A case whose slices lie about a place of its own, in an elongated cloud of 12 dimensions."""
    scale = np.geomspace(3, 0.1, SIZE)
    slices = rng.normal(size=SIZE) * scale / 3 + rng.normal(size=(count, SIZE)) * scale + shift
    return Look({f"channel {number}": values for number, values in enumerate(intensities)}, slices)


def looks(count=12, seed=0, **options):
    rng = np.random.default_rng(seed)
    return [look(rng, **options) for _ in range(count)]


def shrunk(slices):
    """Ledoit and Wolf's covariance in the words of their paper: sums over single observations."""
    centred = slices - slices.mean(axis=0)
    sample = np.mean([np.outer(row, row) for row in centred], axis=0)
    identity = np.eye(SIZE)
    size = np.trace(sample) / SIZE
    spread = np.sum((sample - size * identity) ** 2) / SIZE
    error = min(sum(np.sum((np.outer(row, row) - sample) ** 2) for row in centred) / SIZE / len(slices) ** 2, spread)
    return error / spread * size * identity + (1 - error / spread) * sample


def test_percentiles_are_of_the_voxels_above_0(monkeypatch):
    voxels = np.concatenate([np.zeros(500), -np.ones(3), np.arange(1, 1002)])
    assert training_domain.percentiles(voxels) == pytest.approx((6, 501, 996))
    monkeypatch.setattr(training_domain, "MOST_VOXELS", 300)  # every fourth
    assert training_domain.percentiles(voxels) == pytest.approx((6, 501, 996))
    assert training_domain.percentiles(np.zeros((2, 3, 4))) is None


def test_cases_are_chosen_from_end_to_end():
    assert training_domain.chosen([]) == [] and training_domain.chosen("abc") == list("abc")
    chosen = training_domain.chosen(range(1000))
    assert len(chosen) == training_domain.MOST_CASES and chosen[0] == 0 and chosen[-1] > 980
    assert set(np.diff(chosen)) == {15, 16}


def test_the_padding_of_the_frame_is_left_out():
    geometry = frames.frame_geometry((3, 40, 20), (1, 1, 1), 64, (16, 16))  # the slice fills the left half
    features = np.ones((3, 8, 8, 2), np.float32) * np.arange(3)[:, None, None, None]
    features[:, :, 4:] = 100
    np.testing.assert_array_equal(training_domain.slice_vectors(features, geometry), [[0, 0], [1, 1], [2, 2]])


def test_distances_are_mahalanobis_of_the_shrunk_covariance():
    cases = looks()
    slices = np.concatenate([case.slices for case in cases])
    features = training_domain.describe(cases)["features"]
    away = np.random.default_rng(1).normal(size=(5, SIZE)) * 3 - slices.mean(axis=0)
    inverse = np.linalg.inv(shrunk(slices))
    expected = [np.sqrt(row @ inverse @ row / SIZE) for row in away]
    found = training_domain.distances(features, away + slices.mean(axis=0))
    # What is not the last axis is kept apart; the last is the mean of itself.
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    held_out = [
        training_domain.distances(training_domain.describe(cases[:i] + cases[i + 1 :])["features"], case.slices)
        for i, case in enumerate(cases)
    ]
    assert features["limit"] == pytest.approx(np.percentile(np.concatenate(held_out), 99), rel=1e-4)


def test_it_tells_a_shift_from_more_of_the_same():
    features = training_domain.describe(looks())["features"]

    def median(case):
        return np.median(training_domain.distances(features, case.slices))

    same = [median(case) for case in looks(200, seed=1)]
    shifted = [median(case) for case in looks(200, seed=2, shift=0.7)]  # seven deviations of the narrowest axis
    assert np.mean(np.array(same) > features["limit"]) <= 0.01
    assert np.mean(np.array(shifted) > features["limit"]) == 1


def test_axes_and_units_of_the_features_do_not_matter():
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(SIZE, SIZE)))[0] * 7
    cases, there = looks(), looks(3, seed=5, shift=0.3)
    turned = [case._replace(slices=case.slices @ turn + 2) for case in cases]
    straight, other = (training_domain.describe(found)["features"] for found in (cases, turned))
    for case in there:
        np.testing.assert_allclose(
            training_domain.distances(straight, case.slices),
            training_domain.distances(other, case.slices @ turn + 2),
            rtol=1e-3,
        )


@pytest.mark.parametrize("features", [8, 300])
def test_few_and_equal_slices_give_finite_distances(features):
    """As of pictures, with one slice each: fewer slices than features, or two that are the same."""
    rng = np.random.default_rng(0)
    for slices in (rng.normal(size=(3, 1, features)), np.ones((3, 1, features)), np.zeros((2, 2, features))):
        record = training_domain.describe([Look({}, each) for each in slices])["features"]
        found = training_domain.distances(record, rng.normal(size=(4, features)))
        assert np.isfinite(found).all() and np.isfinite(record["limit"]) and (found > 0).all()


def test_the_record_is_json_with_ranges_over_the_cases():
    rng = np.random.default_rng(0)
    cases = [
        look(rng, intensities=((1, 40, 200), None)),
        look(rng, intensities=((2, 30, 300), (5, 6, 7))),
        look(rng, count=0, intensities=((1, 35, 250), None)),
    ]
    record = training_domain.describe(cases)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["cases"] == 3 and record["features"]["slices"] == 20
    assert record["intensities"] == {
        "channel 0": {"lowest": [1, 30, 200], "highest": [2, 40, 300], "ratio": [0.1, 0.2]},
        "channel 1": {"lowest": [5, 6, 7], "highest": [5, 6, 7], "ratio": [6 / 7, 6 / 7]},
    }


@pytest.mark.parametrize("known", [[], [0]])
def test_what_fewer_than_two_cases_look_like_is_not_known(known):
    cases = [case._replace(slices=case.slices if i in known else None) for i, case in enumerate(looks(2))]
    assert training_domain.describe(cases)["features"] is None
    assert training_domain.describe([])["features"] is None
