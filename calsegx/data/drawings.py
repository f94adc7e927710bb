"""Procedural drawings: images of nested, overlapping objects, on which the tiny SAM learns to follow prompts.

The mask of every object is known, and no medical data is needed.  Three in ten drawings are brain-like slices
with random tissue contrasts, after SynthSeg (Billot et al. 2023, https://doi.org/10.1016/j.media.2023.102789).
"""

import concurrent.futures
import functools
import multiprocessing
from dataclasses import dataclass

import numpy as np
import scipy.ndimage
import scipy.special

from calsegx import interfaces
from calsegx.data import shapes

MAXIMUM_OBJECTS = 15
MINIMUM_PIXELS = 12  # a smaller object is not drawn (at a size of 128)
# Tissue brightness in T1 with contrast agent, T2 and FLAIR; columns: shapes.TISSUES.
MRI = np.array(
    [
        [0.90, 0.10, 0.18, 0.55, 0.67, 0.48, 0.92, 0.30, 0.57],
        [0.70, 0.07, 0.93, 0.60, 0.46, 0.73, 0.64, 0.84, 0.48],
        [0.62, 0.07, 0.16, 0.56, 0.47, 0.80, 0.72, 0.48, 0.54],
    ],
    np.float32,
)


@dataclass(frozen=True)
class Drawing:
    """An image and its objects, numbered from 1 in painting order: parents before children."""

    image: np.ndarray  # uint8 [S, S, 3], 0 in the padding
    labels: np.ndarray  # uint8 [S, S], id of the object on top, 0 = background and padding
    parents: np.ndarray  # int [n + 1], the object inside which each one was painted, 0 = none
    extent: tuple[int, int]  # (h, w): the picture is [:h, :w], the rest is padding


class _Canvas:
    """What is painted so far."""

    def __init__(self, rng: np.random.Generator, size: int, extent: tuple[int, int]) -> None:
        self.rng, self.size, self.extent = rng, size, extent
        self.noise = shapes.Noise(rng, size)
        self.image = np.zeros((size, size, 3), np.float32)
        self.labels = np.zeros((size, size), np.uint8)
        self.parents, self.depths = [0], [0]
        self.framed = np.zeros((size, size), bool)
        self.framed[: extent[0], : extent[1]] = True
        self.minimum = MINIMUM_PIXELS * (size / 128) ** 2

    def allowed(self, parent: int) -> np.ndarray:
        """Where a child of ``parent`` may be painted: on the parent and over its other descendants."""
        return _family(self.parents, parent)[self.labels] if parent else self.framed

    def paint(self, level: np.ndarray, parent: int, colour: np.ndarray, softness: float, opacity: float = 1.0) -> int:
        """Paints a colour (``[3]`` or ``[S, S, 3]``); returns the id, or 0 if too little would be seen."""
        allowed = self.allowed(parent)
        inside = (level > 0) & allowed
        if np.count_nonzero(inside) < self.minimum:
            return 0
        alpha = scipy.special.expit(level / np.float32(softness)) * allowed * np.float32(opacity)
        self.image += alpha[..., None] * (colour - self.image)
        self.labels[inside] = len(self.parents)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        return len(self.parents) - 1

    def texture(self) -> np.ndarray | None:
        """Noise, stripes, checks or a gradient ``[S, S]`` of about unit variance, or nothing."""
        kind = self.rng.choice(6, p=[0.35, 0.15, 0.2, 0.1, 0.15, 0.05])
        if kind == 0:
            return None
        if kind <= 2:
            return self.noise.field(int(self.rng.integers(0, 2) if kind == 1 else self.rng.integers(2, 5)))
        centre = (self.rng.uniform(0, self.size), self.rng.uniform(0, self.size))
        at = shapes.frame(self.size, centre, self.rng.uniform(0, 2 * np.pi), 1.0)
        if kind == 4:
            return at.u / np.float32(self.size / 3)
        waves = np.float32(2 * np.pi / (self.size * self.rng.uniform(0.03, 0.12)))
        return 1.4 * np.sin(waves * at.u) * (np.sign(np.sin(waves * at.v)) if kind == 5 else 1)


