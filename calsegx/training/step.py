"""One training step: task loss, confidence penalty and Fisher penalty of a frozen-encoder decoder, then Adam.

``total = mean_i(task_i + cmp.weight * cmp_i + crac_i) + fisher.weight * s(t) * penalty``, ``s`` the linear warm-up of
the Fisher weight; which terms are on is the method's choice (``configs.METHODS``).

Every device takes its own share of the batch, ``microbatch`` slices at a time where asked; what crosses devices is the
mean of the gradients and of the measurements, at the end, and nothing else.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from calsegx import configs, sharding
from calsegx.interfaces import Batch, Loss, Params, Prompts, UsageError
from calsegx.losses import augmented_lagrangian, fisher
from calsegx.training import state as train_state

Decode = Callable[[Params, Params, Array, Prompts], Array]
Measurements = dict[str, Float[Array, ""]]
Terms = dict[str, Float[Array, " B"]]


class TaskLoss(Protocol):
    """A loss whose weights may change during training; ``progress`` is the share of the steps that is done."""

    def __call__(self, logits: Array, labels: Array, progress: Array, /) -> Array:  # noqa: D102
        ...


class Objective(NamedTuple):
    """What is minimised."""

    task: TaskLoss
    penalised: Loss  # whose feature gradient the Fisher penalty measures, usually the voxel-mean cross-entropy
    confidence: Loss | None = None  # added with ``config.cmp.weight``


def make_loss_fn(
    decode: Decode, objective: Objective, config: configs.TrainConfig
) -> Callable[..., tuple[Terms, Float[Array, " B"]]]:
    """The loss function of ``fisher.value_and_grad``: one decoder pass gives every term.

    With ``config.fisher.labels`` ``sampled`` the penalised loss is that of labels drawn from the model.

    Args:
        decode: ``Backbone.decode``.
        objective: its confidence term may be None: not added.
        config: of the run.

    Returns:
        ``(params, features, frozen, labels, prompts, keys, progress, lagrangian) -> ({"task": [B], "cmp": [B], "crac":
        [B]}, penalised [B])``; ``cmp`` is already weighted, ``keys [B]`` are of the sampled labels, ``lagrangian`` is
        the state of CRaC's multipliers, or None.
    """
    options = configs.lagrangian_options(config)

    def loss_fn(
        params: Params,
        features: Float[Array, "B h w C"],
        frozen: Params,
        labels: Int[Array, "B H W"],
        prompts: Prompts,
        keys: Key[Array, " B"] | None = None,
        progress: Float[Array, ""] | float = 0.0,
        lagrangian: augmented_lagrangian.State | None = None,
    ) -> tuple[Terms, Float[Array, " B"]]:
        logits = decode(params, frozen, features, prompts)
        terms = {"task": objective.task(logits, labels, jnp.asarray(progress))}
        if objective.confidence is not None:
            terms["cmp"] = config.cmp.weight * objective.confidence(logits, labels)
        if lagrangian is not None:
            terms["crac"] = augmented_lagrangian.crac(logits, labels, lagrangian, **options)
        if config.fisher.labels == "sampled":
            if keys is None:
                raise UsageError("Sampled labels (--config.fisher.labels) need the argument keys, one per sample.")
            labels = fisher.sample_labels(keys, logits)
        return terms, objective.penalised(logits, labels)

    return loss_fn


def warmup(config: configs.TrainConfig, step: Int[Array, ""]) -> Float[Array, ""]:
    """``min(1, t / (warmup_fraction * steps))``: the share of the Fisher weight at step ``t`` (from 0)."""
    length = config.fisher.warmup_fraction * config.steps
    return jnp.minimum(1.0, step / length) if length > 0 else jnp.ones(())


def make_train_step(
    decode: Decode,
    frozen: Params,
    objective: Objective,
    config: configs.TrainConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> Callable[[train_state.TrainState, Batch], tuple[train_state.TrainState, Measurements]]:
    """Compile the training step for ``config.method``.

    Args:
        decode: ``Backbone.decode``.
        frozen: parameters that are not trained; an argument of the compiled step, not constants inside it.
        objective: its confidence term is used where the method has one and its weight is not 0.
        config: of the run.
        optimizer: from ``state.make_optimizer``.
        mesh: of ``sharding.device_mesh``; states are replicated, batches split.

    Returns:
        ``(state, batch) -> (state, measurements)``. The old state is donated: its arrays are gone afterwards. Where
        ``fisher.usable`` refuses the measurements (something is not finite), parameters and optimiser stay as they were
        and ``step`` becomes -1, with which no later step trains either. Measurements, float32 scalars: ``loss``
        (without the Fisher penalty), ``task``, ``gradient_norm`` (before clipping), ``learning_rate``; with the
        confidence penalty ``cmp`` (without its weight); of CRaC ``crac``; with the Fisher penalty ``penalty`` and
        ``ratio`` (penalty over loss), both without the weight, ``feature_gradient_norm`` and, of ``perturbed``,
        ``shift``.  The function's ``lower(state, batch)`` is that of ``jax.jit``; it takes abstract arrays.

    Raises:
        UsageError: for a loss of paired views that the devices would take apart; from ``fisher.value_and_grad``.
    """
    if getattr(objective.task, "paired", False) and config.batch_size // mesh.size % 2:
        raise UsageError(
            f"--config.loss compares two views of every slice, which must be on one device: make --config.batch_size="
            f"{config.batch_size} a multiple of {2 * mesh.size}, twice the number of devices."
        )
    with_fisher, with_confidence, _ = configs.METHODS[config.method]
    with_fisher = with_fisher and config.fisher.weight > 0
    with_confidence = with_confidence and config.cmp.weight > 0
    if not with_confidence:
        objective = objective._replace(confidence=None)
    # Its mean gradient ties all samples together: the compiler splits the step then, not we.
    whole_batch = with_fisher and config.fisher.reading == "centered"
    value_and_grad = fisher.value_and_grad(
        make_loss_fn(decode, objective, config),
        weight=config.fisher.weight if with_fisher else 0.0,
        mode=config.fisher.mode,
        reading=config.fisher.reading,
        normalisation=config.fisher.normalisation,
        fraction=config.fisher.fraction,
        every=config.fisher.every,
        microbatch=config.microbatch,
        batched_args=(1, 2, 3),
        axis_name=() if whole_batch else sharding.AXES,
    )

    def gradients(
        state: train_state.TrainState, frozen: Params, batch: Batch, keys: Key[Array, " B"] | None, rng: Key[Array, ""]
    ) -> tuple[Measurements, Params]:
        arguments = frozen, batch.labels, batch.prompts, keys, state.step / config.steps, state.lagrangian
        scale = warmup(config, state.step)
        (_, measurements), found = value_and_grad(
            state.params, batch.features, *arguments, weight_scale=scale, rng=rng, step=state.step
        )
        return measurements, found

    if not whole_batch:
        one, share = PartitionSpec(), PartitionSpec(sharding.AXES)
        gradients = jax.shard_map(
            gradients, mesh=mesh, in_specs=(one, one, share, share, one), out_specs=one, check_vma=False
        )
    schedule = train_state.learning_rate(config)

    def step(
        state: train_state.TrainState, frozen: Params, batch: Batch
    ) -> tuple[train_state.TrainState, Measurements]:
        subset_key, label_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), state.step))
        sampled = config.fisher.labels == "sampled"
        keys = jax.random.split(label_key, batch.features.shape[0]) if sampled else None
        measurements, found = gradients(state, frozen, batch, keys, subset_key)
        if with_confidence:
            measurements["cmp"] = measurements["cmp"] / config.cmp.weight
        measurements["learning_rate"] = jnp.asarray(schedule(state.step))
        updates, opt_state = optimizer.update(found, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        new = state._replace(step=state.step + 1, params=params, opt_state=opt_state)
        usable = fisher.usable(measurements) & (state.step >= 0)
        new = jax.tree.map(lambda after, before: jnp.where(usable, after, before), new, state)
        return new._replace(step=jnp.where(usable, new.step, -1)), measurements

    whole, split = sharding.replicated(mesh), sharding.batch_sharded(mesh)
    compiled = jax.jit(step, in_shardings=(whole, whole, split), out_shardings=(whole, whole), donate_argnums=(0,))
    return _Bound(compiled, sharding.replicate(mesh, frozen))


class _Bound:
    """A compiled step with the frozen parameters as its second argument."""

    def __init__(self, compiled: Any, frozen: Params):
        self._compiled, self._frozen = compiled, frozen

    def __call__(self, state: Any, batch: Batch) -> Any:
        return self._compiled(state, self._frozen, batch)

    def lower(self, state: Any, batch: Batch) -> Any:
        return self._compiled.lower(state, self._frozen, batch)


def make_eval_step(
    decode: Decode, frozen: Params, task_loss: TaskLoss, mesh: Mesh
) -> Callable[[Params, Batch], Float[Array, " B"]]:
    """Compile ``(params, batch) -> task loss of every sample [B]``, for the validation loss; weights as at the end."""

    def step(params: Params, frozen: Params, batch: Batch) -> Float[Array, " B"]:
        features = batch.features.astype(jnp.float32)
        return task_loss(decode(params, frozen, features, batch.prompts), batch.labels, jnp.ones(()))

    return _evaluation(step, frozen, mesh)


def make_constraint_step(
    decode: Decode, frozen: Params, config: configs.TrainConfig, mesh: Mesh
) -> Callable[[train_state.TrainState, tuple[Batch, Float[Array, " B"]]], Any]:
    """Compile ``(state, (batch, counts [B])) -> sums`` of CRaC's constraints; ``counts`` is 0 for what fills up."""
    options = configs.lagrangian_options(config)

    def step(state: train_state.TrainState, frozen: Params, batch: tuple[Batch, Float[Array, " B"]]) -> Any:
        slices, counts = batch
        logits = decode(state.params, frozen, slices.features.astype(jnp.float32), slices.prompts)
        each = jax.vmap(lambda z, y: augmented_lagrangian.sums(z[None], y[None], state.lagrangian, **options))
        return jax.tree.map(lambda sums: jnp.tensordot(counts, sums, axes=1), each(logits, slices.labels))

    return _evaluation(step, frozen, mesh)


def _evaluation(step: Callable[..., Any], frozen: Params, mesh: Mesh) -> Callable[..., Any]:
    whole, split = sharding.replicated(mesh), sharding.batch_sharded(mesh)
    compiled = jax.jit(step, in_shardings=(whole, whole, split), out_shardings=whole)
    return _Bound(compiled, sharding.replicate(mesh, frozen))
