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


def convert(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Flat parameters under our names; ``weights.unflatten`` then checks them strictly against the model."""
    return dict(_convert_one(name, np.asarray(array)) for name, array in state.items())


def _convert_one(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    module, _, leaf = name.rpartition(".")
    if leaf != "weight" or _EMBEDDINGS.search(module):
        return (module if leaf == "weight" else name), array
    if _NORMS.search(module):
        return f"{module}.scale", array
    if module.startswith("mask_decoder.output_upscaling."):
        return f"{module}.kernel", array
    if array.ndim == 4:
        return f"{module}.kernel", array.transpose(2, 3, 1, 0)
    return f"{module}.kernel", array.T
