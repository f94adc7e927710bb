"""Figures of a report, as PNG bytes.

matplotlib is imported inside the functions: the rest of the package starts without it.  Figures are made without
pyplot, so there is no global state and no display.  Colours are Okabe and Ito's, which colour-blind readers can tell
apart; line styles and markers repeat what the colours say.
"""

import base64
import io
import itertools
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from calsegx.evaluation import methods

BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PURPLE, GREY, BLACK = "#56B4E9", "#CC79A7", "#8C8C8C", "#222222"
WINE = "#882255"  # Tol's: a dark one that is missing from Okabe and Ito's
_COLOURS = {
    "prompt_only_disc": GREY,
    "prompt_only_ellipse": GREY,
    "vanilla_sam": BLACK,
    "sam_ft": ORANGE,
    "sam_fip": BLUE,
    "sam_cmp": GREEN,
    "calsam": VERMILION,
}
# Of other methods, in turn; numbers without a common divisor, so that 15 pairs differ.
_SPARE_COLOURS = (PURPLE, SKY, WINE)
_SPARE_MARKERS = ("*", "h", "<", ">", "p")
_SPARE_LINES = ("-", "--", ":", "-.", (0, (6, 1)))
_MARKERS = {
    "prompt_only_disc": "X",
    "prompt_only_ellipse": "P",
    "vanilla_sam": "D",
    "sam_ft": "o",
    "sam_fip": "s",
}
_MARKERS |= {"sam_cmp": "^", "calsam": "v"}
_LINES = {"sam_ft": "-", "sam_fip": "--", "sam_cmp": "-.", "calsam": ":"}
_MOST_BANDS = 6  # methods whose spread over seeds can be told apart


@dataclass(frozen=True)
class Overlay:
    """One method's result on the slice that an overlay shows."""

    prediction: Bool[np.ndarray, "H W"]
    probability: Float[np.ndarray, "H W"]  # foreground


