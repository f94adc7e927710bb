"""What every method of an experiment costs: its training step beside SAM-FT's, and the fits of the calibrators.

python -m benchmarks.method_cost --json=docs/method_cost.json --page=docs/which-method.md

Arithmetic and memory are XLA's own count of the compiled step, which no other program disturbs; seconds are medians of
steps that take turns, and need a quiet machine (``--rounds=0``: none).  Two decoders on random features and labels of
one class: the tiny SAM's, and SAM's own at 1024 pixels.  Methods with another backbone are left out.
"""

import functools
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import measure, scaling, train_step
from calsegx import calibrators, configs, experiment, files, losses, sharding
from calsegx.data import folds
from calsegx.interfaces import Backbone, Batch
from calsegx.losses import expression
from calsegx.models.sam import backbone
from calsegx.training import cost
from calsegx.training import state as train_state
from calsegx.training import step as step_module

MARKS = "<!-- tables of benchmarks.method_cost: begin -->", "<!-- tables of benchmarks.method_cost: end -->"
BATCH = {"tiny": 16, "vit": 2}  # slices per step
COLUMNS = {"method": ""} | {f"{d} {x}": ".2f" for d in BATCH for x in ("FLOPs", "bytes", "seconds")}
FIT_COLUMNS = {"calibrator": "", "voxels": "d", "seconds": ".2f", "in SAM-FT steps": ".0f"}
IMAGES, SIDE = 32, 128  # that calibrators are fitted on


def define_flags(values: flags.FlagValues) -> None:
    """The command line."""
    flags.DEFINE_string("json", "", "File to write the rows to.", flag_values=values)
    flags.DEFINE_string("page", "", "Page whose tables to replace.", flag_values=values)
    flags.DEFINE_integer("rounds", 11, "Timed steps per method; 0: only count.", lower_bound=0, flag_values=values)
    flags.DEFINE_integer("fits", 3, "Timed fits per calibrator.", lower_bound=1, flag_values=values)


def methods() -> list[str]:
    """The methods of an experiment that train the decoder alone."""
    return [name for name in experiment.METHODS if settings(name, 1).model.backbone == configs.ModelConfig().backbone]


def settings(method: str, batch_size: int) -> configs.TrainConfig:
    """What an experiment would train for a method."""
    config = configs.TrainConfig(batch_size=batch_size)
    return experiment.Plan((method,), (), (), "", folds.Options(), config).settings(method, {})


def step_rows(decoder: str, names: Sequence[str], rounds: int) -> list[measure.Row]:
    """One row per method, the first of which is what ratios are to; no seconds with ``rounds`` 0."""
    with tempfile.TemporaryDirectory() as folder:
        network = scaling.vit_decoder(Path(folder)) if decoder == "vit" else backbone.load_backbone(None, 1)
    with futures.ThreadPoolExecutor(measure.cores()) as pool:  # compiling takes most of the time
        steps = list(pool.map(lambda name: _step(network, settings(name, BATCH[decoder])), names))
    seconds = measure.interleave(dict(zip(names, (call for _, call in steps), strict=True)), rounds) if rounds else {}
    rows: list[measure.Row] = []
    for name, (found, _) in zip(names, steps, strict=True):
        row = {"decoder": decoder, "method": name, "batch": BATCH[decoder], "classes": 1, "rounds": rounds}
        row |= {"flops": found.flops, "temporary_bytes": found.temporary}
        row |= {"seconds": statistics.median(seconds[name]) if rounds else None}
        row |= {"seconds_spread": measure.spread(seconds[name]) if rounds else None}
        rows.append(row)
        for key in ("flops", "temporary_bytes", "seconds"):
            row[f"{key}_ratio"] = row[key] / rows[0][key] if row[key] else None
        row |= measure.machine()
    return rows


