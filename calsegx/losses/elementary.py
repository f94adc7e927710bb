"""Pieces that several losses share: derivatives chosen at the kinks, and one logit as two classes."""

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
