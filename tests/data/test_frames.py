"""The encoder frame, the working grid and the way back, against torch, scipy and SAM's rules."""

import pathlib
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

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


# The working grid.
def resampled(native, resample, spacing=(1.0, 1.0, 1.0)):
    return frames.frame_geometry(native, spacing, 64, (16, 16), resample)


def torch_resize(values, shape, antialias):
    """``[n, H, W, C]`` with torch, in float64."""
    torch = pytest.importorskip("torch")
    channels_first = torch.from_numpy(np.moveaxis(values, -1, 1).astype(float))
    resized = torch.nn.functional.interpolate(channels_first, shape, mode="bilinear", antialias=antialias)
    return np.moveaxis(resized.numpy(), 1, -1)


def torch_depth(values, depth, antialias):
    """``[D, H, W]`` to ``[depth, H, W]``: rows and columns as one axis that keeps its length."""
    flat = values.reshape(1, len(values), -1, 1)
    return torch_resize(flat, (depth, flat.shape[2]), antialias).reshape(depth, *values.shape[1:])


@pytest.mark.parametrize("resample", [(), (30, 47), (5, 30, 47)])
def test_a_working_grid_like_the_native_one_changes_no_bit(resample):
    rng = np.random.default_rng(0)
    plain, geometry = geometry_of((30, 47)), resampled((5, 30, 47), resample)
    images = rng.uniform(0, 255, (2, 30, 47, 3)).astype(np.float32)
    labels = rng.integers(0, 3, (5, 30, 47)).astype(np.uint8)
    logits = rng.normal(size=(2, 16, 16, 3)).astype(np.float32)
    for call in (
        lambda g: frames.to_frame(images, g, (1, 2, 3), (4, 5, 6)),
        lambda g: frames.labels_to_low_res(labels, g, 2),
        lambda g: frames.from_low_res(logits, g),
    ):
        np.testing.assert_array_equal(call(geometry), call(plain))
    assert frames.to_working_depth(images, geometry) is images
    assert frames.labels_to_working_depth(labels, geometry, 2) is labels
    assert frames.from_working_depth(images, geometry, np.array([0])) is images


@pytest.mark.parametrize("plane", [(24, 24), (100, 60), (64, 41)])
def test_working_plane_against_torch(plane):
    rng = np.random.default_rng(1)
    geometry = resampled((3, 30, 47), plane)
    height, width = geometry.resized_shape
    assert geometry.resized_shape == geometry_of((30, 47)).resized_shape  # the field of view decides, not the grid
    images = rng.uniform(0, 255, (2, 30, 47, 3)).astype(np.float32)
    framed = frames.to_frame(images, geometry, (0, 0, 0), (1, 1, 1))[:, :height, :width]
    expected = torch_resize(torch_resize(images, plane, True), (height, width), True)
    np.testing.assert_allclose(framed, expected, atol=1e-3)

    logits = rng.normal(0, 5, (2, 16, 16, 3)).astype(np.float32)
    frame = torch_resize(logits, (64, 64), False)[:, :height, :width]
    expected = torch_resize(torch_resize(frame, plane, False), (30, 47), False)
    np.testing.assert_allclose(frames.from_low_res(logits, geometry), expected, atol=1e-4)

    labels = ndimage.zoom(rng.integers(0, 3, (2, 6, 8)), (1, 5, 5.875), order=0).astype(np.uint8)
    shares = np.zeros((2, 64, 64, 3))
    one_hot = np.eye(3)[labels]
    shares[:, :height, :width] = torch_resize(torch_resize(one_hot, plane, True), (height, width), True)
    shares[..., 0] += 1 - shares.sum(axis=-1)  # the padding
    assert_largest_share(frames.labels_to_low_res(labels, geometry, 2), torch_resize(shares, (16, 16), True))


def assert_largest_share(labels, shares):
    """``labels`` are the argmax of ``shares``, where rounding does not decide."""
    first, second = np.sort(shares, axis=-1)[..., :-3:-1].transpose(-1, *range(shares.ndim - 1))
    clear = first - second > 1e-5
    assert clear.mean() > 0.8
    np.testing.assert_array_equal(labels[clear], shares.argmax(axis=-1)[clear])


