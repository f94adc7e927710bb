"""Small fake datasets with the names that each layout's files have; the NIfTI files are empty."""

import json

import numpy as np
from PIL import Image


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def write_table(root, text, encoding="utf-8"):
    (root / "cases.tsv").write_text(text.replace(" ", "\t"), encoding=encoding)


def nnunet_v2(root, cases=("a", "b"), channels=("T1", "FLAIR"), **changes):
    description = {
        "channel_names": {str(i): name for i, name in enumerate(channels)},
        "labels": {"background": 0, "tumour": 1},
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
        **changes,
    }
    (root / "dataset.json").write_text(json.dumps(description))
    for case in cases:
        touch(*(root / "imagesTr" / f"{case}_{i:04d}.nii.gz" for i in range(len(channels))))
        touch(root / "labelsTr" / f"{case}.nii.gz")
    return root


def decathlon(root, cases=("BRATS_001", "BRATS_002"), tests=("BRATS_485",), **changes):
    """Task01_BrainTumour: one 4-D image per case, and the resource forks of macOS beside them."""
    description = {
        "name": "BRATS",
        "tensorImageSize": "4D",
        "modality": {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"},
        "labels": {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"},
        "numTraining": len(cases),
        "numTest": len(tests),
        "training": [{"image": f"./imagesTr/{c}.nii.gz", "label": f"./labelsTr/{c}.nii.gz"} for c in cases],
        "test": [f"./imagesTs/{c}.nii.gz" for c in tests],
        **changes,
    }
    (root / "dataset.json").write_text(json.dumps(description))
    for case in cases:
        touch(root / f"imagesTr/{case}.nii.gz", root / f"labelsTr/{case}.nii.gz", root / f"imagesTr/._{case}.nii.gz")
    touch(*(root / f"imagesTs/{case}.nii.gz" for case in tests))
    return root


def nnunet_v1(root, cases=("la_003", "la_004"), tests=("la_001",), **changes):
    """The same description, with one file per case and channel."""
    decathlon(root, cases, tests, **{"modality": {"0": "T2", "1": "ADC"}, **changes})
    for path in root.glob("imagesT?/*.nii.gz"):
        path.unlink()
    for folder, names in (("imagesTr", cases), ("imagesTs", tests)):
        touch(*(root / folder / f"{name}_{number:04d}.nii.gz" for name in names for number in range(2)))
    return root


def prostate(root):
    touch(*(root / "BIDMC" / name for name in ("Case00.nii.gz", "Case00_segmentation.nii.gz")))
    touch(*(root / "BIDMC" / name for name in ("Case01.nii.gz", "Case01_Segmentation.nii.gz", ".DS_Store")))
    touch(*(root / "RUNMC" / name for name in ("Case00.nii", "Case00_seg.nii", "readme.txt")))
    return root


def pictures(root, masks="masks", colour=True, ids=(0, 255), count=3):
    """``count`` pictures of 6 rows and 8 columns; every mask holds all ``ids``."""
    rng = np.random.default_rng(0)
    for folder in ("images", masks):
        (root / folder).mkdir(parents=True)
    for number in range(count):
        pixels = rng.integers(1, 255, (6, 8, 3) if colour else (6, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"eye {number}.png")
        mask = np.resize(ids, (6, 8)).astype(np.uint8)
        Image.fromarray(mask).save(root / masks / f"eye {number}.png")
    return root


ALL = {
    "nnunet_v2": nnunet_v2,
    "nnunet_v1": nnunet_v1,
    "nnunet_v1 (decathlon)": decathlon,
    "prostate": prostate,
    "images_2d": pictures,
}
