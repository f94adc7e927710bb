"""Tables 2 and 3 of the Fisher benchmark: the frozen encoder inside the step, and online against cached training."""

import functools
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from absl import flags

from benchmarks import fisher_problem as problems

# isort: split
import jax
import numpy as np
import torch

from benchmarks import encoder_problem, measure, torch_encoder
from calsegx import features
from calsegx.interfaces import Prompts
from calsegx.models import sam
from calsegx.models.sam import presets

MODES = ("plain", "exact")
COLUMNS_2 = {"framework": "", "encoder": "", "mode": "", "seconds": ".3f", "ratio_to_plain": ".4f", "overhead": ".2%"}
COLUMNS_2 |= {"method": ""}
COLUMNS_3 = {"encoder": "", "training": "", "mode": "", "seconds": ".0f", "ratio_to_online": ".4f"}
COLUMNS_3 |= {"disk_bytes": ".3g", "method": ""}


class Parts(NamedTuple):
    """Median seconds of one call: the encoder, decoder steps, and whole steps; keys say what."""

    config: sam.SamConfig
    seconds: dict[str, float]
    spread: dict[str, list[float]]
    rounds: int


@functools.cache  # tables 2 and 3 are made of the same parts
def parts(encoder: str, training_batch: int, rounds: int) -> Parts:
    """Measure an encoder, batch 1, with the decoder steps around it, all taking turns."""
    print(f"{encoder}: compiling and timing encoder and steps", file=sys.stderr, flush=True)
    config = presets.PRESETS[encoder]
    grid = "tiny" if encoder == "tiny" else str(config.grid)
    one, many = problems.make(grid, 1, 1), problems.make(grid, training_batch, 1)
    params = {"image_encoder": jax.jit(lambda rng: sam.init(config, rng)["image_encoder"])(jax.random.key(0))}
    images = jax.random.normal(jax.random.key(1), (1, config.image_size, config.image_size, 3))
    calls = {"encode": _blocking(jax.jit(lambda p, x: sam.encode(config, p, x)), params, images)}
    for mode in MODES:
        for name, problem in (("step", one), ("training step", many)):
            positional, _ = problems.jax_arguments(problem)
            calls[f"{mode} {name}"] = _blocking(problems.jax_step(problem, mode), *positional)
        calls[f"{mode} whole"] = _blocking(_whole_step(config, one, mode), params, images)
        calls[f"torch {mode} step"] = problems.torch_step(one, "torch", mode)
    if config.stem == "patch":  # the benchmark's PyTorch encoder is Meta's
        calls["torch encode"] = _torch_encode(config, params, images)
    seconds = measure.interleave(calls, rounds)
    return Parts(
        config,
        {name: statistics.median(times) for name, times in seconds.items()},
        {name: measure.spread(times) for name, times in seconds.items()},
        rounds,
    )


def _whole_step(config: sam.SamConfig, problem: problems.Problem, mode: str) -> Callable[..., Any]:
    """Encoder and decoder step as one jitted function: the encoder's parameters are not differentiated."""
    step = problems.jax_step(problem, mode)

    def whole(encoder: Any, images: jax.Array, *arguments: Any) -> Any:
        decoder, _, *rest = arguments
        return step(decoder, sam.encode(config, encoder, images), *rest)

    positional, _ = problems.jax_arguments(problem)
    jitted = jax.jit(whole)
    return lambda encoder, images: jitted(encoder, images, *positional)


def _torch_encode(config: sam.SamConfig, params: Any, images: jax.Array) -> Callable[[], Any]:
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    state = torch_encoder.from_params(params, device=device)
    frames = torch.from_numpy(np.array(images)).to(device)

    def call() -> None:
        with torch.no_grad():
            torch_encoder.encode(config, state, frames, torch_encoder.meta)
        if device == "cuda":
            torch.cuda.synchronize()

    return call


