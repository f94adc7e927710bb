"""What the calibration metrics measure, what regions and calibrators do to them; on synthetic data."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import scipy.special
from matplotlib.figure import Figure
from scipy import ndimage

from calsegx import calibrators
from calsegx.evaluation.figures import BLACK, BLUE, GREEN, GREY, ORANGE, SKY, VERMILION
from calsegx.metrics import adaptive, calibration, regions
from calsegx.metrics.binning import Bins

BINS = 10
ALIKE = "ranges of equal count, each alike"
CLASS_COLOURS = (GREY, BLUE, GREEN)
Gaps = tuple[np.ndarray, np.ndarray, np.ndarray]  # mean score, share of hits, weight of every bin or range


def _sampled(spread: float = 1.5, background: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [V, 3] of an over-confident model and labels: its logits are 2.2 times the truth's."""
    rng = np.random.default_rng(0)
    logits = spread * rng.normal(size=(20_000, 3)) + [background, 0, -1]
    labels = (scipy.special.softmax(logits, axis=1).cumsum(axis=1) < rng.random((len(logits), 1))).sum(axis=1)
    return scipy.special.softmax(2.2 * logits, axis=1), labels


def _segmentation() -> tuple[np.ndarray, np.ndarray]:
    """The same where most voxels are surely of class 0, so that most scores of the others are tiny."""
    return _sampled(spread=2.0, background=5.0)


def _binned(bins: Bins, weight: np.ndarray) -> Gaps:
    curve, full = bins.curve(), bins.count > 0
    return curve.confidence[full], curve.accuracy[full], weight[full]


def _ranges(scores: np.ndarray, hits: np.ndarray, weight: float) -> Gaps:
    """Ranges of equal count, of equal weight."""
    parts = np.array_split(np.argsort(scores, kind="stable"), BINS)
    means = np.array([(scores[part].mean(), hits[part].mean()) for part in parts])
    return means[:, 0], means[:, 1], np.full(BINS, weight / BINS)


def _measured(
    name: str,
    value: float,
    parts: dict[str, Gaps],
    *,
    score: str = "confidence",
    weight: str = "share of voxels",
    power: int = 1,
    area: bool = True,
    threshold: float | None = None,
) -> Figure:
    """Reliability with its gaps, and the gaps as bars whose area is the metric (or whose highest is).

    Args:
        name: of the metric.
        value: of the metric, as the library computes it; the bars must give the same.
        parts: class -> its bins or ranges; the bars stand side by side.
        score: what is binned.
        weight: what the width of a bar is.
        power: of the gap, which the bars show.
        area: whether the metric is the area, or else the highest bar.
        threshold: scores up to this do not count; given, the axes are logarithmic.
    """
    figure = Figure(figsize=(7.4, 3.1), layout="constrained")
    reliability, bars = figure.subplots(1, 2, width_ratios=[1, 1.25])
    reliability.plot([0, 1], [0, 1], color=BLACK, linewidth=0.8, linestyle="--", label="perfect")
    start = total = highest = 0.0
    several = len(parts) > 1
    for index, (part, (scores, hits, weights)) in enumerate(parts.items()):
        colour = CLASS_COLOURS[index] if several else BLUE
        reliability.vlines(scores, scores, hits, color=VERMILION, linewidth=2.2, label=None if index else "gap")
        reliability.plot(scores, hits, color=colour, marker="os^"[index], markersize=4, linewidth=1, label=part)
        heights = np.abs(hits - scores) ** power
        lefts = start + np.cumsum(weights) - weights
        fill = np.where(heights == heights.max(), VERMILION, "#DDDDDD") if not area else [colour] * len(heights)
        bars.bar(lefts, heights, weights, align="edge", color=list(fill), edgecolor=BLACK, linewidth=0.6)
        start, total, highest = start + weights.sum(), total + weights @ heights, max(highest, heights.max())
    shown = total ** (1 / power) if area else highest
    if not np.isclose(shown, value):
        raise ValueError(f"the picture of {name} shows {shown}, the library computes {value}")
    reliability.set(xlabel=score, ylabel="accuracy" if score == "confidence" else "frequency", xlim=(0, 1), ylim=(0, 1))
    if threshold is not None:
        reliability.set(xscale="log", yscale="log", xlim=(1e-4, 1), ylim=(1e-4, 1))
        reliability.axvspan(1e-5, threshold, color="#DDDDDD")
        reliability.text(1.3e-4, 0.5, "left out" if threshold else "", fontsize=8)
    reliability.legend(fontsize=8, frameon=False, loc="upper left" if threshold is None else "lower right")
    bars.set(xlabel=weight, ylabel="|gap|" if power == 1 else "gap squared", xlim=(0, start))
    bars.margins(y=0.25)
    how = ("area" if power == 1 else "root of the area") if area else "highest bar"
    bars.set_title(f"{how} = {name} = {value:.3f}", fontsize=10)
    return figure


