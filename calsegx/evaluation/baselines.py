"""Guesses made from the prompt alone: what a method must beat before its network deserves credit.

A prompt that was placed on the ground truth leaks the answer.  Two guesses measure how much:

* ``prompt_only_disc`` (point prompts): a disc round the foreground point, of the radius with the best mean DSC on the
  source domain's training labels;
* ``prompt_only_ellipse`` (box prompts): the ellipse inscribed in the box.

Neither sees the image.  The probability inside the shape is constant: the frequency of each class inside it on the
training labels (its precision), outside 0.  So the guesses are calibrated on the source as well as a constant can be,
and a calibration metric is defined for them.  Where that frequency would not win against the background, the
probabilities are scaled up until the most frequent class just does: the shape is what is being segmented.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from calsegx.data import frames
from calsegx.interfaces import Prompts, Volume

MARGIN = 1e-3  # by which the most frequent class wins against the background where precision is below one half


@dataclass(frozen=True)
class PromptedTruth:
    """What a guess is fitted on or made from: a case's prompted slices on its own grid.

    ``labels`` is None where a guess is made; coordinates are ``(x, y)`` pixels of the native grid, x along W.
    """

    shape: tuple[int, int, int]  # (D, H, W)
    spacing_mm: tuple[float, float, float]  # (D, H, W)
    slices: Int[np.ndarray, " n"]
    points: Float[np.ndarray, "n 2"] | None = None  # the foreground point
    boxes: Float[np.ndarray, "n 4"] | None = None  # (x0, y0, x1, y1)
    labels: np.ndarray | None = None  # [D, H, W] class indices


def prompted_truth(
    prompts: Prompts, geometry: frames.FrameGeometry, slices: Int[np.ndarray, " n"], label: Volume
) -> PromptedTruth:
    """The prompts on the native grid: the first foreground point, the box, and the truth.

    A slice without a foreground point gets NaN, and its disc is empty.

    Args:
        prompts: of the prompted slices, in frame coordinates.
        geometry: how the slices lie in the frame.
        slices: the prompted slices' indices along D.
        label: class indices ``[D, H, W]`` on the native grid.
    """
    points = boxes = None
    if prompts.points is not None:
        foreground = prompts.labels == 1
        native = frames.points_from_frame(prompts.points, geometry)
        first = native[np.arange(len(native)), foreground.argmax(axis=1)]
        points = np.where(foreground.any(axis=1)[:, None], first, np.nan)
    if prompts.boxes is not None:
        boxes = frames.points_from_frame(prompts.boxes.reshape(-1, 2, 2), geometry).reshape(-1, 4)
    return PromptedTruth(label.voxels.shape, label.spacing_mm, slices, points, boxes, label.voxels)


@dataclass(frozen=True)
class Disc:
    """A fitted disc: its radius and the probability of each class inside it."""

    radius_mm: float
    confidence: Float[np.ndarray, " K"]

    def __call__(self, case: PromptedTruth) -> Float[np.ndarray, "D H W K"]:
        """Foreground probabilities of a case; slices without a prompt are background."""
        return _paint(case, _squared_distances_mm(case) <= self.radius_mm**2, self.confidence)


@dataclass(frozen=True)
class Ellipse:
    """The ellipse inscribed in the box, and the probability of each class inside it."""

    confidence: Float[np.ndarray, " K"]

    def __call__(self, case: PromptedTruth) -> Float[np.ndarray, "D H W K"]:
        """Foreground probabilities of a case; slices without a prompt are background."""
        return _paint(case, _inside_ellipses(case), self.confidence)


def fit_disc(cases: Sequence[PromptedTruth], classes: int, *, candidates: int = 200) -> Disc:
    """The disc of the best mean DSC over ``cases`` (foreground: any class), found among radii on a geometric grid.

    Args:
        cases: training cases of the source domain, with points and labels.
        classes: K, the number of foreground classes.
        candidates: radii tried, from half a pixel to half the longest slice diagonal.

    Raises:
        ValueError: without any prompted slice.
    """
    _need_slices(cases)
    smallest = min(min(case.spacing_mm[1:]) for case in cases) / 2
    largest = max(math.hypot(*(n * s for n, s in zip(c.shape[1:], c.spacing_mm[1:], strict=True))) for c in cases) / 2
    radii = np.geomspace(smallest, largest, candidates)
    scores = np.mean([_dice_by_radius(case, radii) for case in cases if len(case.slices)], axis=0)
    radius = float(radii[scores.argmax()])
    insides = [_squared_distances_mm(case) <= radius**2 for case in cases]
    return Disc(radius, _confidence(cases, insides, classes))


def fit_ellipse(cases: Sequence[PromptedTruth], classes: int) -> Ellipse:
    """The ellipse's confidence on training cases, which need boxes and labels.

    Raises:
        ValueError: without any prompted slice.
    """
    _need_slices(cases)
    return Ellipse(_confidence(cases, [_inside_ellipses(case) for case in cases], classes))


def _need_slices(cases: Sequence[PromptedTruth]) -> None:
    if not any(len(case.slices) for case in cases):
        raise ValueError(f"The {len(cases)} training cases have no prompted slice to fit a prompt-only guess on.")


def _needed(case: PromptedTruth, name: str) -> np.ndarray:
    value = getattr(case, name)
    if value is None:
        raise ValueError(f"This prompt-only guess needs {name}; the case has none under its prompt protocol.")
    return value


def _dice_by_radius(case: PromptedTruth, radii: Float[np.ndarray, " R"]) -> Float[np.ndarray, " R"]:
    """DSC of the case for every radius, by counting pixels in order of their distance."""
    distances = np.sqrt(_squared_distances_mm(case))
    labels = _needed(case, "labels")
    foreground = labels[case.slices] > 0
    predicted = np.searchsorted(np.sort(distances, axis=None), radii, side="right")
    overlap = np.searchsorted(np.sort(distances[foreground]), radii, side="right")
    return 2 * overlap / (predicted + np.count_nonzero(labels))


def _squared_distances_mm(case: PromptedTruth) -> Float[np.ndarray, "n H W"]:
    """Squared distance of every pixel from its slice's foreground point."""
    _, height, width = case.shape
    _, row_mm, column_mm = case.spacing_mm
    points = _needed(case, "points")
    rows = (np.arange(height) - points[:, 1, None]) * row_mm
    columns = (np.arange(width) - points[:, 0, None]) * column_mm
    return rows[:, :, None] ** 2 + columns[:, None, :] ** 2


