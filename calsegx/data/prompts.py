"""Prompts placed on reference labels, jittered as a user's would be, and drawn as maps."""

import functools
from collections.abc import Callable

import numpy as np
from scipy import ndimage

from calsegx.interfaces import Prompts

BACKGROUND, FOREGROUND, BOX_START, BOX_END, PADDING = 0, 1, 2, 3, -1


def points_from_labels(foreground: np.ndarray, spacing_mm: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """One foreground and one background point per slice, from the reference mask (CalSAM's protocol).

    Foreground: the mask's centroid, or, where that lies outside the mask (rings, several parts), the mask
    pixel nearest to it.  Background: the pixel farthest from the mask, the first in row order on ties.

    Args:
        foreground: bool ``[n, H, W]``.
        spacing_mm: of rows and columns.

    Returns:
        Points float32 ``[n, 2, 2]``, ``(x, y)`` in native pixels, foreground first, and their labels int32
        ``[n, 2]``.  An empty mask has no points and a mask that fills the slice no background point: label
        -1 at (0, 0).
    """
    points = np.zeros((len(foreground), 2, 2), np.float32)
    labels = np.full((len(foreground), 2), PADDING, np.int32)
    for mask, point, label in zip(foreground, points, labels, strict=True):
        if not mask.any():
            continue
        point[0], label[0] = _centre(mask, spacing_mm), FOREGROUND
        if not mask.all():
            distance = np.asarray(ndimage.distance_transform_edt(~mask, sampling=spacing_mm))
            row, column = np.unravel_index(np.argmax(distance), mask.shape)
            point[1], label[1] = (column, row), BACKGROUND
    return points, labels


def boxes_from_labels(foreground: np.ndarray) -> np.ndarray:
    """Tight boxes float32 ``[n, 4]``: first and last mask pixel ``(x0, y0, x1, y1)``, as MedSAM has them.

    Raises:
        ValueError: for a slice without foreground.
    """
    boxes = np.zeros((len(foreground), 4), np.float32)
    for mask, box in zip(foreground, boxes, strict=True):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if not len(rows):
            raise ValueError("a box needs foreground in every slice")
        box[:] = columns[0], rows[0], columns[-1], rows[-1]
    return boxes


def jitter(
    prompts: Prompts,
    rng: np.random.Generator,
    amount: float,
    size: int,
    part: tuple[int, int] | None = None,
) -> Prompts:
    """Prompts as an inexact user gives them: MedSAM's jitter of boxes, and the like for points.

    With ``j = amount * size`` every side of a box moves outwards by U(0, j), and every point by U(-j, j) along each
    axis, both then clipped to the slice.  Labels stay as they are, so a foreground point may leave its object.

    Args:
        prompts: in frame pixels, of one slice or of several.
        rng: draws the same numbers for the same shapes.
        amount: j as a fraction of the frame's side, from 0 to below 1; MedSAM's is 20 / 1024.
        size: S of the frame.
        part: (height, width) of the frame that the slice fills; None: all of it, as in training from the cache, which
            does not keep the slices' shapes.
    """
    height, width = part or (size, size)
    limit = np.array([width, height], np.float32)
    points, boxes = prompts.points, prompts.boxes
    if points is not None:
        moved = points + rng.uniform(-amount * size, amount * size, points.shape)
        is_point = np.asarray(prompts.labels)[..., None] != PADDING
        points = np.where(is_point, np.clip(moved, 0, limit), points).astype(np.float32)
    if boxes is not None:
        outwards = np.array([-1, -1, 1, 1]) * rng.uniform(0, amount * size, boxes.shape)
        boxes = np.clip(boxes + outwards, 0, np.tile(limit, 2)).astype(np.float32)
    return prompts._replace(points=points, boxes=boxes)


def jitter_of(amount: float, size: int) -> Callable[..., Prompts] | None:
    """``jitter`` by ``amount`` of a frame of ``size`` pixels; None where the amount is 0."""
    return functools.partial(jitter, amount=amount, size=size) if amount else None


def guided_maps(points: np.ndarray, labels: np.ndarray, shape: tuple[int, int], sigma: float) -> np.ndarray:
    """Points as images, for networks that take their prompts as input channels (guided U-Nets).

    ``G_c(x, y) = max_i exp(-((x - x_i)^2 + (y - y_i)^2) / (2 sigma^2))`` over the points ``i`` of kind ``c``: 1 at a
    point, 0 everywhere in a slice without points of the kind.  The maximum, not the sum, keeps the peak 1 where points
    lie close together.

    Args:
        points: ``[n, N, 2]`` ``(x, y)`` pixels.
        labels: ``[n, N]``: 1 foreground, 0 background, -1 no point.
        shape: (H, W).
        sigma: in pixels, above 0.

    Returns:
        float32 ``[n, H, W, 2]``: foreground, background.

    Raises:
        ValueError: for a sigma that is not above 0.
    """
    if not sigma > 0:
        raise ValueError(f"sigma must be above 0; got {sigma}")
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    maps = np.zeros((len(points), *shape, 2), np.float32)
    for image, of_slice, kinds in zip(maps, points, labels, strict=True):
        for (x, y), kind in zip(of_slice, kinds, strict=True):
            if kind != PADDING:
                channel = image[..., 0 if kind == FOREGROUND else 1]
                peak = np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * sigma**2))
                np.maximum(channel, peak, out=channel, casting="same_kind")
    return maps


def _centre(mask: np.ndarray, spacing_mm: tuple[float, float]) -> tuple[float, float]:
    pixels = np.argwhere(mask)
    centroid = pixels.mean(axis=0)
    if not mask[tuple(np.rint(centroid).astype(int))]:
        distance = np.square((pixels - centroid) * spacing_mm).sum(axis=1)
        centroid = pixels[np.argmin(distance)]
    return centroid[1], centroid[0]
