"""Whole cases: from files to prompted slices, and back onto the files."""

import dataclasses

import nibabel
import numpy as np
import pytest

from calsegx import configs
from calsegx.data import classes, frames, nifti, preprocessing, prompts
from calsegx.data import clicks as click_tools
from calsegx.evaluation import predict
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
    raw = np.asarray(nibabel.load(case.images["T2"]).dataobj)
    assert prepared.intensities["T2"] == pytest.approx(np.percentile(raw, [0.5, 50, 99.5]))
    assert set(prepared.intensities) == {"T1", "T2"} and not prepare(case, rng=np.random.default_rng(0)).intensities
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
    prepared = prepare(dataclasses.replace(case, label=None), clicks=click_tools.read_clicks(path))
    assert prepared.slices.tolist() == [4]
    assert prepared.labels is None
    assert prepared.label_volume is None
    native = frames.points_from_frame(prepared.prompts["gt_points"].points, prepared.geometry)
    np.testing.assert_allclose(native[0, 0], [13, 11], atol=1e-4)
    assert prepared.prompts["gt_points"].labels.tolist() == [[1, -1]]
    with pytest.raises(DataError, match=r"clicks.tsv has no clicks for case 'p2'"):
        prepare(dataclasses.replace(case, case_id="p2"), clicks=click_tools.read_clicks(path))


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


def windowed(case):
    """A case whose intensities come through unchanged: a window of 0 to 255 that the volume fills."""
    data = np.random.default_rng(6).integers(1, 255, (20, 24, 5)).astype(np.float32)
    data[0, 0, 0], data[0, 1, 0] = 0, 255
    write_image(case.images["T1"], data)
    working = data.transpose(2, 1, 0)[:, ::-1, ::-1]
    return working, {"intensity": "medsam_ct", "window_centre": 127.5, "window_width": 255.0}


def test_adjacent_slices_repeat_at_the_borders(case):
    working, rule = windowed(case)
    label = np.ones((20, 24, 5), np.uint8)
    write_image(case.label, label)
    config = configs.DataConfig(**rule, adjacent_slices=True)
    prepared = preprocessing.prepare_case(case, ("T1", "T1", "T1"), CLASS_MAP, config, "gt_points", 64, (16, 16))
    assert prepared.slices.tolist() == [0, 1, 2, 3, 4]
    for number, image in enumerate(prepared.images):
        for channel, neighbour in enumerate((max(number - 1, 0), number, min(number + 1, 4))):
            np.testing.assert_array_equal(image[..., channel], working[neighbour])
    label[:, :, [0, 1, 3]] = 0  # slices without a prompt are neighbours all the same
    write_image(case.label, label)
    sparse = preprocessing.prepare_case(case, ("T1", "T1", "T1"), CLASS_MAP, config, "gt_points", 64, (16, 16))
    np.testing.assert_array_equal(sparse.images, prepared.images[[2, 4]])


def test_a_working_grid_resamples_slices_after_the_intensities(case):
    working, rule = windowed(case)
    config = configs.DataConfig(**rule, resample="10x24x20")
    prepared = preprocessing.prepare_case(case, ("T1", "T1", "T1"), CLASS_MAP, config, "none", 64, (16, 16))
    assert prepared.slices.tolist() == list(range(10))
    expected = np.einsum("wd,dhc->whc", frames.resample_matrix(5, 10, antialias=True), working)
    np.testing.assert_allclose(prepared.images[..., 1], expected, atol=1e-3)
    assert prepared.label_volume.shape == (5, 24, 20) == prepared.reference.voxels.shape
    assert prepared.labels.shape == (10, 24, 20)


