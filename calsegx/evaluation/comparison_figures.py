"""Figures that compare methods: ranks, and DSC and ECE under corruption.  Style and rules are those of ``figures``."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from calsegx.evaluation import figures, methods
from calsegx.evaluation.evaluate import VOLUME
from calsegx.evaluation.rankings import Rankings

_FEW = 8  # lines that a small panel can hold


def rank_map(found: Rankings, title: str) -> bytes:
    """Two heat maps of methods by metrics: rank of the mean with the sum, and mean rank within subjects with the mean.

    Bright is good.  Below each metric: Friedman's p and the number of subjects.
    """
    names = [figures.short(methods.display(name), 40) for name in found.methods]
    metrics = [name.partition("[")[0] + ("" if region == VOLUME else f" [{region}]") for name, region in found.metrics]
    count = len(metrics)
    figure = figures.canvas(1.44 * (count + 1) + 0.08 * max(map(len, names)) + 1.7, 0.3 * len(names) + 2.9)
    left, right = figure.subplots(1, 2, sharey=True)
    sums, cases = (
        np.column_stack(parts) for parts in ((found.of_means, found.sum_rank), (found.of_cases, found.mean_case_rank))
    )
    _heat(left, sums, sums / [*[1] * count, count], [*metrics, "sum of ranks"])
    colours = _heat(right, cases, cases, [*metrics, "mean-case-rank"])
    left.set_title("Rank of the mean over subjects", fontsize=9)
    right.set_title("Mean rank within a subject", fontsize=9)
    below = len(names) + 0.1, len(names) + 0.8
    for axes, (column, (p, subjects)) in itertools.product(
        (left, right), enumerate(zip(found.friedman_p, found.subjects, strict=True))
    ):
        text = "no test" if math.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}"
        for height, shown in zip(below, (text, str(subjects)), strict=True):
            axes.text(column, height, shown, ha="center", va="center", fontsize=7.5)
    left.set_yticks([*range(len(names)), *below], [*names, "Friedman p", "subjects"], fontsize=8)
    left.set_ylim(len(names) + 1.2, -0.5)
    figure.colorbar(colours, ax=[left, right], label="Rank (1 is the best)", shrink=0.8, pad=0.01)
    figure.suptitle(title, fontsize=10, fontweight="bold")
    return figures.to_png(figure)


def _heat(axes: Any, values: np.ndarray, shade: np.ndarray, labels: Sequence[str]) -> Any:
    """Numbers on a map of ``shade``, ranks from 1 to the number of rows; the last column is set apart."""
    rows, columns = values.shape
    colours = axes.imshow(shade, cmap="cividis_r", vmin=1, vmax=rows, aspect="auto")
    for row, column in np.ndindex(rows, columns):
        ink = "white" if shade[row, column] > (1 + rows) / 2 else "black"
        text = f"{values[row, column]:.1f}".removesuffix(".0")
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color=ink)
    axes.axvline(columns - 1.5, color="white", linewidth=3)
    axes.set_xticks(range(columns), labels, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    return colours


def corruption_curves(
    values: Mapping[tuple[str, str], float],
    levels: Mapping[str, Mapping[int, str]],
    names: Sequence[str],
    label: str,
    scale: float = 1.0,
    horizontal: str = "Level (0: clean)",
) -> bytes:
    """A metric against the level of corruption, one small panel (larger for many methods) per corruption.

    Of many methods, SAM-FT and those with FIP or CMP are drawn thicker than the others.

    Args:
        values: ``(method, domain)`` -> mean; what is missing or NaN is a gap in the line.
        levels: corruption -> level (0: clean) -> domain, as ``transfer.corruptions`` gives it.
        names: the methods, in order.
        label: of the vertical axis, with its unit.
        scale: factor of the values.
        horizontal: what is varied in place of the level.
    """
    few = len(names) <= _FEW

    def stands_out(name: str) -> bool:
        return few or methods.is_ours(name) or methods.base(name) == methods.BASELINE

    columns = min(len(levels), 4 if few else 2)
    width, height = (2.4, 2.3) if few else (4.6, 3.4)
    tall = math.ceil(len(levels) / columns)
    styles = figures.method_styles(names)
    beside = figures.legend_width(map(methods.display, names))
    figure = figures.canvas(width * columns + 0.5 + beside, max(height * tall, 0.27 * len(names)) + 0.3)
    panels, first = figures.grid(figure, len(levels), columns, sharex=True, sharey=True)
    for axes, (corruption, domains) in zip(panels, levels.items(), strict=True):
        for name in names:
            heights = [scale * values.get((name, domain), math.nan) for domain in domains.values()]
            dashed = "--" if name.endswith(methods.CALIBRATED) else "-"
            axes.plot(
                list(domains),
                heights,
                color=styles[name].colour,
                linestyle=dashed,
                linewidth=1.3 if stands_out(name) else 0.7,
                markersize=4.5 if stands_out(name) else 3.5,
                alpha=1 if stands_out(name) else 0.7,
                zorder=3 if stands_out(name) else 2,
                label=methods.display(name),
                **styles[name].marker(),
            )
        axes.set_title(figures.short(corruption, 26), fontsize=9)
        axes.set(xticks=sorted({level for domains in levels.values() for level in domains}), xlabel=horizontal)
        axes.xaxis.set_tick_params(labelbottom=True)
        axes.grid(alpha=0.3)
    for axes in first:
        axes.set_ylabel(label)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False, labelspacing=0.6)
    return figures.to_png(figure)
