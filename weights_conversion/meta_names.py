"""Meta's SAM checkpoint names and layouts to ours.  numpy only: the caller opens the file.

| source                                   | ours                        | layout                                  |
|------------------------------------------|-----------------------------|-----------------------------------------|
| Linear ``weight`` (out, in)              | ``kernel`` (in, out)        | transposed                              |
| Conv ``weight`` (O, I, kh, kw)           | ``kernel`` (kh, kw, I, O)   | (2, 3, 1, 0)                            |
| ConvTranspose ``output_upscaling.{0,3}`` | ``kernel`` (I, O, kh, kw)   | unchanged                               |
| LayerNorm ``weight``                     | ``scale``                   | unchanged                               |
| embeddings, ``pos_embed``, ``rel_pos_*`` | without ``.weight``         | unchanged                               |
"""

import re
from collections.abc import Mapping

import numpy as np

_NORMS = re.compile(
    r"(\.norm\d$|\.norm_final_attn$|^image_encoder\.neck\.[13]$"
    r"|^prompt_encoder\.mask_downscaling\.[14]$|^mask_decoder\.output_upscaling\.1$)"
)
_EMBEDDINGS = re.compile(r"(_embed|_token|_tokens|point_embeddings\.\d)$")
_BARE = re.compile(r"\.(bias|pos_embed|rel_pos_[hw]|positional_encoding_gaussian_matrix)$")


def convert(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Flat parameters under our names; ``weights.unflatten`` then checks them strictly against the model."""
    ours = {to_ours(name): np.asarray(array) for name, array in state.items()}
    return {name: array.transpose(axes(name, array.ndim)) for name, array in ours.items()}


def to_ours(name: str) -> str:
    """Our name of one of Meta's arrays."""
    module, _, leaf = name.rpartition(".")
    if leaf != "weight":
        return name
    if _EMBEDDINGS.search(module):
        return module
    return f"{module}.scale" if _NORMS.search(module) else f"{module}.kernel"


def to_meta(name: str) -> str:
    """Meta's name of one of our arrays; the inverse of ``to_ours``."""
    module, _, leaf = name.rpartition(".")
    if leaf in ("kernel", "scale"):
        return f"{module}.weight"
    return name if _BARE.search(name) else f"{name}.weight"


def axes(name: str, ndim: int) -> tuple[int, ...]:
    """The transposition from Meta's layout to ours, by our name."""
    if not name.endswith(".kernel") or name.startswith("mask_decoder.output_upscaling."):
        return tuple(range(ndim))
    return (2, 3, 1, 0) if ndim == 4 else (1, 0)
