"""Images into frames and masks back, against Meta's code (tests/golden/README.md: sam) and as properties.

Tolerances: resized uint8 images and normalised frames exact, postprocessed logits 1e-4.
"""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from calsegx.interfaces import DataError, UsageError
from calsegx.models import sam
from calsegx.models.sam import frames
from tests.golden import detweights
from tests.models import test_sam_parity as parity

SMALL = sam.SamConfig(image_size=32)
MEDSAM = dataclasses.replace(SMALL, preprocessing="medsam")
few = hypothesis.settings(max_examples=40, deadline=None, database=None, derandomize=True)
sides = strategies.integers(1, 2000)


def grey_levels(config):
    """The configuration whose frames are the resized grey levels themselves."""
    return dataclasses.replace(config, pixel_mean=(0.0, 0.0, 0.0), pixel_std=(1.0, 1.0, 1.0))


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


# --- against Meta's code


def test_resized_image():
    g = parity.golden()
    images, geometry = sam.preprocess(grey_levels(parity.tiny()[0]), g["image"])
    assert geometry == sam.Geometry(((300, 411),), ((187, 256),), 256)
    np.testing.assert_array_equal(images[0, :187], g["resized"])
    assert not images[0, 187:].any()


def test_resized_image_of_another_size():
    g = parity.golden()
    image = detweights.make_image(int(g["resize2/image_seed"]), *g["resize2/original_size"])
    images, geometry = sam.preprocess(grey_levels(parity.tiny()[0]), image)
    height, width = geometry.resized[0]
    np.testing.assert_array_equal(images[0, :height:3, :width:3], g["resize2/pil_strided"])


def test_normalised_padded_frame():
    g = parity.golden()
    images, _ = sam.preprocess(parity.tiny()[0], g["image"])
    np.testing.assert_allclose(images.transpose(0, 3, 1, 2)[:, :, ::8, ::8], g["input_strided"], atol=1e-6, rtol=0)
    mean, std, low, high = g["input_stats"][:4]
    np.testing.assert_allclose([images.mean(), images.std(ddof=1), images.min(), images.max()], [mean, std, low, high])


def test_longest_side():
    for size, expected in zip(*(parity.golden()[f"preprocess_shape/{end}"] for end in ("in", "out_1024")), strict=True):
        assert frames.longest_side(tuple(size.tolist()), 1024) == tuple(expected.tolist())


def test_postprocess_of_metas_logits():
    g, config = parity.golden(), parity.tiny()[0]
    geometry = sam.Geometry(((300, 411),), ((187, 256),), 256)
    masks = sam.postprocess(config, jnp.asarray(g["box/low_res_single"]), geometry)
    np.testing.assert_allclose(masks, g["post/box_single_logits"], atol=1e-4, rtol=0)
    shrinking = sam.Geometry((tuple(g["post_shrink/original_size"].tolist()),), ((154, 256),), 256)
    masks = sam.postprocess(config, jnp.asarray(g["box/low_res_single"]), shrinking)
    np.testing.assert_allclose(masks, g["post_shrink/box_single_logits"], atol=1e-4, rtol=0)


def test_from_the_image_to_its_masks():
    g = parity.golden()
    config, params = parity.tiny()
    images, geometry = sam.preprocess(config, g["image"])
    z = jax.jit(functools.partial(sam.encode, config))(params, images)
    np.testing.assert_allclose(z, g["encoder/neck"].transpose(0, 2, 3, 1), atol=2e-5, rtol=0)
    points = geometry.to_frame(geometry.to_original(g["pt1/points"]))
    prompts = sam.Prompts(points=jnp.asarray(points, jnp.float32), labels=jnp.asarray(g["pt1/labels"], jnp.int32))
    logits, iou = jax.jit(functools.partial(sam.decode, config))(params, z, prompts)
    np.testing.assert_allclose(iou, g["pt1/iou_multi"], atol=1e-5, rtol=0)
    masks = sam.postprocess(config, logits, geometry)
    assert masks.shape == (1, 3, 300, 411)
    np.testing.assert_allclose(masks[:, :, ::7, ::7], g["post/pt1_multi_logits_strided"], atol=1e-4, rtol=0)
    expected = np.unpackbits(g["post/pt1_multi_bool_packed"], count=masks.size).reshape(masks.shape)
    near_zero = np.abs(masks) < 1e-3
    assert near_zero.sum() == pytest.approx(int(g["post/pt1_multi_near_zero"][0]), abs=5)
    np.testing.assert_array_equal((masks > 0)[~near_zero], expected[~near_zero])