def data_uri(png: bytes) -> str:
    """A PNG as the ``src`` of an HTML image."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def training_curves(logs: Mapping[str, Sequence[Mapping[str, Any]]], quantities: Mapping[str, str]) -> bytes:
    """Logged quantities against the step, one panel per quantity, one line per method.

    A line is the mean over the seeds that logged the step, the band round it their range (of at most 6 methods).

    Args:
        logs: run (``sam_ft``, or ``sam_ft seed 42``) -> the records of its ``metrics.jsonl``, each with ``step``.
        quantities: key in the records -> axis label with its unit; quantities that no run logged get no panel.
    """
    shown = {k: label for k, label in quantities.items() if any(k in r for run in logs.values() for r in run)}
    if not shown:
        raise ValueError(f"No run has logged any of {', '.join(quantities)}.")
    runs: dict[str, list[Sequence[Mapping[str, Any]]]] = {}
    for run, records in logs.items():
        runs.setdefault(run.partition(" seed ")[0], []).append(records)
    styles = method_styles(runs)
    columns = min(len(shown), 2)
    tall = math.ceil(len(shown) / columns)
    fitting = max(1, min(4, int(4.4 * columns / legend_width(map(methods.display, runs)))))
    figure = canvas(4.4 * columns, 2.9 * tall + 0.2 + 0.2 * math.ceil(len(runs) / fitting))
    panels = figure.subplots(tall, columns, squeeze=False)
    for axes in panels.flat[len(shown) :]:
        axes.remove()
    for axes, (key, label) in zip(panels.flat, shown.items(), strict=False):
        values: list[float] = []
        for name, seeds in runs.items():
            by_step: dict[int, list[float]] = {}
            for record in itertools.chain.from_iterable(seeds):
                if record.get(key) is not None:
                    by_step.setdefault(record["step"], []).append(record[key])
            steps = sorted(by_step)
            found = [by_step[step] for step in steps]
            style = {"color": styles[name].colour, "linestyle": styles[name].line}
            style |= {"marker": "o"} if len(steps) == 1 else {}
            axes.plot(steps, list(map(np.mean, found)), label=methods.display(name), linewidth=1.4, **style)
            if len(runs) <= _MOST_BANDS:
                band = {"color": styles[name].colour, "alpha": 0.15, "linewidth": 0}
                axes.fill_between(steps, list(map(min, found)), list(map(max, found)), **band)
            values += itertools.chain.from_iterable(found)
        positive = [value for value in values if value > 0]
        if positive and len(positive) == len(values) and max(positive) > 50 * min(positive):
            axes.set_yscale("log")
        axes.set(xlabel="Training step", ylabel=label)
        axes.grid(alpha=0.3)
        axes.locator_params(axis="x", nbins=5)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=fitting, fontsize=9, frameon=False)
    return to_png(figure)


def overlay(
    image: Float[np.ndarray, "H W"],
    truth: Bool[np.ndarray, "H W"],
    results: Mapping[str, Overlay],
    spacing_mm: tuple[float, float],
    title: str,
) -> bytes:
    """One slice: the image with the truth, then per method both contours, the probability map and the errors.

    Args:
        image: intensities, shown between their 1st and 99.5th percentile.
        truth: the foreground.
        results: method -> its result.
        spacing_mm: pixel size along H and W, so that anisotropic pixels are drawn in proportion.
        title: what the slice is (domain, case, slice, DSC).
    """
    from matplotlib import lines

    columns = 1 + len(results)
    aspect = spacing_mm[0] / spacing_mm[1]
    tall = 2.0 * min(aspect * image.shape[0] / image.shape[1], 2.0)
    width = 2.05 * columns + 0.8
    title = textwrap.fill(title, int(11 * width))  # letters of an inch
    figure = canvas(width, 3 * tall + 0.9 + 0.17 * title.count("\n"))
    panels = figure.subplots(3, columns, squeeze=False)
    low, high = np.percentile(image, [1, 99.5])
    gray = {"cmap": "gray", "vmin": low, "vmax": max(high, low + 1e-6), "aspect": aspect}
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[])
    for index, axes in enumerate(panels[0]):
        axes.imshow(image, **gray)
        _contour(axes, truth, GREEN, "solid")
        axes.set_title("Image" if index == 0 else short(methods.display(list(results)[index - 1]), 28), fontsize=9)
    colours = None
    for above, axes, below, result in zip(*panels[:, 1:], results.values(), strict=True):
        _contour(above, result.prediction, ORANGE, "dashed")
        below.imshow(image, **gray)
        below.imshow(_errors(result.prediction, truth), aspect=aspect)
        colours = axes.imshow(result.probability, cmap="viridis", vmin=0, vmax=1, aspect=aspect)
        _contour(axes, truth, "white", "solid")
    for axes in panels[1:, 0]:
        axes.axis("off")
    keys = [
        lines.Line2D([], [], color=GREEN, label="truth"),
        lines.Line2D([], [], color=ORANGE, linestyle="dashed", label="prediction"),
        lines.Line2D([], [], color="#BBBBBB", label="truth on the map\n(white)"),
    ]
    panels[1, 0].legend(handles=keys, loc="center", fontsize=8, frameon=False)
    if colours is not None:
        figure.colorbar(colours, ax=panels[1, :], shrink=0.85, label="Foreground probability")
        wrong = [
            lines.Line2D([], [], marker="s", linestyle="none", color=colour, label=label)
            for colour, label in ((VERMILION, "false positive"), (SKY, "false negative"))
        ]
        panels[2, 0].legend(handles=wrong, loc="center", fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10, fontweight="bold")
    return to_png(figure)


def dice_against_ece(points: Mapping[str, Mapping[str, tuple[float, float]]], region: str) -> bytes:
    """DSC (points) against ECE, one panel per domain: the upper left corner is where one wants to be.

    Args:
        points: domain -> method -> (mean DSC in [0, 1], mean ECE); methods with a NaN are left out.
        region: the ECE's region.
    """
    names = methods.order(name for found in points.values() for name in found)
    styles = method_styles(names)
    columns = min(len(points), 3)
    tall = 3.9 * math.ceil(len(points) / columns)
    figure = canvas(3.6 * columns + legend_width(map(methods.display, names)), max(tall, 0.33 * len(names)))
    panels, first = grid(figure, len(points), columns, sharex=True, sharey=True)
    for axes, (domain, found) in zip(panels, points.items(), strict=True):
        for name in names:
            dice, ece = found.get(name, (math.nan, math.nan))
            axes.plot(
                [ece],
                [100 * dice],
                linestyle="none",
                markersize=9,
                markeredgewidth=1.8,
                label=methods.display(name),
                **styles[name].marker(),
            )
        axes.set_title(short(domain, 28), fontsize=10)
        axes.set_xlabel(f"ECE [{region}] (lower is better)")
        axes.grid(alpha=0.3)
        axes.margins(0.12)
    for axes in first:
        axes.set_ylabel("DSC in points (higher is better)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=9, frameon=False, labelspacing=0.9)
    return to_png(figure)


def canvas(width: float, height: float, constrained: bool = True) -> Any:
    """A matplotlib figure of this size in inches; ``constrained``: it finds the room for labels by itself."""
    from matplotlib import figure

    return figure.Figure(figsize=(width, height), dpi=110, layout="constrained" if constrained else None)


def to_png(figure: Any) -> bytes:
    """The figure's PNG."""
    buffer = io.BytesIO()
    # No software version in the file: the same numbers give the same bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def grid(figure: Any, count: int, columns: int, **shared: Any) -> tuple[list[Any], list[Any]]:
    """``count`` panels row by row, and those of them at the left."""
    panels = figure.subplots(math.ceil(count / columns), columns, squeeze=False, **shared)
    for axes in panels.flat[count:]:
        axes.remove()
    return list(panels.flat[:count]), list(panels[:, 0])


