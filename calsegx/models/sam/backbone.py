"""SAM as a backbone: frozen encoder and prompt encoder, trainable decoder with one mask token per class."""

import functools
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from calsegx import models
from calsegx.interfaces import Backbone, Params, Prompts, Whole
from calsegx.models.sam import model, weights
from calsegx.models.sam.presets import SamConfig

TINY = "sam_tiny"


@models.registry.register("sam")
def load_backbone(folder: Path | None, num_classes: int, *, dtype: str = "float32") -> Backbone:
    """SAM from a weights folder (``None``: the tiny SAM that ships with calsegx) with ``num_classes`` masks.

    ``dtype`` (float32 or bfloat16) is what the frozen image encoder computes in; prompts and decoder are float32.
    Frames are those of ``data.preprocessing`` with the configuration's pixel mean and standard deviation, so MedSAM's
    weights see values in [0, 1], of the volume's percentiles, and slices that are padded where it stretched them.

    One class: ``decode`` gives one logit (sigmoid).  More: a softmax over ``num_classes + 1`` logits whose channel 0,
    the background, is the constant 0, so that one class is the same model either way.
    """
    folder = tiny_weights() if folder is None else Path(folder)
    config, params = weights.load(folder)

    frozen = {name: params[name] for name in ("prompt_encoder", "mask_decoder")}
    frozen["position"] = model.grid_position(config, params["prompt_encoder"])
    return Backbone(
        name="sam",
        fingerprint=weights.fingerprint(folder),
        image_size=config.image_size,
        feature_shape=(config.grid, config.grid, config.out_chans),
        logit_shape=(4 * config.grid, 4 * config.grid),
        pixel_mean=config.pixel_mean,
        pixel_std=config.pixel_std,
        encoder={"image_encoder": params["image_encoder"]},
        frozen=frozen,
        trainable=class_decoder(config, params["mask_decoder"], num_classes),
        **_functions(config, num_classes, dtype),
    )


@functools.cache
def _functions(config: SamConfig, num_classes: int, dtype: str) -> Mapping[str, Callable[..., Any]]:
    """What a backbone of this kind computes; always the same functions, so that JAX traces them once a process."""

    def encode(encoder: Params, images: Float[Array, "b H W 3"]) -> Float[Array, "b h w c"]:
        # checkpoint: sam_whole differentiates it; a forward pass is the same either way.
        return model.encode(config, encoder, images, dtype=jnp.dtype(dtype), checkpoint=True)

    def encode_in_parts(encoder: Params, images: Float[Array, "b H W 3"], whole: Whole) -> Float[Array, "b h w c"]:
        stored = encoder["image_encoder"]
        path = ("image_encoder",)
        rest = {name: whole((*path, name), part, images) for name, part in stored.items() if "blocks." not in name}
        blocks = {name: part for name, part in stored.items() if "blocks." in name}
        return model.encode(
            config,
            {"image_encoder": rest | blocks},
            images,
            dtype=jnp.dtype(dtype),
            whole=lambda name, variables, x: {"params": whole((*path, name), variables["params"], x)},
        )

    def decode(
        trainable: Params, frozen: Params, z: Float[Array, "b h w c"], prompts: Prompts
    ) -> Float[Array, "b H W k"]:
        embeddings = model.embed_prompts(config, frozen["prompt_encoder"], z, prompts)
        embeddings = embeddings._replace(position=frozen["position"])  # sines of every cell, not again at every step
        logits, _ = model.decode_tokens(config, trainable, z, embeddings)
        logits = jnp.moveaxis(logits, 1, -1)
        if num_classes > 1:
            logits = jnp.concatenate([jnp.zeros_like(logits[..., :1]), logits], axis=-1)
        return logits

    def zero_shot(frozen: Params, z: Float[Array, "b h w c"], prompts: Prompts) -> Float[Array, "b H W 1"]:
        logits, _ = model.decode(config, frozen, z, prompts, multimask=False)
        return jnp.moveaxis(logits, 1, -1)

    return {"encode": encode, "encode_in_parts": encode_in_parts, "decode": decode, "zero_shot": zero_shot}


def class_decoder(config: SamConfig, mask_decoder: Params, num_classes: int) -> Params:
    """A decoder with one mask token and hypernetwork per class, each starting as a copy of SAM's mask 0.

    The IoU head keeps one output per class, copied likewise; nothing trains it here.
    """
    mlps = "output_hypernetworks_mlps."
    decoder = {name: value for name, value in mask_decoder.items() if not name.startswith(mlps)}
    for k in range(num_classes):
        decoder[f"{mlps}{k}"] = mask_decoder[f"{mlps}0"]
    decoder["mask_tokens"] = jnp.repeat(jnp.asarray(mask_decoder["mask_tokens"])[:1], num_classes, axis=0)
    head = dict(mask_decoder["iou_prediction_head"])
    last = f"layers.{config.iou_head_depth - 1}"
    head[last] = jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x)[..., :1], num_classes, axis=-1), head[last])
    decoder["iou_prediction_head"] = head
    return jax.tree.map(jnp.asarray, decoder)


def tiny_weights() -> Path:
    """The folder of the tiny SAM's weights inside the installed package."""
    return Path(str(resources.files("calsegx") / "weights" / TINY))
