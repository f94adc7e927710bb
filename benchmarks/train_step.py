"""What each method's training step costs, on cached features: seconds, and the ratio to SAM-FT in the same run.

python -m benchmarks.train_step --json=FILE

The methods take turns, so that a drifting machine slows all of them alike; medians are reported.  FLOPs are XLA's own
count of the compiled step.  Neither grain nor nibabel is imported.
"""

import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import measure
from calsegx import configs, losses, sharding
from calsegx.interfaces import Batch, Prompts
from calsegx.losses import expression
from calsegx.models.sam import backbone
from calsegx.training import state as train_state
from calsegx.training import step as train_step

COLUMNS = {"method": "", "classes": "d", "batch": "d", "seconds": ".4f", "ratio_to_plain": ".2f", "flops": ".3g"}
COLUMNS |= {"flops_ratio": ".2f", "first_step_seconds": ".1f"}


def define_flags(values: flags.FlagValues) -> None:
    """The command line."""
    flags.DEFINE_string("json", "", "File to write the rows to.", flag_values=values)
    flags.DEFINE_integer("rounds", 41, "Timed steps per method.", lower_bound=3, flag_values=values)
    flags.DEFINE_list("batch", ["16"], "Batch sizes.", flag_values=values)
    flags.DEFINE_list("classes", ["1", "3"], "Numbers of foreground classes.", flag_values=values)


def example(tiny: Any, batch: int, classes: int) -> Batch:
    """Random features and labels of the right shapes."""
    rng = np.random.default_rng(0)
    return Batch(
        jnp.asarray(rng.normal(size=(batch, *tiny.feature_shape)), jnp.bfloat16),
        jnp.asarray(rng.integers(0, classes + 1, (batch, *tiny.logit_shape)), jnp.int32),
        Prompts(
            points=jnp.asarray(rng.uniform(0, tiny.image_size, (batch, 2, 2)), jnp.float32),
            labels=jnp.tile(jnp.array([1, 0]), (batch, 1)),
        ),
    )


def rows_of(batch_size: int, classes: int, rounds: int) -> Iterator[measure.Row]:
    """One row per method."""
    tiny, mesh = backbone.load_backbone(None, classes), sharding.device_mesh()
    batch = sharding.shard_batch(mesh, example(tiny, batch_size, classes))
    penalised = losses.get("bce" if classes == 1 else "ce")
    calls, first, flops = {}, {}, {}
    for method in configs.METHODS:
        config = configs.TrainConfig(method=method, batch_size=batch_size)
        optimizer = train_state.make_optimizer(config)
        task = expression.parse(configs.loss_expressions(config, classes)[0])
        objective = train_step.Objective(task, penalised, losses.get("cmp"))
        lagrangian = train_state.init_lagrangian(config, tiny, batch) if configs.METHODS[method].lagrangian else None
        step = train_step.make_train_step(tiny.decode, tiny.frozen, objective, config, optimizer, mesh)
        state = train_state.init_state(tiny.trainable, optimizer, mesh, lagrangian)
        flops[method] = measure.xla_cost(step.lower(state, batch).compile())[0]
        calls[method] = Steps(step, state, batch)
        start = time.perf_counter()
        calls[method]()
        first[method] = time.perf_counter() - start
    seconds = measure.interleave(calls, rounds)
    plain = statistics.median(seconds["sam_ft"])
    for method, times in seconds.items():
        yield {
            "method": method,
            "batch": batch_size,
            "classes": classes,
            "grid": tiny.feature_shape[0],
            "seconds": statistics.median(times),
            "seconds_spread": measure.spread(times),
            "ratio_to_plain": statistics.median(times) / plain,
            "flops": flops[method],
            "flops_ratio": flops[method] / flops["sam_ft"],
            "first_step_seconds": first[method],
            "rounds": rounds,
            **measure.machine(),
        }


class Steps:
    """One training step after the other: the state is donated, so each call needs the last one's."""

    def __init__(self, step: Any, state: Any, batch: Batch):
        self._step, self._state, self._batch = step, state, batch

    def __call__(self) -> None:
        """Take a step, and wait for it."""
        self._state, _ = jax.block_until_ready(self._step(self._state, self._batch))


def run(options: flags.FlagValues) -> None:
    """Measure, print, write."""
    rows = []
    for classes in map(int, options.classes):
        for batch in map(int, options.batch):
            rows += rows_of(batch, classes, options.rounds)
    measure.print_table(rows, COLUMNS)
    if options.json:
        measure.write_json(options.json, rows)
        print(f"The rows are in {options.json}")


if __name__ == "__main__":
    measure.main(define_flags, run)
