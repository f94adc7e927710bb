"""SAM's image encoder: a ViT with windowed and global attention, and a convolutional neck."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from calsegx.models.sam import attention, layers
from calsegx.models.sam.presets import SamConfig

EPSILON = 1e-6


class ImageEncoder(nn.Module):
    """``images [B, H, W, 3]`` (normalised, padded) -> ``image_embeddings [B, h, w, out_chans]``.

    ``whole(name, params, x)`` makes a block's parameters whole where they are stored in parts; it is given the block's
    input, so that it can wait for it.  With ``checkpoint`` a backward pass keeps the input of every block alone and
    computes the rest of it again, except on a CPU, where XLA merges the two computations.
    """

    config: SamConfig
    dtype: jnp.dtype = jnp.float32
    whole: Callable[[str, Any, Array], Any] | None = None
    checkpoint: bool = False

    @nn.compact
    def __call__(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b h w c"]:
        """Encode a batch of frames; sides must be multiples of the patch size."""
        c = self.config
        x = PatchEmbed(c, self.dtype, name="patch_embed")(images)
        if c.use_abs_pos:
            shape = (1, c.grid, c.grid, c.embed_dim)
            pos_embed = layers.stored(self, "pos_embed", nn.initializers.normal(0.02), shape)
            if x.shape[1:3] != pos_embed.shape[1:3]:
                rows, columns = (
                    bicubic_weights(old, new) for old, new in zip(pos_embed.shape[1:3], x.shape[1:3], strict=True)
                )
                highest = jax.lax.Precision.HIGHEST
                pos_embed = jnp.einsum("Hh,Ww,bhwc->bHWc", rows, columns, pos_embed, precision=highest)
            x = x + pos_embed.astype(self.dtype)
        for i in range(c.depth):
            window = 0 if i in c.global_attn_indexes else c.window_size
            x = self._block(f"blocks.{i}", x)(c, window, self.dtype, name=f"blocks.{i}")(x)
        x = x.astype(self.dtype)
        x = nn.Conv(c.out_chans, (1, 1), use_bias=False, dtype=self.dtype, name="neck.0")(x)
        x = layers.layer_norm(x, "neck.1", EPSILON).astype(self.dtype)
        x = nn.Conv(c.out_chans, (3, 3), padding=((1, 1), (1, 1)), use_bias=False, dtype=self.dtype, name="neck.2")(x)
        return layers.layer_norm(x, "neck.3", EPSILON)

    def _block(self, name: str, x: Float[Array, "b h w c"]) -> Any:
        whole = self.whole
        if whole is None:
            return nn.remat(Block) if self.checkpoint else Block
        return nn.map_variables(Block, "params", trans_in_fn=lambda variables: whole(name, variables, x))


class PatchEmbed(nn.Module):
    """Pixels to tokens: Meta's strided projection, or three strided 3x3 convolutions for the tiny preset.

    The convolutional stem learns from scratch several times faster than an 8x8 projection at this size.
    """

    config: SamConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b h w c"]:
        """Project each patch."""
        c = self.config
        if c.stem == "patch":
            p = c.patch_size
            return nn.Conv(c.embed_dim, (p, p), (p, p), "VALID", dtype=self.dtype, name="proj")(images)
        x = images
        for i, width in enumerate((24, 48, c.embed_dim)):
            padding = ((1, 1), (1, 1))
            x = nn.Conv(width, (3, 3), (2, 2), padding, dtype=self.dtype, name=f"convolutions.{i}")(x)
            x = nn.relu(x) if i < 2 else x
        return x


class Block(nn.Module):
    """A transformer block with attention inside windows (``window > 0``) or over the whole grid."""

    config: SamConfig
    window: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """``x + attention(LN(x))``, then ``x + MLP(LN(x))``."""
        c = self.config
        attend = attention.SelfAttention(
            c.num_heads, self.window, self.window or c.grid, c.qkv_bias, c.use_rel_pos, self.dtype, name="attn"
        )
        x = x + attend(layers.layer_norm(x, "norm1", EPSILON).astype(self.dtype))
        y = layers.layer_norm(x, "norm2", EPSILON).astype(self.dtype)
        y = nn.Dense(int(c.embed_dim * c.mlp_ratio), dtype=self.dtype, name="mlp.lin1")(y)
        return x + nn.Dense(c.embed_dim, dtype=self.dtype, name="mlp.lin2")(layers.gelu(y))


def bicubic_weights(size: int, new_size: int) -> Float[np.ndarray, "new_size size"]:
    """Bicubic interpolation along one axis as torch does it: half-pixel centres, a = -0.75, borders repeated.

    ``jax.image.resize`` has a = -0.5 and renormalises at the borders.
    """
    a = -0.75
    centres = (np.arange(new_size) + 0.5) * size / new_size - 0.5
    left = np.floor(centres).astype(int)
    weights = np.zeros((new_size, size))
    for tap in range(-1, 3):
        d = np.abs(centres - (left + tap))
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        np.add.at(weights, (np.arange(new_size), np.clip(left + tap, 0, size - 1)), np.where(d <= 1, near, far))
    return weights.astype(np.float32)
