"""The pure functions of SAM: ``init``, ``encode``, ``decode``.

``params`` is ``{"image_encoder": ..., "prompt_encoder": ..., "mask_decoder": ...}``; joined with dots, its names are
Meta's checkpoint names with flax's words for the leaves (``kernel`` for ``weight``, ``scale`` for norms).
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from calsegx.interfaces import Params, Prompts, UsageError
from calsegx.models.sam.image_encoder import ImageEncoder
from calsegx.models.sam.mask_decoder import MaskDecoder
from calsegx.models.sam.presets import SamConfig
from calsegx.models.sam.prompt_encoder import PromptEmbeddings, PromptEncoder


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
    embeddings = PromptEmbeddings(jnp.zeros((1, 1, c)), z, z[0])
    decoder = MaskDecoder(config, config.num_multimask_outputs + 1)
    return {
        "image_encoder": ImageEncoder(config).init(encoder_rng, jnp.zeros((1, s, s, 3)))["params"],
        "prompt_encoder": PromptEncoder(config).init(prompt_rng, prompts, 1, (g, g), True)["params"],
        "mask_decoder": decoder.init(decoder_rng, z, embeddings)["params"],
    }


def encode(
    config: SamConfig,
    params: Params,
    images: Float[Array, "b H W 3"],
    dtype: jnp.dtype = jnp.float32,
    whole: Callable[[str, Any, Array], Any] | None = None,
    checkpoint: bool = False,
) -> Float[Array, "b h w c"]:
    """Image embeddings of normalised, padded frames.

    Frames of another size than the configuration's, square or not, interpolate the position tables.

    Args:
        config: sizes of the model.
        params: of the whole SAM; the entry ``image_encoder`` is enough.
        images: sides are multiples of the patch size.
        dtype: what the encoder computes in; with bfloat16, softmax, LayerNorm, GELU and logits stay in float32.
        whole: for blocks whose parameters are stored in parts, see ``ImageEncoder``.
        checkpoint: less memory where the encoder is trained, a quarter more arithmetic (ViT-B), the same numbers.

    Raises:
        UsageError: for sides that are not multiples of the patch size.
    """
    if any(side % config.patch_size for side in images.shape[1:3]):
        raise UsageError(
            f"Frames of {images.shape[1]} x {images.shape[2]} pixels are not whole patches of {config.patch_size}; "
            "pad them (sam.preprocess makes square frames of config.image_size)."
        )
    return _apply(ImageEncoder(config, dtype, whole, checkpoint), params["image_encoder"], images.astype(dtype))


def decode(
    config: SamConfig,
    params: Params,
    z: Float[Array, "b h w c"],
    prompts: Prompts,
    *,
    multimask: bool = True,
    ignore_padding: bool = True,
) -> tuple[Float[Array, "*b m H W"], Float[Array, "*b m"]]:
    """Mask logits ``[B, M, 4h, 4w]`` and predicted IoU ``[B, M]``, one group of prompts per image.

    Args:
        config: sizes of the model.
        params: of the whole SAM; or, of ``bundle.load_sam``, with a ``class_decoder`` in place of ``mask_decoder``.
        z: features of B images; those of one image serve any number of groups.
        prompts: B groups; or, with a further axis behind the first (points ``[B, N, P, 2]``, labels ``[B, N, P]``,
            boxes ``[B, N, 4]``, masks ``[B, N, 4h, 4w, 1]``), N groups per image: the results then have it too.
        multimask: keep masks 1..3 (M = 3), otherwise mask 0 (M = 1), as in Meta's model.  A class decoder gives one
            mask for each of its classes either way.
        ignore_padding: points with label -1 only fill a batch up: nothing attends to them, so that the masks are
            those of the points without them.  False: they are "not a point" tokens that take part, Meta's letter.

    Raises:
        UsageError: when the prompts do not fit one another or the images.
    """
    groups = _groups(z, prompts)
    flat = jax.tree.map(lambda x: x.reshape(math.prod(groups), *x.shape[len(groups) :]), prompts)
    z = jnp.repeat(z, math.prod(groups) // z.shape[0], axis=0)
    embeddings = embed_prompts(config, params["prompt_encoder"], z, flat, ignore_padding=ignore_padding)
    if "class_decoder" in params:
        logits, iou = decode_tokens(config, params["class_decoder"], z, embeddings)
    else:
        keep = slice(1, None) if multimask else slice(0, 1)
        logits, iou = (found[:, keep] for found in decode_tokens(config, params["mask_decoder"], z, embeddings))
    return logits.reshape(*groups, *logits.shape[1:]), iou.reshape(*groups, *iou.shape[1:])


def embed_prompts(
    config: SamConfig,
    prompt_encoder: Params,
    z: Float[Array, "b h w c"],
    prompts: Prompts,
    *,
    ignore_padding: bool = True,
) -> PromptEmbeddings:
    """What the decoder sees of one group of prompts per image with features ``z``."""
    return _apply(PromptEncoder(config), prompt_encoder, prompts, z.shape[0], z.shape[1:3], ignore_padding)


def grid_position(config: SamConfig, prompt_encoder: Params) -> Float[Array, "h w c"]:
    """Positional encoding of the configuration's grid, the same for all prompts."""
    grid = (config.grid, config.grid)
    return _apply(PromptEncoder(config), prompt_encoder, grid, method="dense_position")


def decode_tokens(
    config: SamConfig, mask_decoder: Params, z: Float[Array, "b h w c"], prompts: PromptEmbeddings
) -> tuple[Float[Array, "b m H W"], Float[Array, "b m"]]:
    """All masks of a decoder; their number follows from ``mask_decoder["mask_tokens"]``."""
    module = MaskDecoder(config, mask_decoder["mask_tokens"].shape[0])
    return _apply(module, mask_decoder, z, prompts)


def _groups(z: Float[Array, "b h w c"], prompts: Prompts) -> tuple[int, ...]:
    """``(B,)`` or ``(B, N)``: the leading axes that all given prompts share."""
    given = {name: tuple(array.shape) for name, array in prompts._asdict().items() if array is not None}
    if ("points" in given) != ("labels" in given):
        raise UsageError("Prompts.points and Prompts.labels come together: give one label per point (1, 0 or -1).")
    number = given.get("points", (0, 0))[-2:-1]
    ends = {"points": (*number, 2), "labels": number, "boxes": (4,), "masks": (4 * z.shape[1], 4 * z.shape[2], 1)}
    for name, shape in given.items():
        if shape[-len(ends[name]) :] != ends[name]:
            raise UsageError(
                f"Prompts.{name} has the shape {shape}; expected it to end with {ends[name]} (a point is (x, y) and "
                "has one label; fill up with points of the label -1, which are ignored)."
            )
    leading = {shape[: len(shape) - len(ends[name])] for name, shape in given.items()}
    groups = leading.pop() if leading else (z.shape[0],)
    if leading or len(groups) not in (1, 2) or z.shape[0] not in (1, groups[0]):
        shapes = ", ".join(f"{name} {list(shape)}" for name, shape in given.items())
        raise UsageError(
            f"The prompts ({shapes}) do not fit features of {z.shape[0]} images: all must begin with that number, or "
            "all with it and the number of prompts per image."
        )
    return groups


def _apply(module: nn.Module, params: Params, *inputs: Any, method: str | None = None) -> Any:
    """Products of float32 are exact ("highest": a GPU would take TF32), unless JAX's own option says otherwise."""
    precision = getattr(jax.config, "jax_default_matmul_precision", None) or "highest"
    with jax.default_matmul_precision(precision):
        return module.apply({"params": params}, *inputs, method=method)