def _inside_ellipses(case: PromptedTruth) -> np.ndarray:
    _, height, width = case.shape
    x0, y0, x1, y1 = _needed(case, "boxes").T[:, :, None]
    # A box holds its border pixels, so its extent is one pixel more than the difference of their centres.
    rows = (np.arange(height) - (y0 + y1) / 2) / ((y1 - y0 + 1) / 2)
    columns = (np.arange(width) - (x0 + x1) / 2) / ((x1 - x0 + 1) / 2)
    return rows[:, :, None] ** 2 + columns[:, None, :] ** 2 <= 1


def _confidence(cases: Sequence[PromptedTruth], insides: Sequence[np.ndarray], classes: int) -> np.ndarray:
    found = np.concatenate([_needed(c, "labels")[c.slices][inside] for c, inside in zip(cases, insides, strict=True)])
    frequencies = np.bincount(found, minlength=classes + 1)[: classes + 1] / len(found)
    foreground = frequencies[1:]
    if foreground.max() == 0:
        raise ValueError("The prompt-only guess never touches the foreground of the training cases.")
    winning = (1 + MARGIN) / (foreground.max() + foreground.sum())  # s: s * max = 1 - s * sum, and a little more
    return foreground * max(1.0, winning)


def _paint(case: PromptedTruth, inside: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    volume = np.zeros((*case.shape, len(confidence)), np.float32)
    volume[case.slices] = inside[..., None] * confidence
    return volume
