"""What a compiled program costs, as XLA says it, before it runs."""

import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from calsegx import configs
from calsegx.interfaces import Backbone, Batch, Prompts
from calsegx.training import caching
from calsegx.training import state as train_state
from calsegx.training import step as train_step

_COLLECTIVE = re.compile(
    r"^[^=]+= (?P<shapes>.+?) (?P<name>all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all"
    r"|collective-permute|collective-broadcast)(?:-start)?\(",
    re.MULTILINE,
)
_SHAPE = re.compile(r"\b(?P<kind>pred|[a-z]+(?P<bits>\d+)\w*)\[(?P<sides>[\d,]*)\]")


class Cost(NamedTuple):
    """Of one call on one device."""

    flops: float
    held: int  # bytes of arguments and results that are there at the same time; donated arguments count once
    temporary: int  # bytes that are needed beside them while it runs
    collectives: dict[str, list[int]]  # kind of exchange between devices -> bytes of the result of each


def of(compiled: Any) -> Cost:
    """The cost of a ``jax.stages.Compiled``.

    FLOPs are XLA's own count, in which the body of a loop is counted once.
    """
    memory, analysis = compiled.memory_analysis(), compiled.cost_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Cost(analysis["flops"], held, memory.temp_size_in_bytes, collectives(compiled.as_text()))


def of_train_step(
    config: configs.TrainConfig,
    backbone: Backbone,
    objective: train_step.Objective,
    mesh: Mesh,
    num_classes: int = 1,
) -> Cost:
    """The cost of the training step of a run, which is compiled for that; nothing is computed."""
    optimizer = train_state.make_optimizer(config)
    batch, with_lagrangian = abstract_batch(config, backbone, num_classes), configs.METHODS[config.method].lagrangian
    lagrangian = train_state.init_lagrangian(config, backbone, batch) if with_lagrangian else None
    state = jax.eval_shape(lambda: train_state.init_state(backbone.trainable, optimizer, mesh, lagrangian))
    step = train_step.make_train_step(backbone.decode, backbone.frozen, objective, config, optimizer, mesh)
    return of(step.lower(state, batch).compile())


def of_encoder_call(config: configs.TrainConfig, backbone: Backbone, mesh: Mesh) -> tuple[int, Cost]:
    """How many slices one call of the encoder takes, and what it costs; compiled as above."""
    slices = caching.encoder_batch(config.model.encoder_batch, backbone.feature_shape, mesh)
    _, encode = caching.batch_encoder(backbone, mesh)
    frames = jax.ShapeDtypeStruct((slices, backbone.image_size, backbone.image_size, 3), jnp.float32)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), backbone.encoder)
    return slices, of(encode.lower(params, frames).compile())


def abstract_batch(config: configs.TrainConfig, backbone: Backbone, num_classes: int) -> Batch:
    """Shapes and dtypes of a whole training batch, with the prompts that come from labels."""

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((config.batch_size, *shape), dtype)

    points = num_classes + 1 if config.protocol == "class_points" else 2
    prompts = Prompts(points=array((points, 2), jnp.float32), labels=array((points,), jnp.int32))
    if config.protocol in ("gt_box", "none"):
        prompts = Prompts(boxes=array((4,), jnp.float32))
    return Batch(array(backbone.feature_shape, jnp.bfloat16), array(backbone.logit_shape, jnp.int32), prompts)


def collectives(hlo: str) -> dict[str, list[int]]:
    """Every exchange between devices in the text of a compiled program, by kind, with the bytes of its result."""
    found: dict[str, list[int]] = {}
    for match in _COLLECTIVE.finditer(hlo):
        found.setdefault(match["name"], []).append(sum(map(_bytes, _SHAPE.finditer(match["shapes"]))))
    return found


def _bytes(shape: re.Match[str]) -> int:
    bits = 8 if shape["kind"] == "pred" else int(shape["bits"])
    return math.prod(int(side) for side in shape["sides"].split(",") if side) * bits // 8
