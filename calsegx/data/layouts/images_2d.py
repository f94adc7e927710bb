"""Folders of 2-D pictures and their masks, as fundus, ultrasound and histology collections come.

Without a ``cases.tsv`` every picture counts as a subject of its own, and the scanner is unknown.
"""

from pathlib import Path

import numpy as np

from calsegx.data import images, layouts, pictures
from calsegx.data.layouts import nnunet_v2
from calsegx.interfaces import Case, DataError, Dataset

SAMPLED_MASKS = 100
_OTHER_FORMATS = (".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp")


@layouts.registry.register("images_2d")
def read(root: Path) -> Dataset | None:
    """A folder images of PNG files and a folder masks (or labels) of PNG files with the same names.

    Colour pictures have the channels red, green and blue, grey ones the channel grey; the first picture decides.  The
    labels come from a ``labels.json`` ``{"name": id}`` beside the folders, else from the ids in up to 100 masks, evenly
    spread: ``foreground`` if there is one id, ``class_1``, ``class_2``, ... (by their ids) if there are several.

    Raises:
        DataError: for other formats, a picture without its mask and vice versa, and masks without usable ids.
    """
    folders = [root / name for name in ("masks", "labels") if (root / name).is_dir()]
    if not folders or not (root / "images").is_dir():
        return None
    files = (path for folder in (root / "images", *folders) for path in folder.iterdir())
    if not any(path.suffix.lower() == pictures.ENDING and not path.name.startswith(".") for path in files):
        return None
    if len(folders) > 1:
        raise DataError(f"{root} has both masks and labels; move away the folder that is not to be used.")
    images, masks = _by_stem(root / "images"), _by_stem(folders[0])
    for stem in sorted(images.keys() ^ masks.keys()):
        if stem in images:
            raise DataError(f"{images[stem]} has no mask {folders[0] / stem}.png; add it, or remove the picture.")
        raise DataError(f"{masks[stem]} has no picture {root / 'images' / stem}.png; add it, or remove the mask.")
    stems = sorted(images)
    channels = pictures.channels(images[stems[0]])
    volumes = {name: index for index, name in enumerate(channels)} if len(channels) > 1 else {}
    cases = tuple(
        Case(stem, stem, dict.fromkeys(channels, images[stem]), masks[stem], split="", volumes=volumes)
        for stem in stems
    )
    return Dataset(root, cases, channels, _labels(root, [masks[stem] for stem in stems]))


def _by_stem(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        ending = path.suffix.lower()
        if path.name.startswith(".") or ending not in (pictures.ENDING, *_OTHER_FORMATS):
            continue
        if ending != pictures.ENDING:
            raise DataError(f"{path} is not a PNG file; convert all pictures and masks to PNG.")
        if path.stem in found:
            raise DataError(f"{path} and {found[path.stem]} have the same stem; keep one.")
        found[path.stem] = path
    return found


def _labels(root: Path, masks: list[Path]) -> dict[str, int]:
    declared = root / "labels.json"
    if declared.is_file():
        return nnunet_v2.parse_labels(declared, {"labels": nnunet_v2.read_description(declared)})
    chosen = np.unique(np.linspace(0, len(masks) - 1, min(len(masks), SAMPLED_MASKS)).astype(int))
    ids: set[int] = set()
    for index in chosen:
        ids.update(np.unique(pictures.read_labels(masks[index]).voxels).tolist())
        if len(ids) > images.MOST_IDS:
            raise DataError(
                f"{masks[index]} and the masks before it hold {len(ids)} different values, as smoothed edges do; "
                f'threshold the masks, or declare the ids in {declared}: {{"background": 0, "name": id}}.'
            )
    ids.discard(0)
    if not ids:
        raise DataError(
            f"The {len(chosen)} masks looked at in {masks[0].parent} are empty; declare the ids in {declared}: "
            '{"background": 0, "name": id}.'
        )
    if len(ids) == 1:
        return {"background": 0, "foreground": ids.pop()}
    return {"background": 0, **{f"class_{value}": value for value in sorted(ids)}}
