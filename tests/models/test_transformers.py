"""Parity with transformers' SamModel, an independent port, on small models whose weights are drawn anew in every run.

transformers runs in float64, so that a difference is ours.  The weights come from ``tests/golden/detweights.py`` with
a seed from the operating system, which keeps activations at the size the tolerances were measured for (SAM's: encoder
2e-5, prompts 5e-6, masks 1e-4, IoU 1e-5).  A failure names the seed; ``PARITY_SEED=... pytest`` repeats it.
"""

import functools
import os
import secrets
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calsegx.interfaces import Prompts
from calsegx.models import sam
from calsegx.models.sam import model, weights
from tests.golden import detweights
from weights_conversion import meta_names, transformers_names

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SEED = int(os.environ.get("PARITY_SEED") or secrets.randbits(32))
REPEAT = f"repeat with PARITY_SEED={SEED}"
META_EPSILON = 1e-5  # of the decoder's blocks; transformers' default there is 1e-6
IMAGES, PROMPTS = 2, 3  # per batch; prompts per image

# Windows that do not divide the grid, global blocks first and last, head widths of 12 to 24, three or four masks.
CONFIGS = {
    "grid8": sam.SamConfig(
        image_size=128,
        embed_dim=48,
        depth=3,
        num_heads=4,
        global_attn_indexes=(1,),
        window_size=3,
        out_chans=64,
        decoder_heads=4,
        decoder_mlp_dim=96,
        iou_head_hidden_dim=40,
    ),
    "grid10": sam.SamConfig(
        image_size=160,
        embed_dim=96,
        depth=4,
        num_heads=4,
        global_attn_indexes=(0, 3),
        window_size=7,
        mlp_ratio=3.0,
        qkv_bias=False,
        out_chans=96,
        mask_in_chans=32,
        num_multimask_outputs=2,
        decoder_heads=2,
        decoder_mlp_dim=128,
        iou_head_depth=4,
        iou_head_hidden_dim=56,
    ),
}


def build(c: sam.SamConfig) -> Any:
    """An uninitialised transformers model of this configuration, with Meta's epsilon."""
    config = transformers.SamConfig(
        vision_config={
            "hidden_size": c.embed_dim,
            "output_channels": c.out_chans,
            "num_hidden_layers": c.depth,
            "num_attention_heads": c.num_heads,
            "image_size": c.image_size,
            "patch_size": c.patch_size,
            "mlp_ratio": c.mlp_ratio,
            "qkv_bias": c.qkv_bias,
            "window_size": c.window_size,
            "global_attn_indexes": list(c.global_attn_indexes),
            "num_pos_feats": c.out_chans // 2,
        },
        prompt_encoder_config={
            "hidden_size": c.out_chans,
            "image_size": c.image_size,
            "patch_size": c.patch_size,
            "mask_input_channels": c.mask_in_chans,
        },
        mask_decoder_config={
            "hidden_size": c.out_chans,
            "mlp_dim": c.decoder_mlp_dim,
            "num_hidden_layers": c.decoder_depth,
            "num_attention_heads": c.decoder_heads,
            "num_multimask_outputs": c.num_multimask_outputs,
            "iou_head_depth": c.iou_head_depth,
            "iou_head_hidden_dim": c.iou_head_hidden_dim,
        },
        attn_implementation="sdpa",  # eager rounds the softmax to float32 also in a float64 model
    )
    oracle = transformers.SamModel(config).eval().requires_grad_(False)
    for layer in oracle.mask_decoder.transformer.layers:
        for norm in (layer.layer_norm1, layer.layer_norm2, layer.layer_norm3, layer.layer_norm4):
            norm.eps = META_EPSILON
    return oracle


@functools.cache
def pair(name: str) -> tuple[Any, sam.SamConfig, dict[str, Any]]:
    """transformers' model in float64, and our configuration and parameters, with the same drawn weights."""
    config = CONFIGS[name]
    oracle = build(config)
    state, meta = {}, {}
    names = transformers_names.to_meta(oracle.state_dict())
    for key, tensor in oracle.state_dict().items():
        if key == "shared_image_embedding.positional_embedding":  # tied with the prompt encoder's
            continue
        renamed = names[key]
        meta[renamed] = detweights.make_tensor(renamed, tuple(tensor.shape), SEED)
        state[key] = torch.from_numpy(meta[renamed])
    state["shared_image_embedding.positional_embedding"] = state["prompt_encoder.shared_embedding.positional_embedding"]
    oracle.load_state_dict(state, strict=True)
    return oracle.double(), config, weights.unflatten(weights.template(config), meta_names.convert(meta), REPEAT)


def draw_images(*size: int) -> np.ndarray:
    """Normalised images ``[IMAGES, H, W, 3]``."""
    drawn = np.stack([detweights.make_image(SEED + i, *size) for i in range(IMAGES)])
    return (drawn - np.float32(sam.SamConfig.pixel_mean)) / np.float32(sam.SamConfig.pixel_std)


def to_torch(array: np.ndarray) -> Any:
    """As float64, the dtype of the oracle."""
    return torch.from_numpy(np.array(array, np.float64))


@functools.cache
def features(name: str) -> tuple[Any, jax.Array]:
    """The oracle's ``[B, C, h, w]`` and ours ``[B, h, w, C]``."""
    oracle, config, params = pair(name)
    images = draw_images(config.image_size, config.image_size)
    expected = oracle.get_image_embeddings(to_torch(images.transpose(0, 3, 1, 2)))
    return expected, jax.jit(functools.partial(sam.encode, config))(params, jnp.asarray(images))


