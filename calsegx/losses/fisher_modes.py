"""How the gradient of ``mean(task) + weight * penalty`` is computed: one function per mode.

With ``G(params) = grad_z sum_i L_i`` and ``penalty = q(G)``, ``q`` a quadratic form (``fisher_readings``), every mode
rests on ``grad penalty = grad_params <G(params), v>`` with the constant ``v = dq/dG``:

* ``exact`` differentiates ``q(G)`` by reverse mode over reverse mode;
* ``finite_difference`` takes ``<G, v>`` as the central difference of the loss along ``v``;
* ``perturbed`` takes ``mean(L) + weight * <G, v>`` as the mean loss at ``z + weight * B * v``.

A mode is ``(loss_fn, form, params, z, args, weight) -> Outcome``, ``form(gradient, z) -> [B]`` being the reading.
Samples must not mix in the loss (no batch statistics).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from calsegx.interfaces import Params, UsageError
from calsegx.losses import cross_entropy, fisher_readings

PerSample = Float[Array, " B"]
Task = PerSample | dict[str, PerSample]  # one loss, or named terms that are added
LossFunction = Callable[..., PerSample | tuple[Task, PerSample]]  # (params, z, *args)
Form = Callable[[Array, Array], PerSample]
RESERVED = frozenset({"loss", "penalty", "ratio", "gradient_norm", "feature_gradient_norm", "shift"})  # measurements

# Of the features' norm.  Where a ReLU unit switches between the two evaluations the gradient jumps by J, and the
# result by J / step: a smaller step is wrong less often, but by more, and needs more digits.  At this one the error of
# the penalty's share is 0.6 on the tiny SAM that ships (float32, four samples); docs/fisher.md has other measurements.
_RELATIVE_STEP = 0.01


class Outcome(NamedTuple):
    """Of some samples: what was measured of each, and the gradient of the mean objective over them."""

    task: Task
    contributions: PerSample  # q_i: their mean is the penalty
    squared_norms: PerSample  # |g_i|^2
    shifts: PerSample  # of ``perturbed``: |shift_i| / |z_i|; elsewhere 0
    grads: Params


Mode = Callable[[LossFunction, Form, Params, Array, tuple[Any, ...], Array | float], Outcome]


def pair(loss_fn: LossFunction, params: Params, z: Array, args: tuple[Any, ...]) -> tuple[Task, PerSample]:
    """(task, penalised) of the samples; a loss function that gives one loss penalises that one.

    Raises:
        UsageError: for a loss that is not ``[B]``, which would scale the penalty without a word, or a term of the task
            that has the name of a measurement.
    """
    value = loss_fn(params, z, *args)
    task, penalised = value if isinstance(value, tuple) else (value, value)
    for loss in (*jax.tree.leaves(task), penalised):
        if jnp.shape(loss) != z.shape[:1]:
            raise UsageError(
                f"The Fisher loss gives an array of shape {jnp.shape(loss)} for features {z.shape}, where every loss "
                f"must have one value per sample, shape {z.shape[:1]}; reduce over all axes but the first."
            )
    if isinstance(task, dict) and (taken := sorted(RESERVED & task.keys())):
        raise UsageError(
            f"A task term of the Fisher loss is named {taken[0]!r}, the name of another measurement; name it otherwise."
        )
    return task, penalised


def mean_of(task: Task) -> Float[Array, ""]:
    """The mean task loss: of the sum of its terms."""
    means = jax.tree.map(jnp.mean, task)
    return functools.reduce(jnp.add, means.values()) if isinstance(means, dict) else means


def plain(loss_fn: LossFunction, params: Params, z: Array, args: tuple[Any, ...]) -> tuple[Task, Params]:
    """The task loss and its gradient, without any penalty."""

    def objective(params: Params) -> tuple[Array, Task]:
        task, _ = pair(loss_fn, params, z, args)
        return mean_of(task), task

    grads, task = jax.grad(objective, has_aux=True)(params)
    return task, grads


def feature_gradient(loss_fn: LossFunction, params: Params, z: Array, args: tuple[Any, ...]) -> tuple[Array, Task]:
    """``g`` of all samples by one backward pass, and the task loss of the same forward pass."""

    def summed(features: Array) -> tuple[Array, Task]:
        task, penalised = pair(loss_fn, params, features, args)
        return jnp.sum(penalised), task

    return jax.grad(summed, has_aux=True)(z)


def exact(
    loss_fn: LossFunction, form: Form, params: Params, z: Array, args: tuple[Any, ...], weight: Array | float
) -> Outcome:
    """Reverse mode over reverse mode."""

    def objective(params: Params) -> tuple[Array, tuple[Task, PerSample, PerSample]]:
        gradient, task = feature_gradient(loss_fn, params, z, args)
        values = form(gradient, z)
        return mean_of(task) + weight * jnp.mean(values), (task, values, fisher_readings.squared_norms(gradient))

    grads, (task, values, norms) = jax.grad(objective, has_aux=True)(params)
    return Outcome(task, values, norms, jnp.zeros_like(norms), grads)


def finite_difference(
    loss_fn: LossFunction, form: Form, params: Params, z: Array, args: tuple[Any, ...], weight: Array | float
) -> Outcome:
    """First-order gradients at ``z`` and ``z +- 0.01 |z_i| v_i / |v_i|``, for decoders without a second derivative.

    In at least float32: the difference of two gradients in half precision is mostly rounding.
    """
    given, params = params, jax.tree.map(cross_entropy.at_least_float32, params)
    task, gradient, pull = _first_order(loss_fn, params, z, args)
    v = jax.grad(lambda g: jnp.mean(form(g, z)))(gradient)
    length, lengths = jnp.sqrt(fisher_readings.squared_norms(v)), jnp.sqrt(fisher_readings.squared_norms(z))
    distance = _RELATIVE_STEP * jnp.where(lengths > 0, lengths, 1.0)
    offset = v * _per_sample(distance / jnp.where(length > 0, length, 1.0), z)

    coefficients = length / (2 * distance)

    def add(grads: Params, sign: Array) -> tuple[Params, None]:
        shifted, scale = z + sign * offset, weight * sign * coefficients
        more = jax.grad(lambda p: jnp.sum(scale * pair(loss_fn, p, shifted, args)[1]))(params)
        return jax.tree.map(lambda a, b: (a + b).astype(a.dtype), grads, more), None

    # A loop, so that the two evaluations use the same memory.
    grads, _ = jax.lax.scan(add, pull(1.0, 0.0), jnp.asarray([1.0, -1.0], z.dtype))
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, given)
    return Outcome(task, form(gradient, z), fisher_readings.squared_norms(gradient), jnp.zeros_like(length), grads)


def perturbed(
    loss_fn: LossFunction, form: Form, params: Params, z: Array, args: tuple[Any, ...], weight: Array | float
) -> Outcome:
    """One gradient at shifted features; its error grows with the shift, which is measured.

    Where the penalised loss is not the task loss, the objective is ``task(z) - L(z) + L(z + shift)``.
    """
    task, gradient, pull = _first_order(loss_fn, params, z, args)
    shift = weight * z.shape[0] * jax.grad(lambda g: jnp.mean(form(g, z)))(gradient)
    grads = jax.grad(lambda p: jnp.mean(pair(loss_fn, p, z + shift, args)[1]))(params)
    if isinstance(jax.eval_shape(loss_fn, params, z, *args), tuple):
        grads = jax.tree.map(jnp.add, grads, pull(1.0, -1.0))
    norms, lengths = fisher_readings.squared_norms(shift), fisher_readings.squared_norms(z)
    shifts = jnp.where(norms > 0, jnp.sqrt(norms / lengths), 0.0)
    return Outcome(task, form(gradient, z), fisher_readings.squared_norms(gradient), shifts, grads)


def without_penalty(
    loss_fn: LossFunction, form: Form, params: Params, z: Array, args: tuple[Any, ...], weight: Array | float
) -> Outcome:
    """The plain step as a mode: penalty and feature gradients are given as 0."""
    del form, weight
    task, grads = plain(loss_fn, params, z, args)
    zero = jnp.zeros(z.shape[:1], z.dtype)
    return Outcome(task, zero, zero, zero, grads)


def in_parts(mode: Mode, batched: tuple[bool, ...], size: int) -> Mode:
    """``mode``, ``size`` samples after ``size`` samples: the memory of those and of one more set of gradients."""

    def looped(
        loss_fn: LossFunction, form: Form, params: Params, z: Array, args: tuple[Any, ...], weight: Array | float
    ) -> Outcome:
        batch = z.shape[0]

        def body(total: Params, part: tuple[Array, tuple[Any, ...]]) -> tuple[Params, Outcome]:
            z_part, args_part = part
            outcome = mode(loss_fn, form, params, z_part, merge(batched, args_part, args), weight)
            share = z_part.shape[0] / batch
            total = jax.tree.map(lambda t, g: t + share * g.astype(t.dtype), total, outcome.grads)
            return total, outcome._replace(grads=())

        whole, samples = batch - batch % size, (z, only(batched, args))
        total = jax.tree.map(lambda p: jnp.zeros_like(cross_entropy.at_least_float32(p)), params)
        outcomes = []
        if whole:
            parts = jax.tree.map(lambda leaf: leaf[:whole].reshape(-1, size, *leaf.shape[1:]), samples)
            total, stacked = jax.lax.scan(body, total, parts)
            outcomes.append(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), stacked))
        if whole < batch:
            total, rest = body(total, jax.tree.map(lambda leaf: leaf[whole:], samples))
            outcomes.append(rest)
        outcome = jax.tree.map(lambda *parts: jnp.concatenate(parts), *outcomes)
        return outcome._replace(grads=jax.tree.map(lambda t, p: t.astype(p.dtype), total, params))

    return looped


def on_a_subset(mode: Mode, without: Mode, batched: tuple[bool, ...], rng: Array, size: int) -> Mode:
    """``mode`` for ``size`` random samples, ``without`` for the others: ``1 + size / B`` times the plain cost or so.

    Every sample is as likely to be chosen, so that the mean of ``q_i`` over the chosen ones is unbiased.
    """

    def split(
        loss_fn: LossFunction, form: Form, params: Params, z: Array, args: tuple[Any, ...], weight: Array | float
    ) -> Outcome:
        batch = z.shape[0]
        order = jax.random.permutation(rng, batch)

        def take(indices: Array) -> tuple[Array, tuple[Any, ...]]:
            z_part, args_part = jax.tree.map(lambda leaf: leaf[indices], (z, only(batched, args)))
            return z_part, merge(batched, args_part, args)

        outcome = mode(loss_fn, form, params, *take(order[:size]), weight * batch / size)
        if size == batch:
            return outcome
        others = without(loss_fn, form, params, *take(order[size:]), weight)
        share = size / batch
        return outcome._replace(
            task=jax.tree.map(lambda *parts: jnp.concatenate(parts), outcome.task, others.task),
            grads=jax.tree.map(lambda a, b: share * a + (1 - share) * b, outcome.grads, others.grads),
        )

    return split


def on_condition(mode: Mode, without: Mode, penalise: Array) -> Mode:
    """``mode`` where ``penalise`` is true, else ``without``."""

    def choose(
        loss_fn: LossFunction, form: Form, params: Params, z: Array, args: tuple[Any, ...], weight: Array | float
    ) -> Outcome:
        arguments = loss_fn, form, params, z, args, weight
        return jax.lax.cond(penalise, lambda: mode(*arguments), lambda: without(*arguments))

    return choose


def only(batched: tuple[bool, ...], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """``args`` without those that do not carry the batch axis (None in their place)."""
    return tuple(arg if carries else None for carries, arg in zip(batched, args, strict=True))


def merge(batched: tuple[bool, ...], parts: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """``args`` with those that carry the batch axis replaced by ``parts``: the inverse of ``only``."""
    return tuple(part if carries else arg for carries, part, arg in zip(batched, parts, args, strict=True))


def _first_order(
    loss_fn: LossFunction, params: Params, z: Array, args: tuple[Any, ...]
) -> tuple[Task, Array, Callable[[float, float], Params]]:
    """The task, ``g``, and ``(a, b) -> grad_params mean(a * task + b * penalised)``, of one forward pass.

    An explicit ``vjp``: inside a function that is differentiated again, JAX would ask for the second derivative even
    of constants.
    """
    (task, penalised), pull = jax.vjp(lambda p, x: pair(loss_fn, p, x, args), params, z)

    def cotangents(a: float, b: float) -> tuple[Task, PerSample]:
        return jax.tree.map(lambda t: jnp.full_like(t, a), task), jnp.full_like(penalised, b)

    _, gradient = pull(cotangents(0.0, 1.0))
    batch = z.shape[0]
    return task, gradient, lambda a, b: pull(cotangents(a / batch, b / batch))[0]


def _per_sample(values: PerSample, like: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    return values.reshape(-1, *(1,) * (like.ndim - 1))