def _top_label(method: str, name: str, *, alike: bool = False, **options: Any) -> Figure:
    found = calibration.calibration_statistics(*_sampled(), bins=BINS)
    count = (found.count > 0) if alike else found.count
    weight = "each bin alike" if alike else "share of voxels"
    parts = {"accuracy": _binned(found.top_label, count / count.sum())}
    return _measured(name, getattr(found, method)(), parts, weight=weight, **options)


def _by_class(name: str, above: float | None) -> Figure:
    found = calibration.calibration_statistics(*(_segmentation() if above else _sampled()), bins=BINS, above=above)
    parts = {}
    for k in range(3):
        bins = Bins(*(values[k] for values in found.classes))
        parts[f"class {k}"] = _binned(bins, bins.count / (bins.count.sum() if above else found.voxels) / 3)
    value = found.tace_equalwidth() if above else found.cece()
    weight = f"share of each class's {'remaining ' if above else ''}scores, / 3"
    return _measured(name, value, parts, score="probability", weight=weight, threshold=above)


def _adaptive(name: str, threshold: float) -> Figure:
    probabilities, labels = _segmentation()
    parts = {}
    for k, (scores, hits) in enumerate(adaptive.class_scores(probabilities, labels)):
        kept = scores > threshold
        parts[f"class {k}"] = _ranges(scores[kept], hits[kept], 1 / 3)
    value = adaptive.tace(probabilities, labels, threshold=threshold, ranges=BINS)
    return _measured(name, value, parts, score="probability", weight=ALIKE, threshold=threshold)


def _top_label_adaptive() -> Figure:
    probabilities, labels = _sampled()
    parts = {"accuracy": _ranges(*adaptive.top_label(probabilities, labels), 1.0)}
    value = adaptive.top_label_ace(probabilities, labels, ranges=BINS)
    return _measured("top-label ACE", value, parts, weight=ALIKE)


def _proper(method: str, name: str, unit: str) -> Figure:
    """A proper score of a binary voxel over its probability, and its mean where 30 % of such voxels are foreground."""
    figure = Figure(figsize=(7.4, 2.8), layout="constrained")
    one, mean = figure.subplots(1, 2)
    p = np.linspace(0.005, 0.995, 199)
    costs = {
        label: np.array(
            [getattr(calibration.calibration_statistics(np.array([q]), np.array([label])), method)() for q in p]
        )
        for label in (1, 0)
    }
    for label, colour, style in ((1, BLUE, "solid"), (0, VERMILION, "dashed")):
        voxels = [calibration.calibration_statistics(p[i : i + 1], np.array([label])) for i in range(len(p))]
        costs[label] = np.array([getattr(voxel, method)() for voxel in voxels])
        one.plot(p, costs[label], color=colour, linestyle=style, label=f"label {label}")
    expected = 0.3 * costs[1] + 0.7 * costs[0]
    mean.plot(p, expected, color=BLACK, label="30 % of label 1")
    mean.plot([0.3], [expected.min()], "o", color=BLUE, label="least where p = 0.3, the truth")
    for axes in (one, mean):
        axes.set(xlabel="foreground probability p", xlim=(0, 1))
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8, frameon=False, loc="upper center")
    one.set_ylabel(f"{name} of a voxel{unit}")
    mean.set_ylabel(f"mean {name}{unit}")
    return figure


def _regions() -> Figure:
    """ECE on every region of labels that are drawn from the model's own probabilities, and of a sharper model."""
    rng = np.random.default_rng(0)
    grid = np.indices((16, 128, 128))[1:] - np.array([64, 58]).reshape(2, 1, 1, 1)
    logits = 6 - np.sqrt((grid**2).sum(axis=0)) / 4 + 6 * ndimage.gaussian_filter(rng.normal(size=(16, 128, 128)), 2)
    truth = rng.random(logits.shape) < scipy.special.expit(logits)
    models = {"labels drawn from p": logits, "over-confident (logits x 2)": 2 * logits}
    names = ("all", "p>0.01", "pred_fg", "dilated", "union", "gt_fg")
    figure = Figure(figsize=(7.4, 2.9), layout="constrained")
    image, bars = figure.subplots(1, 2, width_ratios=[1, 1.5])
    shown = image.imshow(scipy.special.expit(logits[8]), cmap="gray", vmin=0, vmax=1)
    figure.colorbar(shown, ax=image, shrink=0.6, label="p of the calibrated model")
    for name, colour, style in (("p>0.01", SKY, "solid"), ("pred_fg", ORANGE, "solid"), ("dilated", GREEN, "dashed")):
        mask = regions.region(name, scipy.special.expit(logits), truth, (1, 1, 1), logits > 0)[8]
        image.contour(mask, [0.5], colors=[colour], linestyles=style, linewidths=1.5)
        image.plot([], [], color=colour, linestyle=style, label=name)
    image.set(xticks=[], yticks=[])
    image.set_xlabel("1 mm per pixel", fontsize=8)
    image.legend(fontsize=8, loc="upper right")
    for index, (title, colour) in enumerate(zip(models, (BLUE, ORANGE), strict=True)):
        p = scipy.special.expit(models[title])
        masks = [regions.region(name, p, truth, (1, 1, 1), p > 0.5) for name in names]
        errors = [calibration.calibration_statistics(p[mask], truth[mask]).ece() for mask in masks]
        place = np.arange(len(names)) + 0.4 * index - 0.2
        drawn = bars.bar(place, errors, 0.38, color=colour, label=title, hatch=("", "//")[index], edgecolor=BLACK)
        bars.bar_label(drawn, [f"{error:.3f}" for error in errors], fontsize=6.5, padding=2)
    bars.set_xticks(range(len(names)), names, fontsize=8)
    bars.axvspan(2.5, 5.5, color="#EEEEEE", zorder=0)
    bars.text(4, 0.272, "chosen by labels", ha="center", fontsize=8)
    bars.set(ylabel="ECE of the top label", xlim=(-0.5, 5.5), ylim=(0, 0.34))
    bars.legend(fontsize=8, frameon=False, loc="upper left", ncols=2, columnspacing=1, handlelength=1.5)
    return figure


