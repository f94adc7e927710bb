"""Other ways to compute the image encoder's attention in JAX, to be timed beside the library's own choice.

``encode`` is a direct port of Meta's formulation in plain functions of the parameters of ``calsegx.models.sam``, with
the attention as an argument.  A form maps ``q, k, v [B, N, h, w, d]`` and the relative positions ``rows [h, h, d]`` and
``columns [w, w, d]`` to ``[B, N, h, w, d]``:

    logits[i, j] = q_i . k_j / sqrt(d) + q_i . rows[y_i, y_j] + q_i . columns[x_i, x_j]

``naive`` materialises the logits of the whole grid; ``biased`` gives the sum of the last two terms to a stock attention
kernel as its bias; ``folded`` hides them in wider queries and keys, so that the kernel needs no bias at all.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from calsegx.interfaces import Params
from calsegx.models.sam import SamConfig, attention, image_encoder, layers, weights

Form = Callable[[Array, Array, Array, Array, Array], Array]
Implementation = Literal["xla", "cudnn"]


def naive(
    q: Float[Array, "B N h w d"],
    k: Float[Array, "B N h w d"],
    v: Float[Array, "B N h w d"],
    rows: Float[Array, "h h d"],
    columns: Float[Array, "w w d"],
) -> Float[Array, "B N h w d"]:
    """Meta's formulation; logits and softmax in float32."""
    b, n, h, w, d = q.shape
    logits = jnp.einsum("bnhwd,bnHWd->bnhwHW", q * d**-0.5, k, preferred_element_type=jnp.float32)
    logits = logits + _from_rows(q, rows)[..., :, None] + _from_columns(q, columns)[..., None, :]
    weights_ = jax.nn.softmax(logits.reshape(b, n, h * w, h * w), axis=-1).astype(v.dtype)
    return (weights_ @ v.reshape(b, n, h * w, d)).reshape(q.shape)


def biased(
    q: Float[Array, "B N h w d"],
    k: Float[Array, "B N h w d"],
    v: Float[Array, "B N h w d"],
    rows: Float[Array, "h h d"],
    columns: Float[Array, "w w d"],
    *,
    implementation: Implementation = "xla",
) -> Float[Array, "B N h w d"]:
    """``jax.nn.dot_product_attention`` with the relative positions as a materialised bias ``[B, N, h*w, h*w]``."""
    b, n, h, w, _ = q.shape
    bias = _from_rows(q, rows)[..., :, None] + _from_columns(q, columns)[..., None, :]
    bias = bias.reshape(b, n, h * w, h * w).astype(q.dtype)
    tokens = [_tokens(x) for x in (q, k, v)]
    out = jax.nn.dot_product_attention(*tokens, bias=bias, implementation=implementation)
    return _grid(out, q.shape)


