"""The encoder frame, the working grid and the way back, against torch, scipy and SAM's rules."""

import pathlib

import numpy as np
import pytest

from calsegx.data import frames

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
