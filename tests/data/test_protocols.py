"""Where protocols place prompts, on masks that are easy to get wrong."""

import numpy as np
import pytest

from calsegx import configs
from calsegx.data import protocols

ONE_MM = (1.0, 1.0)
ROWS, COLUMNS = np.mgrid[:40, :50]
RADIUS = np.hypot(ROWS - 18, COLUMNS - 30)
MASKS = {
    "one pixel": (ROWS == 7) & (COLUMNS == 9),
    "corner pixel": (ROWS == 39) & (COLUMNS == 49),
    "whole slice": np.ones((40, 50), bool),
    "all but one pixel": (ROWS != 3) | (COLUMNS != 4),
    "ring": (RADIUS > 8) & (RADIUS < 12),
    "thin ring": (RADIUS > 8) & (RADIUS < 9.2),
    "disc": RADIUS < 7,
    "two parts": (RADIUS < 4) | ((ROWS > 30) & (COLUMNS < 6)),
}


def placed(labels, num_classes=1, slices=None, case_id="p"):
    slices = np.arange(len(labels)) if slices is None else slices
    return protocols.on_foreground(np.asarray(labels, np.uint8), slices, ONE_MM, num_classes, case_id)


def hit(mask, point):
    x, y = np.rint(point).astype(int)
    return bool(mask[y, x])


def test_every_protocol_has_a_placement():
    labels = MASKS["disc"][None].astype(np.uint8)
    every = protocols.on_every_slice(labels, np.eye(3)[None], (40, 50), (1.0, 1.0, 1.0))
    assert {*placed(labels), *every} == set(configs.PROTOCOLS)
    assert set(every) == set(configs.EVERY_SLICE)


@pytest.mark.parametrize("name", MASKS)
def test_points_lie_where_their_label_says(name):
    mask = MASKS[name]
    found = placed(mask[None])
    for protocol in ("gt_points", "random_points", "class_points"):
        foreground, background = found[protocol].points[0]
        assert found[protocol].labels[0].tolist() == [1, -1 if mask.all() else 0]
        assert hit(mask, foreground)
        assert mask.all() or not hit(mask, background)
    x0, y0, x1, y1 = found["gt_box"].boxes[0].astype(int)
    assert mask[y0 : y1 + 1, x0 : x1 + 1].sum() == mask.sum()
    assert mask[y0].any() and mask[y1].any() and mask[:, x0].any() and mask[:, x1].any()


def test_random_points_say_less_than_the_centroid():
    disc = np.repeat(MASKS["disc"][None], 200, axis=0)
    centre = placed(disc[:1])["gt_points"].points[0, 0]
    points = placed(disc)["random_points"].points[:, 0]
    distance = np.hypot(*(points - centre).T)
    assert np.count_nonzero(distance < 0.5) < 10
    # Uniform over a disc the mean distance is 2/3 of its radius; the border's pixels are left out.
    assert distance.mean() == pytest.approx(2 / 3 * 6, abs=0.4)
    assert distance.max() < 7 - 0.5


def test_random_points_are_seeded_by_case_and_slice():
    disc = np.repeat(MASKS["disc"][None], 8, axis=0)
    first = placed(disc)["random_points"].points
    np.testing.assert_array_equal(first, placed(disc)["random_points"].points)
    assert len(np.unique(first[:, 0], axis=0)) > 4
    assert np.any(first != placed(disc, case_id="q")["random_points"].points)
    # A slice keeps its point whichever others are prompted beside it.
    alone = placed(disc[3:4], slices=np.array([3]))["random_points"].points
    np.testing.assert_array_equal(alone[0], first[3])


def test_class_points_of_classes_that_a_slice_lacks():
    labels = np.zeros((2, 40, 50), np.uint8)
    labels[0][MASKS["disc"]] = 1
    labels[0][2:4, 2:4] = 3
    labels[1][10, 11] = 2
    found = placed(labels, num_classes=3)["class_points"]
    assert found.points.shape == (2, 4, 2)
    assert found.labels.tolist() == [[1, -1, 1, 0], [-1, 1, -1, 0]]
    np.testing.assert_allclose(found.points[0, [0, 2]], [[30, 18], [2.5, 2.5]])
    np.testing.assert_allclose(found.points[1, :3], [[0, 0], [11, 10], [0, 0]])


def test_no_slices_give_no_prompts():
    found = placed(np.zeros((0, 40, 50)), num_classes=2)
    assert found["gt_points"].points.shape == found["random_points"].points.shape == (0, 2, 2)
    assert found["class_points"].points.shape == (0, 3, 2)
    assert found["gt_box"].boxes.shape == (0, 4)


def test_one_pair_for_a_whole_volume():
    """The voxel nearest to the centroid, in millimetres, and the one farthest from the object."""
    volume = np.zeros((9, 20, 30), np.uint8)
    volume[2:5, 4:7, 6:9] = 1
    moves = np.tile(np.eye(3), (9, 1, 1))
    found = protocols.on_every_slice(volume, moves, (20, 30), (5.0, 1.0, 1.0))["volume_points"]
    assert found.points.shape == (9, 2, 2)
    np.testing.assert_array_equal(found.points, np.tile([[7, 5], [29, 19]], (9, 1, 1)))
    assert found.labels.tolist() == [[1, 0]] * 9


@pytest.mark.parametrize(("fill", "labels"), [(0, [-1, -1]), (1, [1, -1])])
def test_volumes_without_foreground_or_without_background(fill, labels):
    volume = np.full((3, 4, 5), fill, np.uint8)
    found = protocols.on_every_slice(volume, np.tile(np.eye(3), (2, 1, 1)), (4, 5), (1.0, 1.0, 1.0))
    assert found["volume_points"].labels.tolist() == [labels] * 2


def test_a_volume_of_a_hollow_object_is_prompted_inside_it():
    depth, row, column = np.mgrid[:21, :21, :21]
    radius = np.sqrt((depth - 10) ** 2 + (row - 10) ** 2 + (column - 10) ** 2)
    shell = (radius > 6) & (radius < 8)
    points, labels = protocols.volume_pair(shell, (1.0, 1.0, 1.0))
    assert labels.tolist() == [1, 0]
    x, y = points[0].astype(int)
    assert shell[:, y, x].any()


def test_points_of_a_volume_follow_the_augmentation_and_stay_in_the_slice():
    volume = np.zeros((2, 20, 30), np.uint8)
    volume[0, 4, 6] = 1
    flip = np.array([[-1.0, 0, 29], [0, 1, 0], [0, 0, 1]])
    away = np.array([[1.0, 0, 100], [0, 1, -100], [0, 0, 1]])
    found = protocols.on_every_slice(volume, np.stack([flip, away]), (20, 30), (1.0, 1.0, 1.0))["volume_points"]
    np.testing.assert_array_equal(found.points, [[[23, 4], [0, 19]], [[29, 0], [29, 0]]])


def test_none_needs_no_labels():
    found = protocols.on_every_slice(None, np.tile(np.eye(3), (3, 1, 1)), (20, 30), (1.0, 1.0, 1.0))
    assert set(found) == {"none"}
    assert found["none"].boxes.tolist() == [[0, 0, 29, 19]] * 3
    assert found["none"].points is None
