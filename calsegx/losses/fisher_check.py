"""Checks of a Fisher-penalised loss: that its second derivative exists, and that a step may be trained on."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from calsegx.interfaces import InputError, Params
from calsegx.losses import fisher_modes, fisher_readings

LARGEST_SHIFT = 0.1  # of the features' norm, in the mode ``perturbed``
_FINITE = ("loss", "penalty", "gradient_norm", "feature_gradient_norm")
_ADVICE = "use a lower learning rate or Fisher weight, or another mode"
_DIRECTIONS = 2  # of the check: one alone might be a direction along which nothing happens
_STEPS = (1e-8, 1e-2)  # of the check, in units of each parameter's root mean square


def usable(measurements: Mapping[str, Float[Array, ""]]) -> Bool[Array, ""]:
    """Whether the step's gradients may be trained on; traceable, for a ``jnp.where`` between new and old state.

    Loss, penalty and gradient norms must be finite, and the shift of the mode ``perturbed`` at most 0.1.
    """
    finite = [jnp.isfinite(measurements[name]) for name in _FINITE if name in measurements]
    small = [measurements["shift"] <= LARGEST_SHIFT] if "shift" in measurements else []
    return jnp.all(jnp.stack(finite + small))


def check_measurements(measurements: Mapping[str, Any], step: int, advice: str = _ADVICE) -> None:
    """Stop on what ``usable`` refuses, with the step and the quantity by name.  On the host: it reads the values.

    A small shift is necessary for the mode ``perturbed``, not sufficient: see ``perturbed_error``.

    Args:
        measurements: of ``value_and_grad``'s step.
        step: its number, for the message.
        advice: the end of the message: what is left, and what to do.

    Raises:
        InputError: where a quantity is not finite, or the shift of the mode ``perturbed`` is more than 0.1.
    """
    values = {name: float(measurements[name]) for name in _FINITE if name in measurements}
    bad = [f"the {name.replace('_', ' ')} is {value}" for name, value in values.items() if not math.isfinite(value)]
    shift = float(measurements.get("shift", 0.0))
    if not shift <= LARGEST_SHIFT:
        bad.append(
            f"the features were shifted by {shift:.3g} of their norm, and above {LARGEST_SHIFT} the gradient of the "
            "Fisher mode 'perturbed' is wrong"
        )
    if bad:
        raise InputError(f"Training stopped at step {step}: {' and '.join(bad)}; {advice}.")


def second_derivative_check(
    loss_fn: fisher_modes.LossFunction,
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

    All readings and normalisations are quadratic forms of the same gradients, so that one check serves them all, and
    the modes ``exact``, ``stochastic`` and ``every_k``.  ``finite_difference`` and ``perturbed`` need no second
    derivative; what ``perturbed`` needs, ``perturbed_error`` measures.

    ``loss_fn`` must not draw labels from the model (``sample_labels``): a label that flips between two steps makes
    the difference a jump.

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
        return jax.value_and_grad(lambda p: _raw_penalty(loss_fn, p, z, args))(params)

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


def perturbed_error(
    loss_fn: fisher_modes.LossFunction,
    params: Params,
    z: Float[Array, "B ..."],
    *args: Any,
    weight: float,
    reading: str = "per_sample",
    normalisation: str = "relative",
    batch: int | None = None,
) -> float:
    """How wrong the mode ``perturbed`` is: ``|perturbed - exact| / |exact - plain|`` of the parameters' gradients.

    The error of the penalty's share, in float64, where a share that is small against the task's gradient is no
    rounding.  A small shift does not imply a small error: on SAM's decoder, whose ReLU units switch, it is useless.

    Args:
        loss_fn: as in ``value_and_grad``; its second derivative must exist.
        params: the parameters to check at.
        z: features; two samples are plenty.
        args: passed on to ``loss_fn``; arrays, or trees of them.
        weight: of the penalty; the error grows with it.
        reading: of the penalty.
        normalisation: of the penalty.
        batch: samples of a step, for the reading ``batch_mean``; None: those given.
    """

    def form(gradient: Array, features: Array) -> Array:
        options = {"reading": reading, "normalisation": normalisation, "patch": None, "batch": batch or z.shape[0]}
        return fisher_readings.contributions(gradient, features, **options)

    @jax.jit
    def gradients(params: Params, z: Array, args: tuple[Any, ...]) -> tuple[Params, Params, Params]:
        params, z, args = jax.tree.map(_to_float64, (params, z, args))
        modes = fisher_modes.perturbed, fisher_modes.exact
        perturbed, exact = (mode(loss_fn, form, params, z, args, weight).grads for mode in modes)
        return perturbed, exact, fisher_modes.plain(loss_fn, params, z, args)[1]

    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        flat = [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(g)]) for g in gradients(params, z, args)]
    perturbed, exact, plain = flat
    return float(np.linalg.norm(perturbed - exact) / np.linalg.norm(exact - plain))


def _raw_penalty(loss_fn: fisher_modes.LossFunction, params: Params, z: Array, args: tuple[Any, ...]) -> Array:
    gradient, _ = fisher_modes.feature_gradient(loss_fn, params, z, args)
    return 0.5 * jnp.mean(fisher_readings.squared_norms(gradient))


def _to_float64(leaf: Array) -> Array:
    leaf = jnp.asarray(leaf)
    return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def _random_direction(rng: np.random.Generator, params: Params) -> Params:
    """Normal numbers, scaled to each leaf's root mean square; a leaf of zeros gets that of all leaves."""
    leaves = jax.tree.leaves(params)
    overall = np.sqrt(sum(np.sum(leaf**2) for leaf in leaves) / sum(leaf.size for leaf in leaves))
    return jax.tree.map(lambda p: (np.sqrt(np.mean(p**2)) or overall) * rng.normal(size=p.shape), params)
