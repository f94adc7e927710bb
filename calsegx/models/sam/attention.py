"""Attention: SAM's windowed self-attention with decomposed relative positions, and the decoder's."""

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Above this many query tokens the logits of one image are computed in row blocks: less memory, and faster on CPU.
ROW_BLOCK_TOKENS = 1024


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


class WindowedAttention(nn.Module):
    """Multi-head self-attention over a grid ``[B, h, w, C]`` with decomposed relative positions.

    ``logits = (q / sqrt(d)) . k + q . R_h[h, h'] + q . R_w[w, w']``; the position terms use the unscaled query.
    ``table_size`` is the grid side that the relative position tables were made for.
    """

    num_heads: int
    table_size: int
    qkv_bias: bool = True
    use_rel_pos: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Attend within each grid of the batch."""
        _, h, w, c = x.shape
        d = c // self.num_heads
        qkv = nn.Dense(3 * c, use_bias=self.qkv_bias, dtype=self.dtype, name="qkv")(x)
        q, k, v = einops.rearrange(qkv, "b h w (three n d) -> three b n h w d", three=3, n=self.num_heads)
        tables = []
        if self.use_rel_pos:
            shape = (2 * self.table_size - 1, d)
            for axis, size in (("h", h), ("w", w)):
                table = self.param(f"rel_pos_{axis}", nn.initializers.zeros_init(), shape)
                tables.append(relative_positions(table, size, size).astype(self.dtype))
        if h * w > ROW_BLOCK_TOKENS:
            out = _attend_row_blocked(q, k, v, tables)
        else:
            out = _attend(q, k, v, tables)
        out = einops.rearrange(out, "b n h w d -> b h w (n d)")
        return nn.Dense(c, dtype=self.dtype, name="proj")(out)


def _attend(q: Array, k: Array, v: Array, tables: list[Array]) -> Array:
    """Attention of all query rows ``q [b n h w d]``; ``tables`` are R_h ``[h H d]`` and R_w ``[w W d]`` or empty."""
    scale = q.shape[-1] ** -0.5
    logits = jnp.einsum("bnhwd,bnHWd->bnhwHW", q * scale, k, preferred_element_type=jnp.float32)
    if tables:
        rows, columns = tables
        logits += jnp.einsum("bnhwd,hHd->bnhwH", q, rows, preferred_element_type=jnp.float32)[..., None]
        logits += jnp.einsum("bnhwd,wWd->bnhwW", q, columns, preferred_element_type=jnp.float32)[..., None, :]
    shape = logits.shape
    weights = jax.nn.softmax(logits.reshape(*shape[:-2], -1), axis=-1).reshape(shape).astype(v.dtype)
    return jnp.einsum("bnhwHW,bnHWd->bnhwd", weights, v)


def _attend_row_blocked(q: Array, k: Array, v: Array, tables: list[Array]) -> Array:
    """The same, one row of queries at a time: the logits of the whole grid never exist at once."""

    def one_row(row: tuple[Array, ...]) -> Array:
        query, *rows = row
        block = [rows[0][None], tables[1]] if tables else []
        return _attend(query[:, :, None], k, v, block)[:, :, 0]

    rows = (q.transpose(2, 0, 1, 3, 4), *tables[:1])
    return jax.lax.map(one_row, rows).transpose(1, 2, 0, 3, 4)


class DecoderAttention(nn.Module):
    """The decoder's attention: separate projections, internal width ``width / downsample_rate``."""

    num_heads: int
    downsample_rate: int = 1

    @nn.compact
    def __call__(
        self, q: Float[Array, "b q c"], k: Float[Array, "b k c"], v: Float[Array, "b k c"]
    ) -> Float[Array, "b q c"]:
        """Attend from ``q`` to ``k`` with values ``v``."""
        width = q.shape[-1]
        internal = width // self.downsample_rate
        q, k, v = (
            einops.rearrange(nn.Dense(internal, name=name)(x), "b t (n d) -> b t n d", n=self.num_heads)
            for name, x in (("q_proj", q), ("k_proj", k), ("v_proj", v))
        )
        logits = jnp.einsum("bqnd,bknd->bnqk", q, k) * (q.shape[-1] ** -0.5)
        weights = jax.nn.softmax(logits, axis=-1)
        out = jnp.einsum("bnqk,bknd->bqnd", weights, v)
        return nn.Dense(width, name="out_proj")(einops.rearrange(out, "b q n d -> b q (n d)"))
