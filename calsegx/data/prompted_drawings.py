"""Batches of drawings with prompts: what encoder, decoder and affinity loss see when the tiny SAM is pretrained."""

from typing import NamedTuple

import numpy as np

from calsegx.data import drawings

MINIMUM_AREA = 120  # pixels at 128 x 128: smaller targets are a few pixels of the 64 x 64 masks
ANCHORS, PIXELS = 160, 1024  # of the affinity loss, per image
PADDING_LABEL = 255

Pool = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # of drawings.make_pool


class Step(NamedTuple):
    """One batch: I images with P point prompts and P box prompts each."""

    images: np.ndarray  # [I, 128, 128, 3] normalised
    labels: np.ndarray  # [I, 64, 64] visible object, 255 in the padding
    points: np.ndarray  # [I * P, 2, 2]
    point_labels: np.ndarray  # [I * P, 2]
    boxes: np.ndarray  # [I * P, 4]
    targets: np.ndarray  # [2 * I * P, 64, 64] in [0, 1]; the point prompts' first
    anchors: np.ndarray  # [I, ANCHORS] flat indices into labels
    pixels: np.ndarray  # [I, PIXELS]


def make_step(
    pool: Pool,
    indices: np.ndarray,
    rng: np.random.Generator,
    prompts: int,
    *,
    pixel_mean: tuple[float, float, float],
    pixel_std: tuple[float, float, float],
    augment: bool,
) -> Step:
    """Assemble a batch from drawings of the pool, with ``prompts`` point prompts and as many boxes for each."""
    images, labels, anchors, pixels = [], [], [], []
    samples: dict[str, list] = {"points": [], "box": []}
    for index in indices:
        drawing = drawings.pool_item(pool, int(index))
        if augment:
            drawing = _augment(drawing, rng)
        h, w = drawing.extent
        image = (drawing.image - np.asarray(pixel_mean, np.float32)) / np.asarray(pixel_std, np.float32)
        image[h:] = image[:, w:] = 0
        images.append(image)
        label = drawing.labels.copy()
        label[h:] = label[:, w:] = PADDING_LABEL
        labels.append(label[1::2, 1::2])
        anchors.append(_balanced_pixels(labels[-1], ANCHORS, rng))
        pixels.append(_balanced_pixels(labels[-1], PIXELS, rng))
        masks = drawings.targets(drawing, MINIMUM_AREA) or [drawing.labels == 0]  # nothing large: the background
        for kind, box_fraction in (("points", 0.0), ("box", 1.0)):
            # As many different masks as there are, then any again.
            chosen = [
                *rng.permutation(len(masks))[:prompts],
                *rng.integers(len(masks), size=max(0, prompts - len(masks))),
            ]
            for mask in (masks[index] for index in chosen):
                sample = drawings.sample_prompt(mask, rng, box_fraction=box_fraction, extent=drawing.extent)
                samples[kind].append((*sample[:3], _halve(mask)))
    points, boxes = samples["points"], samples["box"]
    return Step(
        np.stack(images),
        np.stack(labels).astype(np.int32),
        np.stack([s[0] for s in points]),
        np.stack([s[1] for s in points]),
        np.stack([s[2] for s in boxes]),
        np.stack([s[3] for s in points + boxes]),
        np.stack(anchors),
        np.stack(pixels),
    )


def _augment(drawing: drawings.Drawing, rng: np.random.Generator) -> drawings.Drawing:
    """Flips inside the picture, transposition, permuted and inverted channels."""
    h, w = drawing.extent
    image, labels = drawing.image.copy(), drawing.labels.copy()
    for axis in (0, 1):
        if rng.random() < 0.5:
            image[:h, :w] = np.flip(image[:h, :w], axis)
            labels[:h, :w] = np.flip(labels[:h, :w], axis)
    image = image[..., rng.permutation(3)]
    if rng.random() < 0.15:
        image = 255 - image
    if rng.random() < 0.5:
        image, labels, (h, w) = image.swapaxes(0, 1), labels.swapaxes(0, 1), (w, h)
    return drawings.Drawing(image, labels, drawing.parents, (h, w))


def _balanced_pixels(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Half of the pixels uniform over the image, half uniform over labels."""
    flat = labels.ravel()
    ids, inverse, counts = np.unique(flat, return_inverse=True, return_counts=True)
    weights = 0.5 / flat.size + 0.5 / (len(ids) * counts[inverse])
    return np.searchsorted(np.cumsum(weights / weights.sum()), rng.random(count)).clip(max=flat.size - 1)


def _halve(mask: np.ndarray) -> np.ndarray:
    return mask.reshape(mask.shape[0] // 2, 2, -1, 2).mean((1, 3), dtype=np.float32)
