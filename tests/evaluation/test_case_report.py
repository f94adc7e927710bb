"""A case's report on small arrays: every number against its definition, every warning where it belongs."""

import dataclasses
import json

import numpy as np
import pytest

from calsegx.data import frames, preprocessing, training_domain
from calsegx.evaluation import case_report, review
from calsegx.interfaces import Case, Prompts, Volume
from calsegx.uncertainty import scores

SHAPE, SPACING = (6, 20, 24), (3.0, 1.0, 1.0)
NAMES = ("core", "oedema")


def prepared(slices=(1, 2, 3), point=(8, 5), boxes=None, **changes):
    """A case of six slices; on each of ``slices`` a foreground point ``(x, y)`` and a background one at a corner."""
    geometry = frames.frame_geometry(SHAPE, SPACING, 64, (16, 16), changes.pop("resample", ()))
    count = len(slices)
    images = np.full((count, *SHAPE[1:], 3), 90, np.float32)
    images[:, 15:] = 0  # outside of the head
    if boxes is None:
        points = np.tile(np.array([point, (23, 19)], np.float32), (count, 1, 1))
        points = frames.points_to_frame(points, geometry)
        prompts = {"gt_points": Prompts(points=points, labels=np.tile([1, 0], (count, 1)))}
        prompts["volume_points"] = prompts["gt_points"]
    else:
        corners = np.tile(np.array(boxes, np.float32).reshape(2, 2), (count, 1, 1))
        prompts = {"gt_box": Prompts(boxes=frames.points_to_frame(corners, geometry).reshape(-1, 4))}
    affine = np.diag([1.0, 1.0, 3.0, 1.0])
    reference = Volume(np.broadcast_to(np.float32(0), SHAPE), affine, SPACING, np.zeros((3, 2)), None)
    values = {
        "labels": None,
        "label_volume": None,
        "intensities": {"T1": (2.0, 50.0, 400.0)},
        **changes,
    }
    case = Case("p1", "p1", {}, None, "")
    return preprocessing.PreparedCase(
        case, np.array(slices, int), images, prompts=prompts, geometry=geometry, reference=reference, **values
    )


def probabilities(slices=(1, 2, 3)):
    """A square of core in a square of oedema round the point; nothing elsewhere."""
    found = np.zeros((*SHAPE, 2), np.float32)
    found[list(slices), 2:9, 4:13] = (0.02, 0.7)
    found[list(slices), 4:7, 6:11] = (0.9, 0.05)
    return found


def features(shift=0.0, count=3):
    return np.random.default_rng(7).normal(size=(count, 8, 8, 16)).astype(np.float32) + np.float32(shift)


def domain():
    """Of ten cases as ``features`` makes them."""
    rng = np.random.default_rng(0)
    geometry = prepared().geometry
    looks = [
        training_domain.Look(
            {"T1": (1.0, 40.0 + number, 300.0 + 10 * number)},
            training_domain.slice_vectors(rng.normal(size=(6, 8, 8, 16)), geometry),
        )
        for number in range(10)
    ]
    return training_domain.describe(looks)


def report(volume=None, case=None, protocol="gt_points", shift=0.0, known=None):
    case = prepared() if case is None else case
    volume = probabilities(case.slices) if volume is None else volume
    made = case_report.case_report(volume, NAMES, case, protocol, features(shift, len(case.slices)), known or domain())
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    return made


def codes(made):
    return [warning["code"] for warning in made["warnings"]]


def test_a_case_like_the_others_has_no_warning():
    assert report()["warnings"] == []


def test_the_numbers_are_what_they_are_called():
    volume, made = probabilities(), report()
    core, oedema = made["classes"]["core"], made["classes"]["oedema"]
    assert core["volume_ml"] == pytest.approx(3 * 3 * 5 * 0.003)
    assert core["expected_volume_ml"] == pytest.approx(3 * (15 * 0.9 + 48 * 0.02) * 0.003)
    assert core["mean_probability"] == pytest.approx(0.9)
    assert oedema["volume_ml"] == pytest.approx(3 * 48 * 0.003)
    assert oedema["mean_probability"] == pytest.approx(0.7)
    confidence = made["confidence"]
    inside = volume.sum(axis=-1) > 0.01
    assert confidence["mean_confidence"] == pytest.approx(review.mean_confidence(volume))
    assert confidence["mean_entropy"] == pytest.approx(scores.predictive_entropy(volume)[inside].mean())
    assert confidence["uncertain_share"] == pytest.approx(48 / 63)  # 0.72 is uncertain, 0.95 is not
    assert made["slices"] == {"total": 6, "prompted": 3, "between_prompts": 0, "nothing_predicted": 0}
    assert made["intensities"] == {"T1": [2, 50, 400]}


