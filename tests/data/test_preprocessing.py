"""The encoder frame and the way back, against torch and SAM's rules."""

import dataclasses
import pathlib

import nibabel
import numpy as np
import pytest

from calsegx import configs
from calsegx.data import augment, classes, frames, intensity, nifti, preprocessing, prompts
from calsegx.data import clicks as click_tools
from calsegx.interfaces import Case, DataError

# segment-anything (commit dca509f), ResizeLongestSide.get_preprocess_shape at 1024: input -> output.
SAM_SHAPES = {
    (1, 1): (1024, 1024),
    (300, 411): (747, 1024),
    (683, 1024): (683, 1024),
    (1023, 1024): (1023, 1024),
    (2047, 1365): (1024, 683),
    (777, 333): (1024, 439),
    (1500, 1000): (1024, 683),
}
GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
CLASS_MAP = classes.parse("tumour=1,rim=2", {})
CHANNELS = ("T1", "T1", "T2")


def geometry_of(shape, spacing=(1.0, 1.0), image_size=64, logit_shape=(16, 16)):
    return frames.frame_geometry((1, *shape), (1.0, *spacing), image_size, logit_shape)


@pytest.mark.parametrize("spacing", [1.0, 0.9375, 1.2])
def test_equal_spacing_is_sams_rule(spacing):
    for native, resized in SAM_SHAPES.items():
        assert geometry_of(native, (spacing, spacing), 1024).resized_shape == resized


def test_frame_pixels_are_square_in_millimetres():
    geometry = geometry_of((40, 100), (3.0, 1.0), image_size=60)
    assert geometry.resized_shape == (60, 50)
    assert geometry_of((1, 5000)).resized_shape == (1, 64)  # never empty


@pytest.mark.parametrize(("size_in", "size_out"), [(7, 20), (20, 7), (13, 13), (16, 1), (1, 9), (33, 32)])
@pytest.mark.parametrize("antialias", [False, True])
def test_resample_matrix_against_torch(size_in, size_out, antialias):
    torch = pytest.importorskip("torch")
    signal = np.random.default_rng(0).normal(size=(size_in, 3)).astype(np.float32)
    ours = frames.resample_matrix(size_in, size_out, antialias) @ signal
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(signal.T[None, :, None].astype(float)), (1, size_out), mode="bilinear", antialias=antialias
    )
    np.testing.assert_allclose(ours, theirs[0, :, 0].numpy().T, atol=1e-5)


@pytest.mark.parametrize("native", [(30, 47), (120, 90), (64, 64), (200, 20)])
def test_from_low_res_against_torch(native):
    torch = pytest.importorskip("torch")
    geometry = geometry_of(native)
    logits = np.random.default_rng(1).normal(0, 5, (2, 16, 16, 3)).astype(np.float32)
    resize = torch.nn.functional.interpolate
    height, width = geometry.resized_shape
    frame = resize(torch.from_numpy(logits.transpose(0, 3, 1, 2).astype(float)), (64, 64), mode="bilinear")
    expected = resize(frame[..., :height, :width], native, mode="bilinear").numpy().transpose(0, 2, 3, 1)
    ours = frames.from_low_res(logits, geometry)
    assert ours.shape == (2, *native, 3)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize(("key", "native"), [("post", (300, 411)), ("post_shrink", (120, 200))])
def test_from_low_res_against_segment_anything(key, native):
    with np.load(GOLDEN / "sam_tiny.npz") as golden:
        low_res = golden["box/low_res_single"].transpose(0, 2, 3, 1)
        expected = golden[f"{key}/box_single_logits"].transpose(0, 2, 3, 1)
    geometry = geometry_of(native, image_size=256, logit_shape=low_res.shape[1:3])
    # 1e-4: torch computes the sampling positions in float32; the values reach 13.
    np.testing.assert_allclose(frames.from_low_res(low_res, geometry), expected, atol=1e-4)


@pytest.mark.parametrize("native", [(30, 47), (120, 90)])
def test_to_frame_against_torch(native):
    torch = pytest.importorskip("torch")
    geometry = geometry_of(native)
    slices = np.random.default_rng(2).uniform(0, 255, (2, *native, 3)).astype(np.float32)
    mean, std = (120.0, 110.0, 100.0), (58.0, 57.0, 56.0)
    framed = frames.to_frame(slices, geometry, mean, std)
    height, width = geometry.resized_shape
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(slices.transpose(0, 3, 1, 2).astype(float)), (height, width), mode="bilinear", antialias=True
    )
    expected = (resized.numpy().transpose(0, 2, 3, 1) - mean) / std
    assert framed.shape == (2, 64, 64, 3)
    assert framed.dtype == np.float32
    np.testing.assert_allclose(framed[:, :height, :width], expected, atol=1e-5)
    # Padded after normalising: zero, which a padded black pixel would not be.
    assert not framed[:, height:].any()
    assert not framed[:, :, width:].any()


