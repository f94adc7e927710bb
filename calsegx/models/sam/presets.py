"""Configurations of the Segment Anything Model: Meta's three sizes and the tiny one that ships with calsegx."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class SamConfig:
    """Sizes of a SAM.  Names are Meta's (``build_sam.py``); defaults are what all of Meta's models share."""

    image_size: int = 1024
    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    global_attn_indexes: tuple[int, ...] = (2, 5, 8, 11)
    window_size: int = 14
    mlp_ratio: float = 4.0
    out_chans: int = 256  # width of features, prompts and decoder
    qkv_bias: bool = True
    use_abs_pos: bool = True
    use_rel_pos: bool = True
    stem: str = "patch"  # "patch": Meta's strided projection; "conv": three 3x3 stride-2 convolutions (patch_size 8)
    mask_in_chans: int = 16
    num_multimask_outputs: int = 3
    decoder_depth: int = 2
    decoder_heads: int = 8
    decoder_mlp_dim: int = 2048
    iou_head_depth: int = 3
    iou_head_hidden_dim: int = 256
    preprocessing: str = "sam"  # "sam": longest side, mean and std, zero padding; "medsam": square, min-max to [0, 1]
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)

    @property
    def grid(self) -> int:
        """Tokens along one side of the encoder frame."""
        return self.image_size // self.patch_size


VIT_B = SamConfig()
VIT_L = SamConfig(embed_dim=1024, depth=24, num_heads=16, global_attn_indexes=(5, 11, 17, 23))
VIT_H = SamConfig(embed_dim=1280, depth=32, num_heads=16, global_attn_indexes=(7, 15, 23, 31))
TINY = SamConfig(
    image_size=128,
    patch_size=8,
    embed_dim=128,
    depth=4,
    num_heads=4,
    global_attn_indexes=(1, 3),
    window_size=8,
    out_chans=64,
    stem="conv",
    decoder_heads=4,
    decoder_mlp_dim=256,
    iou_head_hidden_dim=64,
)

PRESETS: Mapping[str, SamConfig] = {"vit_b": VIT_B, "vit_l": VIT_L, "vit_h": VIT_H, "tiny": TINY}
