"""Whole cases: from files to prompted slices, and back onto the files."""

import dataclasses

import nibabel
import numpy as np
import pytest

from calsegx import configs
from calsegx.data import classes, frames, nifti, preprocessing, prompts
from calsegx.interfaces import Case, DataError

CLASS_MAP = classes.parse("tumour=1,rim=2", {})
CHANNELS = ("T1", "T1", "T2")


# Whole cases.  The file's axes are x to the left, y to the front, z up: slices are z, rows run along -y.
def write_image(path, data, origin=0.0):
    affine = np.diag([1.0, 1.0, 3.0, 1.0])
    affine[0, 3] = origin
    image = nibabel.Nifti1Image(data, affine)
    image.set_sform(affine, 1)
    path.write_bytes(image.to_bytes())
    return path


@pytest.fixture
def case(tmp_path):
    rng = np.random.default_rng(3)
    label = np.zeros((20, 24, 5), np.uint8)
    label[5:9, 10:16, 1:3] = 1
    label[12:14, 3:5, 3] = 2
    images = {
        name: write_image(tmp_path / f"{name}.nii", rng.uniform(1, 900, label.shape).astype(np.float32))
        for name in ("T1", "T2")
    }
    return Case("p1", "p1", images, write_image(tmp_path / "label.nii", label), "train")


def prepare(case, protocol="gt_points", config=None, **arguments):
    config = config or configs.DataConfig()
    return preprocessing.prepare_case(case, CHANNELS, CLASS_MAP, config, protocol, 64, (16, 16), **arguments)


def test_prepare_case(case):
    prepared = prepare(case)
    assert prepared.slices.tolist() == [1, 2, 3]
    assert prepared.images.shape == (3, 24, 20, 3)
    np.testing.assert_array_equal(prepared.images[..., 0], prepared.images[..., 1])
    assert np.abs(prepared.images[..., 0] - prepared.images[..., 2]).max() > 50
    np.testing.assert_array_equal(prepared.labels, prepared.label_volume[[1, 2, 3]])
    assert prepared.label_volume.shape == (5, 24, 20) == prepared.reference.voxels.shape
    assert prepared.geometry.resized_shape == (64, 53)
    # x = 5..8 from the left of the file is 11..14 from the patient's right side in the working orientation.
    native = frames.points_from_frame(prepared.prompts["gt_points"].points, prepared.geometry)
    np.testing.assert_allclose(native[0, 0], [19 - 6.5, 23 - 12.5], atol=1e-4)
    assert prepared.prompts["gt_points"].labels.tolist() == [[1, 0]] * 3
    # Both kinds of prompts, whatever the protocol: one feature cache serves both.
    corners = frames.points_from_frame(prepared.prompts["gt_box"].boxes.reshape(-1, 2, 2), prepared.geometry)
    np.testing.assert_allclose(corners[0], [[11, 8], [14, 13]], atol=1e-4)


def test_prepared_labels_write_back_onto_the_file(case, tmp_path):
    prepared = prepare(case)
    nifti.write(tmp_path / "out.nii.gz", prepared.label_volume, prepared.reference, np.uint8)
    written, original = nibabel.load(tmp_path / "out.nii.gz"), nibabel.load(case.label)
    np.testing.assert_array_equal(np.asarray(written.dataobj), np.asarray(original.dataobj))
    volume = preprocessing.read_label_volume(case, CLASS_MAP)
    np.testing.assert_array_equal(volume.voxels, prepared.label_volume)


def test_prepare_augmented_view(case):
    first = prepare(case, rng=np.random.default_rng(7))
    again = prepare(case, rng=np.random.default_rng(7))
    plain = prepare(case)
    np.testing.assert_array_equal(first.images, again.images)
    assert np.abs(first.images - plain.images).max() > 10
    np.testing.assert_array_equal(first.label_volume, plain.label_volume)
    expected = prompts.points_from_labels(first.labels > 0, (1.0, 1.0))[0]
    native = frames.points_from_frame(first.prompts["gt_points"].points, first.geometry)
    np.testing.assert_allclose(native, expected, atol=1e-4)


def test_prepare_with_clicks_needs_no_label(case, tmp_path):
    path = tmp_path / "clicks.tsv"
    path.write_text("case_id\ti\tj\tk\tlabel\np1\t6\t12\t4\t1\n")
    prepared = prepare(dataclasses.replace(case, label=None), clicks=prompts.read_clicks(path))
    assert prepared.slices.tolist() == [4]
    assert prepared.labels is None
    assert prepared.label_volume is None
    native = frames.points_from_frame(prepared.prompts["gt_points"].points, prepared.geometry)
    np.testing.assert_allclose(native[0, 0], [13, 11], atol=1e-4)
    assert prepared.prompts["gt_points"].labels.tolist() == [[1, -1]]
    with pytest.raises(DataError, match=r"clicks.tsv has no clicks for case 'p2'"):
        prepare(dataclasses.replace(case, case_id="p2"), clicks=prompts.read_clicks(path))


def test_case_without_foreground_has_no_slices(case):
    write_image(case.label, np.zeros((20, 24, 5), np.uint8))
    for protocol in ("gt_points", "gt_box"):
        prepared = prepare(case, protocol)
        assert prepared.images.shape == (0, 24, 20, 3)
        assert len(prepared.slices) == 0


def test_bad_cases(case):
    with pytest.raises(DataError, match="Case 'p1' has no label file"):
        prepare(dataclasses.replace(case, label=None))
    with pytest.raises(DataError, match="Case 'p1' has no label file"):
        preprocessing.read_label_volume(dataclasses.replace(case, label=None), CLASS_MAP)
    original = case.label.read_bytes()
    write_image(case.label, np.full((20, 24, 5), 7, np.uint8))
    with pytest.raises(DataError, match=r"label.nii holds the label ids 7"):
        prepare(case)
    write_image(case.label, np.zeros((20, 24, 4), np.uint8))
    with pytest.raises(DataError, match=r"T1.nii and .*label.nii have different shapes"):
        prepare(case)
    case.label.write_bytes(original)
    write_image(case.images["T2"], np.full((20, 24, 5), 3.0, np.float32))
    with pytest.raises(DataError, match=r"T2.nii \(case 'p1'\) cannot be normalised"):
        prepare(case)
    write_image(case.images["T2"], np.ones((20, 24, 5), np.float32), origin=9.0)
    with pytest.raises(DataError, match=r"T1.nii and .*T2.nii lie up to 9 mm apart"):
        prepare(case)
