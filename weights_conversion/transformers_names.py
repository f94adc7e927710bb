"""transformers' ``SamModel`` names to Meta's.  Layouts are the same; arrays are only called differently.

``TABLE`` pairs modules, Meta's name second; ``#`` is a number.  Names that no row matches are the same in both.
"""

import re
from collections.abc import Iterable

# The Fourier matrix of positions: one array that transformers may store under both names.
MATRIX = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
MATRIX_NAMES = ("shared_image_embedding.positional_embedding", "prompt_encoder.shared_embedding.positional_embedding")

TABLE = (
    ("vision_encoder.pos_embed", "image_encoder.pos_embed"),
    ("vision_encoder.patch_embed.projection", "image_encoder.patch_embed.proj"),
    ("vision_encoder.layers.#.layer_norm#", "image_encoder.blocks.#.norm#"),
    ("vision_encoder.layers.#", "image_encoder.blocks.#"),
    ("vision_encoder.neck.conv1", "image_encoder.neck.0"),
    ("vision_encoder.neck.layer_norm1", "image_encoder.neck.1"),
    ("vision_encoder.neck.conv2", "image_encoder.neck.2"),
    ("vision_encoder.neck.layer_norm2", "image_encoder.neck.3"),
    (MATRIX_NAMES[0], MATRIX),
    (MATRIX_NAMES[1], MATRIX),
    ("prompt_encoder.point_embed.#", "prompt_encoder.point_embeddings.#"),
    ("prompt_encoder.mask_embed.conv1", "prompt_encoder.mask_downscaling.0"),
    ("prompt_encoder.mask_embed.layer_norm1", "prompt_encoder.mask_downscaling.1"),
    ("prompt_encoder.mask_embed.conv2", "prompt_encoder.mask_downscaling.3"),
    ("prompt_encoder.mask_embed.layer_norm2", "prompt_encoder.mask_downscaling.4"),
    ("prompt_encoder.mask_embed.conv3", "prompt_encoder.mask_downscaling.6"),
    ("mask_decoder.transformer.layers.#.layer_norm#", "mask_decoder.transformer.layers.#.norm#"),
    ("mask_decoder.transformer.layer_norm_final_attn", "mask_decoder.transformer.norm_final_attn"),
    ("mask_decoder.upscale_conv1", "mask_decoder.output_upscaling.0"),
    ("mask_decoder.upscale_layer_norm", "mask_decoder.output_upscaling.1"),
    ("mask_decoder.upscale_conv2", "mask_decoder.output_upscaling.3"),
)
_ROWS = tuple((re.compile(re.escape(theirs).replace(r"\#", r"(\d+)") + r"(?=\.|$)"), meta) for theirs, meta in TABLE)
# Meta numbers the layers of a ReLU MLP 0..d-1; transformers calls them proj_in, layers.0.., proj_out.
_MLP = re.compile(
    r"(mask_decoder\.(?:iou_prediction_head|output_hypernetworks_mlps\.\d+))\.(proj_in|proj_out|layers\.(\d+))\.(.*)"
)


def recognise(names: Iterable[str]) -> bool:
    """Whether a file speaks transformers' names."""
    return any(name.startswith(("vision_encoder.", "shared_image_embedding.")) for name in names)


def to_meta(names: Iterable[str]) -> dict[str, str]:
    """Meta's name for each of a model's names; both of ``MATRIX_NAMES`` give ``MATRIX``."""
    names = list(names)
    inner: dict[str, set[str]] = {}  # the layers between the first and the last, by MLP
    for name in names:
        match = _MLP.fullmatch(name)
        if match:
            inner.setdefault(match[1], set()).update([match[3]] if match[3] else [])
    return {name: _one(name, inner) for name in names}


def _one(name: str, inner: dict[str, set[str]]) -> str:
    mlp = _MLP.fullmatch(name)
    if mlp:
        last = len(inner[mlp[1]]) + 1
        layer = {"proj_in": 0, "proj_out": last}.get(mlp[2])
        return f"{mlp[1]}.layers.{int(mlp[3]) + 1 if layer is None else layer}.{mlp[4]}"
    for pattern, meta in _ROWS:
        match = pattern.match(name)
        if match:
            numbers = iter(match.groups())
            return re.sub("#", lambda _, numbers=numbers: next(numbers), meta) + name[match.end() :]
    return name
