"""Augmented views of a case's slices: small rotations, left-right flips, contrast and brightness."""

import numpy as np
from scipy import ndimage


def augment(
    images: np.ndarray,
    labels: np.ndarray,
    rng: np.random.Generator,
    rotation_degrees: float,
    intensity_fraction: float,
    spacing_mm: tuple[float, float] = (1.0, 1.0),
) -> tuple[np.ndarray, np.ndarray]:
    """Augment every slice on its own.

    A rigid rotation about the slice's centre by U(-rotation_degrees, rotation_degrees); a left-right flip
    with probability 1/2; ``c (x - m) + m + b m`` on pixels above 0, with ``c`` in 1 +- intensity_fraction,
    ``b`` in +- intensity_fraction and ``m`` their mean.  The background outside the head stays 0.

    Args:
        images: float ``[n, H, W, C]``, 0..255.
        labels: class indices ``[n, H, W]``; resampled to the nearest neighbour.
        rng: draws the same numbers for the same shape.
        rotation_degrees: 0 switches the rotation off.
        intensity_fraction: 0 switches contrast and brightness off; below 1.
        spacing_mm: of rows and columns; keeps the rotation rigid where they differ.

    Returns:
        Images float32 and labels, both shaped as given.
    """
    moved = np.empty(images.shape, np.float32)
    moved_labels = np.empty_like(labels)
    for index in range(len(images)):
        angle = np.deg2rad(rng.uniform(-rotation_degrees, rotation_degrees))
        flip = rng.random() < 0.5
        contrast = 1 + rng.uniform(-intensity_fraction, intensity_fraction)
        brightness = rng.uniform(-intensity_fraction, intensity_fraction)
        matrix = _rotation(angle, images.shape[1:3], spacing_mm)
        for channel in range(images.shape[-1]):
            ndimage.affine_transform(images[index, :, :, channel], matrix, output=moved[index, :, :, channel], order=1)
        ndimage.affine_transform(labels[index], matrix, output=moved_labels[index], order=0)
        if flip:
            moved[index] = moved[index, :, ::-1].copy()
            moved_labels[index] = moved_labels[index, :, ::-1].copy()
        moved[index] = _intensity(moved[index], contrast, brightness)
    return moved, moved_labels


def _rotation(angle: float, shape: tuple[int, int], spacing_mm: tuple[float, float]) -> np.ndarray:
    """Output pixel -> input pixel, homogeneous ``[3, 3]``: rotated in millimetres about the centre."""
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    centre = (np.array(shape) - 1) / 2
    matrix = np.eye(3)
    matrix[:2, :2] = turn * np.array(spacing_mm) / np.array(spacing_mm)[:, None]
    matrix[:2, 2] = centre - matrix[:2, :2] @ centre
    return matrix


def _intensity(image: np.ndarray, contrast: float, brightness: float) -> np.ndarray:
    head = image > 0
    if not head.any():
        return image
    mean = image[head].mean()
    return np.where(head, np.clip(contrast * (image - mean) + mean + brightness * mean, 0, 255), 0)
