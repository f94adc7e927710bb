"""Figures of a method's calibration: reliability diagrams and margins.  Style and rules are those of ``figures``."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from calsegx.evaluation import figures
from calsegx.metrics import binning, calibration, margins

_LEAST_VOXELS = 10  # a bin's accuracy from fewer voxels is noise
_LEAST_SHARE = 1e-5  # of the logarithmic axis of margins
Panel = tuple[binning.ReliabilityCurve, float]  # and its ECE, NaN without voxels


def reliability(curves: Mapping[str, calibration.CalibrationStatistics], title: str, region: str) -> bytes:
    """Reliability diagrams of one method, one panel per domain, over the pooled voxels of a region.

    Accuracy against confidence per bin; the red bars are the gap to the diagonal, the grey ones the share of voxels.
    Bins with fewer than 10 voxels are left out.
    """
    columns = min(len(curves), 4)
    tall = math.ceil(len(curves) / columns)
    figure = figures.canvas(2.7 * columns + 0.5, 3.1 * tall + 0.75)
    panels, first = figures.grid(figure, len(curves), columns, sharey=True)
    for axes, (domain, statistics) in zip(panels, curves.items(), strict=True):
        _diagram(axes, statistics.reliability_curve(), markersize=4)
        text = f"ECE {statistics.ece():.3f}" if statistics.voxels else "no voxels"
        axes.set_title(f"{figures.short(domain, 24)}\n{text} (pooled voxels)", fontsize=9)
        axes.set_xlabel("Confidence (top label)")
    for axes in first:
        axes.set_ylabel("Accuracy")
    figure.suptitle(f"{figures.short(title, 26 * columns)}, region {region}", fontsize=10, fontweight="bold")
    _legend(figure, panels[0], 8)
    return _few_colours(figure)


def reliability_grid(rows: Mapping[str, Mapping[str, Panel]], title: str, xlabel: str, ylabel: str) -> bytes:
    """Small reliability diagrams of one method, drawn as by ``reliability``.

    Args:
        rows: domain -> column (a region or a class) -> its panel; the same columns in every row.
        title: of the figure.
        xlabel: what the curves' confidence is.
        ylabel: what their accuracy is.
    """
    columns = list(next(iter(rows.values())))
    panels, width, height = (len(rows), len(columns)), 0.62 + 1.45 * max(len(columns), 3), 1.1 + 1.6 * len(rows)
    figure, grid = _fixed(width, height, panels, {"left": 0.62, "right": 0.12, "top": 0.62, "bottom": 0.65})
    for row, (line, (domain, found)) in enumerate(zip(grid, rows.items(), strict=True)):
        for axes, (column, (curve, ece)) in zip(line, found.items(), strict=True):
            _diagram(axes, curve, markersize=2.5)
            text = "no voxels" if math.isnan(ece) else f"ECE {ece:.3f}"
            axes.set_title(text if row else f"{figures.short(column, 16)}\n{text}", fontsize=8)
            axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"], fontsize=7)
            axes.set_yticks([0, 0.5, 1], ["0", "0.5", "1"], fontsize=7)
        line[0].set_ylabel(f"{figures.short(domain, 24)}\n{ylabel}", fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel(xlabel, fontsize=7)
    figure.suptitle(
        figures.short(title, 22 * max(len(columns), 3)), fontsize=10, fontweight="bold", y=1 - 0.08 / height
    )
    _legend(figure, grid[0, 0], 7, "lower center")
    return _few_colours(figure)


def margin_histograms(counts: Mapping[str, Int[np.ndarray, "2 BINS"]], title: str, limit: float) -> bytes:
    """Distribution of the margin of the true class, one panel per domain, on a logarithmic axis.

    Args:
        counts: domain -> ``margins.histogram``.
        title: of the figure.
        limit: half the width of the axis in nats, as from ``margin_limit``.
    """
    inches = {"left": 0.62, "right": 0.12, "top": 0.5, "bottom": 0.68}
    figure, panels = _fixed(0.74 + 2.55 * max(len(counts), 2), 2.75, (1, len(counts)), inches)
    styles: Sequence[dict[str, Any]] = (
        {"color": figures.BLUE, "fill": True, "alpha": 0.35, "linewidth": 0},
        {"color": figures.VERMILION, "linewidth": 1.5},
    )
    for axes, (domain, found) in zip(panels[0], counts.items(), strict=True):
        total = found.sum(axis=-1)
        for kind, values, voxels, style in zip(margins.KINDS, found, total, styles, strict=True):
            share = values / max(voxels, 1)
            axes.stairs(share, margins.EDGES, label=f"true {kind}", baseline=_LEAST_SHARE, **style)
        axes.axvline(0, color=figures.BLACK, linewidth=0.8, linestyle="--", label="decision boundary")
        wrong = "\n".join(
            f"{kind} {100 * value:.1f} %" if voxels else f"no {kind}"
            for kind, value, voxels in zip(margins.KINDS, margins.wrong(found), total, strict=True)
        )
        axes.text(0.03, 0.96, f"wrong:\n{wrong}", transform=axes.transAxes, fontsize=7.5, va="top")
        axes.set_title(figures.short(domain, 30), fontsize=9)
        axes.set_xlabel("Margin of the true class in nats", fontsize=8)
        axes.set(yscale="log", ylim=(_LEAST_SHARE, 1), xlim=(-limit, limit))
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    panels[0, 0].set_ylabel("Share of voxels per bin", fontsize=8)
    figure.suptitle(figures.short(title, 32 * max(len(counts), 2)), fontsize=10, fontweight="bold", y=0.98)
    _legend(figure, panels[0, 0], 8, "lower center")
    return _few_colours(figure)


def margin_limit(counts: Sequence[Int[np.ndarray, "2 BINS"]]) -> float:
    """The smallest multiple of 5 nats that leaves no voxel of the histograms outside, at least 5."""
    used = np.flatnonzero(sum((found.sum(axis=0) for found in counts), np.zeros(margins.BINS)))
    widest = np.abs(margins.EDGES[[used[0], used[-1] + 1]]).max() if len(used) else 0.0
    return float(max(5.0, 5 * math.ceil(widest / 5)))


def _diagram(axes: Any, curve: binning.ReliabilityCurve, markersize: float) -> None:
    bins = len(curve.count)
    share = curve.count / max(curve.count.sum(), 1)
    axes.bar((np.arange(bins) + 0.5) / bins, share, 1 / bins, color="#DDDDDD", label="share of voxels")
    axes.plot([0, 1], [0, 1], color=figures.BLACK, linewidth=0.8, linestyle="--", label="perfect")
    enough = curve.count >= _LEAST_VOXELS
    confidence, accuracy = curve.confidence[enough], curve.accuracy[enough]
    axes.vlines(confidence, confidence, accuracy, color=figures.VERMILION, linewidth=markersize / 2, label="gap")
    style = {"color": figures.BLUE, "marker": "o", "markersize": markersize, "linewidth": 1.3}
    axes.plot(confidence, accuracy, label="accuracy", **style)
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")


def _legend(figure: Any, axes: Any, fontsize: float, place: str = "outside lower center") -> None:
    handles, labels = axes.get_legend_handles_labels()
    style = {"frameon": False, "handlelength": 1.3, "columnspacing": 1.0}
    figure.legend(handles, labels, loc=place, ncols=4, fontsize=fontsize, **style)


def _fixed(width: float, height: float, panels: tuple[int, int], inches: Mapping[str, float]) -> tuple[Any, np.ndarray]:
    """A canvas with panels that share their axes and room around them, which is quicker than finding the room."""
    figure = figures.canvas(width, height, constrained=False)
    figure.subplots_adjust(
        left=inches["left"] / width,
        right=1 - inches["right"] / width,
        bottom=inches["bottom"] / height,
        top=1 - inches["top"] / height,
        wspace=0.12,
        hspace=0.25,
    )
    return figure, figure.subplots(*panels, squeeze=False, sharex=True, sharey=True)


def _few_colours(figure: Any) -> bytes:
    """The PNG with a palette of 64 colours: a report holds many of these figures, and they have few."""
    from PIL import Image

    buffer = io.BytesIO()
    picture = Image.open(io.BytesIO(figures.to_png(figure))).convert("RGB")
    picture.quantize(64, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(
        buffer, format="png", optimize=True
    )
    return buffer.getvalue()