@pytest.mark.parametrize(("native", "working"), [(5, 9), (9, 5), (31, 128), (155, 128), (1, 4), (6, 1), (4, 8)])
def test_working_depth_against_torch(native, working):
    rng = np.random.default_rng(2)
    geometry = resampled((native, 6, 7), (working, 6, 7))
    volume = rng.uniform(0, 255, (native, 6, 7)).astype(np.float32)
    np.testing.assert_allclose(frames.to_working_depth(volume, geometry), torch_depth(volume, working, True), atol=1e-3)
    labels = ndimage.zoom(rng.integers(0, 4, (native, 2, 3)), (1, 3, 7 / 3), order=0).astype(np.uint8)
    shares = np.stack([torch_depth((labels == index).astype(float), working, True) for index in range(4)], axis=-1)
    assert_largest_share(frames.labels_to_working_depth(labels, geometry, 3), shares)
    probabilities = rng.dirichlet(np.ones(3), (working, 6, 7)).astype(np.float32)
    back = frames.from_working_depth(probabilities, geometry, np.arange(working))
    for index in range(3):
        np.testing.assert_allclose(back[..., index], torch_depth(probabilities[..., index], native, False), atol=1e-5)


def test_working_depth_against_scipy():
    volume = np.random.default_rng(3).uniform(0, 255, (7, 4, 5)).astype(np.float32)
    finer = frames.to_working_depth(volume, resampled((7, 4, 5), (20, 4, 5)))
    expected = ndimage.zoom(volume, (20 / 7, 1, 1), order=1, mode="nearest", grid_mode=True)
    np.testing.assert_allclose(finer, expected, atol=1e-3)


def test_ties_of_labels_go_to_the_lower_class():
    for pair, expected in (((0, 1), 0), ((1, 0), 0), ((2, 1), 1), ((1, 2), 1)):
        labels = np.array(pair, np.uint8)[:, None, None]
        assert frames.labels_to_working_depth(labels, resampled((2, 1, 1), (1, 1, 1)), 2) == expected


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(2, 40), st.integers(2, 40))
def test_linear_ramps_are_reproduced(native, working):
    geometry = resampled((native, 1, 1), (working, 1, 1))
    ramp = np.arange(native, dtype=np.float32) + 0.5
    ours = frames.to_working_depth(ramp[:, None, None], geometry)[:, 0, 0]
    expected = (np.arange(working, dtype=np.float32) + 0.5) * native / working
    reach = max(native / working, 0.5)  # within it of the border the ramp's end is felt
    inside = (expected > reach) & (expected < native - reach)
    # The widened triangle reproduces a ramp where its samples lie symmetrically; else to a tenth of a slice.
    exact = working >= native or native % working == 0
    np.testing.assert_allclose(ours[inside], expected[inside], atol=1e-4 if exact else 0.1)
    back = frames.from_working_depth(expected[:, None, None], geometry, np.arange(working))[:, 0, 0]
    position = (np.arange(native) + 0.5) * working / native
    inside = (position > 0.5) & (position < working - 0.5)
    np.testing.assert_allclose(back[inside], ramp[inside], atol=1e-4)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**30 - 1))
def test_probabilities_stay_probabilities(native, working, chosen):
    geometry = resampled((native, 2, 2), (working, 2, 2))
    predicted = np.flatnonzero([chosen >> index & 1 for index in range(working)])
    probabilities = np.zeros((working, 2, 2, 3), np.float32)
    probabilities[predicted] = np.random.default_rng(chosen).dirichlet(np.ones(3) / 2, (len(predicted), 2, 2))
    back = frames.from_working_depth(probabilities, geometry, predicted)
    assert back.min() >= 0 and back.max() <= 1 + 1e-6
    inside = np.isin(frames.working_slices(np.arange(native), geometry), predicted)
    np.testing.assert_allclose(back[inside].sum(axis=-1), 1, atol=1e-5)  # of predicted slices alone
    assert not back[~inside].any()


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 40))
def test_the_working_slice_holds_the_middle_of_the_files(native, working):
    geometry = resampled((native, 1, 1), (working, 1, 1))
    held = frames.working_slices(np.arange(native), geometry)
    middles = [Fraction(2 * index + 1, 2 * native) for index in range(native)]  # of the field of view
    for index, middle in zip(held, middles, strict=True):
        assert Fraction(int(index), working) <= middle < Fraction(int(index) + 1, working)
    # A single predicted working slice comes back undiminished on every slice of the file that it holds.
    one = np.zeros((working, 1, 1), np.float32)
    one[held[0]] = 0.75
    back = frames.from_working_depth(one, geometry, held[:1])[:, 0, 0]
    np.testing.assert_array_equal(back, np.where(held == held[0], np.float32(0.75), 0))


def test_working_spacing_covers_the_same_depth():
    geometry = resampled((31, 8, 9), (128, 8, 9), (4.0, 0.9, 0.8))
    assert frames.working_spacing((4.0, 0.9, 0.8), geometry) == (31 * 4.0 / 128, 0.9, 0.8)
