"""Parity with Meta's SAM at its real sizes, 1024 x 1024 pixels (tests/golden/README.md: sam, large).

The same tolerances as for the tiny configuration: encoder 2e-5, prompts 5e-6, masks 1e-4, IoU 1e-5, end to end (the
decoder works on our own features).  ViT-B takes seconds; ViT-H needs 8 GB and minutes, and is marked slow.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calsegx.interfaces import Prompts
from calsegx.models import sam
from calsegx.models.sam import image_encoder, model, weights
from tests.golden import detweights
from weights_conversion import meta_names

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
SIZES = ["sam_vit_b_1024", pytest.param("sam_vit_h_1024", marks=pytest.mark.slow)]
CASES = ["pt1", "box", "mask", "box3"]


class Run(NamedTuple):
    """A model of real size, its golden, and what the encoder made of the golden's image."""

    golden: dict[str, np.ndarray]
    config: sam.SamConfig
    params: dict[str, Any]
    geometry: Any
    blocks: dict[str, np.ndarray]  # block -> [4, 4, C / 64]
    statistics: dict[str, np.ndarray]  # stage -> mean, std, min, max, mean of the absolute value
    z: jax.Array


@functools.lru_cache(maxsize=1)  # one model at a time: ViT-H is large
def run(name: str) -> Run:
    golden = dict(np.load(GOLDEN / f"{name}.npz"))
    meta = json.loads(str(golden["meta_json"]))
    fields = {f.name for f in dataclasses.fields(sam.SamConfig)}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in meta["config"].items() if k in fields}
    config = sam.SamConfig(**values)
    params = draw_weights(config, meta)
    image = detweights.make_image(meta["image_seed"], *meta["original_size"])
    images, geometry = sam.preprocess(config, image)
    z, blocks, statistics = jax.device_get(encode(config, params["image_encoder"], images))
    return Run(golden, config, params, geometry, blocks, statistics, jnp.asarray(z))


def draw_weights(config: sam.SamConfig, meta: dict[str, Any]) -> dict[str, Any]:
    state = detweights.make_weights(detweights.sam_shapes(meta["config"]), meta["weight_seed"])
    assert detweights.digest(state) == meta["weights_sha256"]
    template = weights.template(config)
    return weights.unflatten(template, meta_names.convert(state), "golden")


@functools.partial(jax.jit, static_argnums=0)
def encode(config: sam.SamConfig, params: dict[str, Any], images: jax.Array) -> tuple[Any, dict, dict]:
    """Features, and of every block what the golden keeps; whole block outputs do not outlive the jit."""
    is_block = lambda module, method: (module.name or "").startswith("blocks.") and method == "__call__"
    z, state = image_encoder.ImageEncoder(config).apply(
        {"params": params}, images, capture_intermediates=is_block, mutable=["intermediates"]
    )
    blocks = {name: stage["__call__"][0] for name, stage in state["intermediates"].items()}
    return z, {k: v[0, ::16, ::16, ::64] for k, v in blocks.items()}, {k: statistics(v) for k, v in blocks.items()}


def statistics(x: jax.Array) -> jax.Array:
    return jnp.stack([x.mean(), x.std(ddof=1), x.min(), x.max(), jnp.abs(x).mean()])


def prompts_of(case: str, large: Run) -> Prompts:
    get = lambda name: jnp.asarray(large.golden[name]) if name in large.golden else None
    labels, masks = get(f"{case}/labels"), None
    if case == "mask":
        seed, side = json.loads(str(large.golden["meta_json"]))["image_seed"], 4 * large.config.grid
        masks = jnp.asarray(detweights.make_array("mask", (1, 1, side, side), seed, std=4.0)).transpose(0, 2, 3, 1)
    labels = None if labels is None else labels.astype(jnp.int32)
    return Prompts(points=get(f"{case}/points"), labels=labels, boxes=get(f"{case}/boxes"), masks=masks)


@functools.partial(jax.jit, static_argnums=0)
def decode(config: sam.SamConfig, params: dict[str, Any], z: jax.Array, prompts: Prompts) -> dict[str, Any]:
    return {
        "embeddings": model.embed_prompts(config, params["prompt_encoder"], z, prompts),
        "multi": sam.decode(config, params, z, prompts, multimask=True),
        "single": sam.decode(config, params, z, prompts, multimask=False),
    }


@pytest.mark.parametrize("name", SIZES)
def test_every_block(name):
    large = run(name)
    for i in range(large.config.depth):
        expected = large.golden[f"encoder/block{i}_strided"]
        np.testing.assert_allclose(large.blocks[f"blocks.{i}"], expected, atol=2e-5, rtol=0, err_msg=f"block {i}")
        # Of all tokens; the sums of 3 to 5 million float32 numbers add their own rounding, below 1e-5.
        expected = large.golden[f"stats/block{i}"]
        np.testing.assert_allclose(large.statistics[f"blocks.{i}"], expected, atol=2e-5, rtol=0, err_msg=f"block {i}")


@pytest.mark.parametrize("name", SIZES)
def test_neck(name):
    large = run(name)
    z = np.asarray(large.z[0], np.float64)
    golden = large.golden
    np.testing.assert_allclose(z[::8, ::8, ::16], golden["encoder/neck_strided"], atol=2e-5, rtol=0)
    np.testing.assert_allclose(z.mean((0, 1)), golden["encoder/neck_channel_mean"], atol=2e-5, rtol=0)
    np.testing.assert_allclose(z.std((0, 1), ddof=1), golden["encoder/neck_channel_std"], atol=2e-5, rtol=0)
    np.testing.assert_allclose(statistics(large.z), golden["stats/neck"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", SIZES)
def test_prompts_and_masks(name, case):
    large = run(name)
    golden, prompts = large.golden, prompts_of(case, large)
    z = jnp.repeat(large.z, len(golden[f"{case}/sparse"]), axis=0)
    decoded = decode(large.config, large.params, z, prompts)
    sparse, _, position, _ = decoded["embeddings"]
    np.testing.assert_allclose(sparse, golden[f"{case}/sparse"], atol=5e-6, rtol=0)
    position = position.transpose(2, 0, 1)[None, ::8, ::8, ::8]
    np.testing.assert_allclose(position, golden["dense_pe_strided"], atol=5e-6, rtol=0)
    for kind in ("multi", "single"):
        logits, iou = decoded[kind]
        expected = golden[f"{case}/low_res_{kind}_strided"]
        np.testing.assert_allclose(logits[..., ::4, ::4], expected, atol=1e-4, rtol=0)
        np.testing.assert_allclose(iou, golden[f"{case}/iou_{kind}"], atol=1e-5, rtol=0)
        summary = statistics(logits)
        np.testing.assert_allclose(summary, golden[f"stats/{case}/low_res_{kind}"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", SIZES)
def test_masks_at_the_original_size(name):
    large = run(name)
    logits, _ = decode(large.config, large.params, large.z, prompts_of("box", large))["single"]
    masks = sam.postprocess(large.config, logits, large.geometry)
    golden = large.golden
    np.testing.assert_allclose(masks[..., ::11, ::11], golden["post/box_single_logits_strided"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(statistics(masks), golden["stats/post/box_single_logits"], atol=1e-4, rtol=0)
    area, undecided = golden["post/box_single_area"]  # undecided: pixels so near to zero that rounding may flip them
    assert abs(int((masks > 0).sum()) - area) <= undecided
