"""ATLAS v2.0 (stroke lesions, T1w): BIDS-like, with a folder per cohort between the split and the subjects."""

from pathlib import Path

from calsegx.data import layouts
from calsegx.data.layouts import trees
from calsegx.interfaces import Case, DataError, Dataset

IMAGE = "space-MNI152NLin2009aSym_T1w"
MASK = "space-MNI152NLin2009aSym_label-L_desc-T1lesion_mask"


@layouts.registry.register("atlas")
def read(root: Path) -> Dataset | None:
    """ATLAS v2.0: Training/R0xx/sub-r0xxs0yy/ses-1/anat with *_T1w and *_desc-T1lesion_mask, in ATLAS_2 or not.

    The cohort ``R0xx`` is the centre.  ``Testing`` has no masks and gets the split test.

    Raises:
        DataError: for a training image without its mask, or a mask without its image.
    """
    base = root / "ATLAS_2" if (root / "ATLAS_2").is_dir() else root
    cases = []
    for split, name in (("", "Training"), ("test", "Testing")):
        for folder in sorted(base.glob(f"{name}/R[0-9]*/sub-*/ses-*/anat")):
            cohort, subject, session = folder.relative_to(base).parts[1:4]
            case_id = f"{subject}_{session}"
            files = trees.images(folder, f"{case_id}_")
            missing = [kind for kind in (IMAGE, MASK) if kind not in files]
            if len(missing) == 2:
                continue
            if missing and not (split == "test" and missing == [MASK]):
                raise DataError(
                    f"Case {case_id!r} has no file {folder / f'{case_id}_{missing[0]}.nii.gz'}; add it or move the case"
                    " away."
                )
            cases.append(Case(case_id, subject, {"T1w": files[IMAGE]}, files.get(MASK), split, centre=cohort))
    if not cases:
        return None
    return Dataset(root, trees.distinct(root, cases), ("T1w",), {"background": 0, "lesion": 1})
