"""SAM's image encoder in PyTorch, in Meta's formulation, for the benchmark and as an oracle of the tests.

Written from the architecture (Kirillov et al., 2023, "Segment Anything", section 3; Li et al., 2022, "Exploring Plain
Vision Transformer Backbones for Object Detection", for windows and decomposed relative positions), formulated as
``segment_anything/modeling/image_encoder.py``: zero-padded windows, every padded token projected, logits of a whole
grid materialised, relative positions added to them.  The parameters are those of ``calsegx.models.sam``.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from calsegx.interfaces import Params
from calsegx.models.sam import SamConfig, weights

EPSILON = 1e-6
State = Mapping[str, Tensor]
# (q, k, v [n, h*w, d], bias [n, h*w, h*w]) -> [n, h*w, d], where n is windows x heads.
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]

_TRANSFORMERS_NAMES = (
    ("patch_embed.proj.", "patch_embed.projection."),
    ("blocks.", "layers."),
    (".norm", ".layer_norm"),
    ("neck.0.", "neck.conv1."),
    ("neck.1.", "neck.layer_norm1."),
    ("neck.2.", "neck.conv2."),
    ("neck.3.", "neck.layer_norm2."),
)


def from_params(params: Params, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Tensor]:
    """The image encoder's parameters under Meta's names (without ``image_encoder.``) and in torch's layouts.

    The inverse of ``weights_conversion.meta_names``: ``kernel`` (in, out) -> ``weight`` (out, in); convolutions
    (kh, kw, I, O) -> (O, I, kh, kw); ``scale`` -> ``weight``; everything else unchanged.
    """
    state = {}
    for name, leaf in weights.flatten(params["image_encoder"]).items():
        array = np.asarray(leaf)
        if name.endswith(".kernel"):
            array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        name = name.removesuffix("kernel") + "weight" if name.endswith(".kernel") else name
        name = name.removesuffix("scale") + "weight" if name.endswith(".scale") else name
        state[name] = torch.from_numpy(np.array(array, np.float32, order="C")).to(device, dtype)
    return state


def encode(config: SamConfig, state: State, images: Tensor, attend: Attend) -> Tensor:
    """Image embeddings ``[B, h, w, out_chans]`` of normalised frames ``[B, H, W, 3]`` at the model's own size."""
    x = F.conv2d(
        images.permute(0, 3, 1, 2),
        state["patch_embed.proj.weight"],
        state["patch_embed.proj.bias"],
        stride=config.patch_size,
    ).permute(0, 2, 3, 1)
    if config.use_abs_pos:
        x = x + state["pos_embed"]
    for i in range(config.depth):
        window = 0 if i in config.global_attn_indexes else config.window_size
        x = _block(config, state, f"blocks.{i}", x, window, attend)
    x = F.conv2d(x.permute(0, 3, 1, 2), state["neck.0.weight"])
    x = _layer_norm_channels(state, "neck.1", x)
    x = F.conv2d(x, state["neck.2.weight"], padding=1)
    return _layer_norm_channels(state, "neck.3", x).permute(0, 2, 3, 1)


