"""Converted weights beside transformers' ``SamModel`` in float64 with the same checkpoint, on a random image.

Points with a mask prompt and three masks, then a box and one mask: together they pass through every array.
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from calsegx.interfaces import Prompts, UsageError
from calsegx.models import sam
from calsegx.models.sam.presets import SamConfig
from weights_conversion import transformers_names

# Absolute.  A checkpoint with large values rounds more: ROUNDINGS times transformers' own float32 error is allowed.
TOLERANCES = {"image embeddings": 2e-5, "mask logits": 1e-4, "predicted IoU": 1e-5}
ROUNDINGS = 4
META_EPSILON = 1e-5  # LayerNorm of the decoder's blocks; transformers' default there is 1e-6


class Row(NamedTuple):
    """One comparison."""

    what: str
    difference: float  # max abs, our float32 and transformers' float64
    rounding: float  # max abs, transformers' float32 and float64

    @property
    def tolerance(self) -> float:
        """The stated one, or ``ROUNDINGS`` times the rounding where that is larger."""
        return max(TOLERANCES[self.what], ROUNDINGS * self.rounding)

    @property
    def agrees(self) -> bool:
        """Whether the difference is within the tolerance, and both are finite."""
        return self.difference <= self.tolerance < math.inf

    def __str__(self) -> str:
        return (
            f"  {self.what}: max abs difference {self.difference:.1e}, transformers' own in float32 "
            f"{self.rounding:.1e}, tolerance {self.tolerance:.1e}: {'agrees' if self.agrees else 'DIFFERS'}"
        )


def require_libraries() -> None:
    """Raise a UsageError when torch or transformers is not installed."""
    absent = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if absent:
        raise UsageError(
            f"--check compares with transformers, and {' and '.join(absent)} cannot be found: pip install '.[torch]' "
            "in calsegx's folder, or leave --check out."
        )


def check(folder: Path, read_meta: Callable[[str], np.ndarray], seed: int = 0) -> list[Row]:
    """Compare a weights folder with transformers.

    Args:
        folder: a weights folder.
        read_meta: an array of the original checkpoint by Meta's name, float32 in Meta's layout.
        seed: of the image and the prompts.

    Returns:
        One row for each of ``TOLERANCES``.
    """
    config, params = sam.load(folder)
    inputs = _inputs(config, seed)
    ours = _ours(config, params, inputs)
    del params  # float64 needs the memory
    model = build(config, read_meta)
    single = _theirs(model, inputs)
    double = _theirs(model.double(), {name: _widen(array) for name, array in inputs.items()})
    return [
        Row(what, _difference(ours[what], reference), _difference(single[what], reference))
        for what, reference in double.items()
    ]


def _widen(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64) if array.dtype == np.float32 else array


def _difference(some: list[np.ndarray], others: list[np.ndarray]) -> float:
    differences = [float(np.abs(a - b).max()) for a, b in zip(some, others, strict=True)]
    return math.inf if any(map(math.isnan, differences)) else max(differences)


def _inputs(config: SamConfig, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    side, low = config.image_size, 4 * config.grid
    return {
        "image": rng.standard_normal((1, side, side, 3), np.float32),
        "points": np.float32([[[0.3 * side, 0.4 * side], [0.7 * side, 0.2 * side]]]),
        "labels": np.int32([[1, 0]]),
        "boxes": np.float32([[0.2 * side, 0.3 * side, 0.8 * side, 0.6 * side]]),
        "masks": rng.standard_normal((1, low, low, 1), np.float32),
    }


def _ours(config: SamConfig, params: Any, inputs: dict[str, np.ndarray]) -> dict[str, list[np.ndarray]]:
    with jax.default_matmul_precision("highest"):
        z, *outputs = jax.device_get(_encode_and_decode(config, params, inputs))
    return _by_name(z, *outputs)


@functools.partial(jax.jit, static_argnums=0)
def _encode_and_decode(config: SamConfig, params: Any, inputs: dict[str, Any]) -> tuple[Any, ...]:
    z = sam.encode(config, params, inputs["image"])
    first = Prompts(points=inputs["points"], labels=inputs["labels"], masks=inputs["masks"])
    second = Prompts(boxes=inputs["boxes"])
    return (
        z,
        sam.decode(config, params, z, first, multimask=True),
        sam.decode(config, params, z, second, multimask=False),
    )


def _theirs(model: Any, inputs: dict[str, np.ndarray]) -> dict[str, list[np.ndarray]]:
    import torch

    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    with torch.no_grad():
        z = model.get_image_embeddings(tensors["image"].permute(0, 3, 1, 2))
        outputs = [
            model(
                image_embeddings=z,
                input_points=tensors["points"][:, None],
                input_labels=tensors["labels"][:, None],
                input_masks=tensors["masks"].permute(0, 3, 1, 2),
                multimask_output=True,
            ),
            model(image_embeddings=z, input_boxes=tensors["boxes"][:, None], multimask_output=False),
        ]
    pairs = [(output.pred_masks[:, 0].numpy(), output.iou_scores[:, 0].numpy()) for output in outputs]
    return _by_name(z.permute(0, 2, 3, 1).numpy(), *pairs)


def _by_name(z: np.ndarray, *outputs: Any) -> dict[str, list[np.ndarray]]:
    masks, iou = zip(*outputs, strict=True)
    return dict(zip(TOLERANCES, ([z], list(masks), list(iou)), strict=True))


def build(config: SamConfig, read_meta: Callable[[str], np.ndarray]) -> Any:
    """Transformers' ``SamModel`` of a configuration, filled with ``read_meta``, in evaluation mode."""
    import torch
    import transformers

    shared = {"image_size": config.image_size, "patch_size": config.patch_size}
    theirs = transformers.SamConfig(
        vision_config={
            **shared,
            "hidden_size": config.embed_dim,
            "num_hidden_layers": config.depth,
            "num_attention_heads": config.num_heads,
            "mlp_dim": int(config.embed_dim * config.mlp_ratio),
            "output_channels": config.out_chans,
            "num_pos_feats": config.out_chans // 2,
            "qkv_bias": config.qkv_bias,
            "window_size": config.window_size,
            "global_attn_indexes": list(config.global_attn_indexes),
        },
        prompt_encoder_config={
            **shared,
            "hidden_size": config.out_chans,
            "mask_input_channels": config.mask_in_chans,
        },
        mask_decoder_config={
            "hidden_size": config.out_chans,
            "mlp_dim": config.decoder_mlp_dim,
            "num_hidden_layers": config.decoder_depth,
            "num_attention_heads": config.decoder_heads,
            "num_multimask_outputs": config.num_multimask_outputs,
            "iou_head_depth": config.iou_head_depth,
            "iou_head_hidden_dim": config.iou_head_hidden_dim,
            "layer_norm_eps": META_EPSILON,
        },
        attn_implementation="sdpa",  # "eager" rounds the softmax to float32, in float64 too
    )
    model = transformers.SamModel(theirs).eval()
    state = model.state_dict()
    with torch.no_grad():
        for name, meta in transformers_names.to_meta(state).items():
            state[name].copy_(torch.from_numpy(np.array(read_meta(meta))))
    return model