def _blocking(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    return lambda: jax.block_until_ready(function(*arguments))


def table_2(options: flags.FlagValues) -> Iterator[measure.Row]:
    """The penalty's overhead on a step that contains the encoder: ``(encoder + exact) / (encoder + plain) - 1``."""
    for encoder in options.encoders:
        found = _parts(encoder, options)
        s = found.seconds
        whole = {mode: s[f"{mode} whole"] for mode in MODES}
        yield from _overhead(found, encoder, "jax", whole, "measured: one jitted step")
        summed = {mode: s["encode"] + s[f"{mode} step"] for mode in MODES}
        yield from _overhead(found, encoder, "jax", summed, "from parts: encoder + decoder step")
        if "torch encode" in s:
            summed = {mode: s["torch encode"] + s[f"torch {mode} step"] for mode in MODES}
            yield from _overhead(found, encoder, "torch", summed, "from parts: encoder + decoder step")
    if "vit_h" not in options.encoders:
        found, factor, method = _vit_h(options)
        summed = {mode: factor * found.seconds["encode"] + found.seconds[f"{mode} step"] for mode in MODES}
        yield from _overhead(found, "vit_h", "jax", summed, f"from parts: {method} + decoder step")


def _parts(encoder: str, options: flags.FlagValues) -> Parts:
    return parts(encoder, options.training_batch, options.whole_rounds)


def _vit_h(options: flags.FlagValues) -> tuple[Parts, float, str]:
    """What stands in for ViT-H's encoder: a measured one's seconds times the ratio of FLOPs."""
    encoder = options.encoders[-1]
    found = _parts(encoder, options)
    factor = encoder_problem.flops(presets.VIT_H, 1) / encoder_problem.flops(found.config, 1)
    return found, factor, f"{encoder} encoder x {factor:.2f} (FLOPs)"


def _overhead(
    found: Parts, encoder: str, framework: str, seconds: dict[str, float], method: str
) -> Iterator[measure.Row]:
    """A row for each mode."""
    for mode in MODES:
        ratio = seconds[mode] / seconds["plain"]
        yield _row(2, found, encoder, framework, mode, 1, seconds[mode]) | {
            "ratio_to_plain": ratio,
            "overhead": ratio - 1,
            "seconds_spread": found.spread[f"{mode} whole"] if method.startswith("measured") else None,
            "method": method,
        }


def table_3(options: flags.FlagValues) -> Iterator[measure.Row]:
    """Seconds of an epoch: encoding every slice, or reading what was encoded once."""
    slices, views, epochs, batch = options.slices, options.views, options.epochs, options.training_batch
    encoders = [(name, _parts(name, options), 1.0, "measured") for name in options.encoders]
    if "vit_h" not in options.encoders:
        found, factor, method = _vit_h(options)
        encoders.append(("vit_h", found, factor, method))
    for encoder, found, factor, method in encoders:
        shape = (found.config.grid, found.config.grid, found.config.out_chans)
        write, read = disk(shape, options.read_slices)
        encode = factor * found.seconds["encode"]
        for mode in MODES:
            step = found.seconds[f"{mode} training step"] / batch
            online = slices * (encode + step)
            cached = slices * (views * (encode + write) / epochs + read + step)
            for training, seconds in (("online", online), ("cached", cached)):
                yield _row(3, found, encoder, "jax", mode, batch, seconds) | {
                    "training": training,
                    "ratio_to_online": seconds / online,
                    "disk_bytes": features.size_bytes(slices * views, shape) if training == "cached" else 0,
                    "slices": slices,
                    "views": views,
                    "epochs": epochs,
                    "seconds_per_slice": {"encode": encode, "step": step, "write": write, "read": read},
                    "method": f"encoder {method}; step and disk measured",
                }


@functools.cache
def disk(shape: tuple[int, int, int], count: int) -> tuple[float, float]:
    """Seconds to write and to read the features and labels of one slice, as training does: shuffled, checked.

    The system forgets the files in between where it can be told to (Linux), so that reading means the disk.
    """
    rng = np.random.default_rng(0)
    values = rng.normal(size=(count, *shape)).astype(features.BFLOAT16)
    labels = np.zeros((count, 4 * shape[0], 4 * shape[1]), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        cache = features.FeatureCache.open(pathlib.Path(folder), {"benchmark": "fisher_penalty"})
        options = {"slices": np.arange(count), "prompts": Prompts(), "fingerprint": "0"}
        start = time.perf_counter()
        cache.write("case", "view0", features=values, labels=labels, **options)
        written = (time.perf_counter() - start) / count
        if hasattr(os, "posix_fadvise"):
            os.sync()
            for path in (path for path in pathlib.Path(folder).rglob("*") if path.is_file()):
                descriptor = os.open(path, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)
        start = time.perf_counter()
        for index in rng.permutation(count):
            cache.read_slices("case", "view0", int(index))
        return written, (time.perf_counter() - start) / count


def _row(table: int, found: Parts, encoder: str, framework: str, mode: str, batch: int, seconds: float) -> measure.Row:
    empty = dict.fromkeys(("ratio_to_plain", "ratio_to_pytorch", "flops", "peak_bytes", "gradient_error"))
    return {
        "table": table,
        "framework": framework,
        "encoder": encoder,
        "mode": mode,
        "grid": found.config.grid,
        "batch": batch,
        "classes": 1,
        "dtype": "float32",
        "seconds": seconds,
        **empty,
        "status": "measured",
        "rounds": found.rounds,
        **measure.machine(),
    }
