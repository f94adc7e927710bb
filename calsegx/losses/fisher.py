"""The Fisher penalty on features, for any loss that is a function of (params, features).

CalSAM (Khan and Syed), Eq. 3 and Algorithm 1: the task loss plus ``weight * penalty``, where the penalty is the
squared norm of ``g_i = grad_{z_i} L_i``, the gradient of sample i's loss with respect to its features ``z_i`` of a
frozen encoder, which are constants.  ``fisher_readings`` says what exactly is averaged.  By default
``1/2 mean_i |z_i|^2 |g_i|^2``, half the squared elasticity of the loss: it has no unit and does not change with the
scale or the number of the features.  Weights from 0.01 to 0.3 matter, 1 and more destroy the segmentation.  The
letter of the paper, ``normalisation="raw"``, is tiny with voxel-mean losses and does nothing at the paper's weight.

Modes, by how the gradient of the penalty is found:

* ``exact``: reverse mode over reverse mode; the default;
* ``finite_difference``: three first-order gradients; for decoders without a second derivative.  Its error, of the
  penalty's share of the gradient, is 1e-3 on a smooth decoder; with ReLU, whose kinks a difference sees and a
  derivative does not, 0.6 on the tiny SAM that ships (float32, four samples; others in docs/fisher.md);
* ``stochastic``: exact, on a random ``fraction`` of the samples (of the patches for ``centered``); unbiased;
* ``every_k``: exact, on every ``every``-th step, times ``every``;
* ``perturbed``: one gradient at shifted features, wrong unless the shift is small (``check_measurements``).  That is
  necessary, not sufficient: for decoders without kinks only; on SAM's it is useless (error 35 of the penalty's share
  at a shift of 0.06).  ``perturbed_error`` measures it.

Reverse over reverse because it is the cheapest exact way: one forward pass gives task and penalty, and a layer costs
6 matrix products against 3 of the plain step.  The others must know ``v = d penalty / d g`` before they start.  XLA's
FLOPs and memory on SAM's decoder (16 x 16 x 256 features, two samples, CPU), as multiples of the plain step: reverse
over reverse 2.07 and 3.0, reverse over forward (the gradient of ``<g, v>``, a ``jvp``) 2.65 and 3.0, ``linearize`` of
the parameters' gradient 2.99 and 4.2, forward over reverse 3.56 and 5.3.  With larger features the memory falls to
2.0; ``microbatch=1`` makes it 1.0 for two samples.  ``jax.checkpoint`` of the loss only makes it larger.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from calsegx.interfaces import Params, UsageError
from calsegx.losses import cross_entropy, fisher_modes, fisher_readings
from calsegx.losses.fisher_check import check_measurements, perturbed_error, second_derivative_check, usable
from calsegx.losses.fisher_modes import LossFunction, PerSample, Task
from calsegx.losses.fisher_readings import NORMALISATIONS, READINGS, Patch, sample_labels

__all__ = [
    "FIRST_ORDER_MODES",
    "MODES",
    "NORMALISATIONS",
    "PENALTY_MEASUREMENTS",
    "READINGS",
    "check_measurements",
    "penalty",
    "perturbed_error",
    "sample_labels",
    "second_derivative_check",
    "usable",
    "value_and_grad",
]

MODES = ("exact", "finite_difference", "stochastic", "every_k", "perturbed")
FIRST_ORDER_MODES = ("finite_difference", "perturbed")  # they need no second derivative
PENALTY_MEASUREMENTS = ("penalty", "ratio", "feature_gradient_norm")  # 0 in the steps that ``every_k`` leaves out

Measurements = dict[str, Float[Array, ""]]
Step = Callable[..., tuple[tuple[Float[Array, ""], Measurements], Params]]


def penalty(
    loss_fn: LossFunction,
    params: Params,
    z: Float[Array, "B ..."],
    *args: Any,
    reading: str = "per_sample",
    normalisation: str = "relative",
    patch: Patch | None = None,
) -> tuple[Float[Array, ""], tuple[Task, PerSample]]:
    """The exact penalty, the task loss of the same forward pass, and the squared norms of the feature gradients.

    Args:
        loss_fn: ``(params, z, *args)`` to one loss per sample, or to a pair (task, penalised) of them.
        params: what the decoder learns.
        z: features, in at least float32.
        args: passed on to ``loss_fn``.
        reading: see ``value_and_grad``, as the next two.
        normalisation: ``relative`` or ``raw``.
        patch: for ``centered``.

    Returns:
        ``penalty, (task [B], |g_i|^2 [B])``.

    Raises:
        UsageError: for an unknown reading or normalisation, or a patch that does not fit.
    """
    _check_reading(reading, normalisation, patch)
    gradient, task = fisher_modes.feature_gradient(loss_fn, params, z, args)
    values = fisher_readings.contributions(
        gradient, z, reading=reading, normalisation=normalisation, patch=patch, batch=z.shape[0]
    )
    return jnp.mean(values), (task, fisher_readings.squared_norms(gradient))


def value_and_grad(
    loss_fn: LossFunction,
    *,
    weight: float = 0.1,
    mode: str = "exact",
    reading: str = "per_sample",
    normalisation: str = "relative",
    patch: Patch | None = None,
    fraction: float = 0.125,
    every: int = 8,
    microbatch: int = 0,
    batched_args: tuple[int, ...] | None = None,
    axis_name: str | tuple[str, ...] = (),
) -> Step:
    """Differentiate ``mean(task) + weight * weight_scale * penalty`` with respect to the parameters.

    Args:
        loss_fn: ``(params, z, *args)`` to one loss per sample ``[B]``, or to a pair (task ``[B]``, penalised
            ``[B]``) from one forward pass; usually the penalised one is the voxel-mean cross-entropy.  The
            task may be a dict of terms ``[B]``: their sum is the task loss, the mean of each is measured.
        weight: lambda_1 >= 0.  At 0 the step is the plain one: no penalty is computed.
        mode: see the module.
        reading: ``per_sample``, ``batch_mean``, ``elementwise_mean`` or ``centered``, see ``fisher_readings``.
        normalisation: ``relative`` or ``raw``, see the module.
        patch: for ``centered``, token positions per patch along every token axis of ``z [B, *tokens, C]``; the
            gradients inside a patch are summed, since its positions share one embedding.  None: each position is a
            patch.  SAM's features have one position per 16 x 16 pixels of the encoder frame, so that patches of
            16 x 16 x 16 voxels are ``z [volumes, D, h, w, C]`` with ``patch=(16, 1, 1)`` where a pixel is a voxel
            (``(16, s, s)`` where the frame is enlarged ``s`` times); ``loss_fn`` then decodes ``z`` as ``volumes * D``
            slices and gives one loss per volume.
        fraction: of ``stochastic``: the share of the samples that is penalised, at least one sample.  With
            ``centered`` the share of the patches, at the full price: the mean gradient needs all of them.
        every: of ``every_k``.
        microbatch: so many samples at a time, for the memory of those; 0: all.  Not with ``centered``, whose samples
            are tied.
        batched_args: which of ``args`` carry the batch axis (arrays or trees of them), for ``stochastic`` and
            ``microbatch``, which take samples apart; None: the only one there is.
        axis_name: inside ``jax.shard_map`` without replication checks, the mesh axes over which the batch is split
            evenly: gradients and measurements are then those of the whole batch, by one reduction at the end.  Not
            with ``centered``.

    Returns:
        ``step(params, z, *args, weight_scale=1.0, rng=None, step=None) -> ((total, measurements), grads)``.
        ``weight_scale`` may be traced (a warm-up), ``rng`` is a key (for ``stochastic``), ``step`` the step's number
        (for ``every_k``, which penalises where ``step % every == 0``).  ``z`` is used in float32, or in its own
        precision where that is higher.  ``total`` is the differentiated objective.  Measurements, all scalars:
        ``loss`` (mean task loss), ``gradient_norm`` (of ``grads``) and, where the weight is not 0, ``penalty``,
        ``ratio`` (penalty / loss, without the weight; 0 where the loss is 0), ``feature_gradient_norm`` (root
        mean square over samples of ``|g_i|``), the three of the penalised samples, and 0 in the steps that ``every_k``
        leaves out; for ``perturbed`` also ``shift``, the largest ``|shift_i| / |z_i|`` (see ``check_measurements``).

    Raises:
        UsageError: for an option that is unknown, out of its range or in no use with the others; in the step, for a
            missing ``rng`` or ``step``, a patch that does not fit, an argument without the batch axis, several
            arguments without ``batched_args`` where it is used, a loss that is not ``[B]``, or a task term with the
            name of a measurement.
    """
    _check_reading(reading, normalisation, patch)
    _check_mode(weight, mode, reading, fraction, every, microbatch, axis_name)
    base = {"finite_difference": fisher_modes.finite_difference, "perturbed": fisher_modes.perturbed}.get(
        mode, fisher_modes.exact
    )

    def step(
        params: Params,
        z: Float[Array, "B ..."],
        *args: Any,
        weight_scale: float | Array = 1.0,
        rng: Array | None = None,
        step: int | Array | None = None,
    ) -> tuple[tuple[Float[Array, ""], Measurements], Params]:
        z = cross_entropy.at_least_float32(z)
        batch, scaled, kept = z.shape[0], weight * weight_scale, None
        batched = tuple(batched_args is None or index in batched_args for index in range(len(args)))
        compute, without = base, fisher_modes.without_penalty
        if microbatch:
            _check_batched(batched_args, batched, args, batch)
            compute, without = (fisher_modes.in_parts(part, batched, microbatch) for part in (compute, without))
        if weight == 0:
            compute = without
        elif mode == "stochastic":
            if rng is None:
                raise UsageError("The Fisher mode 'stochastic' needs a key: step(..., rng=jax.random.key(...)).")
            if reading == "centered":
                kept = _random_patches(rng, batch, fisher_readings.count_patches(z.shape, patch), fraction)
            else:
                _check_batched(batched_args, batched, args, batch)
                size = max(1, round(fraction * batch))
                own = jax.random.fold_in(rng, jax.lax.axis_index(axis_name)) if axis_name else rng
                compute = fisher_modes.on_a_subset(compute, without, batched, own, size)
        elif mode == "every_k":
            if step is None:
                raise UsageError("The Fisher mode 'every_k' needs the number of the step: step(..., step=number).")
            scaled = scaled * every
            compute = fisher_modes.on_condition(compute, without, jnp.asarray(step) % every == 0)

        def form(gradient: Array, features: Array) -> PerSample:
            return fisher_readings.contributions(
                gradient,
                features,
                reading=reading,
                normalisation=normalisation,
                patch=patch,
                batch=batch * (jax.lax.axis_size(axis_name) if axis_name else 1),
                kept=kept,
            )

        outcome = compute(loss_fn, form, params, z, args, scaled)
        means = _means(outcome.task), jnp.mean(outcome.contributions), jnp.mean(outcome.squared_norms), outcome.grads
        shift = jnp.max(outcome.shifts)
        if axis_name:
            means, shift = jax.lax.pmean(means, axis_name), jax.lax.pmax(shift, axis_name)
        measurements, value, squared_norm, grads = means
        loss = measurements["loss"]
        if weight:
            measurements |= {
                "penalty": value,
                "ratio": jnp.where(loss != 0, value / loss, 0.0),
                "feature_gradient_norm": jnp.sqrt(squared_norm),
            }
        measurements["gradient_norm"] = _global_norm(grads)
        if weight and mode == "perturbed":
            measurements["shift"] = shift
        return (loss + scaled * value, measurements), grads

    return step


def _check_reading(reading: str, normalisation: str, patch: Patch | None) -> None:
    if reading not in READINGS:
        raise UsageError(f"Fisher reading {reading!r} is not known; use {', '.join(READINGS[:-1])} or {READINGS[-1]}.")
    if normalisation not in NORMALISATIONS:
        raise UsageError(f"Fisher normalisation {normalisation!r} is not known; use {' or '.join(NORMALISATIONS)}.")
    if patch is not None and reading != "centered":
        raise UsageError(f"Fisher patch {patch} is only for the reading 'centered', not {reading!r}; leave it out.")
    if patch is not None and not all(isinstance(size, int) and size > 0 for size in patch):
        raise UsageError(f"Fisher patch {patch} must hold whole numbers of at least 1, one for each token axis.")


def _check_mode(
    weight: float,
    mode: str,
    reading: str,
    fraction: float,
    every: int,
    microbatch: int,
    axis_name: str | tuple[str, ...],
) -> None:
    if mode not in MODES:
        raise UsageError(f"Fisher mode {mode!r} is not known; use {', '.join(MODES[:-1])} or {MODES[-1]}.")
    if not (math.isfinite(weight) and weight >= 0):
        raise UsageError(f"Fisher weight {weight} must be finite and at least 0; 0.1 is a good start.")
    if not 0 < fraction <= 1:
        raise UsageError(f"Fisher fraction {fraction} must be above 0 and at most 1; 0.125 is a good start.")
    if every != int(every) or every < 1:
        raise UsageError(f"Fisher every {every} must be a whole number of at least 1; 8 is a good start.")
    if microbatch != int(microbatch) or microbatch < 0:
        raise UsageError(f"Fisher microbatch {microbatch} must be a whole number of samples; 0 takes all at once.")
    if (microbatch or axis_name) and reading == "centered" and weight:
        raise UsageError(
            "The Fisher reading 'centered' needs all samples for its mean gradient, and microbatch or axis_name take "
            "them apart; use another reading or leave these out."
        )


def _check_batched(
    batched_args: tuple[int, ...] | None, batched: tuple[bool, ...], args: tuple[Any, ...], batch: int
) -> None:
    if batched_args is None and len(args) > 1:
        raise UsageError(
            f"The Fisher loss has {len(args)} arguments after the features; name those that carry the batch axis with "
            "batched_args, for instance batched_args=(0,)."
        )
    for index, arg in enumerate(fisher_modes.only(batched, args)):
        for leaf in jax.tree.leaves(arg):
            if jnp.ndim(leaf) == 0 or leaf.shape[0] != batch:
                raise UsageError(
                    f"Argument {index} of the Fisher loss has an array of shape {jnp.shape(leaf)} without the batch "
                    f"axis of {batch}; name the arguments that carry it with batched_args."
                )


def _random_patches(rng: Array, batch: int, patches: int, fraction: float) -> Float[Array, "B P"]:
    """Weights of a random share of all patches, of mean 1: chosen ones weigh ``number / chosen``, others 0."""
    number = batch * patches
    chosen = max(1, round(fraction * number))
    weights = jnp.where(jnp.arange(number) < chosen, number / chosen, 0.0)
    return jax.random.permutation(rng, weights).reshape(batch, patches)


def _means(task: Task) -> Measurements:
    """What is measured of the task: the mean loss and, by name, that of its terms."""
    terms = {name: jnp.mean(term) for name, term in task.items()} if isinstance(task, dict) else {}
    return {"loss": fisher_modes.mean_of(task)} | terms


def _global_norm(tree: Params) -> Float[Array, ""]:
    leaves = map(cross_entropy.at_least_float32, jax.tree.leaves(tree))
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in leaves))
