"""Augmentation: what moves together, what stays, and that the same numbers come again."""

import numpy as np
import pytest

from calsegx import configs
from calsegx.data import augment


def ranges(rotation_degrees, intensity_fraction, **others):
    return configs.DataConfig(rotation_degrees=rotation_degrees, intensity_fraction=intensity_fraction, **others)


def test_augment_moves_image_and_labels_together():
    labels = np.zeros((6, 40, 50), np.uint8)
    labels[:, 8:20, 10:18] = 1
    images = np.repeat(labels[..., None] * np.float32(200), 3, axis=-1)
    moved, moved_labels, _ = augment.augment(images, labels, np.random.default_rng(0), ranges(15.0, 0.0))
    assert moved.dtype == np.float32
    assert moved_labels.dtype == np.uint8
    for image, label, original in zip(moved, moved_labels, labels, strict=True):
        overlap = ((image[..., 0] > 100) & (label == 1)).sum() / label.sum()
        assert overlap > 0.95
        assert abs(int(label.sum()) - int(original.sum())) < 12  # rigid
    assert sum((after != before).any() for after, before in zip(moved_labels, labels, strict=True)) >= 4
    flipped = moved_labels[:, :, 25:].sum(axis=(1, 2)) > 0
    assert 0 < flipped.sum() < 6


def test_augment_off_is_a_flip_at_most():
    images = np.random.default_rng(1).uniform(0, 255, (4, 8, 9, 3)).astype(np.float32)
    labels = np.zeros((4, 8, 9), np.uint8)
    moved, _, _ = augment.augment(images, labels, np.random.default_rng(0), ranges(0.0, 0.0))
    for before, after in zip(images, moved, strict=True):
        assert np.allclose(after, before, atol=1e-4) or np.allclose(after, before[:, ::-1], atol=1e-4)


def test_augment_keeps_air_black_and_rotates_in_millimetres():
    images = np.zeros((1, 60, 20, 1), np.float32)
    images[0, 15:45, 5:15] = 100.0  # 30 mm x 30 mm on pixels of 1 x 3 mm
    labels = (images[..., 0] > 0).astype(np.uint8)
    rng = np.random.default_rng(5)
    moved, moved_labels, _ = augment.augment(images, labels, rng, ranges(15.0, 0.2), (1.0, 3.0))
    assert moved[0, 0, 0, 0] == 0
    assert moved.max() <= 255
    assert abs(int(moved_labels.sum()) - 300) < 20


def bright_pixels(count=24, shape=(40, 50)):
    """One slice per pixel: black but for a head of 20 and one bright block of 3 x 3, and its centre (x, y)."""
    rng = np.random.default_rng(3)
    rows, columns = rng.integers(12, shape[0] - 12, count), rng.integers(15, shape[1] - 15, count)
    images = np.full((count, *shape, 1), 20.0, np.float32)
    for image, row, column in zip(images, rows, columns, strict=True):
        image[row - 1 : row + 2, column - 1 : column + 2] = 200.0
    return images, np.stack([columns, rows], axis=1)


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (1.0, 2.5)])
def test_moves_map_points_onto_the_moved_image(spacing):
    images, points = bright_pixels()
    labels = (images[..., 0] > 100).astype(np.uint8)
    moved, moved_labels, moves = augment.augment(images, labels, np.random.default_rng(0), ranges(15.0, 0.0), spacing)
    homogeneous = np.concatenate([points, np.ones((len(points), 1))], axis=1)
    mapped = np.einsum("nij,nj->ni", moves, homogeneous)
    np.testing.assert_allclose(mapped[:, 2], 1)
    assert np.abs(mapped[:, :2] - points).max() > 3  # they do move
    for image, label, (column, row) in zip(moved, moved_labels, mapped[:, :2], strict=True):
        weights = np.clip(image[..., 0] - 20, 0, None)
        centre = np.array([np.average(grid, weights=weights) for grid in np.indices(weights.shape)])
        np.testing.assert_allclose(centre, (row, column), atol=0.25)
        np.testing.assert_allclose(np.argwhere(label).mean(axis=0), (row, column), atol=0.75)


EVERYTHING = {"gamma": 0.4, "noise": 0.1, "low_resolution": 3.0}


def textured():
    rng = np.random.default_rng(4)
    images = rng.uniform(20, 235, (5, 32, 36, 3)).astype(np.float32)
    images[:, :6] = 0  # background
    labels = np.zeros((5, 32, 36), np.uint8)
    labels[:, 12:20, 10:20] = 2
    return images, labels


