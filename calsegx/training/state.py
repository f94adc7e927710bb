"""What training carries from step to step, and the optimizer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from calsegx import configs, sharding
from calsegx.interfaces import Backbone, Batch, Params
from calsegx.losses import augmented_lagrangian


class TrainState(NamedTuple):
    """Everything that a step changes; replicated over the mesh."""

    step: Int[Array, ""]  # steps done
    params: Params  # the decoder
    opt_state: optax.OptState
    lagrangian: Any = None  # the multipliers of CRaC (``augmented_lagrangian.State``); None: the method has none


def learning_rate(config: configs.TrainConfig) -> optax.Schedule:
    """Cosine decay ``lr(t) = learning_rate * (1 + cos(pi * t / steps)) / 2``, to zero at the last step."""
    return optax.cosine_decay_schedule(config.optimizer.learning_rate, config.steps)


def make_optimizer(config: configs.TrainConfig) -> optax.GradientTransformation:
    """Adam with cosine decay, after clipping the global gradient norm to ``clip_norm`` (0: no clipping).

    With ``weight_decay`` it is AdamW: every step also takes ``lr(t) * weight_decay * p`` off each parameter ``p``, also
    off one that has no gradient, such as the predicted IoU's (MedSAM's PyTorch skips those).
    """
    options = config.optimizer
    adam = optax.adam(learning_rate(config), b1=options.b1, b2=options.b2)
    if options.weight_decay:
        adam = optax.adamw(learning_rate(config), b1=options.b1, b2=options.b2, weight_decay=options.weight_decay)
    if options.clip_norm == 0:
        return adam
    return optax.chain(optax.clip_by_global_norm(options.clip_norm), adam)


def init_lagrangian(config: configs.TrainConfig, backbone: Backbone, batch: Batch) -> augmented_lagrangian.State:
    """CRaC's multipliers before the first epoch; ``batch``, which may be abstract, is what ``backbone`` decodes."""
    logits = jax.eval_shape(backbone.decode, backbone.trainable, backbone.frozen, batch.features, batch.prompts)
    classes = max(2, logits.shape[-1])
    return augmented_lagrangian.init(classes, multiplier=config.crac.multiplier, rho=config.crac.rho)


def update_lagrangian(
    config: configs.TrainConfig, state: augmented_lagrangian.State, sums: augmented_lagrangian.Sums
) -> augmented_lagrangian.State:
    """CRaC's multipliers after an epoch, from the ``sums`` over the validation slices."""
    crac = config.crac
    return augmented_lagrangian.update(
        state,
        sums,
        average=crac.average,
        multiplier_range=(crac.multiplier, crac.highest_multiplier),
        rho_range=(crac.rho, crac.highest_rho),
        growth=crac.growth,
        improvement=crac.improvement,
        rho_step=crac.rho_step,
    )


def init_state(
    params: Params, optimizer: optax.GradientTransformation, mesh: Mesh, lagrangian: Any = None
) -> TrainState:
    """The state at step 0, on every device of the mesh.

    ``params`` are copied: the train step donates its state, and the caller's arrays must outlive it.
    """
    params = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params)
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), lagrangian)
    return sharding.replicate(mesh, state)


def abstract_state(state: TrainState) -> TrainState:
    """Shapes, dtypes and shardings of ``state``, without its values."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