def test_labels_to_low_res_follows_the_logits_grid():
    geometry = geometry_of((32, 48))  # the frame's lower third is padding
    labels = np.zeros((1, 32, 48), np.uint8)
    labels[:, 8:24, :24], labels[:, 8:24, 24:] = 1, 2
    low = frames.labels_to_low_res(labels, geometry, 2)
    assert low.shape == (1, 16, 16)
    assert low.dtype == np.uint8
    assert not low[:, 11:].any()
    one_hot = np.eye(3, dtype=np.float32)[low]
    back = frames.from_low_res(one_hot, geometry).argmax(axis=-1)
    assert (back == labels).mean() > 0.95
    assert set(np.unique(frames.labels_to_low_res(labels[:0], geometry, 2))) == set()


def test_majority_decides_when_shrinking():
    labels = np.zeros((1, 64, 64), np.uint8)
    labels[:, ::2] = 1
    labels[:, 1::4] = 1  # three rows of four
    assert frames.labels_to_low_res(labels, geometry_of((64, 64), logit_shape=(8, 8)), 1).mean() > 0.9
    assert not frames.labels_to_low_res(1 - labels, geometry_of((64, 64), logit_shape=(8, 8)), 1).any()


def test_points_round_trip_uses_the_rounded_ratio():
    geometry = geometry_of((777, 333), image_size=1024)
    points = np.array([[0.0, 0.0], [100.0, 700.5]], np.float32)
    framed = frames.points_to_frame(points, geometry)
    np.testing.assert_allclose(framed[1], [100 * 439 / 333, 700.5 * 1024 / 777], rtol=1e-6)
    np.testing.assert_allclose(frames.points_from_frame(framed, geometry), points, atol=1e-4)


def test_normalise_intensity():
    voxels = np.concatenate([np.zeros(500), np.arange(1, 1001)]).astype(np.float32)
    normal = intensity.normalise(voxels, configs.DataConfig())
    assert normal.dtype == np.float32
    assert (normal.min(), normal.max()) == (0, 255)
    assert normal[1000] == pytest.approx(127.5, abs=0.3)
    with pytest.raises(ValueError, match="constant"):
        intensity.normalise(np.full(9, 3.0, np.float32), configs.DataConfig())
    with pytest.raises(ValueError, match="no voxel above 0"):
        intensity.normalise(np.zeros(9, np.float32), configs.DataConfig())


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


def ranges(rotation_degrees, intensity_fraction, **others):
    return configs.DataConfig(rotation_degrees=rotation_degrees, intensity_fraction=intensity_fraction, **others)


def test_augment_moves_image_and_labels_together():
    labels = np.zeros((6, 40, 50), np.uint8)
    labels[:, 8:20, 10:18] = 1
    images = np.repeat(labels[..., None] * np.float32(200), 3, axis=-1)
    moved, moved_labels, _ = augment.augment(images, labels, np.random.default_rng(0), ranges(15.0, 0.0))
    assert moved.dtype == np.float32
    assert moved_labels.dtype == np.uint8
    for image, label, original in zip(moved, moved_labels, labels, strict=True):
        overlap = ((image[..., 0] > 100) & (label == 1)).sum() / label.sum()
        assert overlap > 0.95
        assert abs(int(label.sum()) - int(original.sum())) < 12  # rigid
    assert sum((after != before).any() for after, before in zip(moved_labels, labels, strict=True)) >= 4
    flipped = moved_labels[:, :, 25:].sum(axis=(1, 2)) > 0
    assert 0 < flipped.sum() < 6


def test_augment_off_is_a_flip_at_most():
    images = np.random.default_rng(1).uniform(0, 255, (4, 8, 9, 3)).astype(np.float32)
    labels = np.zeros((4, 8, 9), np.uint8)
    moved, _, _ = augment.augment(images, labels, np.random.default_rng(0), ranges(0.0, 0.0))
    for before, after in zip(images, moved, strict=True):
        assert np.allclose(after, before, atol=1e-4) or np.allclose(after, before[:, ::-1], atol=1e-4)


def test_augment_keeps_air_black_and_rotates_in_millimetres():
    images = np.zeros((1, 60, 20, 1), np.float32)
    images[0, 15:45, 5:15] = 100.0  # 30 mm x 30 mm on pixels of 1 x 3 mm
    labels = (images[..., 0] > 0).astype(np.uint8)
    rng = np.random.default_rng(5)
    moved, moved_labels, _ = augment.augment(images, labels, rng, ranges(15.0, 0.2), (1.0, 3.0))
    assert moved[0, 0, 0, 0] == 0
    assert moved.max() <= 255
    assert abs(int(moved_labels.sum()) - 300) < 20
