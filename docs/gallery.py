"""Draws the pictures of docs/methods.md, docs/corruptions.md and docs/evaluation-protocol.md: ``make gallery``.

``python docs/gallery.py [FOLDER]`` draws them into another folder than docs/figures.
"""

import io
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import foreground_ece
import gallery_corruptions
import gallery_losses
import gallery_measures
from matplotlib.figure import Figure
from PIL import Image

from calsegx import files

FOLDER = Path(__file__).parent / "figures"
# name -> function that gives a matplotlib figure
PICTURES = gallery_losses.PICTURES | gallery_measures.PICTURES | gallery_corruptions.PICTURES | foreground_ece.PICTURES


def draw(folder: Path, pictures: Mapping[str, Callable[[], Figure]]) -> None:
    """Draw pictures, in 64 colours, which lines and letters do not miss."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        drawn, reduced = io.BytesIO(), io.BytesIO()
        picture().savefig(drawn, format="png", dpi=120)
        Image.open(drawn).convert("RGB").quantize(64).save(reduced, format="png", optimize=True)
        files.write_atomically(folder / f"{name}.png", reduced.getvalue())
    print(f"Drew {len(pictures)} pictures into {folder}.")


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER, PICTURES)
