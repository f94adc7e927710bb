"""The tables of names, and the configuration that names and shapes tell."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from calsegx.models.sam import presets, weights
from calsegx.models.sam.presets import SamConfig
from tests.weights_conversion import checkpoints
from weights_conversion import configuration, meta_names, transformers_names
from weights_conversion.sources import Source

OFFICIAL = ("vit_b", "vit_l", "vit_h")
OTHERS = {
    "tiny": checkpoints.CONFIG,
    "no qkv bias": dataclasses.replace(checkpoints.CONFIG, qkv_bias=False),
    "global blocks only": dataclasses.replace(checkpoints.CONFIG, global_attn_indexes=(0, 1, 2, 3), window_size=8),
    "windows only": dataclasses.replace(checkpoints.CONFIG, global_attn_indexes=()),
    "windows larger than the grid": dataclasses.replace(checkpoints.CONFIG, window_size=14),
    "odd MLP": dataclasses.replace(checkpoints.CONFIG, mlp_ratio=99 / 40),
    "decoder of three": dataclasses.replace(checkpoints.CONFIG, decoder_depth=3, iou_head_depth=2),
    "one mask, patch 8": dataclasses.replace(checkpoints.CONFIG, num_multimask_outputs=0, patch_size=8),
    "image 256": SamConfig(image_size=256, depth=1, global_attn_indexes=(0,), window_size=16),
}
CONFIGS = {**{name: presets.PRESETS[name] for name in OFFICIAL}, **OTHERS}


def shapes_only(shapes):
    """A source without numbers."""
    return Source(
        path=Path("checkpoint"),
        container="",
        shapes=shapes,
        dtypes=dict.fromkeys(shapes, "float32"),
        read=lambda name: np.zeros(shapes[name], np.float32),
        ignored={},
        is_training_checkpoint=False,
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_the_configuration_follows_from_shapes(name):
    shapes = checkpoints.meta_shapes(CONFIGS[name])
    assert configuration.make_plan(shapes_only(shapes)).config == CONFIGS[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_names(name):
    shapes = checkpoints.meta_shapes(CONFIGS[name])
    theirs = {checkpoints.transformers_name(meta, CONFIGS[name]): meta for meta in shapes}
    assert transformers_names.to_meta(theirs) == theirs
    assert transformers_names.to_meta([checkpoints.SHARED]) == {checkpoints.SHARED: transformers_names.MATRIX}
    assert transformers_names.recognise(theirs) and not transformers_names.recognise(shapes)


@pytest.mark.parametrize("name", ["vit_b", "tiny"])
def test_our_names_are_metas_and_back(name):
    meta = set(checkpoints.meta_shapes(CONFIGS[name]))
    ours = {meta_names.to_ours(key) for key in meta}
    assert ours == set(weights.flatten(weights.template(CONFIGS[name])))
    assert {meta_names.to_meta(key) for key in ours} == meta


def test_layouts():
    state = {
        "image_encoder.blocks.0.attn.qkv.weight": np.zeros((6, 2)),
        "image_encoder.neck.2.weight": np.zeros((2, 3, 4, 5)),
        "mask_decoder.output_upscaling.0.weight": np.zeros((2, 3, 4, 5)),
        "prompt_encoder.no_mask_embed.weight": np.zeros((1, 2)),
        "image_encoder.neck.1.weight": np.zeros(3),
    }
    assert {name: array.shape for name, array in meta_names.convert(state).items()} == {
        "image_encoder.blocks.0.attn.qkv.kernel": (2, 6),
        "image_encoder.neck.2.kernel": (4, 5, 3, 2),
        "mask_decoder.output_upscaling.0.kernel": (2, 3, 4, 5),
        "prompt_encoder.no_mask_embed": (1, 2),
        "image_encoder.neck.1.scale": (3,),
    }
