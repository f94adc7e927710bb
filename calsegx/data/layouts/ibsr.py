"""IBSR-18 (v2.0): 18 T1 brains with grey matter, white matter and cerebrospinal fluid drawn by hand."""

import re
from pathlib import Path

from calsegx.data import layouts
from calsegx.data.layouts import trees
from calsegx.interfaces import Case, DataError, Dataset

LABELS = {"background": 0, "cerebrospinal_fluid": 1, "grey_matter": 2, "white_matter": 3}
# In the order of preference; "fill" gives the brain's zeros of segTRI to the cerebrospinal fluid.
IMAGES, TISSUES = ("ana_strip", "ana"), ("segTRI_fill_ana", "segTRI_ana")


@layouts.registry.register("ibsr")
def read(root: Path) -> Dataset | None:
    """IBSR-18 folders IBSR_01/IBSR_01_{ana,ana_strip,segTRI_ana,segTRI_fill_ana}.

    All cases use the same kind of file: the image is the brain alone (``ana_strip``) where every case has it, else
    ``ana``; the label is ``segTRI_fill_ana`` where every case has it, else ``segTRI_ana``.  ``seg_ana`` (many
    structures) is not read.

    Raises:
        DataError: when no kind of image, or of label, is there for every case.
    """
    files = {
        folder: trees.images(folder, f"{folder.name}_")
        for folder in trees.folders(root, 2)
        if re.fullmatch(r"IBSR_\d\d", folder.name)
    }
    files = {folder: names for folder, names in files.items() if names.keys() & {*IMAGES, *TISSUES}}
    if not files:
        return None
    image, label = _kind(files, IMAGES), _kind(files, TISSUES)
    cases = [Case(folder.name, folder.name, {"T1": names[image]}, names[label], "") for folder, names in files.items()]
    return Dataset(root, trees.distinct(root, cases), ("T1",), LABELS)


def _kind(files: dict[Path, dict[str, Path]], kinds: tuple[str, str]) -> str:
    """The first kind of file that every case has."""
    for kind in kinds:
        if all(kind in names for names in files.values()):
            return kind
    folder = next(folder for folder, names in files.items() if kinds[-1] not in names)
    raise DataError(
        f"Case {folder.name!r} has no file {folder / f'{folder.name}_{kinds[-1]}.nii.gz'}, and not every case has "
        f"{kinds[0]}; add it or move the case away."
    )
