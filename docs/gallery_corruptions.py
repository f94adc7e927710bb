"""Every corruption at every level on a phantom, and how far each moves the image: docs/corruptions.md.

``make gallery`` draws them with the others, ``python docs/gallery_corruptions.py [FOLDER]`` alone.
"""

import functools
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from calsegx.data import anatomy, corruptions, phantoms
from calsegx.evaluation.figures import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION

CASES = 4  # for the distances; each draws its own motion, field, ...


@functools.cache
def phantom() -> tuple[np.ndarray, tuple[float, float, float]]:
    """FLAIR of a tumour phantom, scanner A, ``[D, H, W]`` in the working orientation, and its spacing."""
    scanner = phantoms.vendor("A")
    body = anatomy.make_anatomy(np.random.default_rng([2024, 1]))
    images, _, _ = phantoms.render(body, scanner, np.random.default_rng(0))  # file axes to the left and posterior
    return np.ascontiguousarray(images["FLAIR"].T).astype(np.float32), scanner.spacing_mm[::-1]


@functools.cache
def corrupted(name: str, level: int, case: int = 0) -> np.ndarray:
    """The phantom, corrupted; level 0 is as it came."""
    voxels, spacing = phantom()
    return corruptions.corrupt(name, voxels, spacing, level, f"phantom{case}") if level else voxels


def levels() -> Figure:
    """One slice, corruptions by levels; every row in the grey values of the original."""
    names, columns = corruptions.names(), (0, *corruptions.LEVELS)
    bright, shown = corruptions.reference(phantom()[0]), slice(6, 126)
    figure = Figure(figsize=(6.2, 12.1), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, hspace=0, wspace=0)
    axes = figure.subplots(len(names), len(columns))
    for row, name in zip(axes, names, strict=True):
        for axis, level in zip(row, columns, strict=True):
            axis.imshow(corrupted(name, level)[19, shown], cmap="gray", vmin=0, vmax=bright)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(name.replace("_", " "), fontsize=10)
    for axis, level in zip(axes[0], columns, strict=True):
        axis.set_title(f"level {level}" if level else "original", fontsize=10)
    return figure


def distances() -> Figure:
    """Root-mean-square distance to the original over the levels, as a share of the bright end."""
    voxels, _ = phantom()
    figure = Figure(figsize=(7.4, 3.4), layout="constrained")
    axis = figure.subplots()
    colours = (BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE, GREY, BLACK)
    for index, name in enumerate(corruptions.names()):
        errors = [
            [np.sqrt(np.mean((corrupted(name, level, case) - voxels) ** 2)) for level in corruptions.LEVELS]
            for case in range(CASES)
        ]
        mean = np.mean(errors, axis=0) / corruptions.reference(voxels)
        style = {
            "color": colours[index % len(colours)],
            "marker": "os^Dv"[index % 5],
            "linestyle": "-" if index < 8 else "--",
        }
        axis.plot(corruptions.LEVELS, mean, label=name.replace("_", " "), markersize=4, linewidth=1.2, **style)
    axis.set(xlabel="level", ylabel="RMS distance / bright end", yscale="log", xticks=corruptions.LEVELS)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=9, frameon=False)
    return figure


PICTURES = {"corruptions": levels, "corruptions_distance": distances}


if __name__ == "__main__":
    import gallery

    gallery.draw(Path(sys.argv[1]) if len(sys.argv) > 1 else gallery.FOLDER, PICTURES)
