"""Small layers shared by SAM's encoder, prompt encoder and decoder."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Mlp(nn.Module):
    """A stack of dense layers with ReLU between them (Meta's ``MLP``); parameters ``layers.0 ..``."""

    hidden: int
    out: int
    depth: int

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b o"]:
        """Apply the stack."""
        for i in range(self.depth):
            last = i == self.depth - 1
            x = nn.Dense(self.out if last else self.hidden, name=f"layers.{i}")(x)
            x = x if last else nn.relu(x)
        return x


class Projection(nn.Module):
    """The parameters of a dense layer, not yet applied."""

    features: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, inputs: int) -> tuple[Float[Array, "i o"], Float[Array, " o"]]:
        """Kernel and bias (zeros where there is none)."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (inputs, self.features))
        zeros = nn.initializers.zeros_init()
        bias = self.param("bias", zeros, (self.features,)) if self.use_bias else jnp.zeros(self.features)
        return kernel, bias


def stored(module: nn.Module, name: str, init: Any, shape: tuple[int, ...]) -> Array:
    """A parameter in the shape it was stored with: a table for another image size, which the caller resizes."""
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, init, shape)


class UpscaleByTwo(nn.Module):
    """Stride-2 2x2 transposed convolution as one matmul, with the depth-to-space left to the caller.

    ``out[2i+a, 2j+b, o] = sum_c x[i, j, c] W[c, o, a, b] + bias[o]``; returns ``[..., 2, 2, O]``.  ``kernel`` has
    torch's layout ``[C, O, 2, 2]``.
    """

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b 2 2 o"]:
        """Apply the matmul."""
        shape = (x.shape[-1], self.features, 2, 2)
        kernel = self.param("kernel", nn.initializers.lecun_normal(in_axis=0, out_axis=1), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        matrix = kernel.transpose(0, 2, 3, 1).reshape(x.shape[-1], -1)
        out = (x @ matrix).reshape(*x.shape[:-1], 2, 2, self.features)
        return out + bias


def gelu(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Exact GELU, as torch computes it, in at least float32; JAX takes erfc, which XLA expands to more work."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (0.5 * wide * (1 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


def layer_norm(x: Float[Array, "*s"], name: str, epsilon: float) -> Float[Array, "*s"]:
    """LayerNorm over the last axis inside a compact module; at least float32, whatever the input is."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)(x)
