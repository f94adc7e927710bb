"""Stage-by-stage parity with Meta's SAM on a tiny configuration (tests/golden/README.md: sam).

Tolerances are absolute and come from float32-against-float64 runs of Meta's code: encoder 2e-5, prompts 5e-6,
masks 1e-4, IoU 1e-5.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calsegx.interfaces import Prompts, UsageError
from calsegx.models import sam
from calsegx.models.sam import attention, image_encoder, model, weights
from tests.golden import detweights
from weights_conversion import meta_names

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "sam_tiny.npz"


@functools.cache
def golden():
    data = np.load(GOLDEN)
    return {name: data[name] for name in data.files}


@functools.cache
def state():
    """The weights under Meta's names."""
    meta = json.loads(str(golden()["meta_json"]))
    drawn = detweights.make_weights(detweights.sam_shapes(meta["config"]), meta["weight_seed"])
    assert detweights.digest(drawn) == meta["weights_sha256"]
    return drawn


@functools.cache
def tiny():
    """Configuration and parameters converted from Meta's names."""
    meta = json.loads(str(golden()["meta_json"]))
    fields = {f.name for f in dataclasses.fields(sam.SamConfig)}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in meta["config"].items() if k in fields}
    config = sam.SamConfig(**values)
    return config, weights.unflatten(weights.template(config), meta_names.convert(state()), "golden")


def frame():
    """The golden's image, normalised and padded."""
    config = tiny()[0]
    frame = np.zeros((1, config.image_size, config.image_size, 3), np.float32)
    resized = golden()["resized"]
    normalised = (resized - np.float32(config.pixel_mean)) / np.float32(config.pixel_std)
    frame[0, : resized.shape[0], : resized.shape[1]] = normalised
    return frame


@functools.cache
def embeddings():
    config, params = tiny()
    apply = functools.partial(image_encoder.ImageEncoder(config).apply, capture_intermediates=True)
    return jax.jit(apply)({"params": params["image_encoder"]}, jnp.asarray(frame()))


@pytest.mark.parametrize("block", range(4))
def test_encoder_blocks(block):
    stages = embeddings()[1]["intermediates"]
    out = stages[f"blocks.{block}"]["__call__"][0]
    np.testing.assert_allclose(out, golden()[f"encoder/block{block}"], atol=2e-5, rtol=0)


def test_patch_embedding():
    out = embeddings()[1]["intermediates"]["patch_embed"]["__call__"][0]
    np.testing.assert_allclose(out, golden()["encoder/patch_embed"], atol=2e-5, rtol=0)


def test_neck():
    z = embeddings()[0]
    np.testing.assert_allclose(z, golden()["encoder/neck"].transpose(0, 2, 3, 1), atol=2e-5, rtol=0)


def test_row_blocked_attention_equals_whole(monkeypatch):
    config, params = tiny()
    x = jax.random.normal(jax.random.key(0), (1, 3 * 16, 2 * 16, 3))
    whole = jax.jit(functools.partial(sam.encode, config))(params, x)
    monkeypatch.setattr(attention, "LOGIT_BYTES_CPU", 1)
    blocked = jax.jit(lambda *args: sam.encode(config, *args))(params, x)
    np.testing.assert_allclose(blocked, whole, atol=2e-5, rtol=0)


@pytest.mark.parametrize("case", ["same", "up", "down", "q_lt_k", "q_gt_k", "odd", "interp_unequal"])
def test_relative_positions(case):
    table, expected = golden()[f"relpos/{case}/table"], golden()[f"relpos/{case}/out"]
    out = attention.relative_positions(jnp.asarray(table), *expected.shape[:2])
    np.testing.assert_allclose(out, expected, atol=5e-6, rtol=0)


