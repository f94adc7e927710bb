"""One training step: task loss, confidence penalty and Fisher penalty of a frozen-encoder decoder, then Adam.

``total = mean_i(task_i + cmp.weight * cmp_i) + fisher.weight * s(t) * penalty``, ``s`` the linear warm-up of the
Fisher weight; which terms are on is the method's choice (``configs.METHODS``).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from calsegx import configs, sharding
from calsegx.interfaces import Batch, Loss, Params, Prompts, UsageError
from calsegx.losses import fisher
from calsegx.training import state as train_state

Decode = Callable[[Params, Params, Array, Prompts], Array]
Measurements = dict[str, Float[Array, ""]]
Terms = dict[str, Float[Array, " B"]]


def make_loss_fn(
    decode: Decode,
    task_loss: Loss,
    penalised_loss: Loss,
    confidence_loss: Loss | None,
    config: configs.TrainConfig,
) -> Callable[..., tuple[Terms, Float[Array, " B"]]]:
    """The loss function of ``fisher.value_and_grad``: one decoder pass gives every term.

    With ``config.fisher.labels`` ``sampled`` the penalised loss is that of labels drawn from the model.

    Args:
        decode: ``Backbone.decode``.
        task_loss: what is minimised.
        penalised_loss: whose feature gradient the Fisher penalty measures (voxel-mean cross-entropy).
        confidence_loss: added with ``config.cmp.weight``; None: not added.
        config: of the run.

    Returns:
        ``(params, features, frozen, labels, prompts, keys) -> ({"task": [B], "cmp": [B]}, penalised [B])``; ``cmp``
        is already weighted, ``keys [B]`` are of the sampled labels.
    """

    def loss_fn(
        params: Params,
        features: Float[Array, "B h w C"],
        frozen: Params,
        labels: Int[Array, "B H W"],
        prompts: Prompts,
        keys: Key[Array, " B"] | None = None,
    ) -> tuple[Terms, Float[Array, " B"]]:
        logits = decode(params, frozen, features, prompts)
        terms = {"task": task_loss(logits, labels)}
        if confidence_loss is not None:
            terms["cmp"] = config.cmp.weight * confidence_loss(logits, labels)
        if config.fisher.labels == "sampled":
            if keys is None:
                raise UsageError("Sampled labels (--config.fisher.labels) need the argument keys, one per sample.")
            labels = fisher.sample_labels(keys, logits)
        return terms, penalised_loss(logits, labels)

    return loss_fn


def warmup(config: configs.TrainConfig, step: Int[Array, ""]) -> Float[Array, ""]:
    """``min(1, t / (warmup_fraction * steps))``: the share of the Fisher weight at step ``t`` (from 0)."""
    length = config.fisher.warmup_fraction * config.steps
    return jnp.minimum(1.0, step / length) if length > 0 else jnp.ones(())


def make_train_step(
    decode: Decode,
    frozen: Params,
    task_loss: Loss,
    penalised_loss: Loss,
    confidence_loss: Loss | None,
    config: configs.TrainConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> Callable[[train_state.TrainState, Batch], tuple[train_state.TrainState, Measurements]]:
    """Compile the training step for ``config.method``.

    Args:
        decode: ``Backbone.decode``.
        frozen: parameters that are not trained; an argument of the compiled step, not constants inside it.
        task_loss: one value per sample.
        penalised_loss: see ``make_loss_fn``.
        confidence_loss: used where the method has the confidence penalty and its weight is not 0.
        config: of the run.
        optimizer: from ``state.make_optimizer``.
        mesh: with an axis ``data``; states are replicated, batches split.

    Returns:
        ``(state, batch) -> (state, measurements)``. The old state is donated: its arrays are gone afterwards. Where
        ``fisher.usable`` refuses the measurements (something is not finite), parameters and optimiser stay as they were
        and ``step`` becomes -1, with which no later step trains either. Measurements, float32 scalars: ``loss``
        (without the Fisher penalty), ``task``, ``gradient_norm`` (before clipping), ``learning_rate``; with the
        confidence penalty ``cmp`` (without its weight); with the Fisher penalty ``penalty`` and ``ratio``
        (penalty over loss), both without the weight, ``feature_gradient_norm`` and, of ``perturbed``, ``shift``.

    Raises:
        UsageError: for ``config.fisher.remat`` on more than one device, and for the mode ``stochastic`` there, except
            with the reading ``centered``, which leaves the batch whole.
    """
    with_fisher, with_confidence = configs.METHODS[config.method]
    if with_fisher and config.fisher.remat and mesh.size > 1:
        raise UsageError(
            f"--config.fisher.remat takes slice after slice, which would leave {mesh.size - 1} of {mesh.size} devices "
            "idle; leave it out, or train on one device."
        )
    if with_fisher and config.fisher.mode == "stochastic" and config.fisher.reading != "centered" and mesh.size > 1:
        raise UsageError(
            f"--config.fisher.mode='stochastic' takes the batch apart, for which each of {mesh.size} devices would "
            "compute all of it; use --config.fisher.mode=every_k, or train on one device."
        )
    with_confidence = with_confidence and config.cmp.weight > 0
    loss_fn = make_loss_fn(decode, task_loss, penalised_loss, confidence_loss if with_confidence else None, config)
    value_and_grad = fisher.value_and_grad(
        loss_fn,
        weight=config.fisher.weight if with_fisher else 0.0,
        mode=config.fisher.mode,
        reading=config.fisher.reading,
        normalisation=config.fisher.normalisation,
        fraction=config.fisher.fraction,
        every=config.fisher.every,
        remat=config.fisher.remat,
        batched_args=(1, 2, 3),
    )
    schedule = train_state.learning_rate(config)

    def step(
        state: train_state.TrainState, frozen: Params, batch: Batch
    ) -> tuple[train_state.TrainState, Measurements]:
        subset_key, label_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), state.step))
        sampled = config.fisher.labels == "sampled"
        (_, measurements), gradients = value_and_grad(
            state.params,
            batch.features,
            frozen,
            batch.labels,
            batch.prompts,
            jax.random.split(label_key, batch.features.shape[0]) if sampled else None,
            weight_scale=warmup(config, state.step),
            rng=subset_key,
            step=state.step,
        )
        if with_confidence:
            measurements["cmp"] = measurements["cmp"] / config.cmp.weight
        measurements["learning_rate"] = jnp.asarray(schedule(state.step))
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        new = train_state.TrainState(state.step + 1, params, opt_state)
        usable = fisher.usable(measurements) & (state.step >= 0)
        new = jax.tree.map(lambda after, before: jnp.where(usable, after, before), new, state)
        return new._replace(step=jnp.where(usable, new.step, -1)), measurements

    whole, split = sharding.replicated(mesh), sharding.batch_sharded(mesh)
    compiled = jax.jit(step, in_shardings=(whole, whole, split), out_shardings=(whole, whole), donate_argnums=(0,))
    frozen = sharding.replicate(mesh, frozen)
    return lambda state, batch: compiled(state, frozen, batch)


def make_eval_step(
    decode: Decode, frozen: Params, task_loss: Loss, mesh: Mesh
) -> Callable[[Params, Batch], Float[Array, " B"]]:
    """Compile ``(params, batch) -> task loss of every sample [B]``, for the validation loss."""

    def step(params: Params, frozen: Params, batch: Batch) -> Float[Array, " B"]:
        features = batch.features.astype(jnp.float32)
        return task_loss(decode(params, frozen, features, batch.prompts), batch.labels)

    whole, split = sharding.replicated(mesh), sharding.batch_sharded(mesh)
    compiled = jax.jit(step, in_shardings=(whole, whole, split), out_shardings=whole)
    frozen = sharding.replicate(mesh, frozen)
    return lambda params, batch: compiled(params, frozen, batch)
