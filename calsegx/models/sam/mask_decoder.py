"""SAM's mask decoder: a two-way transformer, upscaling, one hypernetwork per mask token."""

import einops
import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from calsegx.models.sam import layers
from calsegx.models.sam.decoder_attention import DecoderAttention
from calsegx.models.sam.presets import SamConfig
from calsegx.models.sam.prompt_encoder import PromptEmbeddings

EPSILON = 1e-5  # torch's default, unlike the encoder
UPSCALING_EPSILON = 1e-6


class MaskDecoder(nn.Module):
    """Features and prompt tokens to ``logits [B, M, 4h, 4w]`` and ``iou_predictions [B, M]``.

    ``num_mask_tokens`` is Meta's 4, or the number of foreground classes of a fine-tuned head.
    """

    config: SamConfig
    num_mask_tokens: int

    @nn.compact
    def __call__(
        self,
        image_embeddings: Float[Array, "b h w c"],
        prompts: PromptEmbeddings,
    ) -> tuple[Float[Array, "b m H W"], Float[Array, "b m"]]:
        """Decode all mask tokens."""
        c, m = self.config, self.num_mask_tokens
        b, h, w, width = image_embeddings.shape
        normal = nn.initializers.normal(1.0)
        iou_token = self.param("iou_token", normal, (1, width))
        mask_tokens = self.param("mask_tokens", normal, (m, width))
        own = jnp.broadcast_to(jnp.concatenate([iou_token, mask_tokens]), (b, m + 1, width))
        tokens = jnp.concatenate([own, prompts.sparse], axis=1)
        ignored = None if prompts.ignored is None else jnp.pad(prompts.ignored, ((0, 0), (m + 1, 0)))

        image = (image_embeddings + prompts.dense).reshape(b, h * w, width)
        position = prompts.position.reshape(1, h * w, width)
        tokens, image = TwoWayTransformer(c, name="transformer")(tokens, image, position, ignored)

        pixels = UpscaledPixels(name="output_upscaling")(image.reshape(b, h, w, width))
        hyper = jnp.stack(
            [
                layers.Mlp(width, width // 8, 3, name=f"output_hypernetworks_mlps.{i}")(tokens[:, 1 + i])
                for i in range(m)
            ],
            axis=1,
        )
        # All four pixels of the second upscaling in one matmul with a block-diagonal matrix: the arithmetic is free,
        # the layout is that of the previous matmul, and the depth-to-space is left to M channels at the very end.
        blocks = jnp.einsum("bmc,xy->bxcym", hyper, jnp.eye(4, dtype=hyper.dtype)).reshape(b, width // 2, 4 * m)
        masks = jnp.einsum("bpx,bxy->bpy", pixels.reshape(b, -1, width // 2), blocks)
        masks = einops.rearrange(masks, "b (h w i j) (k l m) -> b m (h i k) (w j l)", h=h, w=w, i=2, j=2, k=2, l=2, m=m)
        iou = layers.Mlp(c.iou_head_hidden_dim, m, c.iou_head_depth, name="iou_prediction_head")(tokens[:, 0])
        return masks, iou


class UpscaledPixels(nn.Module):
    """``[B, h, w, C]`` to pixel embeddings ``[B, h, w, 2, 2, 2, 2, C / 8]``, depth-to-space not yet applied."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w 2 2 2 2 o"]:
        """Two upscalings by two, with LayerNorm over channels and exact GELU."""
        width = x.shape[-1]
        x = layers.UpscaleByTwo(width // 4, name="0")(x)
        x = layers.gelu(layers.layer_norm(x, "1", UPSCALING_EPSILON))
        return layers.gelu(layers.UpscaleByTwo(width // 8, name="3")(x))


class TwoWayTransformer(nn.Module):
    """Tokens attend to the image and the image to the tokens; returns both."""

    config: SamConfig

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "b t c"],
        image: Float[Array, "b n c"],
        position: Float[Array, "1 n c"],
        ignored: Bool[Array, "b t"] | None,
    ) -> tuple[Float[Array, "b t c"], Float[Array, "b n c"]]:
        """``tokens`` as given are also the positional encoding of the queries, in every layer."""
        c = self.config
        queries, query_position = tokens, tokens
        for i in range(c.decoder_depth):
            block = TwoWayBlock(c, skip_first=i == 0, name=f"layers.{i}")
            queries, image = block(queries, image, query_position, position, ignored)
        attend = DecoderAttention(c.decoder_heads, 2, name="final_attn_token_to_image")
        queries = queries + attend(queries + query_position, image + position, image)
        return layers.layer_norm(queries, "norm_final_attn", EPSILON), image


class TwoWayBlock(nn.Module):
    """Self-attention of tokens, tokens to image, MLP, image to tokens."""

    config: SamConfig
    skip_first: bool  # the first block's self-attention has neither position nor residual

    @nn.compact
    def __call__(
        self,
        queries: Float[Array, "b t c"],
        image: Float[Array, "b n c"],
        query_position: Float[Array, "b t c"],
        position: Float[Array, "1 n c"],
        ignored: Bool[Array, "b t"] | None,
    ) -> tuple[Float[Array, "b t c"], Float[Array, "b n c"]]:
        """One block; values never carry the positional encoding."""
        c = self.config
        self_attend = DecoderAttention(c.decoder_heads, name="self_attn")
        if self.skip_first:
            queries = self_attend(queries, queries, queries, ignored)
        else:
            q = queries + query_position
            queries = queries + self_attend(q, q, queries, ignored)
        queries = layers.layer_norm(queries, "norm1", EPSILON)

        to_image = DecoderAttention(c.decoder_heads, 2, name="cross_attn_token_to_image")
        queries = queries + to_image(queries + query_position, image + position, image)
        queries = layers.layer_norm(queries, "norm2", EPSILON)

        hidden = nn.relu(nn.Dense(c.decoder_mlp_dim, name="mlp.lin1")(queries))
        queries = queries + nn.Dense(queries.shape[-1], name="mlp.lin2")(hidden)
        queries = layers.layer_norm(queries, "norm3", EPSILON)

        to_tokens = DecoderAttention(c.decoder_heads, 2, name="cross_attn_image_to_token")
        image = image + to_tokens(image + position, queries + query_position, queries, ignored)
        return queries, layers.layer_norm(image, "norm4", EPSILON)
