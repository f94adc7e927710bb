"""SAM's prompt encoder: points, boxes and masks to sparse tokens and a dense embedding."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from calsegx.interfaces import Prompts
from calsegx.models.sam import layers
from calsegx.models.sam.presets import SamConfig

EPSILON = 1e-6


PADDING = -1


class PromptEmbeddings(NamedTuple):
    """What the decoder sees of the prompts."""

    sparse: Float[Array, "b t c"]  # point tokens, then "not a point" if there is no box, then the two box corners
    dense: Float[Array, "b h w c"]
    position: Float[Array, "h w c"]  # positional encoding of the grid
    ignored: Bool[Array, "b t"] | None = None  # sparse tokens that nothing may attend to


class PromptEncoder(nn.Module):
    """Encode one group of prompts per image."""

    config: SamConfig

    def setup(self) -> None:
        """Create the embeddings; names mirror Meta's."""
        c = self.config
        normal = nn.initializers.normal(1.0)
        self.gaussian = self.param("pe_layer.positional_encoding_gaussian_matrix", normal, (2, c.out_chans // 2))
        self.point_embeddings = [self.param(f"point_embeddings.{i}", normal, (1, c.out_chans)) for i in range(4)]
        self.not_a_point = self.param("not_a_point_embed", normal, (1, c.out_chans))
        self.no_mask = self.param("no_mask_embed", normal, (1, c.out_chans))
        self.mask_downscaling = MaskDownscaling(c)

    def __call__(self, prompts: Prompts, batch: int, grid: tuple[int, int], ignore_padding: bool) -> PromptEmbeddings:
        """Encode ``prompts`` for ``batch`` images whose features have the size ``grid``."""
        c = self.config
        size = jnp.array([grid[1] * c.patch_size, grid[0] * c.patch_size], jnp.float32)  # (x, y)
        sparse = [jnp.zeros((batch, 0, c.out_chans))]
        if prompts.points is not None:
            if prompts.labels is None:
                raise ValueError("Prompts.points needs Prompts.labels")
            sparse.append(self._points(prompts.points, prompts.labels, size, pad=prompts.boxes is None))
        if prompts.boxes is not None:
            corners = prompts.boxes.reshape(batch, 2, 2)
            types = jnp.concatenate([self.point_embeddings[2], self.point_embeddings[3]])
            sparse.append(self._encode((corners + 0.5) / size) + types)
        if prompts.masks is not None:
            dense = self.mask_downscaling(prompts.masks)
        else:
            dense = jnp.broadcast_to(self.no_mask, (batch, *grid, c.out_chans))
        tokens = jnp.concatenate(sparse, axis=1)
        ignored = None
        if prompts.labels is not None and ignore_padding:
            others = tokens.shape[1] - prompts.labels.shape[1]
            ignored = jnp.pad(prompts.labels == PADDING, ((0, 0), (0, others)))
        return PromptEmbeddings(tokens, dense, self.dense_position(grid), ignored)

    def dense_position(self, grid: tuple[int, int]) -> Float[Array, "h w c"]:
        """Positional encoding of the cell centres of a grid."""
        y, x = ((jnp.arange(n) + 0.5) / n for n in grid)
        return self._encode(jnp.stack(jnp.meshgrid(x, y), axis=-1))

    def _points(
        self, points: Float[Array, "b n 2"], labels: Int[Array, "b n"], size: Array, pad: bool
    ) -> Float[Array, "b t c"]:
        points = points + 0.5
        if pad:  # Meta's model appends a "not a point" token exactly when there is no box
            points = jnp.pad(points, ((0, 0), (0, 1), (0, 0)))
            labels = jnp.pad(labels, ((0, 0), (0, 1)), constant_values=PADDING)
        labels = labels[..., None]
        tokens = self._encode(points / size)
        tokens = jnp.where(labels == PADDING, self.not_a_point, tokens)
        tokens = jnp.where(labels == 0, tokens + self.point_embeddings[0], tokens)
        return jnp.where(labels == 1, tokens + self.point_embeddings[1], tokens)

    def _encode(self, coordinates: Float[Array, "*b 2"]) -> Float[Array, "*b c"]:
        """Random Fourier features of coordinates in [0, 1]; the phases reach tens of radians, hence HIGHEST."""
        phase = 2 * jnp.pi * jnp.matmul(2 * coordinates - 1, self.gaussian, precision=jax.lax.Precision.HIGHEST)
        return jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)


class MaskDownscaling(nn.Module):
    """Mask logits ``[B, 4h, 4w, 1]`` to a dense embedding ``[B, h, w, C]``."""

    config: SamConfig

    @nn.compact
    def __call__(self, masks: Float[Array, "b H W 1"]) -> Float[Array, "b h w c"]:
        """Two strided convolutions and a projection."""
        c = self.config
        x = masks
        for i, width in ((0, c.mask_in_chans // 4), (3, c.mask_in_chans)):
            x = nn.Conv(width, (2, 2), (2, 2), "VALID", name=str(i))(x)
            x = layers.gelu(layers.layer_norm(x, str(i + 1), EPSILON))
        return nn.Conv(c.out_chans, (1, 1), name="6")(x)
