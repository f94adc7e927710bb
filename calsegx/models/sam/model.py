"""The pure functions of SAM: ``init``, ``encode``, ``decode``.

``params`` is ``{"image_encoder": ..., "prompt_encoder": ..., "mask_decoder": ...}``; joined with dots, its names are
Meta's checkpoint names with flax's words for the leaves (``kernel`` for ``weight``, ``scale`` for norms).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from calsegx.interfaces import Params, Prompts
from calsegx.models.sam.image_encoder import ImageEncoder
from calsegx.models.sam.mask_decoder import MaskDecoder
from calsegx.models.sam.presets import SamConfig
from calsegx.models.sam.prompt_encoder import PromptEncoder


def init(config: SamConfig, rng: Array) -> Params:
    """Fresh parameters of a whole SAM."""
    encoder_rng, prompt_rng, decoder_rng = jax.random.split(rng, 3)
    s, g, c = config.image_size, config.grid, config.out_chans
    prompts = Prompts(
        points=jnp.zeros((1, 1, 2)),
        labels=jnp.zeros((1, 1), jnp.int32),
        masks=jnp.zeros((1, 4 * g, 4 * g, 1)),
    )
    z = jnp.zeros((1, g, g, c))
    decoder = MaskDecoder(config, config.num_multimask_outputs + 1)
    return {
        "image_encoder": ImageEncoder(config).init(encoder_rng, jnp.zeros((1, s, s, 3)))["params"],
        "prompt_encoder": PromptEncoder(config).init(prompt_rng, prompts, 1, (g, g))["params"],
        "mask_decoder": decoder.init(decoder_rng, z, z[0], jnp.zeros((1, 1, c)), z)["params"],
    }


def encode(
    config: SamConfig, params: Params, images: Float[Array, "b H W 3"], dtype: jnp.dtype = jnp.float32
) -> Float[Array, "b h w c"]:
    """Image embeddings of normalised, padded frames."""
    return _apply(ImageEncoder(config, dtype), params["image_encoder"], images.astype(dtype))


def decode(
    config: SamConfig,
    params: Params,
    z: Float[Array, "b h w c"],
    prompts: Prompts,
    *,
    multimask: bool = True,
) -> tuple[Float[Array, "b m H W"], Float[Array, "b m"]]:
    """Mask logits ``[B, M, 4h, 4w]`` and predicted IoU ``[B, M]``, one group of prompts per image.

    ``multimask`` keeps masks 1..3 (M = 3), otherwise mask 0 (M = 1), as in Meta's model.
    """
    prompt_embeddings = embed_prompts(config, params["prompt_encoder"], z, prompts)
    logits, iou = decode_tokens(config, params["mask_decoder"], z, prompt_embeddings)
    keep = slice(1, None) if multimask else slice(0, 1)
    return logits[:, keep], iou[:, keep]


def embed_prompts(
    config: SamConfig, prompt_encoder: Params, z: Float[Array, "b h w c"], prompts: Prompts
) -> tuple[Array, Array, Array]:
    """Sparse tokens ``[B, T, C]``, dense embedding ``[B, h, w, C]``, position ``[h, w, C]`` for features ``z``."""
    return _apply(PromptEncoder(config), prompt_encoder, prompts, z.shape[0], z.shape[1:3])


def decode_tokens(
    config: SamConfig,
    mask_decoder: Params,
    z: Float[Array, "b h w c"],
    prompt_embeddings: tuple[Array, Array, Array],
) -> tuple[Float[Array, "b m H W"], Float[Array, "b m"]]:
    """All masks of a decoder; their number follows from ``mask_decoder["mask_tokens"]``."""
    sparse, dense, position = prompt_embeddings
    module = MaskDecoder(config, mask_decoder["mask_tokens"].shape[0])
    return _apply(module, mask_decoder, z, position, sparse, dense)


def _apply(module: nn.Module, params: Params, *inputs: Any) -> Any:
    return module.apply({"params": params}, *inputs)
