"""SAM's image encoder: a ViT with windowed and global attention, and a convolutional neck."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from calsegx.models.sam import attention, layers
from calsegx.models.sam.presets import SamConfig

EPSILON = 1e-6


class ImageEncoder(nn.Module):
    """``images [B, H, W, 3]`` (normalised, padded) -> ``image_embeddings [B, h, w, out_chans]``."""

    config: SamConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b h w c"]:
        """Encode a batch of frames; sides must be multiples of the patch size."""
        c = self.config
        x = PatchEmbed(c, self.dtype, name="patch_embed")(images)
        if c.use_abs_pos:
            shape = (1, c.grid, c.grid, c.embed_dim)
            pos_embed = self.param("pos_embed", nn.initializers.normal(0.02), shape)
            if x.shape[1:3] != (c.grid, c.grid):
                pos_embed = jax.image.resize(pos_embed, (1, *x.shape[1:]), "bicubic", antialias=False)
            x = x + pos_embed.astype(self.dtype)
        for i in range(c.depth):
            window = 0 if i in c.global_attn_indexes else c.window_size
            x = Block(c, window, self.dtype, name=f"blocks.{i}")(x)
        x = x.astype(self.dtype)
        x = nn.Conv(c.out_chans, (1, 1), use_bias=False, dtype=self.dtype, name="neck.0")(x)
        x = layers.layer_norm(x, "neck.1", EPSILON).astype(self.dtype)
        x = nn.Conv(c.out_chans, (3, 3), padding=((1, 1), (1, 1)), use_bias=False, dtype=self.dtype, name="neck.2")(x)
        return layers.layer_norm(x, "neck.3", EPSILON)


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
        attend = attention.WindowedAttention(
            c.num_heads, self.window or c.grid, c.qkv_bias, c.use_rel_pos, self.dtype, name="attn"
        )
        y = layers.layer_norm(x, "norm1", EPSILON).astype(self.dtype)
        if self.window:
            windows, grid = partition(y, self.window)
            y = unpartition(attend(windows), self.window, grid, x.shape[1:3])
        else:
            y = attend(y)
        x = x + y
        y = layers.layer_norm(x, "norm2", EPSILON).astype(self.dtype)
        y = nn.Dense(int(c.embed_dim * c.mlp_ratio), dtype=self.dtype, name="mlp.lin1")(y)
        return x + nn.Dense(c.embed_dim, dtype=self.dtype, name="mlp.lin2")(layers.gelu(y))


def partition(x: Float[Array, "b h w c"], window: int) -> tuple[Float[Array, "bw window window c"], tuple[int, int]]:
    """Cut a grid into windows, after zero-padding bottom and right to a multiple of ``window``.

    Padded tokens take part in the softmax as keys, as in Meta's model.  Returns the windows and how many there are
    along each axis.
    """
    b, h, w, c = x.shape
    rows, columns = -(-h // window), -(-w // window)
    x = jnp.pad(x, ((0, 0), (0, rows * window - h), (0, columns * window - w), (0, 0)))
    x = x.reshape(b, rows, window, columns, window, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, window, window, c), (rows, columns)


def unpartition(
    windows: Float[Array, "bw window window c"], window: int, grid: tuple[int, int], size: tuple[int, ...]
) -> Float[Array, "b h w c"]:
    """The inverse of ``partition``: reassemble and crop to ``size = (h, w)``."""
    rows, columns = grid
    x = windows.reshape(-1, rows, columns, window, window, windows.shape[-1]).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(x.shape[0], rows * window, columns * window, x.shape[-1])
    return x[:, : size[0], : size[1]]