def _errors(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """``[H, W, 4]``: false positives and false negatives in colour, everything else transparent."""
    from matplotlib import colors

    shown = np.zeros((*truth.shape, 4))
    shown[prediction & ~truth] = colors.to_rgba(VERMILION, 0.85)
    shown[truth & ~prediction] = colors.to_rgba(SKY, 0.85)
    return shown


def _contour(axes: Any, mask: np.ndarray, colour: str, style: str) -> None:
    if mask.any() and not mask.all():
        axes.contour(mask.astype(float), [0.5], colors=[colour], linewidths=1.3, linestyles=style)


@dataclass(frozen=True)
class Style:
    """How a method is drawn everywhere in a figure."""

    colour: str
    shape: str
    line: Any  # of matplotlib
    hollow: bool  # with a calibrator

    def marker(self) -> dict[str, Any]:
        """Keywords of matplotlib."""
        face = "none" if self.hollow else self.colour
        return {"marker": self.shape, "markeredgecolor": self.colour, "markerfacecolor": face}


def method_styles(names: Iterable[str]) -> dict[str, Style]:
    """The style of each method: its own, or the next spare one; with a calibrator as without, but hollow."""
    given = list(names)
    others = [name for name in dict.fromkeys(map(methods.base, given)) if name not in _COLOURS]
    spare = {
        name: (_SPARE_COLOURS[i % len(_SPARE_COLOURS)], _SPARE_MARKERS[i % len(_SPARE_MARKERS)], _SPARE_LINES[i % 5])
        for i, name in enumerate(others)
    }
    own = {name: (colour, _MARKERS[name], _LINES.get(name, "-")) for name, colour in _COLOURS.items()}
    return {name: Style(*(own | spare)[methods.base(name)], methods.calibrated(name)) for name in given}


def legend_width(names: Iterable[str]) -> float:
    """Inches of a legend's column at 9 points."""
    return 0.6 + 0.085 * max(map(len, names), default=0)


def short(text: str, length: int) -> str:
    """The text, cut to ``length`` characters."""
    return text if len(text) <= length else text[: length - 1] + "…"