def draw(rng: np.random.Generator, size: int = 128) -> Drawing:
    """Draws one image of ``size x size`` pixels with 2 to 15 objects.

    Fewer where too many attempts fall out of sight.  The padding, below and to the right, is in one of four.
    """
    canvas = _Canvas(rng, size, _extent(rng, size))
    if rng.random() < 0.3:
        _paint_head(canvas)
        budget = min(len(canvas.parents) - 1 + rng.integers(0, 4), MAXIMUM_OBJECTS)
        _paint_objects(canvas, int(budget), nested=0.85, grey=True)
    else:
        _paint_background(canvas)
        _paint_objects(canvas, int(rng.integers(2, MAXIMUM_OBJECTS + 1)), nested=rng.uniform(0.2, 0.7), grey=False)
    image = _acquire(canvas)
    image[~canvas.framed] = 0
    return Drawing(image, canvas.labels, np.array(canvas.parents), canvas.extent)


def _extent(rng: np.random.Generator, size: int) -> tuple[int, int]:
    if rng.random() >= 0.25:
        return size, size
    short, shorter = (int(round(size * rng.uniform(0.55, 0.97))) for _ in range(2))
    return ((short, size), (size, short), (short, shorter))[rng.choice(3, p=[0.45, 0.45, 0.1])]


def _paint_background(canvas: _Canvas) -> None:
    rng = canvas.rng
    kind = rng.choice(3, p=[0.25, 0.35, 0.4])
    canvas.image += (0, rng.uniform(0, 1), rng.uniform(0, 1, 3).astype(np.float32))[kind]
    pattern = canvas.texture()
    if kind and pattern is not None:
        canvas.image += pattern[..., None] * np.float32(rng.uniform(0.01, 0.12))


def _paint_objects(canvas: _Canvas, total: int, nested: float, grey: bool) -> None:
    """Paints objects until there are ``total``, or the tries are used up."""
    rng, size = canvas.rng, canvas.size
    spread = rng.choice([0.0, 0.3, 1.0], p=[0.45, 0.2, 0.35]) if not grey else 0.0  # how much channels differ
    floor = np.exp(rng.uniform(np.log(0.06), np.log(0.35)))
    crisp = rng.random() < 0.6
    for _ in range(2 * total):
        if len(canvas.parents) > total:
            return
        parent, rooms = 0, None
        if rng.random() < nested and len(canvas.parents) > 1:
            parent = int(rng.integers(1, len(canvas.parents)))
            rooms = np.flatnonzero(canvas.labels == parent)
            if canvas.depths[parent] > 6 or rooms.size < 10 * canvas.minimum:
                continue
        if rooms is None:
            centre = (rng.uniform(0, canvas.extent[0]), rng.uniform(0, canvas.extent[1]))
            radius = size * np.exp(rng.uniform(np.log(0.04), np.log(0.36)))
        else:
            centre = divmod(int(rng.choice(rooms)), size)
            radius = np.sqrt(rooms.size / np.pi) * rng.uniform(0.2, 0.65)
        level = shapes.outline(rng, canvas.noise, size, centre, radius)
        inside = (level > 0) & canvas.allowed(parent)
        if np.count_nonzero(inside) < canvas.minimum:
            continue
        covered = canvas.image[inside]
        # Never fainter than what it covers varies: it could not be seen.
        contrast = max(rng.uniform(floor, max(2 * floor, 0.8)), 1.2 * covered.std(0).max())
        colour = _contrasting(rng, covered.mean(0), min(contrast, 0.9), spread)
        pattern = canvas.texture()
        if pattern is not None:
            weights = (1 + spread * rng.uniform(-0.8, 0.8, 3)) * rng.uniform(0.01, 0.13)
            colour = colour + pattern[..., None] * weights.astype(np.float32)
        softness = rng.uniform(0.2, 0.5) if crisp or rng.random() < 0.6 else rng.uniform(0.5, 2.0)
        canvas.paint(level, parent, colour, softness)


def _contrasting(rng: np.random.Generator, below: np.ndarray, contrast: float, spread: float) -> np.ndarray:
    """A colour that differs from ``below`` by ``contrast`` in its strongest channel, mirrored into [0, 1]."""
    direction = (1 - spread) * rng.choice([-1, 1]) + spread * rng.uniform(-1, 1, 3)
    change = contrast * direction / np.abs(direction).max()
    outside = (below + change < 0) | (below + change > 1)
    return np.clip(np.where(outside, below - change, below + change), 0, 1).astype(np.float32)


