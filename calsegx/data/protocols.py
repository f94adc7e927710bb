"""Prompt protocols: where prompts are placed when nobody clicks.

All but ``none`` are placed on the reference labels, so a score under them is a benchmark, not what a user will see:

* ``gt_points``: per slice with foreground, the foreground's centroid and the pixel farthest from it (CalSAM's);
* ``random_points``: a random interior pixel in place of the centroid, which says less about the shape;
* ``class_points``: the centroid of every class, and the farthest pixel;
* ``gt_box``: per slice with foreground, the tight box (MedSAM's);
* ``volume_points``: one pair for a whole volume, repeated on every slice, also on those without foreground;
* ``none``: a box round the whole of every slice, for use without any prompt.

Coordinates here are native ``(x, y)`` pixels.
"""

import zlib

import numpy as np
from scipy import ndimage

from calsegx.data import prompts as prompt_tools
from calsegx.interfaces import Prompts

RANDOM_SEED = 2024  # of random_points: the same for every training seed, so that runs can be compared


def on_foreground(
    labels: np.ndarray, slices: np.ndarray, spacing_mm: tuple[float, float], num_classes: int, case_id: str
) -> dict[str, Prompts]:
    """The prompts of slices with foreground, by protocol.

    Args:
        labels: class indices ``[n, H, W]``, foreground in every slice.
        slices: ``[n]`` their numbers in the volume; with ``case_id`` they seed ``random_points``.
        spacing_mm: of rows and columns.
        num_classes: K.
        case_id: the case's name.
    """
    points, point_labels = prompt_tools.points_from_labels(labels > 0, spacing_mm)
    boxes = prompt_tools.boxes_from_labels(labels > 0)
    background = points[:, 1:], point_labels[:, 1:]
    random = points.copy()
    for row, number in enumerate(slices):
        seed = [RANDOM_SEED, zlib.crc32(case_id.encode()), int(number)]
        random[row, 0] = _interior(labels[row] > 0, np.random.default_rng(seed))
    centres = [prompt_tools.points_from_labels(labels == index, spacing_mm) for index in range(1, num_classes + 1)]
    of_classes = (
        np.concatenate([*(found[:, :1] for found, _ in centres), background[0]], axis=1),
        np.concatenate([*(kind[:, :1] for _, kind in centres), background[1]], axis=1),
    )
    return {
        "gt_points": Prompts(points=points, labels=point_labels),
        "random_points": Prompts(points=random, labels=point_labels),
        "class_points": Prompts(points=of_classes[0], labels=of_classes[1]),
        "gt_box": Prompts(boxes=boxes),
    }


def on_every_slice(
    volume_labels: np.ndarray | None,
    moves: np.ndarray,
    shape: tuple[int, int],
    spacing_mm: tuple[float, float, float],
) -> dict[str, Prompts]:
    """The prompts of protocols that do not know which slices hold foreground.

    Args:
        volume_labels: class indices ``[D, H, W]``; None gives ``none`` alone.
        moves: ``[n, 3, 3]``, how an augmentation moved the points ``(x, y, 1)`` of each of the n slices.
        shape: (H, W).
        spacing_mm: of D, H and W.
    """
    height, width = shape
    box = np.array([0, 0, width - 1, height - 1], np.float32)
    prompts = {"none": Prompts(boxes=np.tile(box, (len(moves), 1)))}
    if volume_labels is not None:
        pair, kind = volume_pair(volume_labels > 0, spacing_mm)
        homogeneous = np.concatenate([pair, np.ones((2, 1))], axis=1)
        moved = np.einsum("nij,pj->npi", moves, homogeneous)[..., :2]
        points = np.clip(moved, 0, [width - 1, height - 1]).astype(np.float32)  # a rotation turns corners out
        prompts["volume_points"] = Prompts(points=points, labels=np.tile(kind, (len(moves), 1)))
    return prompts


def volume_pair(foreground: np.ndarray, spacing_mm: tuple[float, float, float]) -> tuple[np.ndarray, np.ndarray]:
    """One foreground and one background point of a volume: float32 ``[2, 2]`` ``(x, y)``, and their labels ``[2]``.

    Foreground: the mask's voxel nearest to its centroid; background: the voxel farthest from the mask, in millimetres.
    What does not exist has the label -1 (padding).
    """
    points, labels = np.zeros((2, 2), np.float32), np.full(2, prompt_tools.PADDING, np.int32)
    if foreground.any():
        voxels = np.argwhere(foreground)
        nearest = np.argmin(np.square((voxels - voxels.mean(axis=0)) * spacing_mm).sum(axis=1))
        points[0], labels[0] = voxels[nearest][[2, 1]], prompt_tools.FOREGROUND
        if not foreground.all():
            distance = np.asarray(ndimage.distance_transform_edt(~foreground, sampling=spacing_mm))
            farthest = np.unravel_index(np.argmax(distance), foreground.shape)
            points[1], labels[1] = (farthest[2], farthest[1]), prompt_tools.BACKGROUND
    return points, labels


def _interior(mask: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    """A random ``(x, y)`` inside the mask: not on its border, unless it has nothing else."""
    inner = ndimage.binary_erosion(mask)
    row, column = rng.choice(np.argwhere(inner if inner.any() else mask))
    return column, row
