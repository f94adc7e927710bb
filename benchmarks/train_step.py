"""What each method's training step costs, on cached features: seconds, and the ratio to SAM-FT in the same run.

python -m benchmarks.train_step --json=FILE

The methods take turns, so that a drifting machine slows all of them alike; medians are reported.  FLOPs are XLA's own
count of the compiled step.  Neither grain nor nibabel is imported.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from calsegx import configs, files, losses, memory, sharding
from calsegx.interfaces import Batch, Prompts
from calsegx.models.sam import backbone
from calsegx.training import state as train_state
from calsegx.training import step as train_step

JSON = flags.DEFINE_string("json", "", "File to write the rows to.")
ROUNDS = flags.DEFINE_integer("rounds", 15, "Timed steps per method.", lower_bound=3)
BATCH = flags.DEFINE_list("batch", ["16"], "Batch sizes.")
CLASSES = flags.DEFINE_list("classes", ["1", "3"], "Numbers of foreground classes.")


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


def measure(batch_size: int, classes: int, rounds: int) -> list[dict[str, Any]]:
    """One row per method."""
    tiny, mesh = backbone.load_backbone(None, classes), sharding.data_mesh()
    batch = sharding.shard_batch(mesh, example(tiny, batch_size, classes))
    penalised = losses.get("bce" if classes == 1 else "ce")
    steps, states, seconds, compile_seconds, flops = {}, {}, {}, {}, {}
    for method in configs.METHODS:
        config = configs.TrainConfig(method=method, batch_size=batch_size)
        optimizer = train_state.make_optimizer(config)
        terms = losses.get("sam"), penalised, losses.get("cmp")
        steps[method] = train_step.make_train_step(tiny.decode, tiny.frozen, *terms, config, optimizer, mesh)
        states[method] = train_state.init_state(tiny.trainable, optimizer, mesh)
        start = time.perf_counter()
        states[method], _ = jax.block_until_ready(steps[method](states[method], batch))
        compile_seconds[method] = time.perf_counter() - start
        flops[method] = _flops(tiny, terms, config, batch)
        seconds[method] = []
    for _ in range(rounds):
        for method, step in steps.items():
            start = time.perf_counter()
            states[method], _ = jax.block_until_ready(step(states[method], batch))
            seconds[method].append(time.perf_counter() - start)
    plain = statistics.median(seconds["sam_ft"])
    return [
        {
            "method": method,
            "batch": batch_size,
            "classes": classes,
            "grid": tiny.feature_shape[0],
            "seconds": statistics.median(times),
            "seconds_min": min(times),
            "ratio_to_plain": statistics.median(times) / plain,
            "flops": flops[method],
            "flops_ratio": flops[method] / flops["sam_ft"],
            "first_step_seconds": compile_seconds[method],
        }
        for method, times in seconds.items()
    ]


def _flops(tiny: Any, terms: Any, config: configs.TrainConfig, batch: Batch) -> float:
    """XLA's count for loss and gradients (the optimizer is negligible)."""
    from calsegx.losses import fisher

    with_fisher, with_cmp = configs.METHODS[config.method]
    loss_fn = train_step.make_loss_fn(tiny.decode, terms[0], terms[1], terms[2] if with_cmp else None, config)
    step = fisher.value_and_grad(loss_fn, weight=config.fisher.weight if with_fisher else 0.0)
    compiled = jax.jit(step).lower(tiny.trainable, batch.features, tiny.frozen, batch.labels, batch.prompts).compile()
    return float(_first(compiled.cost_analysis())["flops"])


def _first(analysis: Any) -> Mapping[str, float]:
    return analysis[0] if isinstance(analysis, list) else analysis


def main(argv: Any) -> None:
    """Measure, print, write."""
    del argv
    memory.keep_freed_memory()  # as the launch scripts do
    rows = []
    print(f"{'method':8} {'K':>2} {'batch':>5} {'ms':>8} {'ratio':>6} {'GFLOP':>7} {'ratio':>6} {'first step s':>12}")
    for classes in map(int, CLASSES.value):
        for batch in map(int, BATCH.value):
            for row in measure(batch, classes, ROUNDS.value):
                rows.append(row)
                cells = (
                    f"{row['method']:8} {classes:2d} {batch:5d} {1e3 * row['seconds']:8.1f}",
                    f"{row['ratio_to_plain']:6.2f} {row['flops'] / 1e9:7.2f} {row['flops_ratio']:6.2f}",
                    f"{row['first_step_seconds']:12.1f}",
                )
                print(*cells, flush=True)
    device = jax.devices()[0]
    machine = {
        "device": device.device_kind,
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "jax": jax.__version__,
    }
    if JSON.value:
        files.write_atomically(Path(JSON.value), json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
        print(f"The rows are in {JSON.value}")


if __name__ == "__main__":
    app.run(main)
