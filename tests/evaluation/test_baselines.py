import dataclasses

import numpy as np
import pytest

from calsegx.data import frames, prompts
from calsegx.evaluation import baselines, predict
from calsegx.interfaces import Prompts, Volume
from calsegx.metrics import overlap

SPACING = (3.0, 1.0, 0.5)


def discs(radius_mm, centre=(12.0, 20.0), shape=(4, 25, 41), classes=(1,)):
    """A case with a disc of a known radius on slices 1 and 2, its point and box."""
    rows, columns = np.mgrid[: shape[1], : shape[2]]
    distance = ((rows - centre[0]) * SPACING[1]) ** 2 + ((columns - centre[1]) * SPACING[2]) ** 2
    labels = np.zeros(shape, np.uint8)
    labels[1:3] = (distance <= radius_mm**2) * classes[0]
    if len(classes) > 1:
        labels[1:3][(labels[1:3] > 0) & (columns > centre[1] + 4)] = classes[1]
    slices = np.array([1, 2])
    points = np.tile([centre[1], centre[0]], (2, 1))
    boxes = prompts.boxes_from_labels(labels[slices] > 0)
    return baselines.PromptedTruth(shape, SPACING, slices, points, boxes, labels)


def test_disc_finds_the_radius_in_millimetres():
    cases = [discs(5.0), discs(5.0, centre=(10.0, 16.0))]
    disc = baselines.fit_disc(cases, classes=1)
    assert disc.radius_mm == pytest.approx(5.0, rel=0.02)
    prediction = predict.segment(disc(cases[0])) == 1
    assert overlap.dice(prediction, cases[0].labels == 1) > 0.97
    assert not prediction[[0, 3]].any()


def test_dice_by_radius_is_the_dice_of_the_painted_disc():
    case = discs(4.0)
    radii = np.array([1.0, 3.3, 4.0, 6.1])
    literal = []
    for radius in radii:
        painted = baselines.Disc(radius, np.array([1.0]))(case)[..., 0] > 0
        literal.append(overlap.dice(painted, case.labels > 0))
    np.testing.assert_allclose(baselines._dice_by_radius(case, radii), literal, rtol=1e-12)
    assert np.argmax(literal) == 2


def test_confidence_is_the_precision_on_the_training_labels():
    case = discs(5.0)
    ellipse = baselines.fit_ellipse([case], classes=1)
    inside = ellipse(case)[..., 0] > 0
    precision = (case.labels[inside] == 1).mean()
    assert 0.5 < precision <= 1
    np.testing.assert_allclose(ellipse.confidence, [precision])
    segmented = predict.segment(ellipse(case)) == 1
    np.testing.assert_array_equal(prompts.boxes_from_labels(segmented[case.slices]), case.boxes)
    assert overlap.dice(segmented, case.labels == 1) > 0.9


def test_shape_is_segmented_even_where_its_precision_is_below_one_half():
    case = discs(4.0)
    case.labels[1:3, ::2] = 0
    case.labels[1:3, :, ::3] = 0
    disc = baselines.fit_disc([case], classes=1)
    inside = baselines._squared_distances_mm(case) <= disc.radius_mm**2
    assert (case.labels[case.slices][inside] == 1).mean() < 0.5
    assert disc.confidence[0] == pytest.approx(0.5, abs=0.001)
    np.testing.assert_array_equal(predict.segment(disc(case))[case.slices] == 1, inside)


def test_several_classes_get_their_frequencies_and_the_most_frequent_wins():
    case = discs(5.0, classes=(2, 1))
    disc = baselines.fit_disc([case], classes=2)
    inside = baselines._squared_distances_mm(case) <= disc.radius_mm**2
    found = case.labels[case.slices][inside]
    np.testing.assert_allclose(disc.confidence, [(found == 1).mean(), (found == 2).mean()])
    assert set(np.unique(predict.segment(disc(case)))) == {0, 2}


def test_a_slice_without_a_point_stays_empty():
    case = discs(4.0)
    case.points[0] = np.nan
    volume = baselines.Disc(4.0, np.array([0.9]))(case)
    assert not volume[1].any()
    assert volume[2].any()


def test_nothing_to_fit_on_is_an_error():
    empty = baselines.PromptedTruth((2, 3, 3), SPACING, np.zeros(0, int), np.zeros((0, 2)), np.zeros((0, 4)))
    with pytest.raises(ValueError, match="no prompted slice"):
        baselines.fit_disc([empty], classes=1)
    with pytest.raises(ValueError, match="no prompted slice"):
        baselines.fit_ellipse([empty], classes=1)


def test_a_guess_needs_its_kind_of_prompt():
    case = dataclasses.replace(discs(4.0), boxes=None)
    with pytest.raises(ValueError, match="needs boxes"):
        baselines.fit_ellipse([case], classes=1)
    with pytest.raises(ValueError, match="needs labels"):
        baselines.fit_disc([dataclasses.replace(case, labels=None)], classes=1)


def test_prompted_truth_undoes_the_encoder_frame():
    case = discs(5.0)
    geometry = frames.frame_geometry(case.shape, case.spacing_mm, 64, (16, 16))
    foreground = case.labels[case.slices] > 0
    points, labels = prompts.points_from_labels(foreground, case.spacing_mm[1:])
    labels[1, 0] = -1
    boxes = frames.points_to_frame(case.boxes.reshape(-1, 2, 2), geometry).reshape(-1, 4)
    prompt = Prompts(frames.points_to_frame(points, geometry), labels, boxes)
    label = Volume(case.labels, np.eye(4), SPACING, np.zeros((3, 2)), None)
    native = baselines.prompted_truth(prompt, geometry, case.slices, label)
    np.testing.assert_allclose(native.points[0], case.points[0], atol=1e-4)
    assert np.isnan(native.points[1]).all()
    np.testing.assert_allclose(native.boxes, case.boxes, atol=1e-4)
    assert native.shape == case.shape
    np.testing.assert_array_equal(native.labels, case.labels)
