"""Augmentation of a case's slices: rigid rotations, left-right flips, and how the scanner might have seen them."""

import numpy as np
from scipy import ndimage

from calsegx import configs


def augment(
    images: np.ndarray,
    labels: np.ndarray,
    rng: np.random.Generator,
    config: configs.DataConfig,
    spacing_mm: tuple[float, float] = (1.0, 1.0),
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Augment every slice on its own.

    In this order: a rigid rotation about the slice's centre by U(-a, a), ``a = rotation_degrees``, unless it would move
    the slice's whole foreground out of the image; a left-right flip with probability 1/2, but for
    sagittal slices, whose columns run from front to back; ``c (x - m) + m + b m`` with
    contrast ``c`` in 1 +- intensity_fraction, brightness ``b`` in +- intensity_fraction and ``m`` the mean of the
    pixels above 0; ``255 (x / 255)^g`` with ``g = exp(U(-gamma, gamma))``; linear sampling on a grid ``U(1,
    low_resolution)`` times as coarse, and back; Gaussian noise of standard deviation ``255 U(0, noise)``.  What is 0,
    the background outside the head, stays 0.

    Args:
        images: float ``[n, H, W, C]``, 0..255.
        labels: class indices ``[n, H, W]``; resampled to the nearest neighbour.
        rng: draws the same numbers for the same shape and configuration.
        config: the ranges; what is switched off (0; low_resolution 1) draws nothing beside rotation and intensity.
        spacing_mm: of rows and columns; keeps the rotation rigid where they differ.

    Returns:
        Images float32 and labels, both shaped as given, and ``[n, 3, 3]``: the move of a point ``(x, y, 1)``.
    """
    moved = np.empty(images.shape, np.float32)
    moved_labels = np.empty_like(labels)
    moves = np.empty((len(images), 3, 3))
    for index in range(len(images)):
        angle = np.deg2rad(rng.uniform(-config.rotation_degrees, config.rotation_degrees))
        flip = rng.random() < 0.5 and config.slice_axis != "sagittal"
        contrast = 1 + rng.uniform(-config.intensity_fraction, config.intensity_fraction)
        brightness = rng.uniform(-config.intensity_fraction, config.intensity_fraction)
        matrix = _rotation(angle, images.shape[1:3], spacing_mm)
        ndimage.affine_transform(labels[index], matrix, output=moved_labels[index], order=0)
        if labels[index].any() and not moved_labels[index].any():
            matrix, moved_labels[index] = np.eye(3), labels[index]
        for channel in range(images.shape[-1]):
            ndimage.affine_transform(images[index, :, :, channel], matrix, output=moved[index, :, :, channel], order=1)
        if flip:
            moved[index] = moved[index, :, ::-1].copy()
            moved_labels[index] = moved_labels[index, :, ::-1].copy()
        moves[index] = _move(matrix, flip, images.shape[2])
        moved[index] = _scanner(_intensity(moved[index], contrast, brightness), rng, config)
    return moved, moved_labels, moves


def _rotation(angle: float, shape: tuple[int, int], spacing_mm: tuple[float, float]) -> np.ndarray:
    """Output pixel -> input pixel, homogeneous ``[3, 3]``: rotated in millimetres about the centre."""
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    centre = (np.array(shape) - 1) / 2
    matrix = np.eye(3)
    matrix[:2, :2] = turn * np.array(spacing_mm) / np.array(spacing_mm)[:, None]
    matrix[:2, 2] = centre - matrix[:2, :2] @ centre
    return matrix


def _move(matrix: np.ndarray, flip: bool, width: int) -> np.ndarray:
    """The move of points (x, y, 1) that belongs to an output-to-input ``matrix`` of (row, column, 1)."""
    swap = np.array([[0.0, 1, 0], [1, 0, 0], [0, 0, 1]])
    mirror = np.array([[-1.0, 0, width - 1], [0, 1, 0], [0, 0, 1]]) if flip else np.eye(3)
    return mirror @ swap @ np.linalg.inv(matrix) @ swap


def _intensity(image: np.ndarray, contrast: float, brightness: float) -> np.ndarray:
    head = image > 0
    if not head.any():
        return image
    mean = image[head].mean()
    return np.where(head, np.clip(contrast * (image - mean) + mean + brightness * mean, 0, 255), 0)


def _scanner(image: np.ndarray, rng: np.random.Generator, config: configs.DataConfig) -> np.ndarray:
    """Gamma, low resolution and noise of one slice ``[H, W, C]``."""
    head = image > 0
    if config.gamma:
        image = 255 * (image / 255) ** np.exp(rng.uniform(-config.gamma, config.gamma))
    if config.low_resolution > 1:
        factor = rng.uniform(1, config.low_resolution)
        height, width = image.shape[:2]
        coarse = tuple(max(1, round(side / factor)) for side in (height, width))
        image = _resized(_resized(image, coarse), (height, width))
    if config.noise:
        image = image + rng.normal(0, 255 * rng.uniform(0, config.noise), image.shape)
    return np.where(head, np.clip(image, 0, 255), 0).astype(np.float32)


def _resized(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    factors = [new / old for new, old in zip(shape, image.shape[:2], strict=True)]
    return ndimage.zoom(image, (*factors, 1), order=1, mode="nearest", grid_mode=True)
