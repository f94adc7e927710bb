"""Draws the pictures of docs/methods.md: ``make gallery``, or ``python docs/gallery.py [FOLDER]`` (docs/figures)."""

import io
import sys
from pathlib import Path

import gallery_losses
import gallery_measures
from PIL import Image

from calsegx import files

PICTURES = gallery_losses.PICTURES | gallery_measures.PICTURES  # name -> function that gives a matplotlib figure


def main(folder: Path) -> None:
    """Draw all pictures, in 64 colours, which lines and letters do not miss."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        drawn, reduced = io.BytesIO(), io.BytesIO()
        draw().savefig(drawn, format="png", dpi=120)
        Image.open(drawn).convert("RGB").quantize(64).save(reduced, format="png", optimize=True)
        files.write_atomically(folder / f"{name}.png", reduced.getvalue())
    print(f"Drew {len(PICTURES)} pictures into {folder}.")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "figures")
