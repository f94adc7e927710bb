"""The decoder's attention, computed from whichever side is less work.

Between few tokens and many image positions the image need not be projected.  With ``W_q, W_k, W_v, W_o`` the
projections of one head, associativity gives the same numbers from the tokens' side:

* tokens to image: ``(q W_k') x'`` instead of ``q (x W_k)'``, and ``(A x) W_v`` instead of ``A (x W_v)``; the key
  bias adds a constant to the logits of a query, which softmax ignores;
* image to tokens: ``x (W_q k') + b_q k'`` instead of ``(x W_q + b_q) k'``, and ``A (v W_o)`` instead of
  ``(A v) W_o``.

The image then meets ``tokens * heads`` columns instead of the internal width, forwards and in every derivative.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from calsegx.models.sam.layers import Projection


class Projections(NamedTuple):
    """Kernels and biases of the four projections: ``n`` heads of width ``d``."""

    q: tuple[Float[Array, "c n d"], Float[Array, "n d"]]
    k: tuple[Float[Array, "c n d"], Float[Array, "n d"]]
    v: tuple[Float[Array, "c n d"], Float[Array, "n d"]]
    out: tuple[Float[Array, "n d c"], Float[Array, " c"]]


class DecoderAttention(nn.Module):
    """Attention with separate projections and the internal width ``width / downsample_rate``.

    ``side`` is for tests; by default the cheaper one is taken.  All have the same parameters.
    """

    num_heads: int
    downsample_rate: int = 1
    side: str = "cheaper"

    @nn.compact
    def __call__(
        self,
        q: Float[Array, "b q c"],
        k: Float[Array, "b k c"],
        v: Float[Array, "b k c"],
        ignored: Bool[Array, "b k"] | None = None,
    ) -> Float[Array, "b q c"]:
        """Attend from ``q`` to ``k`` with values ``v``; ``ignored`` keys get no weight."""
        width = q.shape[-1]
        heads = (self.num_heads, width // self.downsample_rate // self.num_heads)
        internal = heads[0] * heads[1]
        q_proj, k_proj, v_proj = (
            (kernel.reshape(width, *heads), bias.reshape(heads))
            for kernel, bias in (Projection(internal, name=f"{name}_proj")(width) for name in "qkv")
        )
        kernel, bias = Projection(width, name="out_proj")(internal)
        projections = Projections(q_proj, k_proj, v_proj, (kernel.reshape(*heads, width), bias))
        side = cheaper_side(q.shape[1], k.shape[1], width, *heads) if self.side == "cheaper" else self.side
        hidden = None if ignored is None else jnp.where(ignored, -jnp.inf, 0.0).astype(q.dtype)
        return SIDES[side](q, k, v, projections, hidden)


def cheaper_side(queries: int, keys: int, width: int, heads: int, head_width: int) -> str:
    """Count the multiplications of a forward pass; every derivative costs as many again."""
    internal = heads * head_width
    whole = 2 * (queries + keys) * width * internal + 2 * queries * keys * internal
    few = min(queries, keys)
    few_side = 4 * few * width * internal + 2 * queries * keys * heads * width
    if whole <= few_side:
        return "both"
    return "queries" if few == queries else "keys"


def from_both_sides(q: Array, k: Array, v: Array, p: Projections, hidden: Array | None) -> Array:
    """Project queries, keys and values; the textbook order."""
    q, k, v = (jnp.einsum("btc,cnd->btnd", x, w) + bias for x, (w, bias) in zip((q, k, v), p[:3], strict=True))
    logits = jnp.einsum("bqnd,bknd->bnqk", q, k) * q.shape[-1] ** -0.5
    if hidden is not None:
        logits += hidden[:, None, None, :]
    mixed = jnp.einsum("bnqk,bknd->bqnd", jax.nn.softmax(logits, axis=-1), v)
    kernel, bias = p.out
    return jnp.einsum("bqnd,ndc->bqc", mixed, kernel) + bias


def from_the_queries(q: Array, k: Array, v: Array, p: Projections, hidden: Array | None) -> Array:
    """Few queries: project them into the space of the keys, and what they gathered into that of the values."""
    b, t, c = q.shape
    q = jnp.einsum("btc,cnd->btnd", q, p.q[0]) + p.q[1]
    u = jnp.einsum("btnd,cnd->btnc", q, p.k[0]) * q.shape[-1] ** -0.5
    logits = jnp.einsum("bkc,bsc->bks", k, u.reshape(b, -1, c))
    if hidden is not None:
        logits += hidden[:, :, None]
    gathered = jnp.einsum("bks,bkc->bsc", jax.nn.softmax(logits, axis=1), v).reshape(b, t, -1, c)
    mixed = jnp.einsum("btnc,cnd->btnd", gathered, p.v[0]) + p.v[1]
    return jnp.einsum("btnd,ndc->btc", mixed, p.out[0]) + p.out[1]


def from_the_keys(q: Array, k: Array, v: Array, p: Projections, hidden: Array | None) -> Array:
    """Few keys: project them into the space of the queries, and their values into that of the output."""
    b, t, c = k.shape
    k = (jnp.einsum("btc,cnd->btnd", k, p.k[0]) + p.k[1]) * p.k[1].shape[-1] ** -0.5
    v = jnp.einsum("btc,cnd->btnd", v, p.v[0]) + p.v[1]
    u = jnp.einsum("btnd,cnd->bntc", k, p.q[0])
    logits = jnp.einsum("bqc,bsc->bqs", q, u.reshape(b, -1, c)).reshape(b, -1, *u.shape[1:3])
    logits += jnp.einsum("btnd,nd->bnt", k, p.q[1])[:, None]
    if hidden is not None:
        logits += hidden[:, None, None, :]
    weights = jax.nn.softmax(logits, axis=-1).reshape(b, q.shape[1], -1)
    w = jnp.einsum("btnd,ndc->bntc", v, p.out[0]).reshape(b, -1, c)
    return jnp.einsum("bqs,bsc->bqc", weights, w) + p.out[1]


SIDES = {"both": from_both_sides, "queries": from_the_queries, "keys": from_the_keys}