def _step(network: Backbone, config: configs.TrainConfig) -> tuple[cost.Cost, Callable[[], None]]:
    """The cost of a run's training step, and a call that takes the next one."""
    mesh, optimizer = sharding.device_mesh(), train_state.make_optimizer(config)
    batch = sharding.shard_batch(mesh, _batch(config, network))
    task, penalised = configs.loss_expressions(config, 1)
    objective = step_module.Objective(expression.parse(task), losses.get(penalised), losses.get("cmp"))
    with_lagrangian = configs.METHODS[config.method].lagrangian
    lagrangian = train_state.init_lagrangian(config, network, batch) if with_lagrangian else None
    state = train_state.init_state(network.trainable, optimizer, mesh, lagrangian)
    step = step_module.make_train_step(network.decode, network.frozen, objective, config, optimizer, mesh)
    compiled, frozen = step.lower(state, batch).compile(), sharding.replicate(mesh, network.frozen)
    return cost.of(compiled), train_step.Steps(lambda state, batch: compiled(state, frozen, batch), state, batch)


def _batch(config: configs.TrainConfig, network: Backbone) -> Batch:
    """Random features, labels 0 and 1, and prompts of the method's kind."""
    rng = np.random.default_rng(0)

    def draw(array: jax.ShapeDtypeStruct) -> jax.Array:
        if array.dtype == jnp.int32:
            return jnp.asarray(rng.integers(0, 2, array.shape), array.dtype)
        if array.dtype == jnp.float32:  # coordinates
            return jnp.asarray(rng.uniform(0, network.image_size, array.shape), array.dtype)
        return jnp.asarray(rng.normal(size=array.shape), array.dtype)

    return jax.tree.map(draw, cost.abstract_batch(config, network, 1))


def fit_rows(fits: int, step_seconds: float) -> Iterator[measure.Row]:
    """One row per calibrator that an experiment knows, on an over-confident model's logits of one class."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(IMAGES, SIDE, SIDE, 1))
    labels = (rng.random(z.shape) < 1 / (1 + np.exp(-z)))[..., 0].astype(int)
    logits, image = (2 * z).astype(np.float32), rng.random((IMAGES, SIDE, SIDE, 3), np.float32)
    calls: dict[str, Callable[[], Any]] = {}
    for suffix, name in experiment.CALIBRATORS.items():
        calibrator = calibrators.get(name)
        options = {"image": image, "region": np.ones(labels.shape, bool)} if calibrator.spatial else {}
        calls[suffix] = functools.partial(calibrator.fit, logits, labels, **options)
    for suffix, times in measure.interleave(calls, fits, warmups=0).items():
        seconds = statistics.median(times)
        found = {"calibrator": f"+{suffix}", "voxels": labels.size, "seconds": seconds, "fits": fits}
        found |= {"seconds_spread": measure.spread(times), "steps": seconds / step_seconds}
        yield found | measure.machine()


def texts(rows: Sequence[measure.Row]) -> list[str]:
    """The tables of the page, from the rows of the JSON file."""
    by_method: dict[str, measure.Row] = {}
    keys = {"FLOPs": "flops_ratio", "bytes": "temporary_bytes_ratio", "seconds": "seconds_ratio"}
    for row in (row for row in rows if "decoder" in row):
        line = by_method.setdefault(row["method"], {"method": f"`{row['method']}`"})
        line |= {f"{row['decoder']} {word}": row[key] for word, key in keys.items()}
    found = ["\n".join(measure.table(list(by_method.values()), COLUMNS))]
    fits = [row | {"in SAM-FT steps": row["steps"]} for row in rows if "calibrator" in row]
    return [*found, "\n".join(measure.table(fits, FIT_COLUMNS))] if fits else found


def run(options: flags.FlagValues) -> list[measure.Row]:
    """Measure, print, write."""
    if options.page:
        files.split_page(Path(options.page), MARKS)  # refused before the work
    if options.rounds:
        measure.warn_if_busy()
    rows = [row for decoder in BATCH for row in step_rows(decoder, methods(), options.rounds)]
    if options.rounds:
        rows += fit_rows(options.fits, rows[0]["seconds"])
    print("\n\n".join(texts(rows)), flush=True)
    measure.publish(options, MARKS, texts(rows), rows)
    return rows


if __name__ == "__main__":
    measure.main(define_flags, run)