def test_the_same_seed_gives_the_same_numbers():
    images, labels = textured()
    first, again, other = (
        augment.augment(images, labels, np.random.default_rng(seed), ranges(15.0, 0.2, **EVERYTHING))
        for seed in (7, 7, 8)
    )
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, two)
    assert np.abs(first[0] - other[0]).max() > 10
    np.testing.assert_array_equal(images, textured()[0])  # what was given stays


@pytest.mark.parametrize("name", EVERYTHING)
def test_the_scanners_part_leaves_labels_and_background_alone(name):
    images, labels = textured()
    for seed in range(3):
        rng = np.random.default_rng(seed)
        changed, changed_labels, moves = augment.augment(images, labels, rng, ranges(0.0, 0.0, **{name: 3.0}))
        assert changed.dtype == np.float32
        assert changed.min() >= 0 and changed.max() <= 255
        for before, after, label, move in zip(images, changed, changed_labels, moves, strict=True):
            sense = slice(None, None, int(np.sign(move[0, 0])))
            np.testing.assert_array_equal(label, labels[0][:, sense])
            assert not after[before[:, sense] == 0].any()
            assert np.abs(after - before[:, sense]).max() > 5


def one_slice(value, **settings):
    """A constant slice after augmentation with nothing but ``settings``."""
    images, labels = np.full((1, 64, 64, 1), value, np.float32), np.zeros((1, 64, 64), np.uint8)
    for seed in range(200):
        yield augment.augment(images, labels, np.random.default_rng(seed), ranges(0.0, 0.0, **settings))[0]


def test_gamma_has_the_stated_range():
    exponents = [np.log(image.mean() / 255) / np.log(100 / 255) for image in one_slice(100.0, gamma=0.3)]
    logarithms = np.log(exponents)
    assert -0.3 <= logarithms.min() < -0.27 and 0.27 < logarithms.max() <= 0.3
    assert abs(logarithms.mean()) < 0.04  # U(-g, g): a standard error is 0.012


def test_noise_has_the_stated_range():
    deviations = np.array([image.std() / 255 for image in one_slice(127.5, noise=0.1)])
    assert deviations.min() < 0.01 and 0.09 < deviations.max() < 0.103
    assert abs(deviations.mean() - 0.05) < 0.007  # U(0, noise): a standard error is 0.002


def test_low_resolution_blurs_up_to_the_stated_factor():
    images, labels = np.zeros((1, 60, 60, 1), np.float32), np.zeros((1, 60, 60), np.uint8)
    images[0, :, :30], images[0, :, 30:] = 50, 200
    widths = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        profile = augment.augment(images, labels, rng, ranges(0.0, 0.0, low_resolution=4.0))[0][0, 30, :, 0]
        assert np.all(np.diff(profile) >= -1e-3) or np.all(np.diff(profile) <= 1e-3)
        widths.append(np.count_nonzero((profile > 50.5) & (profile < 199.5)))
    assert min(widths) <= 2 and 3 <= max(widths) <= 8  # two coarse pixels of four


def test_a_slice_that_would_lose_its_foreground_is_not_rotated():
    labels = np.zeros((40, 40, 40), np.uint8)
    labels[:, 0, 0] = 1  # a corner leaves the image with every turn
    images = np.random.default_rng(5).uniform(1, 255, (40, 40, 40, 1)).astype(np.float32)
    moved, moved_labels, moves = augment.augment(images, labels, np.random.default_rng(0), ranges(15.0, 0.0))
    assert moved_labels.any(axis=(1, 2)).all()
    for before, image, label, move in zip(images, moved, moved_labels, moves, strict=True):
        sense = int(np.sign(move[0, 0]))
        if label[:, ::sense][0, 0]:  # image, label and points alike
            np.testing.assert_allclose(image, before[:, ::sense], atol=1e-4)
            np.testing.assert_array_equal(np.abs(move[:2, :2]), np.eye(2))
    without = augment.augment(images, 0 * labels, np.random.default_rng(0), ranges(15.0, 0.0))[0]
    assert np.abs(without - moved).max() > 10  # and turned where there is none to lose


def test_sagittal_slices_are_not_mirrored_front_to_back():
    images = np.tile(np.linspace(1, 200, 30, dtype=np.float32), (40, 20, 1))[..., None]
    labels = np.ones(images.shape[:3], np.uint8)
    for slice_axis, mirrored in (("axial", True), ("coronal", True), ("sagittal", False)):
        config = ranges(0.0, 0.0, slice_axis=slice_axis)
        moved, _, moves = augment.augment(images, labels, np.random.default_rng(0), config)
        rising = moved[:, 0, -1, 0] > moved[:, 0, 0, 0]
        assert (not rising.all()) == mirrored and rising.any()
        np.testing.assert_array_equal(moves[:, 0, 0] > 0, rising)
