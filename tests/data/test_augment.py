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
