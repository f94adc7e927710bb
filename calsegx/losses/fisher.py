"""The Fisher penalty on features: any loss of (params, features), plus its squared feature gradient.

CalSAM (Khan and Syed), Eq. 3 and Algorithm 1, read per sample: ``g_i = grad_{z_i} L_i`` with ``L_i`` the loss
of sample i, and the features ``z`` of a frozen encoder, which are constants:

* ``raw``, the letter of the paper: ``1/2 mean_i |g_i|^2``.  With voxel-mean losses it is tiny and does
  nothing at the paper's weight.
* ``relative``: ``1/2 mean_i |z_i|^2 |g_i|^2``, half the squared elasticity of the loss.  It has no unit and
  does not change with the scale or the number of the features.  Weights from 0.01 to 0.3 matter, 1 and more
  destroy the segmentation.

The derivative is exact, by reverse mode over reverse mode.  One backward pass of ``sum_i L_i`` gives every
``g_i``, which holds for decoders that do not mix samples (no batch statistics).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from calsegx.interfaces import Params, UsageError
from calsegx.losses import cross_entropy

PerSample = Float[Array, " B"]
Task = PerSample | dict[str, PerSample]  # one loss, or named terms that are added
LossFunction = Callable[..., PerSample | tuple[Task, PerSample]]  # (params, z, *args)
Measurements = dict[str, Float[Array, ""]]

NORMALISATIONS = ("relative", "raw")
_DIRECTIONS = 2  # of the check: one alone might be a direction along which nothing happens
_STEPS = (1e-8, 1e-2)  # of the check, in units of each parameter's root mean square


def penalty(
    loss_fn: LossFunction,
    params: Params,
    z: Float[Array, "B ..."],
    *args: Any,
    normalisation: str = "relative",
) -> tuple[Float[Array, ""], tuple[Task, PerSample]]:
    """The penalty, the task loss of the same forward pass, and the squared norms of the feature gradients.

    Args:
        loss_fn: ``(params, z, *args)`` to one loss per sample, or to a pair (task, penalised) of them.
        params: what the decoder learns.
        z: features, in at least float32.
        args: passed on to ``loss_fn``.
        normalisation: ``relative`` or ``raw``.

    Returns:
        ``penalty, (task [B], |g_i|^2 [B])``.
    """

    def summed(features: Array) -> tuple[Array, Task]:
        task, penalised = _pair(loss_fn(params, features, *args))
        return jnp.sum(penalised), task

    gradient, task = jax.grad(summed, has_aux=True)(z)
    squared_norms = _squared_norm_per_sample(gradient)
    scale = _squared_norm_per_sample(z) if normalisation == "relative" else 1.0
    return 0.5 * jnp.mean(scale * squared_norms), (task, squared_norms)


def value_and_grad(
    loss_fn: LossFunction, *, weight: float = 0.1, normalisation: str = "relative"
) -> Callable[..., tuple[tuple[Float[Array, ""], Measurements], Params]]:
    """Differentiate ``mean(task) + weight * weight_scale * penalty`` with respect to the parameters.

    Args:
        loss_fn: ``(params, z, *args)`` to one loss per sample ``[B]``, or to a pair (task ``[B]``, penalised
            ``[B]``) from one forward pass; usually the penalised one is the voxel-mean cross-entropy.  The
            task may be a dict of terms ``[B]``: their sum is the task loss, the mean of each is measured.
        weight: lambda_1 >= 0.  At 0 the step is the plain one: no second derivative is computed.
        normalisation: ``relative`` or ``raw``, see the module.

    Returns:
        ``step(params, z, *args, weight_scale=1.0) -> ((total, measurements), grads)``.  ``weight_scale`` may
        be traced (a warm-up).  ``z`` is used in float32, or in its own precision where that is higher.
        Measurements, all scalars: ``loss`` (mean task loss), ``gradient_norm`` (of ``grads``) and, where the
        weight is not 0, ``penalty``, ``ratio`` (weight * penalty / loss, without the warm-up) and
        ``feature_gradient_norm`` (root mean square over samples of ``|g_i|``).

    Raises:
        UsageError: for an unknown normalisation or a negative or infinite weight.
    """
    if normalisation not in NORMALISATIONS:
        raise UsageError(f"Fisher normalisation {normalisation!r} is not known; use {' or '.join(NORMALISATIONS)}.")
    if not (math.isfinite(weight) and weight >= 0):
        raise UsageError(f"Fisher weight {weight} must be finite and at least 0; 0.1 is a good start.")

    def step(
        params: Params, z: Float[Array, "B ..."], *args: Any, weight_scale: float | Array = 1.0
    ) -> tuple[tuple[Float[Array, ""], Measurements], Params]:
        z = cross_entropy.at_least_float32(z)

        def plain(params: Params) -> tuple[Array, Measurements]:
            return _mean_task(_pair(loss_fn(params, z, *args))[0])

        def penalised(params: Params) -> tuple[Array, Measurements]:
            value, (task, squared_norms) = penalty(loss_fn, params, z, *args, normalisation=normalisation)
            loss, measurements = _mean_task(task)
            measurements |= {
                "penalty": value,
                "ratio": weight * value / loss,
                "feature_gradient_norm": jnp.sqrt(jnp.mean(squared_norms)),
            }
            return loss + weight * weight_scale * value, measurements

        objective = plain if weight == 0 else penalised
        (total, measurements), grads = jax.value_and_grad(objective, has_aux=True)(params)
        return (total, measurements | {"gradient_norm": _global_norm(grads)}), grads

    return step


def second_derivative_check(
    loss_fn: LossFunction,
    params: Params,
    z: Float[Array, "B ..."],
    *args: Any,
    seed: int = 0,
    tolerance: float = 0.1,
) -> None:
    """Make sure that the penalty's gradient exists, by finite differences of first-order penalties.

    A ``stop_gradient`` or a ``custom_vjp`` whose backward rule cannot be differentiated (a fused attention
    kernel) can leave the first derivative right and drop terms of the second without a word.  Along random
    directions of the parameters, the derivative of the raw penalty by ``jax.grad`` is compared with a central
    difference, which needs no second derivative.

    It runs in float64: where ReLU units switch the first derivative jumps, so that only a step too small for
    float32 is free of jumps (measured on SAM's decoder: relative error 2e-8 at the step 1e-8, 0.6 at 1e-2).
    The large step is for decoders that insist on float32; those must be smooth.

    Args:
        loss_fn: as in ``value_and_grad``.
        params: the parameters to check at.
        z: features; two samples are plenty.
        args: passed on to ``loss_fn``; arrays, or trees of them.
        seed: of the random directions.
        tolerance: of the relative error over all directions.

    Raises:
        ValueError: when the two differ, or when the penalty is zero or not finite.
    """

    @jax.jit
    def evaluate(params: Params, z: Array, args: tuple[Any, ...]) -> tuple[Array, Params]:
        # args are arguments, not a closure: frozen weights would become huge constants.
        params, z, args = jax.tree.map(_to_float64, (params, z, args))
        return jax.value_and_grad(lambda p: penalty(loss_fn, p, z, *args, normalisation="raw")[0])(params)

    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    directions = [_random_direction(rng, params) for _ in range(_DIRECTIONS)]
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        value, gradient = jax.tree.map(np.asarray, evaluate(params, z, args))
        if not 0 < value < np.inf:
            raise ValueError(
                f"The Fisher penalty is {value}: the loss must be finite and its gradient must reach the "
                "features; look for a stop_gradient between them."
            )
        slopes = [sum(jax.tree.leaves(jax.tree.map(np.vdot, gradient, d))) for d in directions]
        for step in _STEPS:
            differences = []
            for direction in directions:
                ahead, behind = (
                    float(evaluate(jax.tree.map(lambda p, d, s=s: p + s * d, params, direction), z, args)[0])
                    for s in (step, -step)
                )
                differences.append((ahead - behind) / (2 * step))
            if np.linalg.norm(np.subtract(slopes, differences)) <= tolerance * np.linalg.norm(differences):
                return
    raise ValueError(
        "The second derivative of the loss is wrong: along random directions the gradient of the Fisher "
        f"penalty is {np.array(slopes)}, finite differences say {np.array(differences)}; look for a "
        "stop_gradient or a custom_vjp (a fused attention kernel) between the features and the loss."
    )


def _to_float64(leaf: Array) -> Array:
    leaf = jnp.asarray(leaf)
    return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def _random_direction(rng: np.random.Generator, params: Params) -> Params:
    """Normal numbers, scaled to each leaf's root mean square; a leaf of zeros gets that of all leaves."""
    leaves = jax.tree.leaves(params)
    overall = np.sqrt(sum(np.sum(leaf**2) for leaf in leaves) / sum(leaf.size for leaf in leaves))
    return jax.tree.map(lambda p: (np.sqrt(np.mean(p**2)) or overall) * rng.normal(size=p.shape), params)


def _pair(value: PerSample | tuple[Task, PerSample]) -> tuple[Task, PerSample]:
    """(task, penalised); a loss function that gives one loss penalises that one."""
    return value if isinstance(value, tuple) else (value, value)


def _mean_task(task: Task) -> tuple[Float[Array, ""], Measurements]:
    """The mean task loss, and what is measured of it: the loss and, by name, its terms."""
    if not isinstance(task, dict):
        loss = jnp.mean(task)
        return loss, {"loss": loss}
    terms = {name: jnp.mean(term) for name, term in task.items()}
    loss = functools.reduce(jnp.add, terms.values())
    return loss, {"loss": loss} | terms


def _squared_norm_per_sample(array: Float[Array, "B ..."]) -> PerSample:
    return jnp.sum(jnp.square(array), axis=tuple(range(1, array.ndim)))


def _global_norm(tree: Params) -> Float[Array, ""]:
    leaves = map(cross_entropy.at_least_float32, jax.tree.leaves(tree))
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in leaves))
