"""SAM trained as a whole: image encoder and decoder, as MedSAM was; the prompt encoder alone stays frozen."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Array, Float

from calsegx import models
from calsegx.interfaces import Backbone, Params, Prompts
from calsegx.models.sam import backbone


@models.registry.register("sam_whole")
def load_backbone(folder: Path | None, num_classes: int, *, dtype: str = "float32") -> Backbone:
    """``sam`` whose encoder is part of what is trained: features are the normalised frames ``[S, S, 3]`` themselves.

    So all that works on features works on frames: a cache keeps them (bfloat16: at most half a grey level of 255 is
    lost), and ``decode`` is encoder and decoder.  The second moments of all parameters are in memory and in
    checkpoints.  ``dtype`` is what the encoder computes in; its parameters are float32.  ``zero_shot`` is SAM as it
    came, for which the encoder as it was is among the frozen parameters.
    """
    sam = backbone.load_backbone(folder, num_classes, dtype=dtype)
    return dataclasses.replace(
        sam,
        name="sam_whole",
        fingerprint=f"{sam.fingerprint}-whole",  # other features than sam's, so another cache
        feature_shape=(sam.image_size, sam.image_size, 3),
        encoder={},
        frozen={**sam.frozen, **sam.encoder},
        trainable={"encoder": sam.encoder, "decoder": sam.trainable},
        encode_in_parts=None,
        **_functions(sam.encode, sam.decode, sam.zero_shot),
    )


@functools.cache
def _functions(encoder: Callable[..., Any], decoder: Callable[..., Any], untrained: Any) -> Mapping[str, Any]:
    """Of SAM's functions, those of a backbone that is trained as a whole; the same for the same."""

    def encode(_: Params, images: Float[Array, "b S S 3"]) -> Float[Array, "b S S 3"]:
        return images

    def decode(
        trainable: Params, frozen: Params, frames: Float[Array, "b S S 3"], prompts: Prompts
    ) -> Float[Array, "b H W k"]:
        return decoder(trainable["decoder"], frozen, encoder(trainable["encoder"], frames), prompts)

    def zero_shot(frozen: Params, frames: Float[Array, "b S S 3"], prompts: Prompts) -> Float[Array, "b H W 1"]:
        return untrained(frozen, encoder(frozen, frames), prompts)

    return {"encode": encode, "decode": decode, "zero_shot": zero_shot}
