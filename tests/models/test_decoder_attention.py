"""The decoder's attention from either side: same parameters, same results and derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calsegx.models.sam.decoder_attention import DecoderAttention, cheaper_side

TOKENS, IMAGE = (2, 5, 32), (2, 36, 32)
DIRECTIONS = {"queries": (TOKENS, IMAGE), "keys": (IMAGE, TOKENS)}  # the few are the queries, or the keys


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("side", DIRECTIONS)
def test_both_sides_agree_up_to_the_second_derivative(side, ignored):
    shapes = DIRECTIONS[side]
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=shapes[i])) for i in (0, 1, 1))
    hidden = jnp.asarray(rng.random(shapes[1][:2]) < 0.3).at[:, 0].set(False) if ignored else None
    params = DecoderAttention(4, 2).init(jax.random.key(0), q, k, v)
    params = jax.tree.map(lambda x: x + 0.3 * jnp.asarray(rng.normal(size=x.shape)), params)  # biases are not zero

    def value_and_derivatives(which):
        def value(params, q, k, v):
            return DecoderAttention(4, 2, which).apply(params, q, k, v, hidden)

        def penalty(*args):
            gradients = jax.grad(lambda *a: jnp.sum(jnp.sin(value(*a))), argnums=(1, 2, 3))(*args)
            return sum(jnp.sum(jnp.square(g)) for g in gradients)

        args = (params, q, k, v)
        return jax.jit(lambda: (value(*args), jax.value_and_grad(penalty, argnums=(0, 1, 2, 3))(*args)))()

    with jax.enable_x64():
        params, q, k, v = jax.tree.map(lambda x: x.astype(jnp.float64), (params, q, k, v))
        actual, expected = value_and_derivatives(side), value_and_derivatives("both")
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-9, atol=1e-9), actual, expected)


@pytest.mark.parametrize("tokens", range(3, 21))
def test_the_cheaper_side_is_the_one_with_fewer_multiplications(tokens):
    """SAM's sizes: 4096 positions, width 256, 8 heads of 16.  The rule is held against XLA's own count."""
    for side, (queries, keys) in zip(("queries", "keys"), ((tokens, 4096), (4096, tokens)), strict=True):
        flops = {}
        for which in ("both", side):
            q, k = (jax.ShapeDtypeStruct((1, n, 256), jnp.float32) for n in (queries, keys))
            module = DecoderAttention(8, 2, which)
            params = jax.eval_shape(module.init, jax.random.key(0), q, k, k)
            analysis = jax.jit(module.apply).lower(params, q, k, k).cost_analysis()
            flops[which] = analysis["flops"]
        cheaper = min(flops, key=flops.get)
        close = abs(flops["both"] - flops[side]) < 0.05 * flops["both"]
        assert close or cheaper == cheaper_side(queries, keys, 256, 8, 16)
    assert cheaper_side(tokens, tokens, 256, 8, 32) == "both"  # tokens among themselves
