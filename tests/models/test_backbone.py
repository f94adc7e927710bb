"""SAM as a backbone: what is on the device when, and what the frozen encoder computes in."""

import dataclasses

import jax
import numpy as np
import pytest

from calsegx import models
from calsegx.interfaces import Prompts, UsageError
from calsegx.models import sam
from calsegx.models.sam import backbone, model, presets, weights

PATCH16 = dataclasses.replace(
    presets.VIT_B,
    image_size=64,
    embed_dim=32,
    depth=2,
    num_heads=2,
    global_attn_indexes=(1,),
    window_size=3,
    out_chans=32,
    decoder_heads=2,
    decoder_mlp_dim=16,
)


def save_random(folder, config):
    """A weights folder of random numbers, drawn without compiling anything."""
    rng = np.random.default_rng(0)
    template = weights.template(config)
    flat = {
        name: rng.normal(1.0 if name.endswith("scale") else 0.0, 0.1, leaf.shape).astype(np.float32)
        for name, leaf in weights.flatten(template).items()
    }
    sam.save(folder, config, weights.unflatten(template, flat, "random"), "Random numbers. Not a medical device.")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("weights") / "sam", PATCH16)


def images(count=2):
    return np.random.default_rng(0).normal(size=(count, 64, 64, 3)).astype(np.float32)


def encode(made):
    return np.asarray(jax.jit(made.encode)(made.encoder, images()), np.float32)


def test_encoder_and_the_rest_are_apart(folder):
    """Training on cached features must not need the encoder."""
    made = backbone.load_backbone(folder, 1)
    _, params = sam.load(folder)
    assert made.encoder.keys() == {"image_encoder"}
    assert made.frozen.keys() == {"prompt_encoder", "mask_decoder", "position"}
    loaded = {**made.encoder, **made.frozen}
    position = model.grid_position(sam.load(folder)[0], params["prompt_encoder"])
    np.testing.assert_allclose(loaded.pop("position"), position)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    z = encode(made)
    assert z.shape == (2, *made.feature_shape) == (2, 4, 4, 32)
    prompts = Prompts(points=np.full((2, 1, 2), 20.0, np.float32), labels=np.ones((2, 1), np.int32))
    decoded = jax.jit(made.decode)(made.trainable, made.frozen, z, prompts)
    zero_shot = jax.jit(made.zero_shot)(made.frozen, z, prompts)
    assert decoded.shape == zero_shot.shape == (2, *made.logit_shape, 1)
    assert np.ptp(decoded) > 0.1 and np.any(decoded != zero_shot)  # SAM's other mask tokens take part in its answer


def test_bfloat16_is_close_to_float32(folder):
    full, half = (backbone.load_backbone(folder, 1, dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert full.fingerprint == half.fingerprint
    exact, rounded = encode(full), encode(half)
    error = np.abs(rounded - exact).max() / np.abs(exact).max()
    assert 1e-5 < error < 3e-2  # 2**-8 is one rounding


def test_the_option_reaches_the_loader_through_the_registry(folder):
    half = models.registry.bind("sam", {"dtype": "bfloat16"})(folder, 1)
    found = jax.make_jaxpr(half.encode)(half.encoder, images())
    assert "bf16" in str(found)
    full = models.registry.bind("sam", {})(folder, 1)
    assert "bf16" not in str(jax.make_jaxpr(full.encode)(full.encoder, images()))


def plain_loader(folder, num_classes):
    """A backbone from outside the tree that knows one dtype."""
    return backbone.load_backbone(folder, num_classes)


def test_a_loader_without_the_option(folder):
    name = f"{__name__}:plain_loader"
    assert models.registry.bind(name, {})(folder, 1).name == "sam"
    with pytest.raises(UsageError, match="has no option 'dtype'"):
        models.registry.bind(name, {"dtype": "bfloat16"})
