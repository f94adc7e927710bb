"""Prompts from reference masks, their jitter, and their maps."""

import numpy as np
import pytest

from calsegx.data import prompts
from calsegx.interfaces import Prompts

SPACING = (1.0, 1.0)


def one(mask, spacing=SPACING):
    points, labels = prompts.points_from_labels(mask[None], spacing)
    return points[0], labels[0].tolist()


def test_centroid_and_farthest_pixel():
    mask = np.zeros((20, 30), bool)
    mask[2:5, 4:8] = True
    points, labels = one(mask)
    assert labels == [1, 0]
    np.testing.assert_allclose(points, [[5.5, 3.0], [29, 19]])


def test_centroid_of_a_ring_snaps_into_it():
    rows, columns = np.mgrid[:41, :41]
    radius = np.hypot(rows - 20, columns - 20)
    mask = (radius > 8) & (radius < 11)
    points, labels = one(mask)
    x, y = points[0].astype(int)
    assert mask[y, x]
    assert labels == [1, 0]
    nearest = radius[mask].min()
    assert np.hypot(x - 20, y - 20) == pytest.approx(nearest)
    # The first of the nearest in row order.
    assert (y, x) == min((r, c) for r, c in np.argwhere(mask) if np.isclose(radius[r, c], nearest))


def test_background_ties_take_the_smallest_index():
    mask = np.zeros((21, 21), bool)
    mask[10, 10] = True
    points, _ = one(mask)
    assert points[1].tolist() == [0, 0]


def test_spacing_decides_what_is_far():
    mask = np.zeros((10, 10), bool)
    mask[0, 0] = True
    mask[0, 9] = True
    assert one(mask, (1.0, 1.0))[0][1].tolist() == [4, 9]
    mask[9, 0] = mask[9, 9] = True
    assert one(mask, (1.0, 3.0))[0][1].tolist() == [4, 4]
    mask[:] = False
    mask[0, :] = mask[:, 0] = True
    assert one(mask, (1.0, 5.0))[0][1].tolist() == [2, 9]


def test_full_and_empty_masks():
    points, labels = one(np.ones((5, 5), bool))
    assert labels == [1, -1]
    np.testing.assert_allclose(points, [[2, 2], [0, 0]])
    assert one(np.zeros((5, 5), bool))[1] == [-1, -1]


def test_boxes():
    mask = np.zeros((2, 10, 12), bool)
    mask[0, 2:5, 3:9] = True
    mask[1, 9, 11] = True
    assert prompts.boxes_from_labels(mask).tolist() == [[3, 2, 8, 4], [11, 9, 11, 9]]
    with pytest.raises(ValueError, match="foreground in every slice"):
        prompts.boxes_from_labels(np.zeros((1, 3, 3), bool))


def jittered(amount=0.1, seed=0, count=500, part=None):
    given = Prompts(
        points=np.tile(np.array([[50.0, 20.0], [0, 0]], np.float32), (count, 1, 1)),
        labels=np.tile(np.array([1, -1], np.int32), (count, 1)),
        boxes=np.tile(np.array([10.0, 20, 60, 95], np.float32), (count, 1)),
    )
    return given, prompts.jitter(given, np.random.default_rng(seed), amount, 100, part)


def test_jitter_moves_points_both_ways_and_boxes_outwards():
    given, moved = jittered()
    shift = moved.points[:, 0] - given.points[:, 0]
    assert -10 <= shift.min() < -9 and 9 < shift.max() <= 10
    assert abs(shift.mean()) < 1 and shift.std() == pytest.approx(20 / 12**0.5, rel=0.1)
    outwards = (moved.boxes - given.boxes) * [-1, -1, 1, 1]
    assert outwards.min() >= 0 and outwards[:, :3].max() <= 10
    assert outwards[:, :3].mean() == pytest.approx(5, abs=0.5)
    assert outwards[:, 3].max() == 5  # the frame's side is 100
    assert moved.points.dtype == moved.boxes.dtype == np.float32
    np.testing.assert_array_equal(moved.labels, given.labels)
    np.testing.assert_array_equal(moved.points[:, 1], given.points[:, 1])  # padding is no point


def test_jitter_is_seeded_and_stays_in_the_slice():
    _, first = jittered(seed=3)
    _, again = jittered(seed=3)
    _, other = jittered(seed=4)
    np.testing.assert_array_equal(first.points, again.points)
    assert np.any(first.points != other.points) and np.any(first.boxes != other.boxes)
    given, moved = jittered(amount=0.0)
    np.testing.assert_array_equal(moved.points, given.points)
    np.testing.assert_array_equal(moved.boxes, given.boxes)
    _, inside = jittered(amount=0.5, part=(97, 64))
    assert inside.points.min() == 0 and inside.points[..., 0].max() == 64
    assert inside.boxes[:, 2].max() == 64 and inside.boxes[:, 3].max() == 97


def test_jitter_of_one_kind_alone():
    rng = np.random.default_rng(0)
    box = prompts.jitter(Prompts(boxes=np.array([1.0, 2, 3, 4])), rng, 0.1, 64)
    assert box.points is None and box.labels is None and box.boxes.shape == (4,)
    point = prompts.jitter(Prompts(points=np.ones((2, 2)), labels=np.array([1, 0])), rng, 0.1, 64)
    assert point.boxes is None and point.points.shape == (2, 2)


def test_guided_maps():
    points = np.array([[[3.0, 2], [7, 5], [6, 5]], [[0, 0], [0, 0], [0, 0]]])
    labels = np.array([[1, 0, 0], [-1, -1, -1]])
    maps = prompts.guided_maps(points, labels, (8, 10), sigma=2.0)
    assert maps.shape == (2, 8, 10, 2) and maps.dtype == np.float32
    assert maps[0, 2, 3, 0] == maps[0, 5, 7, 1] == maps[0, 5, 6, 1] == 1
    assert maps.max() == 1
    assert maps[0, 4, 3, 0] == pytest.approx(np.exp(-0.5))  # one sigma away
    assert maps[0, 2, 6, 0] == pytest.approx(np.exp(-9 / 8))
    assert maps[0, 5, 9, 1] == pytest.approx(np.exp(-0.5))  # of the nearer of two, not their sum
    assert not maps[1].any()
    with pytest.raises(ValueError, match="sigma must be above 0"):
        prompts.guided_maps(points, labels, (8, 10), sigma=0.0)
