"""Which region's ECE ranks models rightly: the simulation of docs/evaluation-protocol.md.

``python docs/foreground_ece.py`` writes its tables into the page; ``make gallery`` draws its picture.

A voxel with the true logit z is foreground with probability sigmoid(z), drawn independently of all others.  A model
says p = sigmoid(a z): its masks are the same for every a, it is calibrated for a = 1 by construction, and
over-confident for a > 1.
"""

import functools
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy import ndimage, special

from calsegx import files
from calsegx.evaluation.figures import BLACK, BLUE, GREEN, GREY, ORANGE, VERMILION
from calsegx.metrics import calibration, overlap, regions

PAGE = Path(__file__).parent / "evaluation-protocol.md"
MARKS = "<!-- docs/foreground_ece.py: begin -->", "<!-- docs/foreground_ece.py: end -->"
CASES, SHAPE, SPACING_MM = 8, (4, 96, 96), (3.0, 1.0, 1.0)
PLATEAUS = {"clear": 2.0, "faint": 0.0}  # the true logit inside a lesion
EMPTY = -14.0  # the true logit far outside
REGIONS = ("p>0.01", "dilated", "all", "gt_fg")
FACTORS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.4, 1.7, 2.0, 2.5, 3.0, 4.0)  # a, of the picture
FIELDS_MM = (96, 192, 384, 768)  # sides of the image
MODELS = {0.5: "under-confident, a = 0.5", 1.0: "**calibrated**, a = 1", 2.0: "over-confident, a = 2", 4.0: "a = 4"}
INVENTED = "a = 1, and sure of a disc that is not there"
STYLES = {  # colour, line, marker, its size
    "p>0.01": (BLUE, "-", "o", 9),
    "dilated": (GREEN, "--", "s", 6.5),
    "all": (ORANGE, ":", "^", 4.5),
    "gt_fg": (VERMILION, "-.", "v", 8),
}
Case = tuple[np.ndarray, np.ndarray]  # true logits and labels, [D, H, W]


