"""Checkpoints of a tiny SAM as Meta, MedSAM's training and transformers would store them."""

import re

import numpy as np
import safetensors.numpy

from calsegx.models.sam.presets import SamConfig
from tests.golden import detweights

# Every size differs from every other and from the defaults, so that no two can be swapped unnoticed.
CONFIG = SamConfig(
    image_size=128,
    embed_dim=40,
    depth=4,
    num_heads=5,
    global_attn_indexes=(1, 3),
    window_size=3,
    mlp_ratio=3.0,
    out_chans=32,
    mask_in_chans=12,
    num_multimask_outputs=2,
    decoder_mlp_dim=56,
    iou_head_depth=4,
    iou_head_hidden_dim=24,
)

# Meta -> transformers by patterns; the converter goes the other way, by a table of its own.
_TO_TRANSFORMERS = (
    (r"^image_encoder\.", "vision_encoder."),
    (r"\.patch_embed\.proj\.", ".patch_embed.projection."),
    (r"^vision_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision_encoder.layers.\1.layer_norm\2."),
    (r"^vision_encoder\.blocks\.", "vision_encoder.layers."),
    (r"\.neck\.0\.", ".neck.conv1."),
    (r"\.neck\.1\.", ".neck.layer_norm1."),
    (r"\.neck\.2\.", ".neck.conv2."),
    (r"\.neck\.3\.", ".neck.layer_norm2."),
    (r"\.pe_layer\.positional_encoding_gaussian_matrix$", ".shared_embedding.positional_embedding"),
    (r"\.point_embeddings\.", ".point_embed."),
    (r"\.mask_downscaling\.0\.", ".mask_embed.conv1."),
    (r"\.mask_downscaling\.1\.", ".mask_embed.layer_norm1."),
    (r"\.mask_downscaling\.3\.", ".mask_embed.conv2."),
    (r"\.mask_downscaling\.4\.", ".mask_embed.layer_norm2."),
    (r"\.mask_downscaling\.6\.", ".mask_embed.conv3."),
    (r"\.transformer\.layers\.(\d+)\.norm([1234])\.", r".transformer.layers.\1.layer_norm\2."),
    (r"\.norm_final_attn\.", ".layer_norm_final_attn."),
    (r"\.output_upscaling\.0\.", ".upscale_conv1."),
    (r"\.output_upscaling\.1\.", ".upscale_layer_norm."),
    (r"\.output_upscaling\.3\.", ".upscale_conv2."),
)
SHARED = "shared_image_embedding.positional_embedding"
OWN = "prompt_encoder.shared_embedding.positional_embedding"


def meta_shapes(config=CONFIG):
    """Names and shapes of Meta's state dict."""
    return detweights.sam_shapes({name: getattr(config, name) for name in config.__dataclass_fields__})


def meta_state(config=CONFIG):
    """Meta's state dict."""
    return detweights.make_weights(meta_shapes(config))


def transformers_name(name, config=CONFIG):
    """transformers' name of one of Meta's arrays."""
    for pattern, replacement in _TO_TRANSFORMERS:
        name = re.sub(pattern, replacement, name)
    match = re.fullmatch(r"(.*(?:hypernetworks_mlps\.\d+|(iou_prediction_head)))\.layers\.(\d+)\.(.*)", name)
    if not match:
        return name
    layer, last = int(match[3]), (config.iou_head_depth if match[2] else 3) - 1
    word = {0: "proj_in", last: "proj_out"}.get(layer, f"layers.{layer - 1}")
    return f"{match[1]}.{word}.{match[4]}"


def transformers_state(config=CONFIG):
    """transformers' state dict, the matrix of positions under both of its names."""
    state = {transformers_name(name, config): array for name, array in meta_state(config).items()}
    return {**state, SHARED: state[OWN].copy()}


def write_safetensors(path, state=None):
    """transformers' ``model.safetensors``."""
    state = transformers_state() if state is None else state
    safetensors.numpy.save_file({name: np.ascontiguousarray(array) for name, array in state.items()}, path)
    return path


def write_torch(path, state=None, **options):
    """A ``.pth`` of numpy arrays as tensors; ``options`` go to ``torch.save``."""
    import torch

    state = meta_state() if state is None else state
    tensors = lambda x: (
        torch.from_numpy(x)
        if isinstance(x, np.ndarray)
        else {k: tensors(v) for k, v in x.items()}
        if isinstance(x, dict)
        else x
    )
    torch.save(tensors(state), path, **options)
    return path