def test_postprocess_equals_two_resizes():
    """Landscape and portrait, enlarging and shrinking, against the two steps as they are written in Meta's code."""
    logits = jax.random.normal(jax.random.key(0), (2, 3, 8, 8)) * 10
    for original in ((50, 20), (20, 50), (9, 7), (32, 32)):
        geometry = sam.preprocess(SMALL, noise(*original))[1]
        whole = jax.image.resize(logits, (2, 3, 32, 32), "bilinear", antialias=False)
        height, width = geometry.resized[0]
        expected = jax.image.resize(whole[:, :, :height, :width], (2, 3, *original), "bilinear", antialias=False)
        np.testing.assert_allclose(sam.postprocess(SMALL, logits, geometry), expected, atol=1e-4, rtol=0)


# --- batches, geometry, properties


@pytest.mark.parametrize("config", [SMALL, MEDSAM], ids=lambda c: c.preprocessing)
def test_batch_of_several_sizes_equals_single_images(config):
    pictures = [noise(20, 50), noise(64, 64, 1), noise(33, 7, 2)]
    images, geometry = sam.preprocess(config, pictures)
    assert images.shape == (3, 32, 32, 3) and images.dtype == np.float32
    logits = jax.random.normal(jax.random.key(0), (3, 2, 8, 8))
    masks = sam.postprocess(config, logits, geometry)
    boxes = np.arange(12.0).reshape(3, 4)
    for i, picture in enumerate(pictures):
        image, alone = sam.preprocess(config, picture)
        np.testing.assert_array_equal(images[i], image[0])
        assert masks[i].shape == (2, *picture.shape[:2])
        np.testing.assert_allclose(masks[i], sam.postprocess(config, logits[i : i + 1], alone)[0], atol=1e-5)
        np.testing.assert_array_equal(geometry.to_frame(boxes)[i], alone.to_frame(boxes[i : i + 1])[0])


def test_images_of_one_size_give_one_array():
    _, geometry = sam.preprocess(SMALL, [noise(20, 50), noise(20, 50, 1)])
    assert sam.postprocess(SMALL, jnp.zeros((2, 3, 8, 8)), geometry).shape == (2, 3, 20, 50)


def test_many_prompts_for_one_image():
    _, geometry = sam.preprocess(SMALL, noise(20, 50))
    assert geometry.to_frame(np.zeros((5, 4))).shape == (5, 4)
    assert sam.postprocess(SMALL, jnp.zeros((5, 3, 8, 8)), geometry).shape == (5, 3, 20, 50)


def test_coordinates_are_x_y_and_scale_per_axis():
    geometry = sam.Geometry(((10, 20), (40, 10)), ((32, 16), (32, 5)), 32)
    points = np.array([[[20.0, 5.0]], [[10.0, 40.0]]])
    np.testing.assert_allclose(geometry.to_frame(points), [[[16.0, 16.0]], [[5.0, 32.0]]])
    boxes = np.array([[0.0, 0.0, 20.0, 10.0], [5.0, 20.0, 10.0, 40.0]])
    np.testing.assert_allclose(geometry.to_frame(boxes), [[0.0, 0.0, 16.0, 32.0], [2.5, 16.0, 5.0, 32.0]])