@functools.cache
def draw_prompts(name: str, case: str) -> dict[str, np.ndarray]:
    """Prompts in transformers' shapes, ``[IMAGES, PROMPTS, ...]``; masks are one per image there."""
    size, grid = CONFIGS[name].image_size, CONFIGS[name].grid
    rng = np.random.default_rng([SEED, len(case)])
    drawn = {}
    if "points" in case:
        drawn["points"] = rng.uniform(0, size, (IMAGES, PROMPTS, 4, 2)).astype(np.float32)
        drawn["labels"] = rng.integers(-1 if "padded" in case else 0, 2, (IMAGES, PROMPTS, 4))
    if "box" in case:
        corners = rng.uniform(0, size, (IMAGES, PROMPTS, 2, 2)).astype(np.float32)
        drawn["boxes"] = np.sort(corners, axis=2).reshape(IMAGES, PROMPTS, 4)
    if "mask" in case:
        drawn["masks"] = rng.normal(0, 4, (IMAGES, 1, 4 * grid, 4 * grid)).astype(np.float32)
    return drawn


@pytest.mark.parametrize("name", CONFIGS)
def test_encoder(name):
    expected, z = features(name)
    np.testing.assert_allclose(z, expected.permute(0, 2, 3, 1), atol=2e-5, rtol=0, err_msg=REPEAT)


@pytest.mark.parametrize("case", ["points", "points_padded", "box", "points_box", "mask", "none"])
@pytest.mark.parametrize("name", CONFIGS)
def test_prompts_and_masks(name, case):
    oracle, config, params = pair(name)
    expected_z, z = features(name)
    drawn = draw_prompts(name, case)
    inputs = {f"input_{key}": to_torch(value) for key, value in drawn.items()}

    z = jnp.repeat(z, PROMPTS if "points" in drawn or "boxes" in drawn else 1, axis=0)
    flat = {key: value.reshape(-1, *value.shape[2:]) for key, value in drawn.items()}  # one group of prompts per row
    if "masks" in flat:
        flat["masks"] = flat["masks"][..., None]
    prompts = Prompts(**flat)

    embed = jax.jit(functools.partial(model.embed_prompts, config))
    sparse, dense, position, _ = embed(params["prompt_encoder"], z, prompts)
    whole = {f"input_{key}": inputs.get(f"input_{key}") for key in ("points", "labels", "boxes", "masks")}
    expected_sparse, expected_dense = oracle.prompt_encoder(**whole)
    if expected_sparse is None:
        assert sparse.shape[1] == 0
    else:
        expected_sparse = expected_sparse.flatten(0, 1)
        np.testing.assert_allclose(sparse, expected_sparse, atol=5e-6, rtol=0, err_msg=REPEAT)
    expected_dense = np.broadcast_to(
        expected_dense.permute(0, 2, 3, 1)[:, None], (IMAGES, len(z) // IMAGES, *z.shape[1:])
    )
    np.testing.assert_allclose(dense, expected_dense.reshape(z.shape), atol=2e-5, rtol=0, err_msg=REPEAT)
    expected_position = oracle.get_image_wide_positional_embeddings()[0].permute(1, 2, 0)
    np.testing.assert_allclose(position, expected_position, atol=5e-6, rtol=0, err_msg=REPEAT)

    decode = functools.partial(sam.decode, config, ignore_padding=False)  # transformers attends to padding
    decode = jax.jit(decode, static_argnames="multimask")
    for multimask in (True, False):
        expected = oracle(image_embeddings=expected_z, multimask_output=multimask, **inputs)
        logits, iou = decode(params, z, prompts, multimask=multimask)
        assert logits.shape[1] == (config.num_multimask_outputs if multimask else 1)
        masks, scores = expected.pred_masks.flatten(0, 1), expected.iou_scores.flatten(0, 1)
        np.testing.assert_allclose(logits, masks, atol=1e-4, rtol=0, err_msg=REPEAT)
        np.testing.assert_allclose(iou, scores, atol=1e-5, rtol=0, err_msg=REPEAT)


@pytest.mark.parametrize("size", [(192, 192), (96, 96), (112, 176)])
def test_encoder_at_another_image_size(size):
    """transformers refuses another size than the configuration's; its position embedding is resized here, by torch.

    The relative positions of the global blocks it resizes itself.
    """
    _, config, params = pair("grid8")
    oracle = build(config).double()
    oracle.load_state_dict(pair("grid8")[0].state_dict())
    encoder = oracle.vision_encoder
    grid = tuple(side // config.patch_size for side in size)
    position = torch.nn.functional.interpolate(encoder.pos_embed.permute(0, 3, 1, 2), grid, mode="bicubic")
    encoder.pos_embed = torch.nn.Parameter(position.permute(0, 2, 3, 1))
    encoder.patch_embed.image_size = size
    images = draw_images(*size)
    expected = encoder(to_torch(images.transpose(0, 3, 1, 2))).last_hidden_state.detach()
    z = jax.jit(functools.partial(sam.encode, config))(params, jnp.asarray(images))
    np.testing.assert_allclose(z, expected.permute(0, 2, 3, 1), atol=2e-5, rtol=0, err_msg=REPEAT)