def meta(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attention as Meta's code writes it: the logits exist as a whole."""
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if bias is not None:
        logits = logits + bias
    return logits.softmax(dim=-1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """PyTorch's fused attention with the relative positions as its mask, as transformers' SAM uses it."""
    one = [x.unsqueeze(0) for x in (q, k, v)]
    mask = None if bias is None else bias.unsqueeze(0)
    return F.scaled_dot_product_attention(*one, attn_mask=mask).squeeze(0)


def transformers_encoder(config: SamConfig, state: State) -> Callable[[Tensor], Tensor]:
    """``transformers.SamVisionEncoder`` with sdpa and these parameters: ``[B, H, W, 3]`` -> ``[B, h, w, out_chans]``.

    Raises:
        ImportError: when transformers is not installed.
    """
    from transformers.models.sam import configuration_sam, modeling_sam

    c = configuration_sam.SamVisionConfig(
        hidden_size=config.embed_dim,
        output_channels=config.out_chans,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        window_size=config.window_size,
        global_attn_indexes=list(config.global_attn_indexes),
        mlp_dim=int(config.embed_dim * config.mlp_ratio),
        mlp_ratio=float(config.mlp_ratio),
        qkv_bias=config.qkv_bias,
        use_abs_pos=config.use_abs_pos,
        use_rel_pos=config.use_rel_pos,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        module = modeling_sam.SamVisionEncoder(c)
    module.load_state_dict({_transformers_name(name): tensor for name, tensor in state.items()}, assign=True)
    module.eval()
    return lambda images: module(images.permute(0, 3, 1, 2)).last_hidden_state.permute(0, 2, 3, 1)


def _transformers_name(name: str) -> str:
    for ours, theirs in _TRANSFORMERS_NAMES:
        name = name.replace(ours, theirs)
    return name


def _block(config: SamConfig, state: State, name: str, x: Tensor, window: int, attend: Attend) -> Tensor:
    _, h, w, _ = x.shape
    y = _layer_norm(state, f"{name}.norm1", x)
    if window:
        windows = _partition(y, window)
        y = _unpartition(_attention(config, state, f"{name}.attn", windows, attend), window, x.shape)
    else:
        y = _attention(config, state, f"{name}.attn", y, attend)
    x = x + y
    y = _linear(state, f"{name}.mlp.lin1", _layer_norm(state, f"{name}.norm2", x))
    return x + _linear(state, f"{name}.mlp.lin2", F.gelu(y))


def _attention(config: SamConfig, state: State, name: str, x: Tensor, attend: Attend) -> Tensor:
    b, h, w, c = x.shape
    heads = config.num_heads
    qkv = _linear(state, f"{name}.qkv", x).reshape(b, h * w, 3, heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.reshape(3, b * heads, h * w, -1).unbind(0)
    bias = None
    if config.use_rel_pos:
        rows = _relative_positions(state[f"{name}.rel_pos_h"], h)
        columns = _relative_positions(state[f"{name}.rel_pos_w"], w)
        grid = q.reshape(b * heads, h, w, -1)
        from_rows = torch.einsum("bhwd,hkd->bhwk", grid, rows)[..., :, None]
        from_columns = torch.einsum("bhwd,wkd->bhwk", grid, columns)[..., None, :]
        bias = (from_rows + from_columns).reshape(b * heads, h * w, h * w)
    out = attend(q, k, v, bias).reshape(b, heads, h, w, -1).permute(0, 2, 3, 1, 4).reshape(b, h, w, c)
    return _linear(state, f"{name}.proj", out)


def _relative_positions(table: Tensor, size: int) -> Tensor:
    steps = torch.arange(size, device=table.device)
    index = steps[:, None] - steps[None, :] + size - 1
    return table[index]


def _partition(x: Tensor, window: int) -> Tensor:
    b, h, w, c = x.shape
    x = F.pad(x, (0, 0, 0, -w % window, 0, -h % window))
    x = x.reshape(b, x.shape[1] // window, window, x.shape[2] // window, window, c)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, window, window, c)


def _unpartition(windows: Tensor, window: int, shape: Any) -> Tensor:
    b, h, w, c = shape
    rows, columns = -(-h // window), -(-w // window)
    x = windows.reshape(b, rows, columns, window, window, c).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(b, rows * window, columns * window, c)[:, :h, :w]


def _linear(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def _layer_norm(state: State, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], EPSILON)


def _layer_norm_channels(state: State, name: str, x: Tensor) -> Tensor:
    """LayerNorm over the channels of ``[B, C, h, w]``."""
    centred = x - x.mean(1, keepdim=True)
    normalised = centred / torch.sqrt(centred.square().mean(1, keepdim=True) + EPSILON)
    return state[f"{name}.weight"][:, None, None] * normalised + state[f"{name}.bias"][:, None, None]