def prompts_of(case):
    config, g = tiny()[0], golden()
    get = lambda name: jnp.asarray(g[f"{case}/{name}"]) if f"{case}/{name}" in g else None
    labels = get("labels")
    masks = None
    if "mask" in case:
        side = 4 * config.grid
        masks = jnp.asarray(detweights.make_array("mask", (1, 1, side, side), 1, std=4.0)).transpose(0, 2, 3, 1)
    labels = None if labels is None else labels.astype(jnp.int32)
    return Prompts(points=get("points"), labels=labels, boxes=get("boxes"), masks=masks)


CASES = ["none", "pt1", "pt2", "box", "box_pt", "mask", "pt1_mask", "box3", "pt_pad"]


@pytest.mark.parametrize("case", CASES)
def test_prompts_and_masks(case):
    config, params = tiny()
    g = golden()
    z = jnp.repeat(jnp.asarray(g["encoder/neck"].transpose(0, 2, 3, 1)), len(g[f"{case}/low_res_multi"]), axis=0)
    prompts = prompts_of(case)

    @jax.jit
    def stages(params, z, prompts):
        several, one = (
            sam.decode(config, params, z, prompts, multimask=multimask, ignore_padding=False)
            for multimask in (True, False)
        )
        return model.embed_prompts(config, params["prompt_encoder"], z, prompts)[:3], several, one

    (sparse, dense, position), *masks = stages(params, z, prompts)
    np.testing.assert_allclose(sparse, g[f"{case}/sparse"], atol=5e-6, rtol=0)
    np.testing.assert_allclose(position, g["dense_pe"][0].transpose(1, 2, 0), atol=5e-6, rtol=0)
    if case == "mask":
        np.testing.assert_allclose(dense, g["mask/dense"].transpose(0, 2, 3, 1), atol=2e-5, rtol=0)
    for (logits, iou), name in zip(masks, ("multi", "single"), strict=True):
        np.testing.assert_allclose(logits, g[f"{case}/low_res_{name}"], atol=1e-4, rtol=0)
        np.testing.assert_allclose(iou, g[f"{case}/iou_{name}"], atol=1e-5, rtol=0)


def features(count):
    return jnp.repeat(jnp.asarray(golden()["encoder/neck"].transpose(0, 2, 3, 1)), count, axis=0)


@functools.cache
def decode():
    config = tiny()[0]
    return jax.jit(functools.partial(sam.decode, config), static_argnames=("multimask", "ignore_padding"))


@pytest.mark.parametrize("boxes", [None, [[30.0, 40.0, 180.0, 121.5]]])
def test_padded_points_give_the_unpadded_result(boxes):
    params = tiny()[1]
    boxes = None if boxes is None else jnp.array(boxes)
    plain = Prompts(points=jnp.array([[[30.0, 40.0]]]), labels=jnp.array([[1]]), boxes=boxes)
    padded = plain._replace(points=jnp.array([[[9.0, 9.0], [30.0, 40.0], [0.0, 0.0]]]), labels=jnp.array([[-1, 1, -1]]))
    expected = decode()(params, features(1), plain)
    for actual, wanted in zip(decode()(params, features(1), padded), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, atol=1e-4, rtol=0)
    attended = decode()(params, features(1), padded, ignore_padding=False)
    assert np.abs(attended[0] - expected[0]).max() > 0.1


