"""Pieces that several losses share: derivatives chosen at the kinks, one logit as two classes, fast softmax.

The classes are the last axis and few.  On a CPU, XLA is slow at reducing such an axis and at the transposes of
derivatives (a broadcast becomes a reduction, a slice a padding).  Hence sums are spelled out (``class_sum``), and
derivatives given in a form whose transpose is elementwise.
"""

import functools
import operator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_jvp
def absolute(values: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``|x|`` with the derivative 0 at 0, as in PyTorch; that of ``jnp.abs`` is 1 there.

    A decoder whose last layer starts at zero gives logits that are exactly 0, so the kink does occur.
    """
    return jnp.abs(values)


@absolute.defjvp
def _absolute_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (values,), (tangent,) = primals, tangents
    return absolute(values), jnp.sign(values) * tangent


def as_softmax(logits: Float[Array, "*shape L"]) -> Float[Array, "*shape K"]:
    """Logits of a softmax: those of ``L >= 2`` as they are, one logit ``z`` as the two classes ``[-z/2, z/2]``.

    ``softmax([-z/2, z/2])_1 = sigmoid(z)``, and neither class is special: a constraint on single logits treats
    foreground and background alike, which ``[0, z]`` would not.
    """
    if logits.shape[-1] > 1:
        return logits
    return jnp.concatenate([-logits / 2, logits / 2], axis=-1)


def planes(values: Float[Array, "*shape K"]) -> list[Float[Array, "*shape"]]:
    """The classes one by one."""
    return [values[..., k] for k in range(values.shape[-1])]


def class_sum(values: Float[Array, "*shape K"]) -> Float[Array, "*shape"]:
    """The sum over the classes."""
    return functools.reduce(operator.add, planes(values))


def for_every_class(values: Float[Array, "*shape"], classes: int) -> Float[Array, "*shape {classes}"]:
    """The same values for each class; the transpose is a ``class_sum``, where that of a broadcast is a reduction."""
    return jnp.stack([values] * classes, axis=-1)


def centred(logits: Float[Array, "*shape K"]) -> Float[Array, "*shape K"]:
    """Logits whose largest is 0, minus a constant: no loss of a softmax depends on it."""
    largest = functools.reduce(jnp.maximum, planes(jax.lax.stop_gradient(logits)))
    return logits - largest[..., None]


@jax.custom_jvp
def log_sum_exp(centred: Float[Array, "*shape K"]) -> Float[Array, "*shape"]:
    """``log sum_k exp z_k`` of ``centred`` logits."""
    return jnp.log(class_sum(jnp.exp(centred)))


@log_sum_exp.defjvp
def _log_sum_exp_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (logits,), (tangent,) = primals, tangents
    values = log_sum_exp(logits)
    return values, jnp.sum(jnp.exp(logits - for_every_class(values, logits.shape[-1])) * tangent, axis=-1)


def log_softmax(logits: Float[Array, "*shape K"]) -> Float[Array, "*shape K"]:
    """``log softmax(z)``; for few classes a third of the time of ``jax.nn.log_softmax`` on a CPU."""
    logits = centred(logits)
    return logits - log_sum_exp(logits)[..., None]


@jax.custom_jvp
def softmax(logits: Float[Array, "*shape K"]) -> Float[Array, "*shape K"]:
    """``softmax(z)``; for few classes a third of the time of ``jax.nn.softmax`` on a CPU, with its gradient."""
    powers = jnp.exp(centred(logits))
    return powers / class_sum(powers)[..., None]


@softmax.defjvp
def _softmax_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (logits,), (tangent,) = primals, tangents
    p = softmax(logits)
    return p, p * (tangent - for_every_class(jnp.sum(p * tangent, axis=-1), p.shape[-1]))


@jax.custom_jvp
def below_largest(logits: Float[Array, "*shape K"]) -> Float[Array, "*shape K"]:
    """``max_j z_j - z_k``; of equal largest logits the first has the gradient, as in PyTorch (JAX shares it)."""
    return functools.reduce(jnp.maximum, planes(logits))[..., None] - logits


@below_largest.defjvp
def _below_largest_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (logits,), (tangent,) = primals, tangents
    first, largest = jnp.zeros(logits.shape[:-1], jnp.int32), logits[..., 0]
    for k, plane in enumerate(planes(logits)[1:], start=1):
        first, largest = jnp.where(plane > largest, k, first), jnp.maximum(plane, largest)
    of_first = jnp.sum(jnp.where(first[..., None] == jnp.arange(logits.shape[-1]), tangent, 0), axis=-1)
    return below_largest(logits), for_every_class(of_first, logits.shape[-1]) - tangent


@jax.custom_jvp
def softplus(values: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``log(1 + exp x)`` without cancellation; with its derivative half the time of ``jax.nn.softplus`` on a CPU."""
    return jnp.maximum(values, 0) + jnp.log1p(jnp.exp(-jnp.abs(values)))


@softplus.defjvp
def _softplus_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (values,), (tangent,) = primals, tangents
    return softplus(values), jax.nn.sigmoid(values) * tangent
