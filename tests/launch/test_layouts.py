"""Pointing at the folder alone: every layout's fake tree, its files filled, trains and is segmented."""

import dataclasses

import nibabel
import numpy as np
import pytest
from PIL import Image

from calsegx.data import images, layouts
from launch import index, predict, train, verify
from tests.data.layouts import trees

THREE = ("s1", "s2", "s3")
TREES = {
    "nnunet_v2": lambda root: trees.nnunet_v2(root, THREE, labels={"background": 0, "whole": [1, 2], "core": 2}),
    "nnunet_v1": lambda root: trees.nnunet_v1(root, THREE, tests=()),
    "decathlon": lambda root: trees.decathlon(root, THREE, tests=()),
    "prostate": trees.prostate,
    "images_2d": lambda root: trees.pictures(root, count=5),
}

QUICK = ("decathlon", "images_2d")  # volumes of a file, and no NIfTI


def fill(dataset):
    """An image of noise and a label of one block per id in every case, over the empty files of the tree."""
    rng = np.random.default_rng(0)
    for case in dataset.cases:
        if next(iter(case.images.values())).stat().st_size:  # not an empty file of ``trees``
            continue
        affine = np.diag([-1.0, -1.2, 3, 1])
        volumes = len(dataset.channels) if case.volumes else 1
        for path in set(case.images.values()):
            voxels = rng.integers(1, 900, (14, 15, 2, volumes)).astype(np.int16)
            nibabel.save(nibabel.Nifti1Image(voxels if volumes > 1 else voxels[..., 0], affine), path)
        label = np.zeros((14, 15, 2), np.uint8)
        for value in dataset.labels.values():
            label[3:9, 2 * value : 2 * value + 2] = value
        nibabel.save(nibabel.Nifti1Image(label, affine), case.label)


@pytest.mark.parametrize(
    "tree", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TREES]
)
def test_training_and_prediction(tmp_path, config, tree):
    root = tmp_path / "data set"
    root.mkdir()
    TREES[tree](root)
    dataset = layouts.detect(root)
    fill(dataset)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    index.index_dataset(root)
    verify.verify_dataset(root, on_error="skip")
    names = dataset.channels if len(dataset.channels) in (1, 3) else dataset.channels[:1]
    data = dataclasses.replace(
        config.data, root=str(root), channels=",".join(names), classes="", source="", cache="", views=1
    )
    settings = dataclasses.replace(config, data=data, steps=1, batch_size=2, validate_every=1, save_every=1)
    train.train(settings, tmp_path / "run")
    labelled = all(case.label for case in dataset.cases)  # for the others prediction asks for clicks
    masks = predict.predict(tmp_path / "run", tmp_path / "out", split="all" if labelled else "train")
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
    by_id = {case.case_id: case for case in dataset.cases}
    assert len(masks) == len(by_id) if labelled else masks
    for mask in masks:
        case = by_id[mask.name.removesuffix(".png" if tree == "images_2d" else ".nii.gz")]
        ids = images.read_labels(mask).voxels
        assert ids.shape == images.read_labels(case.label).voxels.shape
        assert set(np.unique(ids)) <= set(dataset.labels.values())
    if tree == "images_2d":
        with Image.open(tmp_path / "out/eye 0_prob-foreground.png") as picture:
            assert picture.mode == "I;16"
    if tree == "decathlon":  # one volume of the grid of the 4-D image
        image = nibabel.load(masks[0])
        assert image.shape == (14, 15, 2)
        np.testing.assert_allclose(image.affine, nibabel.load(dataset.cases[0].label).affine)