def _paint_head(canvas: _Canvas) -> None:
    """Paints a brain-like slice; the channels hold one, or three more or less related, tissue contrasts."""
    rng = canvas.rng
    table = MRI[rng.permutation(3)] + rng.normal(0, 0.06, MRI.shape)
    if rng.random() < 0.45:
        common = rng.uniform(0, 1, MRI.shape[1])
        table = common + rng.choice([0.0, 0.5, 1.0]) * (rng.uniform(0, 1, MRI.shape) - common)
    if rng.random() < 0.25:
        table = table[[0, 0, 0]]
    table = np.clip(table, 0.03, 1).astype(np.float32)
    air = rng.choice([0.0, rng.uniform(0, 0.08), rng.uniform(0, 1)], p=[0.75, 0.15, 0.1])
    canvas.image += np.float32(air)
    texture = 1 + rng.uniform(0, 0.05) * canvas.noise.field(0) + rng.uniform(0, 0.06) * canvas.noise.field(3)
    layers = shapes.head(rng, canvas.noise, canvas.size, canvas.extent)
    softness, ids = rng.uniform(0.3, 0.8), []
    for layer in layers:
        parent = ids[layer.inside] if layer.inside >= 0 else 0
        if layer.inside >= 0 and not parent:  # its own layer is out of sight, and so is it
            ids.append(0)
            continue
        lesion = shapes.TISSUES[layer.tissue] in ("oedema", "rim", "core")
        colour = table[:, layer.tissue] * texture[..., None].astype(np.float32)
        soft, opacity = (rng.uniform(0.5, 2.2), rng.uniform(0.6, 1)) if lesion else (softness, 1.0)
        ids.append(canvas.paint(layer.level, parent, colour, soft, opacity))


def _acquire(canvas: _Canvas) -> np.ndarray:
    """What a camera or a scanner adds: blur, uneven light, gamma and noise; uint8 ``[S, S, 3]``."""
    rng, image, noise = canvas.rng, canvas.image, canvas.noise
    if rng.random() < 0.35:
        image = scipy.ndimage.gaussian_filter(image, (*[rng.uniform(0.4, 1.2) * canvas.size / 128] * 2, 0))
    if rng.random() < 0.4:
        image = image * np.exp(rng.uniform(0.05, 0.3) * noise.field(4))[..., None]
    image = np.clip(image, 0, None)
    if rng.random() < 0.5:
        low, high = np.percentile(image[canvas.framed][::7], (0.5, 99.5))
        # Stretch to the full range at most four times: a flat drawing stays faint.
        image = (image - low) / max(high - low, 0.25)
    image = np.clip(image, 0, 1) ** np.float32(np.exp(rng.normal(0, 0.2)))
    sigma = rng.choice([0.0, rng.uniform(0, 0.02), rng.uniform(0.02, 0.06)], p=[0.2, 0.5, 0.3])
    if sigma > 0:
        shape = image.shape if rng.random() < 0.6 else (*image.shape[:2], 1)
        image = image + np.float32(sigma) * rng.standard_normal(shape, dtype=np.float32)
    return np.round(255 * np.clip(image, 0, 1)).astype(np.uint8)


def _family(parents: np.ndarray | list[int], index: int) -> np.ndarray:
    """Which ids are ``index`` or below it, bool ``[n + 1]``."""
    member = np.zeros(len(parents), bool)
    member[index] = True
    for child in range(index + 1, len(parents)):  # parents come first
        member[child] = member[parents[child]]
    return member


def object_mask(drawing: Drawing, index: int, with_descendants: bool) -> np.ndarray:
    """The visible part of object ``index`` (1 to n), if asked with what is inside it: bool ``[S, S]``."""
    if not 1 <= index < len(drawing.parents):
        count = len(drawing.parents) - 1
        raise interfaces.DataError(f"The drawing has no object {index}: use an id from 1 to {count}.")
    if with_descendants:
        return _family(drawing.parents, index)[drawing.labels]
    return drawing.labels == index


def targets(drawing: Drawing, minimum_area: int) -> list[np.ndarray]:
    """Masks worth a prompt, bool ``[S, S]``.

    The visible part of every object, and the object with its descendants where that differs, of at least
    ``minimum_area`` pixels.  There may be none.  A mask over more than 95 % of the picture is left out: it
    leaves no room for a background point.
    """
    height, width = drawing.extent
    masks: list[np.ndarray] = []
    for index in range(1, len(drawing.parents)):
        visible = object_mask(drawing, index, with_descendants=False)
        whole = object_mask(drawing, index, with_descendants=True)
        masks += [visible] if np.array_equal(visible, whole) else [visible, whole]
    return [mask for mask in masks if minimum_area <= np.count_nonzero(mask) <= 0.95 * height * width]


