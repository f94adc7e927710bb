"""SAM's self-attention with decomposed relative positions, inside windows or over the whole grid."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from calsegx.models.sam.layers import Projection, stored

# Logits that exist at once.  On CPU they should stay in the cache; on a GPU they only have to leave memory for others.
LOGIT_BYTES_CPU = 4 << 20
LOGIT_BYTES = 1 << 30


def relative_positions(
    table: Float[Array, "t c"], query_size: int, key_size: int
) -> Float[Array, "query_size key_size c"]:
    """Relative position embeddings ``R[i, j]`` along one axis, from a table of ``2 * size - 1`` rows.

    A table of another length is resized linearly without antialiasing, as ``get_rel_pos`` of Meta's code does.
    """
    rows = 2 * max(query_size, key_size) - 1
    if table.shape[0] != rows:
        table = jax.image.resize(table, (rows, table.shape[1]), "linear", antialias=False)
    query_step = max(key_size / query_size, 1.0)
    key_step = max(query_size / key_size, 1.0)
    query = jnp.arange(query_size)[:, None] * query_step
    key = jnp.arange(key_size)[None, :] * key_step
    index = (query - key + (key_size - 1) * key_step).astype(jnp.int32)
    return table[index]


class SelfAttention(nn.Module):
    """Multi-head self-attention over a grid ``[B, h, w, C]`` with decomposed relative positions.

    ``logits = (q / sqrt(d)) . k + q . R_h[h, h'] + q . R_w[w, w']``; the position terms use the unscaled query.
    ``window`` > 0 attends inside windows of that side, 0 over the whole grid.  Meta's model pads the grid with zeros
    up to whole windows *before* the projection, so that a padded token's query, key and value are the bias; here the
    grid is padded after the projection and cropped before the next, which saves projecting the padding.
    ``table_size`` is the grid side that the relative position tables were made for.
    """

    num_heads: int
    window: int
    table_size: int
    qkv_bias: bool = True
    use_rel_pos: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Attend within each window or grid of the batch."""
        _, h, w, c = x.shape
        grid = (self.window, self.window) if self.window else (h, w)
        tables = None
        if self.use_rel_pos:
            shape = (2 * self.table_size - 1, c // self.num_heads)
            names = ("rel_pos_h", "rel_pos_w")
            tables = [stored(self, name, nn.initializers.zeros_init(), shape) for name in names]
            tables = [relative_positions(t, s, s).astype(self.dtype) for t, s in zip(tables, grid, strict=True)]
        kernel, bias = Projection(3 * c, self.qkv_bias, name="qkv")(c)
        qkv = x @ kernel.astype(self.dtype)
        if self.window:
            qkv, counts = partition(qkv, self.window)
            qkv += bias.astype(self.dtype)
            out = unpartition(_attend_windows(qkv, self.num_heads, tables), self.window, counts, (h, w))
        else:
            out = _attend_grids(qkv + bias.astype(self.dtype), self.num_heads, tables)
        return nn.Dense(c, dtype=self.dtype, name="proj")(out)


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


def _attend_windows(qkv: Float[Array, "b h w c3"], heads: int, tables: list[Array] | None) -> Float[Array, "b h w c"]:
    """One window after the other: splitting the heads and the softmax happen in the cache."""

    def one(qkv: Float[Array, "h w c3"]) -> Float[Array, "h w c"]:
        h, w, _ = qkv.shape
        q, k, v = qkv.reshape(h, w, 3, heads, -1).transpose(2, 3, 0, 1, 4)
        out = _attend(q, k, v, _position_logits(q, tables))
        return out.transpose(1, 2, 0, 3).reshape(h, w, -1)

    _, h, w, _ = qkv.shape
    return _map(one, qkv, 4 * heads * (h * w) ** 2)


def _attend_grids(qkv: Float[Array, "b h w c3"], heads: int, tables: list[Array] | None) -> Float[Array, "b h w c"]:
    """One head after the other, and within it blocks of rows of queries."""
    b, h, w, _ = qkv.shape
    rows = _largest_divisor(h, _budget() // (4 * w * h * w))

    def one(head: tuple[Array, Array, Array]) -> Float[Array, "h w d"]:
        q, k, v = (x[None] for x in head)
        positions = _position_logits(q, tables)
        if rows == h:
            return _attend(q, k, v, positions)[0]
        blocks = [x.reshape(h // rows, 1, rows, w, -1) for x in (q, *positions)]
        out = jax.lax.map(lambda block: _attend(block[0], k, v, block[1:]), blocks)
        return out.reshape(h, w, -1)

    qkv = qkv.reshape(b, h, w, 3, heads, -1).transpose(3, 0, 4, 1, 2, 5)
    q, k, v = qkv.reshape(3, b * heads, h, w, -1)
    out = _map(one, (q, k, v), 4 * rows * w * h * w)
    return out.reshape(b, heads, h, w, -1).transpose(0, 2, 3, 1, 4).reshape(b, h, w, -1)


def _position_logits(q: Float[Array, "n h w d"], tables: list[Array] | None) -> list[Array]:
    """``q . R_h [n h w H]`` and ``q . R_w [n h w W]``, or nothing."""
    if tables is None:
        return []
    rows, columns = tables
    wide = jnp.promote_types(q.dtype, jnp.float32)
    return [
        jnp.einsum("nhwd,hHd->nhwH", q, rows, preferred_element_type=wide),
        jnp.einsum("nhwd,wWd->nhwW", q, columns, preferred_element_type=wide),
    ]


def _attend(
    q: Float[Array, "n r w d"], k: Float[Array, "n h w d"], v: Float[Array, "n h w d"], positions: list[Array]
) -> Float[Array, "n r w d"]:
    """Softmax in at least float32; divided by its sum after the product with ``v``, where there is less to divide."""
    n, h, w, d = k.shape
    wide = jnp.promote_types(q.dtype, jnp.float32)
    queries, keys, values, scale = q.reshape(n, -1, d), k.reshape(n, -1, d), v.reshape(n, -1, d), d**-0.5
    if q.dtype == wide:
        logits = jnp.einsum("nqd,nkd->nqk", scale * queries, keys)
    else:  # scaling the logits saves a rounding; above, the queries are fewer
        logits = scale * jnp.einsum("nqd,nkd->nqk", queries, keys, preferred_element_type=wide)
    if positions:
        rows, columns = positions
        logits = logits.reshape(n, -1, h, w) + rows.reshape(n, -1, h, 1) + columns.reshape(n, -1, 1, w)
    logits = logits.reshape(n, -1, h * w)
    weights = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
    out = jnp.einsum("nqk,nkd->nqd", weights.astype(v.dtype), values, preferred_element_type=wide)
    return (out / jnp.sum(weights, axis=-1, keepdims=True)).astype(v.dtype).reshape(q.shape)


def _map(function: Callable[[Any], Array], items: Any, item_bytes: int) -> Array:
    """``vmap``, or as many items at once as the logits' budget allows."""
    count = len(jax.tree.leaves(items)[0])
    at_once = _largest_divisor(count, _budget() // item_bytes)
    if at_once == count:
        return jax.vmap(function)(items)
    return jax.lax.map(function, items, batch_size=at_once)


def _budget() -> int:
    return LOGIT_BYTES_CPU if jax.default_backend() == "cpu" else LOGIT_BYTES


def _largest_divisor(number: int, limit: int) -> int:
    return max(d for d in range(1, number + 1) if number % d == 0 and (d == 1 or d <= limit))