def folded(
    q: Float[Array, "B N h w d"],
    k: Float[Array, "B N h w d"],
    v: Float[Array, "B N h w d"],
    rows: Float[Array, "h h d"],
    columns: Float[Array, "w w d"],
    *,
    implementation: Implementation = "xla",
    multiple: int = 64,
) -> Float[Array, "B N h w d"]:
    """``q~ = [q/sqrt(d), q.rows, q.columns]``, ``k~ = [k, onehot(y), onehot(x)]``: ``q~.k~`` are the biased logits.

    The width ``d + h + w`` is zero-padded to a ``multiple`` (cuDNN takes widths up to 128, on Hopper 256), and so are
    the values.  In bfloat16 the position terms are rounded to bfloat16 before they are added.
    """
    b, n, h, w, d = q.shape
    wide_q = jnp.concatenate([q * d**-0.5, _from_rows(q, rows), _from_columns(q, columns)], axis=-1)
    ones_y = jnp.broadcast_to(jnp.eye(h)[:, None], (b, n, h, w, h))
    ones_x = jnp.broadcast_to(jnp.eye(w)[None, :], (b, n, h, w, w))
    wide_k = jnp.concatenate([k, ones_y, ones_x], axis=-1)
    width = -(-(d + h + w) // multiple) * multiple
    padded = [
        jnp.pad(_tokens(x).astype(q.dtype), ((0, 0), (0, 0), (0, 0), (0, width - x.shape[-1])))
        for x in (wide_q, wide_k, v)
    ]
    out = jax.nn.dot_product_attention(*padded, scale=1.0, implementation=implementation)
    return _grid(out[..., :d], q.shape)


def encode(
    config: SamConfig, params: Params, images: Float[Array, "b H W 3"], form: Form, dtype: Any = jnp.float32
) -> Float[Array, "b h w c"]:
    """Image embeddings of frames of the model's own size, with attention computed by ``form``."""
    flat = weights.flatten(params["image_encoder"])
    x = _convolution(flat, "patch_embed.proj", images.astype(dtype), config.patch_size, "VALID")
    if config.use_abs_pos:
        x = x + flat["pos_embed"].astype(dtype)
    for i in range(config.depth):
        window = 0 if i in config.global_attn_indexes else config.window_size
        x = _block(config, flat, f"blocks.{i}", x, window, form)
    x = _layer_norm(flat, "neck.1", _convolution(flat, "neck.0", x, 1, "VALID"))
    return _layer_norm(flat, "neck.3", _convolution(flat, "neck.2", x, 1, ((1, 1), (1, 1))))


def _block(config: SamConfig, flat: dict[str, Array], name: str, x: Array, window: int, form: Form) -> Array:
    y = _layer_norm(flat, f"{name}.norm1", x)
    if window:
        _, h, w, _ = x.shape
        windows, grid = attention.partition(y, window)
        y = attention.unpartition(_attention(config, flat, f"{name}.attn", windows, form), window, grid, (h, w))
    else:
        y = _attention(config, flat, f"{name}.attn", y, form)
    x = x + y
    y = _dense(flat, f"{name}.mlp.lin1", _layer_norm(flat, f"{name}.norm2", x))
    return x + _dense(flat, f"{name}.mlp.lin2", layers.gelu(y))


def _attention(config: SamConfig, flat: dict[str, Array], name: str, x: Array, form: Form) -> Array:
    b, h, w, c = x.shape
    heads = config.num_heads
    q, k, v = _dense(flat, f"{name}.qkv", x).reshape(b, h, w, 3, heads, -1).transpose(3, 0, 4, 1, 2, 5)
    tables = [
        attention.relative_positions(flat[f"{name}.rel_pos_{axis}"], size, size).astype(x.dtype)
        for axis, size in (("h", h), ("w", w))
    ]
    out = form(q, k, v, *tables)
    return _dense(flat, f"{name}.proj", out.transpose(0, 2, 3, 1, 4).reshape(b, h, w, c))


def _from_rows(q: Array, rows: Array) -> Array:
    return jnp.einsum("bnhwd,hHd->bnhwH", q, rows, preferred_element_type=jnp.float32)


def _from_columns(q: Array, columns: Array) -> Array:
    return jnp.einsum("bnhwd,wWd->bnhwW", q, columns, preferred_element_type=jnp.float32)


def _tokens(x: Array) -> Array:
    """``[B, N, h, w, d]`` -> ``[B, h*w, N, d]``, the layout of ``jax.nn.dot_product_attention``."""
    b, n, h, w, d = x.shape
    return x.reshape(b, n, h * w, d).transpose(0, 2, 1, 3)


def _grid(x: Array, shape: tuple[int, ...]) -> Array:
    return x.transpose(0, 2, 1, 3).reshape(shape)


def _dense(flat: dict[str, Array], name: str, x: Array) -> Array:
    y = x @ flat[f"{name}.kernel"].astype(x.dtype)
    return y + flat[f"{name}.bias"].astype(x.dtype) if f"{name}.bias" in flat else y


def _convolution(flat: dict[str, Array], name: str, x: Array, stride: int, padding: Any) -> Array:
    kernel = flat[f"{name}.kernel"].astype(x.dtype)
    y = jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return y + flat[f"{name}.bias"].astype(x.dtype) if f"{name}.bias" in flat else y


def _layer_norm(flat: dict[str, Array], name: str, x: Array) -> Array:
    """In float32, returned in the type of ``x``."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + image_encoder.EPSILON)
    return (y * flat[f"{name}.scale"] + flat[f"{name}.bias"]).astype(x.dtype)