def _calibrators() -> Figure:
    """Reliability of half of the images before and after calibrators that were fitted on the others."""
    rng = np.random.default_rng(0)
    truth = 1.5 * ndimage.gaussian_filter(rng.normal(size=(64, 32, 32)), (0, 2, 2)) * 7 - 0.5
    labels = (rng.random(truth.shape) < scipy.special.expit(truth)).astype(int)
    image = (np.arange(64) % 2 * np.ones((32, 32, 1))).transpose(2, 0, 1)[..., None]
    z = (truth * np.where(image[..., 0] > 0, 4.0, 1.3) + 1.5)[..., None]  # a scale of the image, and a bias of all
    logits = np.concatenate([-z / 2, z / 2], axis=-1)
    fitted, kept = slice(0, 32), slice(32, 64)
    figure = Figure(figsize=(7.4, 4.3), layout="constrained")
    panels = figure.subplots(2, 4, sharex=True, sharey=True)
    for axes, (title, result) in zip(panels.flat, _results(logits, labels, image, fitted, kept), strict=True):
        p = scipy.special.softmax(np.asarray(result, np.float64), axis=-1)[..., 1]
        found = calibration.calibration_statistics(p.ravel(), labels[kept].ravel(), bins=BINS, score="foreground")
        curve = found.reliability_curve()
        axes.plot([0, 1], [0, 1], color=BLACK, linewidth=0.8, linestyle="--")
        axes.vlines(curve.confidence, curve.confidence, curve.accuracy, color=VERMILION, linewidth=2)
        axes.plot(curve.confidence, curve.accuracy, color=BLUE, marker="o", markersize=3.5, linewidth=1.2)
        axes.set_title(f"{title}\nECE {found.ece():.3f}, NLL {found.nll():.3f}", fontsize=8.5)
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    figure.supxlabel("foreground probability", fontsize=9)
    figure.supylabel("frequency of foreground", fontsize=9)
    return figure


def _results(
    logits: np.ndarray, labels: np.ndarray, image: np.ndarray, fitted: slice, kept: slice
) -> Iterator[tuple[str, np.ndarray]]:
    """The kept images' logits as they are, and after every calibrator."""
    yield "before", logits[kept]
    everywhere = np.ones(labels[fitted].shape, bool)
    for name in calibrators.names():
        calibrator = calibrators.get(name)
        if calibrator.spatial:
            options = {"image": image[fitted], "region": everywhere, "learning_rate": 0.02, "epochs": 12}
        else:
            options = {}
        params = calibrator.fit(logits[fitted], labels[fitted], **options)
        yield name, calibrator.apply(params, logits[kept].astype(np.float32), image[kept])


THRESHOLD = 1e-3
PICTURES: dict[str, Callable[[], Figure]] = {
    "ece": functools.partial(_top_label, "ece", "ECE"),
    "mce": functools.partial(_top_label, "mce", "MCE", area=False),
    "rmsce": functools.partial(_top_label, "rmsce", "RMSCE", power=2),
    "ace_nonempty": functools.partial(_top_label, "ace_nonempty", "average calibration error", alike=True),
    "top_label_ace": _top_label_adaptive,
    "cece": functools.partial(_by_class, "CECE", None),
    "ace_adaptive": functools.partial(_adaptive, "ACE", 0.0),
    "tace": functools.partial(_adaptive, "TACE", THRESHOLD),
    "tace_equalwidth": functools.partial(_by_class, "equal-width TACE", THRESHOLD),
    "brier": functools.partial(_proper, "brier", "Brier score", ""),
    "nll": functools.partial(_proper, "nll", "NLL", " (nats)"),
    "regions": _regions,
    "calibrators": _calibrators,
}