def sample_prompt(
    mask: np.ndarray,
    rng: np.random.Generator,
    box_fraction: float = 0.45,
    jitter: float = 0.06,
    extent: tuple[int, int] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """A random prompt for a mask, in the conventions of ``interfaces.Prompts``.

    With probability ``box_fraction`` a box: the tight one (first and last pixel), each edge moved by a
    Gaussian of standard deviation ``jitter`` times the side, clipped at twice that (SAM itself: 10 %, at
    most 20 px).  Otherwise a foreground point (the mask pixel nearest to the centroid, or any; half each) and
    a background point (the pixel farthest from the mask, one at most an eighth of the frame away, or any; a
    third each).  After Kirillov et al. 2023 (SAM), appendix A.

    Args:
        mask: bool ``[S, S]``, neither empty nor everything.
        rng: source of randomness.
        box_fraction: probability of a box.
        jitter: relative noise of the box.
        extent: ``(h, w)`` of the picture; given, no prompt lies in the padding.

    Returns:
        points float32 ``[2, 2]`` (x, y), foreground first; point labels int32 ``[2]``; box float32 ``[4]``
        (x0, y0, x1, y1); ``"points"`` or ``"box"``.  With a box the points are 0 and labelled -1; with points
        the box is 0 and not to be used.
    """
    height, width = extent or mask.shape
    mask = np.asarray(mask, bool)[:height, :width]
    inside = np.argwhere(mask)
    if not 0 < len(inside) < mask.size:
        raise interfaces.DataError(
            f"The mask covers {len(inside)} of {mask.size} pixels; a prompt needs some inside and outside: "
            "take masks from targets()."
        )
    if rng.random() < box_fraction:
        (top, left), (bottom, right) = inside.min(0), inside.max(0)
        sides = np.array([right - left + 1, bottom - top + 1] * 2)
        shift = np.clip(rng.normal(0, jitter, 4), -2 * jitter, 2 * jitter) * sides
        box = np.clip([left, top, right, bottom] + shift, 0, [width - 1, height - 1] * 2).astype(np.float32)
        return np.zeros((2, 2), np.float32), np.full(2, -1, np.int32), box, "box"
    if rng.random() < 0.5:
        foreground = inside[np.argmin(((inside - inside.mean(0)) ** 2).sum(1))]
    else:
        foreground = inside[rng.integers(len(inside))]
    background = _background_point(mask, rng)
    points = np.array([foreground[::-1], background[::-1]], np.float32)
    return points, np.array([1, 0], np.int32), np.zeros(4, np.float32), "points"


def _background_point(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    kind = rng.integers(3)
    if kind == 2:
        places = np.argwhere(~mask)
        return places[rng.integers(len(places))]
    distance = scipy.ndimage.distance_transform_edt(~mask)
    if kind == 0:
        return np.array(np.unravel_index(np.argmax(distance), mask.shape))
    near = np.argwhere((distance > 0) & (distance <= max(max(mask.shape) / 8, 1)))
    return near[rng.integers(len(near))]


def _pool_item(size: int, seed: int, index: int) -> Drawing:
    return draw(np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(index,))), size)


def make_pool(
    count: int, size: int, seed: int, processes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Draws ``count`` images; item ``i`` depends on ``(seed, i)`` alone, whatever the number of processes.

    Returns:
        images uint8 ``[n, S, S, 3]``, labels uint8 ``[n, S, S]``, parents int8 ``[n, MAXIMUM_OBJECTS + 1]``
        (0: no parent, -1: no such object) and extents int16 ``[n, 2]``.  ``pool_item`` takes one out.
    """
    if count < 1 or processes < 1:
        raise interfaces.UsageError(
            f"A pool needs count and processes of at least 1, got {count} and {processes}: change them."
        )
    make = functools.partial(_pool_item, size, seed)
    if processes == 1:
        drawings = [make(index) for index in range(count)]
    else:
        # Not a fork: the caller may hold threads of jax.
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as executor:
            drawings = list(executor.map(make, range(count), chunksize=max(1, min(32, count // processes))))
    parents = np.full((count, MAXIMUM_OBJECTS + 1), -1, np.int8)
    for row, drawing in zip(parents, drawings, strict=True):
        row[: len(drawing.parents)] = drawing.parents
    images, labels = np.stack([d.image for d in drawings]), np.stack([d.labels for d in drawings])
    return images, labels, parents, np.array([d.extent for d in drawings], np.int16)


def pool_item(pool: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], index: int) -> Drawing:
    """Item ``index`` of what ``make_pool`` returned."""
    images, labels, parents, extents = (part[index] for part in pool)
    return Drawing(images, labels, parents[parents >= 0].astype(int), (int(extents[0]), int(extents[1])))