def test_groups_of_prompts_per_image():
    """[images, groups, ...] equals one group at a time; one image serves any number of groups."""
    params = tiny()[1]
    z = features(2) * jnp.array([1.0, 0.5])[:, None, None, None]
    rng = np.random.default_rng(0)
    points, labels = rng.uniform(0, 255, (2, 3, 2, 2)).astype(np.float32), np.array([[[1, 0]] * 3] * 2)
    logits, iou = decode()(params, z, Prompts(points=points, labels=labels))
    assert logits.shape == (2, 3, 3, 64, 64) and iou.shape == (2, 3, 3)
    for group in range(3):
        expected = decode()(params, z, Prompts(points=points[:, group], labels=labels[:, group]))
        np.testing.assert_allclose(logits[:, group], expected[0], atol=1e-4, rtol=0)
        np.testing.assert_allclose(iou[:, group], expected[1], atol=1e-5, rtol=0)
    _, geometry = sam.preprocess(tiny()[0], [np.zeros((40, 60, 3), np.uint8), np.zeros((50, 30, 3), np.uint8)])
    masks = sam.postprocess(tiny()[0], logits, geometry)
    assert [mask.shape for mask in masks] == [(3, 3, 40, 60), (3, 3, 50, 30)]
    one = sam.postprocess(tiny()[0], logits[1], sam.Geometry(geometry.original[1:], geometry.resized[1:], 256))
    np.testing.assert_allclose(masks[1], one, atol=1e-5, rtol=0)
    shared = decode()(params, z[1:], Prompts(points=points[1], labels=labels[1]))
    np.testing.assert_allclose(shared[0], logits[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "prompts",
    [
        Prompts(points=np.zeros((3, 1, 2)), labels=np.ones((3, 1))),
        Prompts(points=np.zeros((2, 1, 2)), labels=np.ones((2, 1)), boxes=np.zeros((1, 4))),
        Prompts(points=np.zeros((2, 1, 2))),
        Prompts(points=np.zeros((2, 3, 2)), labels=np.ones((2, 1))),
        Prompts(points=np.zeros((2, 3, 3)), labels=np.ones((2, 3))),
        Prompts(masks=np.zeros((2, 1, 64, 64))),
    ],
)
def test_prompts_that_do_not_fit_are_refused(prompts):
    with pytest.raises(UsageError, match="Prompts|prompts"):
        sam.decode(*tiny(), features(2), prompts)


def test_window_partition_round_trip_on_a_grid_that_is_not_square():
    x = jax.random.normal(jax.random.key(0), (2, 7, 13, 3))
    windows, grid = attention.partition(x, 5)
    assert windows.shape == (2 * 2 * 3, 5, 5, 3)
    np.testing.assert_array_equal(attention.unpartition(windows, 5, grid, (7, 13)), x)


def test_another_image_size_with_the_same_parameters():
    """A configuration with another image size uses the stored tables, interpolated: from image to mask."""
    config, params = tiny()
    small = dataclasses.replace(config, image_size=160)
    images, geometry = sam.preprocess(small, np.full((50, 80, 3), 90, np.uint8))
    z = jax.jit(functools.partial(sam.encode, small))(params, images)
    assert images.shape == (1, 160, 160, 3) and z.shape == (1, 10, 10, 256)
    as_stored = jax.jit(functools.partial(sam.encode, config))(params, images)
    np.testing.assert_allclose(z, as_stored, atol=2e-5, rtol=0)
    logits, _ = jax.jit(functools.partial(sam.decode, small))(
        params, z, Prompts(boxes=np.array([[10.0, 10.0, 90.0, 70.0]]))
    )
    assert sam.postprocess(small, logits, geometry).shape == (1, 3, 50, 80)


def test_frames_that_are_not_whole_patches_are_refused():
    with pytest.raises(UsageError, match="100 x 96 pixels are not whole patches of 16"):
        sam.encode(*tiny(), np.zeros((1, 100, 96, 3), np.float32))


def test_float32_products_are_exact_on_any_device():
    """A GPU multiplies float32 in TF32 unless told otherwise."""
    config, params = tiny()
    z = jax.ShapeDtypeStruct((1, 16, 16, 256), jnp.float32)
    prompts = Prompts(boxes=jax.ShapeDtypeStruct((1, 4), jnp.float32))
    for text in (
        jax.jit(functools.partial(sam.encode, config)).lower(params, np.zeros((1, 64, 64, 3), np.float32)).as_text(),
        jax.jit(functools.partial(sam.decode, config)).lower(params, z, prompts).as_text(),
    ):
        products = [line for line in text.splitlines() if "dot_general" in line]
        assert products and all("HIGHEST" in line for line in products)