@pytest.mark.parametrize("resample", ["", "2x24x20", "10x24x20", "13x30x30"])
def test_clicks_land_on_the_working_slice_and_point_that_hold_them(case, tmp_path, resample):
    path = tmp_path / "clicks.tsv"
    path.write_text("case_id\ti\tj\tk\tlabel\np1\t6\t12\t3\t1\n")
    clicks = click_tools.read_clicks(path)
    prepared = prepare(case, config=configs.DataConfig(resample=resample), clicks=clicks)
    depth = int(resample.split("x")[0]) if resample else 5
    assert prepared.slices.tolist() == [int(3.5 / 5 * depth)]
    assert prepared.slices == frames.working_slices(np.array([3]), prepared.geometry)
    native = frames.points_from_frame(prepared.prompts["gt_points"].points, prepared.geometry)
    np.testing.assert_allclose(native[0, 0], [13, 11], atol=1e-4)  # the plane's field of view is the file's
    volume = predict.to_native(np.full((1, 24, 20, 1), 0.9, np.float32), prepared.slices, prepared.geometry)
    assert volume.shape == (5, 24, 20, 1)
    assert volume[3].min() == np.float32(0.9)  # a prediction is not diluted by slices that nobody asked for
    assert sorted(np.unique(volume)) == [0, np.float32(0.9)]


@pytest.mark.parametrize("slice_axis", configs.SLICE_AXES)
def test_points_lie_on_their_voxels_along_every_slice_axis(case, slice_axis):
    label = np.zeros((20, 24, 5), np.uint8)
    label[6, 13, 2] = 1
    write_image(case.label, label)
    prepared = prepare(case, config=configs.DataConfig(slice_axis=slice_axis))
    native = frames.points_from_frame(prepared.prompts["gt_points"].points, prepared.geometry)
    column, row = np.rint(native[0, 0]).astype(int)
    millimetres = prepared.reference.affine @ [prepared.slices[0], row, column, 1]
    np.testing.assert_allclose(millimetres, [6, 13, 6, 1], atol=1e-4)


def test_protocols_of_every_slice_leave_out_black_slices(case, tmp_path):
    data = np.random.default_rng(7).uniform(100, 900, (20, 24, 5)).astype(np.float32)
    data[:, :, [0, 4]] = 0
    for image in case.images.values():
        write_image(image, data)
    path = tmp_path / "clicks.tsv"
    path.write_text("case_id\ti\tj\tk\tlabel\np1\t6\t12\t1\t1\np1\t1\t1\t2\t0\n")
    for arguments in ({}, {"clicks": click_tools.read_clicks(path)}):
        prepared = prepare(case, "volume_points", **arguments)
        assert prepared.slices.tolist() == [1, 2, 3]
        assert prepared.prompts["volume_points"].points.shape == (3, 2, 2)
        assert len(prepared.images) == 3
    assert prepare(dataclasses.replace(case, label=None), "none").slices.tolist() == [1, 2, 3]


def test_points_of_a_volume_follow_the_augmentation_of_each_slice(case):
    label = np.zeros((20, 24, 5), np.uint8)
    label[11:14, 14:17, :] = 1
    write_image(case.label, label)
    config = configs.DataConfig(rotation_degrees=15)
    prepared = prepare(case, "volume_points", config, rng=np.random.default_rng(1))
    native = frames.points_from_frame(prepared.prompts["volume_points"].points, prepared.geometry)
    for points, moved in zip(native, prepared.labels, strict=True):
        np.testing.assert_allclose(points[0], np.argwhere(moved).mean(axis=0)[::-1], atol=0.75)


def test_drawn_slices(case):
    drawn = [prepare(case, rng=np.random.default_rng(seed), count=2) for seed in range(6)]
    assert {tuple(d.slices) for d in drawn} <= {(1, 2), (1, 3), (2, 3)}
    assert len({tuple(d.slices) for d in drawn}) > 1
    assert all(len(d.images) == len(d.labels) == len(d.prompts["gt_box"].boxes) == 2 for d in drawn)
    repeated = prepare(case, rng=np.random.default_rng(0), count=7).slices
    assert len(repeated) == 7 and set(repeated) <= {1, 2, 3}
    with pytest.raises(ValueError, match="rng"):
        prepare(case, count=2)


def test_one_volume_of_a_4d_file_is_a_channel(case, tmp_path):
    both = np.stack([np.asarray(nibabel.load(case.images[name]).dataobj) for name in ("T2", "T1")], axis=-1)
    path = write_image(tmp_path / "both.nii", both)
    together = dataclasses.replace(case, images={"T1": path, "T2": path}, volumes={"T1": 1, "T2": 0})
    np.testing.assert_array_equal(prepare(together).images, prepare(case).images)