@functools.cache
def cases(lesions: str) -> list[Case]:
    """Patients with one lesion each: a plateau with an uneven, uncertain border."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(CASES):
        noise = ndimage.gaussian_filter(rng.normal(size=SHAPE), (1, 2, 2))
        centre, radius = rng.uniform(38, 58, 2), rng.uniform(14, 20)  # mm
        y, x = np.mgrid[: SHAPE[1], : SHAPE[2]]
        beyond = np.hypot(y - centre[0], x - centre[1]) - radius
        logits = np.maximum(np.minimum(PLATEAUS[lesions], -1.5 * beyond) + 0.7 * noise / noise.std(), EMPTY)
        found.append((logits, rng.random(SHAPE) < special.expit(logits)))
    return found


def with_invented(logits: np.ndarray) -> np.ndarray:
    """The logits of a model that is 95 % sure of a disc in a corner, more than 10 mm from every lesion."""
    y, x = np.mgrid[: SHAPE[1], : SHAPE[2]]
    return np.where(np.hypot(y - 8, x - 8) < 6, special.logit(0.95), logits)


@functools.cache
def measure(lesions: str, factor: float, invented: bool = False) -> dict[str, float]:
    """Means over cases: DSC, recall, ECE of every region, and on the true foreground the confidence and p."""
    rows = []
    for logits, truth in cases(lesions):
        p = special.expit(factor * (with_invented(logits) if invented else logits))
        masks = {name: regions.region(name, p, truth, SPACING_MM) for name in REGIONS}
        found = {n: calibration.calibration_statistics(p[mask], truth[mask]).ece() for n, mask in masks.items()}
        areas = overlap.overlap_counts(p > 0.5, truth).finalise(SPACING_MM)
        inside = p[truth]
        found |= {"confidence": np.maximum(inside, 1 - inside).mean(), "p": inside.mean()}
        rows.append(found | {"dsc": areas.dsc.value, "recall": areas.recall.value})
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


@functools.cache
def in_field(side_mm: int, factor: float) -> float:
    """ECE [all] of the clear lesions with empty background all round, to an image of this side."""
    voxels = math.prod(SHAPE)
    empty = calibration.calibration_statistics(np.full(voxels, special.expit(factor * EMPTY)), np.zeros(voxels, bool))
    found = []
    for logits, truth in cases("clear"):
        p = special.expit(factor * logits)
        lesion = calibration.calibration_statistics(p.ravel(), truth.ravel())
        found.append(sum([empty] * ((side_mm // SHAPE[1]) ** 2 - 1), start=lesion).ece())
    return float(np.mean(found))


def tables() -> str:
    """Both tables of the page."""
    head = ("lesions", "model", "DSC", *(f"ECE [{name}]" for name in REGIONS))
    head += ("recall", "confidence, y = 1", "p, y = 1")
    lines = [head]
    for lesions in PLATEAUS:
        models = [(name, factor, False) for factor, name in MODELS.items()]
        models += [(INVENTED, 1.0, True)] if lesions == "clear" else []
        for name, factor, invented in models:
            found = measure(lesions, factor, invented)
            numbers = (found[key] for key in ("dsc", *REGIONS, "recall", "confidence", "p"))
            lines.append((lesions, name, *map("{:.3f}".format, numbers)))
    fields = [("side of the image", "ECE [all], a = 1", "ECE [all], a = 2")]
    fields += [(f"{side} mm", *(f"{in_field(side, factor):.4f}" for factor in (1.0, 2.0))) for side in FIELDS_MM]
    return f"{_markdown(lines, 2)}\n\n{_markdown(fields, 1)}"


def _markdown(lines: Iterable[tuple[str, ...]], words: int) -> str:
    """A table whose first columns are words, the others numbers."""
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    columns = head.count("|") - 1
    return "\n".join([head, "|" + "---|" * words + "---:|" * (columns - words), *body])


def picture() -> Figure:
    """ECE by region over the sharpness of the model, and over the size of the image."""
    figure = Figure(figsize=(7.4, 3.3), layout="constrained")
    clear, faint, field = figure.subplots(1, 3)
    for axes, lesions in ((clear, "clear"), (faint, "faint")):
        axes.axvline(1, color=GREY, linewidth=0.8)
        for region, (colour, line, marker, size) in STYLES.items():
            errors = [measure(lesions, factor)[region] for factor in FACTORS]
            least = int(np.argmin(errors))
            axes.plot(FACTORS, errors, color=colour, linestyle=line, label=f"ECE [{region}]")
            axes.plot(FACTORS[least], errors[least], marker, color=colour, markeredgecolor=BLACK, markersize=size)
        axes.set(xscale="log", ylim=(-0.012, 0.28))
        axes.set_xlabel("a: model's logits / true logits", fontsize=8.5)
        axes.set_xticks((0.5, 1, 2, 4), ("0.5", "1", "2", "4"))
        axes.set_title(f"{lesions} lesions, DSC {measure(lesions, 1.0)['dsc']:.2f}", fontsize=9)
        axes.text(1.04, 0.264, "calibrated", fontsize=7.5, color="#555555")
    clear.set_ylabel("ECE of the top label", fontsize=8.5)
    figure.legend(*clear.get_legend_handles_labels(), ncols=4, fontsize=8, frameon=False, loc="outside lower center")
    over = measure("clear", 2.0)
    errors = {"p>0.01": [over["p>0.01"]] * len(FIELDS_MM), "dilated": [over["dilated"]] * len(FIELDS_MM)}
    errors["all"] = [in_field(side, 2.0) for side in FIELDS_MM]
    for region, values in errors.items():
        colour, line, marker, _ = STYLES[region]
        field.plot(FIELDS_MM, values, color=colour, linestyle=line, marker=marker, markersize=5)
    field.set(xscale="log", yscale="log", ylim=(1e-4, 0.3))
    field.set_xlabel("side of the image (mm)", fontsize=8.5)
    field.set_xticks(FIELDS_MM, list(map(str, FIELDS_MM)))
    field.set_title("clear lesions, a = 2", fontsize=9)
    for axes in (clear, faint, field):
        axes.minorticks_off()
        axes.tick_params(labelsize=8)
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {"foreground_ece": picture}


def write(page: Path) -> None:
    """Put the tables between the marker lines of the page."""
    files.write_between(page, MARKS, tables())


if __name__ == "__main__":
    write(PAGE)
    print(f"The tables are in {PAGE}.")