def test_what_is_not_predicted_has_no_confidence():
    made = report(volume=np.zeros((*SHAPE, 2), np.float32))
    assert codes(made) == ["nothing_predicted", "prompt_outside"]
    assert made["classes"]["core"] == {"volume_ml": 0, "expected_volume_ml": 0, "mean_probability": None}
    assert set(made["confidence"].values()) == {None}
    assert made["slices"]["nothing_predicted"] == 3


def test_a_case_without_a_prompted_slice():
    made = report(case=prepared(slices=()))
    assert codes(made) == ["nothing_predicted"]
    assert made["training_domain"]["unknown"] == "no slice was prompted"


@pytest.mark.parametrize(
    ("point", "said"),
    [
        ((8, 5), []),
        ((18, 5), ["3 of 3 foreground points lie outside what was segmented"]),
        ((8, 17), ["outside what was segmented", "3 of 3 foreground points lie on black voxels"]),
    ],
)
@pytest.mark.parametrize("protocol", ["gt_points", "volume_points"])
def test_points_outside(point, said, protocol):
    made = report(case=prepared(point=point), protocol=protocol)
    assert codes(made) == ["prompt_outside"] * len(said)
    for warning, words in zip(made["warnings"], said, strict=True):
        assert words.replace("3 of 3", "1 of 1" if protocol == "volume_points" else "3 of 3") in warning["message"]


def test_only_the_slices_where_it_is_outside_count():
    volume = probabilities((1, 3))
    (warning,) = report(volume)["warnings"]
    assert warning["message"].startswith("1 of 3 foreground points lie outside what was segmented")
    # One point for the volume is inside where any slice has it.
    assert report(volume, protocol="volume_points")["warnings"] == []


@pytest.mark.parametrize(("box", "wrong"), [((12, 8, 20, 12), 0), ((13, 9, 20, 12), 3)])
def test_boxes_without_foreground(box, wrong):
    made = report(case=prepared(boxes=box), protocol="gt_box")
    assert codes(made) == ["prompt_outside"] * bool(wrong)
    if wrong:
        assert made["warnings"][0]["message"].startswith("3 of 3 boxes hold no segmented voxel")


def test_slices_between_prompts():
    case = prepared(slices=(0, 3, 5))
    made = report(case=case)
    assert codes(made) == ["slices_between_prompts"] and made["slices"]["between_prompts"] == 3
    assert made["warnings"][0]["message"].startswith("3 slices between prompted ones")
    # Placed on labels they say that there is nothing; protocols of every slice leave out black ones alone.
    labelled = dataclasses.replace(case, label_volume=np.zeros(SHAPE, np.uint8))
    assert report(case=labelled)["warnings"] == []
    assert report(case=case, protocol="volume_points")["warnings"] == []


@pytest.mark.parametrize("depth", [3, 12])
def test_slices_of_another_working_grid(depth):
    """The point of a working slice is looked for on the slices of the file that it stands for."""
    case = prepared(slices=(1,), resample=(depth, 20, 24))
    there = {3: (2, 3), 12: (0,)}[depth]
    for number in range(6):
        made = report(probabilities([number]), case)
        assert codes(made) == ([] if number in there else ["prompt_outside"]), number


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((1.0, 12.0, 95.0), []),  # another scale, as scanners have
        ((0.0, 0.12, 0.95), ["the median of the voxels above 0 is 0.12", "the 99.5th percentile"]),
        ((9.0, 900.0, 6e3), ["of the training images 40 to 49, which it leaves by more than 10 times", "99.5th"]),
        ((1.0, 200.0, 300.0), ["the median of the voxels above 0 is 0.67 of their 99.5th percentile"]),
        (None, ["T1 has no voxel above 0"]),
    ],
)
def test_intensities_out_of_range(values, said):
    made = report(case=prepared(intensities={"T1": values}))
    assert len(codes(made)) == len(said) and set(codes(made)) <= {"intensity_out_of_range"}
    for warning, words in zip(made["warnings"], said, strict=True):
        assert words in warning["message"]


def test_unlike_the_training_cases():
    made = report()
    assert 0 < made["training_domain"]["distance"] < made["training_domain"]["limit"]
    shifted = report(shift=0.5)
    assert codes(shifted) == ["unlike_training"]
    distance, limit = (shifted["training_domain"][name] for name in ("distance", "limit"))
    assert distance > 2 * limit
    assert f"at the distance {distance:.3g}" in shifted["warnings"][0]["message"]
    assert f"within {limit:.3g}" in shifted["warnings"][0]["message"]


def test_models_that_do_not_know_their_training_cases():
    case = prepared(intensities={"T1": (0.0, 0.1, 0.9)})
    old = case_report.case_report(probabilities(), NAMES, case, "gt_points", features(9), None)
    assert old["warnings"] == [] and "of an earlier version" in old["training_domain"]["unknown"]
    online = report(case=case, shift=9, known=domain() | {"features": None})
    assert codes(online) == ["intensity_out_of_range"] * 2
    assert "without a feature cache" in online["training_domain"]["unknown"]
