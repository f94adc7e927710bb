import numpy as np
import pytest
import scipy.ndimage

from calsegx import interfaces
from calsegx.data import drawings

COUNT = 40


@pytest.fixture(scope="module")
def pool():
    return drawings.make_pool(COUNT, 64, seed=3, processes=1)


@pytest.fixture(scope="module")
def items(pool):
    return [drawings.pool_item(pool, index) for index in range(COUNT)]


def two_squares() -> drawings.Drawing:
    """A 12 x 12 square (1) with a 4 x 4 child (2) and an unrelated 2 x 2 object (3) on top of it."""
    labels = np.zeros((32, 32), np.uint8)
    labels[4:16, 4:16] = 1
    labels[6:10, 6:10] = 2
    labels[12:14, 12:14] = 3
    return drawings.Drawing(np.zeros((32, 32, 3), np.uint8), labels, np.array([0, 0, 1, 0]), (32, 32))


def test_same_seed_same_drawing():
    first, second = (drawings.draw(np.random.default_rng(7), 64) for _ in range(2))
    other = drawings.draw(np.random.default_rng(8), 64)
    np.testing.assert_array_equal(first.image, second.image)
    np.testing.assert_array_equal(first.labels, second.labels)
    assert not np.array_equal(first.image, other.image)


def test_pool_does_not_depend_on_processes_or_count():
    alone = drawings.make_pool(5, 32, seed=1, processes=1)
    shared = drawings.make_pool(3, 32, seed=1, processes=2)
    for one, two in zip(alone, shared, strict=True):
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(one[:3], two)


def test_pool_shapes(pool):
    images, labels, parents, extents = pool
    assert images.shape == (COUNT, 64, 64, 3) and images.dtype == np.uint8
    assert labels.shape == (COUNT, 64, 64) and labels.dtype == np.uint8
    assert parents.shape == (COUNT, drawings.MAXIMUM_OBJECTS + 1) and parents.dtype == np.int8
    assert extents.shape == (COUNT, 2) and extents.dtype == np.int16


def test_pool_item_is_what_draw_returned(items):
    rng = np.random.default_rng(np.random.SeedSequence(3, spawn_key=(4,)))
    direct = drawings.draw(rng, 64)
    np.testing.assert_array_equal(items[4].image, direct.image)
    np.testing.assert_array_equal(items[4].parents, direct.parents)
    assert items[4].extent == direct.extent


def test_parents_come_first_and_labels_are_known(items):
    for item in items:
        assert item.parents[0] == 0
        assert np.all(item.parents[1:] < np.arange(1, len(item.parents)))
        assert 1 <= len(item.parents) - 1 <= drawings.MAXIMUM_OBJECTS
        assert item.labels.max() < len(item.parents)
    assert max(len(item.parents) for item in items) > 8
    assert any(item.parents.max() > 0 for item in items)


def test_objects_are_seen_in_the_image(items):
    # A drawing with objects has edges where the labels change: stronger ones than elsewhere, on average.
    wins = 0
    for item in items:
        smooth = scipy.ndimage.gaussian_filter(item.image.astype(float), (1, 1, 0))
        edges = np.abs(np.diff(smooth, axis=0)).max(-1)[: item.extent[0] - 1, : item.extent[1]]
        change = (np.diff(item.labels.astype(int), axis=0) != 0)[: item.extent[0] - 1, : item.extent[1]]
        wins += edges[change].mean() > edges[~change].mean()
    assert wins >= 0.9 * COUNT


def test_padding_is_empty(items):
    padded = [item for item in items if item.extent != (64, 64)]
    assert 0 < len(padded) < COUNT / 2
    for item in padded:
        height, width = item.extent
        for array in (item.image, item.labels):
            assert not array[height:].any() and not array[:, width:].any()
        assert item.image[:height, :width].any()


def test_object_mask():
    drawing = two_squares()
    assert drawings.object_mask(drawing, 1, with_descendants=False).sum() == 144 - 16 - 4
    assert drawings.object_mask(drawing, 1, with_descendants=True).sum() == 144 - 4
    assert drawings.object_mask(drawing, 2, with_descendants=True).sum() == 16


@pytest.mark.parametrize("index", [0, 4, -1])
def test_object_mask_refuses_an_unknown_object(index):
    with pytest.raises(interfaces.DataError, match="id from 1 to 3"):
        drawings.object_mask(two_squares(), index, with_descendants=False)


@pytest.mark.parametrize(("minimum", "areas"), [(1, [124, 140, 16, 4]), (16, [124, 140, 16]), (125, [140]), (141, [])])
def test_targets_respect_the_minimum_area(minimum, areas):
    assert [mask.sum() for mask in drawings.targets(two_squares(), minimum)] == areas


def test_targets_leave_room_for_a_background_point():
    full = drawings.Drawing(
        np.zeros((8, 8, 3), np.uint8),
        np.pad(np.ones((4, 8), np.uint8), ((0, 4), (0, 0))),
        np.array([0, 0]),
        (4, 8),
    )
    assert drawings.targets(full, 1) == []


def test_prompts_of_drawings(items):
    rng, kinds = np.random.default_rng(0), []
    for item in items:
        height, width = item.extent
        for mask in drawings.targets(item, 30)[:4]:
            points, labels, box, kind = drawings.sample_prompt(mask, rng, extent=item.extent)
            kinds.append(kind)
            assert points.dtype == box.dtype == np.float32 and labels.dtype == np.int32
            if kind == "points":
                (x, y), (u, v) = points.astype(int)
                assert mask[y, x] and not mask[v, u] and v < height and u < width
                assert labels.tolist() == [1, 0] and not box.any()
            else:
                rows, columns = np.nonzero(mask)
                tight = np.array([columns.min(), rows.min(), columns.max(), rows.max()])
                sides = np.tile(tight[2:] - tight[:2] + 1, 2)
                assert np.all(np.abs(box - tight) <= 0.12 * sides + 1e-4)
                assert box.min() >= 0 and box[2] < width and box[3] < height
                assert labels.tolist() == [-1, -1] and not points.any()
    assert 0.3 < kinds.count("box") / len(kinds) < 0.6


def test_points_are_x_y_and_the_box_is_tight():
    mask = np.zeros((16, 32), bool)
    mask[2:5, 20:29] = True
    points = [drawings.sample_prompt(mask, np.random.default_rng(seed), 0.0)[0] for seed in range(40)]
    assert any(np.array_equal(pair[0], (24, 3)) for pair in points)  # the centroid
    assert any(np.array_equal(pair[1], (0, 15)) for pair in points)  # the farthest corner
    box = drawings.sample_prompt(mask, np.random.default_rng(0), 1.0, jitter=0.0)[2]
    assert box.tolist() == [20, 2, 28, 4]


@pytest.mark.parametrize("mask", [np.zeros((8, 8), bool), np.ones((8, 8), bool)])
def test_prompt_needs_inside_and_outside(mask):
    with pytest.raises(interfaces.DataError, match="some inside and outside"):
        drawings.sample_prompt(mask, np.random.default_rng(0))


@pytest.mark.parametrize(("count", "processes"), [(0, 1), (1, 0)])
def test_pool_refuses_nothing_to_do(count, processes):
    with pytest.raises(interfaces.UsageError, match="at least 1"):
        drawings.make_pool(count, 32, 0, processes)