@few
@hypothesis.given(sides, sides, sides, sides, strategies.sampled_from([2, 4]), strategies.sampled_from([64, 1024]))
def test_round_trip_of_coordinates(height, width, other_height, other_width, last, side):
    original = ((height, width), (other_height, other_width))
    resized = tuple(frames.longest_side(size, side) for size in original)
    hypothesis.assume(min(map(min, resized)) > 0)
    geometry = sam.Geometry(original, resized, side)
    xy = np.random.default_rng(0).uniform(0, 1, (2, 3, last)) * np.tile(np.array(original)[:, None, ::-1], last // 2)
    there = geometry.to_frame(xy)
    assert np.all(there <= side + 1e-9)
    np.testing.assert_allclose(geometry.to_original(there), xy, rtol=1e-12, atol=1e-12)


@few
@hypothesis.given(sides, sides, strategies.sampled_from([64, 1024]))
def test_longest_side_fills_the_frame(height, width, side):
    new = frames.longest_side((height, width), side)
    assert max(new) == side
    for before, after in zip((height, width), new, strict=True):
        assert abs(after - before * side / max(height, width)) <= 0.5 + 1e-9


@hypothesis.settings(few, max_examples=12)  # each size is compiled
@hypothesis.given(strategies.integers(1, 60), strategies.integers(1, 60), strategies.sampled_from(["sam", "medsam"]))
def test_any_size_there_and_back(height, width, preprocessing):
    config = dataclasses.replace(SMALL, preprocessing=preprocessing)
    images, geometry = sam.preprocess(config, noise(height, width))
    new_height, new_width = geometry.resized[0]
    assert np.isfinite(images).all()
    assert not images[0, new_height:].any() and not images[0, :, new_width:].any()
    # A constant survives bilinear resizing at any size, in either space.
    masks = sam.postprocess(config, np.full((1, 1, 8, 8), 3.0, np.float32), geometry)
    assert masks.shape == (1, 1, height, width)
    np.testing.assert_allclose(masks, 3.0, atol=1e-4)


@pytest.mark.parametrize("config", [SMALL, MEDSAM], ids=lambda c: c.preprocessing)
@pytest.mark.parametrize("size", [(1, 1), (1, 60), (60, 1), (1500, 40)])
def test_one_pixel_and_elongated_images(config, size):
    image = np.full((*size, 3), 100, np.uint8)
    images, geometry = sam.preprocess(config, image)
    height, width = geometry.resized[0]
    expected = 0.0 if config is MEDSAM else (100 - np.float32(config.pixel_mean)) / np.float32(config.pixel_std)
    np.testing.assert_allclose(images[0, :height, :width], np.broadcast_to(expected, (height, width, 3)), atol=1e-6)


def test_too_elongated_for_the_frame():
    with pytest.raises(DataError, match="Image 1 is 1 x 5000 pixels, too elongated"):
        sam.preprocess(SMALL, [noise(3, 3), noise(1, 5000)])
    assert sam.preprocess(MEDSAM, noise(1, 5000))[0].shape == (1, 32, 32, 3)


# --- bad input

BAD_IMAGES = {
    "float": (noise(4, 4).astype(np.float32), "Image 0 is float32; expected a numpy uint8"),
    "nan": (np.full((4, 4, 3), np.nan), "Image 0 is float64"),
    "int64": (noise(4, 4).astype(np.int64), "Image 0 is int64"),
    "grey": (noise(4, 4)[..., 0], r"is grey, shape \(4, 4\)"),
    "grey channel": (noise(4, 4)[..., :1], "repeat its channel"),
    "rgba": (np.zeros((4, 4, 4), np.uint8), "drop an alpha channel"),
    "stack": (np.zeros((2, 4, 4, 3), np.uint8), "several images as a list"),
    "empty": (np.zeros((0, 4, 3), np.uint8), "is empty"),
    "name": ("image.png", "Image 0 is str"),
    "second": ([noise(4, 4), noise(4, 4)[..., 0]], "Image 1 is grey"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_unusable_images(case):
    image, message = BAD_IMAGES[case]
    with pytest.raises(DataError, match=message):
        sam.preprocess(SMALL, image)


def test_the_advice_for_grey_images_works():
    for grey in (noise(4, 5)[..., 0], noise(4, 5)[..., :1]):
        colour = np.repeat(grey.reshape(*grey.shape[:2], 1), 3, axis=2)
        assert sam.preprocess(SMALL, colour)[0].shape == (1, 32, 32, 3)


def test_no_image():
    with pytest.raises(UsageError, match="The list of images is empty"):
        sam.preprocess(SMALL, [])


def test_unknown_preprocessing():
    config = dataclasses.replace(SMALL, preprocessing="sm")
    geometry = sam.preprocess(SMALL, noise(4, 4))[1]
    with pytest.raises(UsageError, match="no preprocessing named 'sm' .*; known: medsam, sam"):
        sam.preprocess(config, noise(4, 4))
    with pytest.raises(UsageError, match="known: medsam, sam"):
        sam.postprocess(config, jnp.zeros((1, 1, 8, 8)), geometry)


@pytest.mark.parametrize("shape", [(3, 1, 8, 8), (1, 8, 8), (2, 1, 8, 6)])
def test_logits_of_other_images(shape):
    _, geometry = sam.preprocess(SMALL, [noise(4, 4), noise(5, 5)])
    with pytest.raises(UsageError, match="do not belong to the square frames of 2 image"):
        sam.postprocess(SMALL, jnp.zeros(shape), geometry)


@pytest.mark.parametrize("shape", [(3, 1, 2), (2, 1, 3), (2,)])
def test_coordinates_of_other_images(shape):
    _, geometry = sam.preprocess(SMALL, [noise(4, 4), noise(5, 5)])
    with pytest.raises(UsageError, match="do not belong to 2 image"):
        geometry.to_frame(np.zeros(shape))
