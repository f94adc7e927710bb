"""SAM's mask decoder in PyTorch, in Meta's formulation, for the benchmark and as an oracle of the tests.

Written from the architecture (Kirillov et al., 2023, "Segment Anything", appendix A; names and constants of
``segment_anything/modeling/{mask_decoder,transformer}.py``), not tuned: ``Linear`` projections of the image tokens,
explicit softmax attention (which can be differentiated twice), ``ConvTranspose2d``, one hypernetwork per mask token.
Prompts come encoded.  The parameters are those of ``calsegx.models.sam``, so that both sides compute the same thing.
"""

from collections.abc import Mapping

import jax
import numpy as np
import torch
from torch import Tensor, nn

from calsegx.interfaces import Params
from calsegx.models.sam import SamConfig, weights


class LayerNorm2d(nn.Module):
    """LayerNorm over the channels of ``[B, C, h, w]``."""

    def __init__(self, channels: int, epsilon: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Normalise."""
        centred = x - x.mean(1, keepdim=True)
        variance = centred.square().mean(1, keepdim=True)
        normalised = centred / torch.sqrt(variance + self.epsilon)
        return self.weight[:, None, None] * normalised + self.bias[:, None, None]


class Mlp(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, inputs: int, hidden: int, outputs: int, depth: int):
        super().__init__()
        sizes = [inputs, *[hidden] * (depth - 1), outputs]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the stack."""
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        return self.layers[-1](x)


class Attention(nn.Module):
    """Multi-head attention of internal width ``width / downsample_rate``."""

    def __init__(self, width: int, heads: int, downsample_rate: int = 1):
        super().__init__()
        internal = width // downsample_rate
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, internal) for _ in range(3))
        self.out_proj = nn.Linear(internal, width)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from ``q [B, Q, C]`` to ``k [B, N, C]`` with values ``v``."""
        q, k, v = (self._split(project(x)) for project, x in ((self.q_proj, q), (self.k_proj, k), (self.v_proj, v)))
        logits = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        out = torch.softmax(logits, dim=-1) @ v
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        """``[B, N, C]`` to ``[B, heads, N, C / heads]``."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class TwoWayBlock(nn.Module):
    """Self-attention of tokens, tokens to image, MLP, image to tokens."""

    def __init__(self, config: SamConfig, skip_first: bool):
        super().__init__()
        width, heads = config.out_chans, config.decoder_heads
        self.self_attn = Attention(width, heads)
        self.cross_attn_token_to_image = Attention(width, heads, 2)
        self.cross_attn_image_to_token = Attention(width, heads, 2)
        self.mlp = nn.ModuleDict(
            {"lin1": nn.Linear(width, config.decoder_mlp_dim), "lin2": nn.Linear(config.decoder_mlp_dim, width)}
        )
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.LayerNorm(width) for _ in range(4))
        self.skip_first = skip_first

    def forward(self, queries: Tensor, keys: Tensor, query_position: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens ``[B, T, C]`` and image ``[B, N, C]``, both updated."""
        if self.skip_first:
            queries = self.self_attn(queries, queries, queries)
        else:
            q = queries + query_position
            queries = queries + self.self_attn(q, q, queries)
        queries = self.norm1(queries)
        k = keys + position
        queries = self.norm2(queries + self.cross_attn_token_to_image(queries + query_position, k, keys))
        queries = self.norm3(queries + self.mlp["lin2"](torch.relu(self.mlp["lin1"](queries))))
        q = queries + query_position
        keys = self.norm4(keys + self.cross_attn_image_to_token(k, q, queries))
        return queries, keys


class TwoWayTransformer(nn.Module):
    """The blocks and a last attention from the tokens to the image."""

    def __init__(self, config: SamConfig):
        super().__init__()
        self.layers = nn.ModuleList(TwoWayBlock(config, skip_first=i == 0) for i in range(config.decoder_depth))
        self.final_attn_token_to_image = Attention(config.out_chans, config.decoder_heads, 2)
        self.norm_final_attn = nn.LayerNorm(config.out_chans)

    def forward(self, image: Tensor, position: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """``image`` and ``position [B, C, h, w]``, ``tokens [B, T, C]`` to tokens and image ``[B, h w, C]``."""
        keys, position = (x.flatten(2).transpose(1, 2) for x in (image, position))
        queries = tokens
        for layer in self.layers:
            queries, keys = layer(queries, keys, tokens, position)
        queries = queries + self.final_attn_token_to_image(queries + tokens, keys + position, keys)
        return self.norm_final_attn(queries), keys


class MaskDecoder(nn.Module):
    """Features and encoded prompts to mask logits and predicted IoU, one group of prompts per image."""

    def __init__(self, config: SamConfig, num_mask_tokens: int):
        super().__init__()
        width = config.out_chans
        self.iou_token = nn.Embedding(1, width)
        self.mask_tokens = nn.Embedding(num_mask_tokens, width)
        self.transformer = TwoWayTransformer(config)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(width, width // 4, 2, stride=2),
            LayerNorm2d(width // 4),
            nn.GELU(),
            nn.ConvTranspose2d(width // 4, width // 8, 2, stride=2),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(Mlp(width, width, width // 8, 3) for _ in range(num_mask_tokens))
        self.iou_prediction_head = Mlp(width, config.iou_head_hidden_dim, num_mask_tokens, config.iou_head_depth)

    def forward(self, image: Tensor, position: Tensor, sparse: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
        """Decode every mask token.

        Args:
            image: features ``[B, C, h, w]``.
            position: positional encoding of the grid ``[1, C, h, w]``.
            sparse: prompt tokens ``[B, T, C]``.
            dense: dense prompt embedding ``[B, C, h, w]``.

        Returns:
            Mask logits ``[B, M, 4h, 4w]`` and predicted IoU ``[B, M]``.
        """
        batch, _, height, width = image.shape
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat([own.expand(batch, -1, -1), sparse], dim=1)
        position = torch.repeat_interleave(position, batch, dim=0)
        tokens, source = self.transformer(image + dense, position, tokens)
        pixels = self.output_upscaling(source.transpose(1, 2).unflatten(2, (height, width)))
        hyper = torch.stack([mlp(tokens[:, 1 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)], dim=1)
        masks = (hyper @ pixels.flatten(2)).unflatten(2, (4 * height, 4 * width))
        return masks, self.iou_prediction_head(tokens[:, 0])


def from_params(config: SamConfig, mask_decoder: Params) -> MaskDecoder:
    """A PyTorch decoder with the parameters of ours; every name and shape must fit."""
    arrays = {name: np.asarray(array) for name, array in weights.flatten(mask_decoder).items()}
    decoder = MaskDecoder(config, arrays["mask_tokens"].shape[0])
    decoder.load_state_dict(dict(to_meta(name, array) for name, array in arrays.items()), strict=True)
    return decoder


def to_meta(name: str, array: np.ndarray) -> tuple[str, Tensor]:
    """Meta's name and layout of one of our decoder's parameters: the inverse of ``weights_conversion.meta_names``."""
    tensor = torch.from_numpy(np.array(array))
    module, _, leaf = name.rpartition(".")
    if leaf == "kernel":  # a transposed convolution has torch's layout on both sides
        return f"{module}.weight", tensor.T.contiguous() if tensor.ndim == 2 else tensor
    if leaf == "scale":
        return f"{module}.weight", tensor
    return (name if leaf == "bias" else f"{name}.weight"), tensor


def to_params(template: Params, state: Mapping[str, Tensor]) -> Params:
    """The way back, for gradients: Meta's names and layouts to a tree like ``template``, numpy float64 leaves."""
    flat = {}
    for name, array in weights.flatten(template).items():
        meta, tensor = to_meta(name, np.asarray(array))
        value = state[meta].detach().double().cpu().numpy()
        turned = name.endswith(".kernel") and tensor.ndim == 2
        flat[name] = value.T if turned else value
    leaves = [flat[name] for name in weights.flatten(template)]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)
