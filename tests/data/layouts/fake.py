"""Small fake trees with the names of real datasets; the voxels are invented."""

import zlib

import nibabel
import numpy as np

SHAPE = (24, 20, 6)  # file axes
AFFINE = np.diag([-1.0, -1.0, 3.0, 1.0])


def write(root, *names, ids=(1,), shape=SHAPE):
    """NIfTI files below ``root``: labels with blocks of ``ids`` where the name says so, else images."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.Nifti1Image(_voxels(str(name), ids, shape), AFFINE).to_filename(path)
    return root


def _voxels(name, ids, shape):
    if any(part in name.lower() for part in ("seg", "mask")):
        labels = np.zeros(shape, np.uint8)
        for number, value in enumerate(ids):
            labels[4:16, 2 + 4 * number : 6 + 4 * number, 1:5] = value
        return labels
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return rng.integers(50, 900, shape).astype(np.int16)


def brats_2019(root, cases=("BraTS19_CBICA_AAB_1", "BraTS19_TCIA01_131_1", "BraTS19_TCIA01_131_2"), grade="HGG"):
    for case in cases:
        brats_case(root / grade / case)
    return root


def brats_case(folder, kinds=("t1", "t1ce", "t2", "flair", "seg"), ending=".nii.gz"):
    return write(folder, *(f"{folder.name}_{kind}{ending}" for kind in kinds), ids=(1, 2, 4))


def brats_2023(root, cases=("BraTS-GLI-00000-000", "BraTS-GLI-00000-001", "BraTS-GLI-00002-000"), seg=True):
    for case in cases:
        kinds = ("t1n", "t1c", "t2w", "t2f", *(["seg"] if seg else []))
        write(root / case, *(f"{case}-{kind}.nii.gz" for kind in kinds), ids=(1, 2, 3))
    return root


def atlas(root, inside="ATLAS_2"):
    for split, cohort, subject in (
        ("Training", "R001", "sub-r001s001"),
        ("Training", "R001", "sub-r001s002"),
        ("Training", "R009", "sub-r009s001"),
        ("Testing", "R010", "sub-r010s001"),
    ):
        anat = f"{inside}/{split}/{cohort}/{subject}/ses-1/anat/{subject}_ses-1_space-MNI152NLin2009aSym"
        write(root, f"{anat}_T1w.nii.gz")
        if split == "Training":
            write(root, f"{anat}_label-L_desc-T1lesion_mask.nii.gz")
    return root


def ibsr(root, cases=("IBSR_01", "IBSR_02", "IBSR_03")):
    for case in cases:
        kinds = ("ana", "ana_strip", "ana_brainmask", "seg_ana", "segTRI_ana", "segTRI_fill_ana")
        names = [f"{case}/{case}_{kind}.nii.gz" for kind in kinds]
        write(root, *names, ids=(1, 2, 3), shape=(*SHAPE, 1))
    return root


def bids(root, subjects=("sub-01", "sub-02", "sub-03"), images=("T1w", "FLAIR"), mask="desc-lesion_mask"):
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset_description.json").write_text('{"Name": "Invented", "BIDSVersion": "1.9.0"}')
    for subject in subjects:
        write(root, *(f"{subject}/anat/{subject}_{image}.nii.gz" for image in images))
        if mask:
            write(root, f"derivatives/manual/{subject}/anat/{subject}_{mask}.nii.gz")
    return root
