"""The multi-site prostate collection (T2-weighted MRI of six centres), read as it is downloaded."""

import re
from pathlib import Path

from calsegx.data import layouts
from calsegx.data.layouts import trees
from calsegx.interfaces import Case, DataError, Dataset

SITES = ("BIDMC", "BMC", "HK", "I2CVB", "RUNMC", "UCL")
# Some sites mark two zones and some the whole gland, so that neither id means the same everywhere.
LABELS = {"background": 0, "prostate_1": 1, "prostate_2": 2}
_NAME = re.compile(r"(Case\d+)(_segmentation|_seg)?\.nii(?:\.gz)?", re.IGNORECASE)


@layouts.registry.register("prostate")
def read(root: Path) -> Dataset | None:
    """Folders BIDMC, BMC, HK, I2CVB, RUNMC, UCL (two or more) of CaseXX.nii.gz and CaseXX_segmentation.nii.gz.

    The folder is the centre, ``<folder>_CaseXX`` the case and its subject.  ``_Segmentation`` and ``_seg`` are read,
    too.  The class is ``prostate``, both ids together, unless others are asked for.

    Raises:
        DataError: for a file of another name, a case given twice, an image without its label and vice versa.
    """
    found = [(site, trees.nifti_files(root / site)) for site in SITES if (root / site).is_dir()]
    if len(found) < 2 or not any(_NAME.fullmatch(path.name) for _, paths in found for path in paths):
        return None
    cases = tuple(case for site, paths in found for case in _cases(site, paths))
    return Dataset(root, cases, ("T2",), LABELS, default_classes="prostate=1+2")


def _cases(site: str, paths: list[Path]) -> list[Case]:
    images: dict[str, Path] = {}
    labels: dict[str, Path] = {}
    for path in paths:
        match = _NAME.fullmatch(path.name)
        if not match:
            raise DataError(f"{path} is not named CaseXX.nii.gz or CaseXX_segmentation.nii.gz; rename it or move it.")
        role = labels if match[2] else images
        if match[1] in role:
            raise DataError(f"{path} and {role[match[1]]} are both of {match[1]}; keep one.")
        role[match[1]] = path
    for name in sorted(images.keys() ^ labels.keys()):
        if name in images:
            raise DataError(f"{images[name]} has no label {name}_segmentation.nii.gz beside it; add it.")
        raise DataError(f"{labels[name]} has no image {name}.nii.gz beside it; add it.")
    return [
        Case(f"{site}_{name}", f"{site}_{name}", {"T2": images[name]}, labels[name], split="", centre=site)
        for name in sorted(images)
    ]
