"""What the Fisher penalty measures: four readings of the paper's formula, two normalisations, two kinds of labels.

With ``g_i = grad_{z_i} L_i`` every reading is a mean over samples, ``penalty = mean_i q_i``, and ``q`` is a
quadratic form of the gradients:

* ``per_sample``: ``q_i = 1/2 |g_i|^2``, the default reading;
* ``batch_mean``: ``q_i = 1/2 |g_i / B|^2``, Algorithm 1 of CalSAM to the letter: the gradient of the mean loss;
* ``elementwise_mean``: ``q_i = 1/2 |g_i|^2 / n``, with ``n`` entries of ``z_i``;
* ``centered``: ``q_i = 1/2 sum_t |g_it - g'|^2``, with ``g_it`` the gradient at patch embedding ``t`` and ``g'`` its
  mean over batch and patches ("centred gradients" in the paper's words).

``relative`` multiplies ``q_i`` by the squared norm of the sample's features, which are constants: ``|z_i|^2``, and
for ``centered`` ``sum_t |e_it|^2`` over its patch embeddings.  In ``per_sample`` and ``centered`` the result does not
change with the scale or the number of the features; the other two are ``per_sample`` divided by ``B^2`` or ``n``.
"""

import math

import einops
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from calsegx.interfaces import UsageError
from calsegx.losses import cross_entropy

READINGS = ("per_sample", "batch_mean", "elementwise_mean", "centered")
NORMALISATIONS = ("relative", "raw")
Patch = tuple[int, ...]


def squared_norms(array: Float[Array, "B ..."]) -> Float[Array, " B"]:
    """``|a_i|^2`` of every sample, summed in at least float32."""
    return jnp.sum(jnp.square(cross_entropy.at_least_float32(array)), axis=tuple(range(1, array.ndim)))


def contributions(
    gradient: Float[Array, "B *tokens C"],
    z: Float[Array, "B *tokens C"],
    *,
    reading: str,
    normalisation: str,
    patch: Patch | None,
    batch: int,
    kept: Float[Array, "B P"] | None = None,
) -> Float[Array, " B"]:
    """``q_i`` of every sample, whose mean is the penalty.

    Args:
        gradient: ``g_i``, in at least float32.
        z: the features.
        reading: one of ``READINGS``.
        normalisation: one of ``NORMALISATIONS``.
        patch: token positions per patch along each token axis, for ``centered``; None: each position is a patch.
        batch: ``B`` of ``batch_mean``; more than the samples given where these are a part of the batch.
        kept: weights of the patches in ``centered``; None: 1.
    """
    if reading == "centered":
        tokens = _patches(gradient, patch, "sum")
        deviations = jnp.sum(jnp.square(tokens - jnp.mean(tokens, axis=(0, 1))), axis=-1)
        values = jnp.sum(deviations if kept is None else deviations * kept, axis=-1)
        scale = squared_norms(_patches(z, patch, "mean")) if normalisation == "relative" else 1.0
    else:
        divisor = {"per_sample": 1, "batch_mean": batch**2, "elementwise_mean": math.prod(z.shape[1:])}[reading]
        values = squared_norms(gradient) / divisor
        scale = squared_norms(z) if normalisation == "relative" else 1.0
    return 0.5 * scale * values


def count_patches(shape: tuple[int, ...], patch: Patch | None) -> int:
    """Patches of one sample of features ``[B, *tokens, C]``.

    Raises:
        UsageError: where ``patch`` does not divide the token axes.
    """
    tokens = shape[1:-1]
    if patch is None:
        return math.prod(tokens)
    if len(patch) != len(tokens) or any(axis % size for axis, size in zip(tokens, patch, strict=True)):
        raise UsageError(
            f"The patch {patch} must have one size for each token axis of the features {shape} and divide it; choose "
            "another patch, or crop or pad the features."
        )
    return math.prod(axis // size for axis, size in zip(tokens, patch, strict=True))


def sample_labels(rng: Array, logits: Float[Array, "B *spatial L"]) -> Int[Array, " B *spatial"]:
    """Labels drawn from the model itself, ``y ~ p(y | z)``: with them the penalty estimates the true Fisher.

    Use it **inside** the loss function, so that everything shares one forward pass::

        def loss_fn(params, z, labels, keys):
            logits = decode(params, z)
            return losses.dice(logits, labels), losses.ce(logits, fisher.sample_labels(keys, logits))

    With the data's labels the penalty is the *empirical* Fisher.  The two agree only where the model is right in
    distribution; elsewhere the empirical one measures the size of the errors, not the model's own sensitivity, and is
    no approximation of the true one: Kunstner, Balles, Hennig, "Limitations of the empirical Fisher approximation for
    natural gradient descent", NeurIPS 2019.

    No gradient flows through the labels.  The modes ``finite_difference`` and ``perturbed`` evaluate the loss at
    shifted features, where other labels would be drawn: draw them before the step there, and pass them as arguments.

    Args:
        rng: one key, or one per sample ``[B]``; with ``remat`` and ``stochastic``, which split the batch, one per
            sample, as a batched argument.
        logits: one logit (Bernoulli) or several (categorical) per voxel.

    Returns:
        int32 labels, from 0.

    Raises:
        UsageError: for keys of ``jax.random.PRNGKey``, whose shape does not tell one key from several.
    """
    if not jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
        raise UsageError(
            f"sample_labels was given an array of {rng.dtype} (a legacy key of jax.random.PRNGKey); make the key with "
            "jax.random.key(seed)."
        )
    if rng.ndim:
        return jax.vmap(sample_labels)(rng, logits)
    logits = cross_entropy.at_least_float32(jax.lax.stop_gradient(logits))
    if logits.shape[-1] == 1:
        return jax.random.bernoulli(rng, jax.nn.sigmoid(logits[..., 0])).astype(jnp.int32)
    return jax.random.categorical(rng, logits).astype(jnp.int32)


def _patches(array: Float[Array, "B *tokens C"], patch: Patch | None, reduction: str) -> Float[Array, "B P C"]:
    """Reduce every patch to one vector: an embedding is the mean of its positions, its gradient their sum."""
    count_patches(array.shape, patch)
    patch = patch or (1,) * (array.ndim - 2)
    axes = range(len(patch))
    whole, inner = " ".join(f"(t{i} p{i})" for i in axes), {f"p{i}": size for i, size in enumerate(patch)}
    kept = " ".join(f"t{i}" for i in axes)
    return einops.reduce(array, f"b {whole} c -> b ({kept}) c", reduction, **inner)
