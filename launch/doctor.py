"""Say what this machine has, and what a run would need, before anything starts.

python -m launch.doctor
python -m launch.doctor --config.data.root=DATASET --config.model.weights=FOLDER --workdir=runs/x

The first prints versions and devices.  With a dataset, and the flags of ``launch.train``, the second also compiles the
run's real training step and encoder for these devices, without running them, and counts the slices by reading the
cases' label files.  Nothing is written but compiled programs.  The exit code is 1 where the run cannot work.
"""

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags

from calsegx import configs, features, sharding
from calsegx.interfaces import Case, InputError
from calsegx.training import cache_jobs, checkpoints, cost
from launch import common, components

PACKAGES = ("calsegx", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorstore", "numpy")
MEGA, GIGA = 1e6, 1e9


def describe_machine(nodes: Path = Path("/dev")) -> list[str]:
    """Lines about versions and devices; ``nodes`` is where the system lists its own."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    lines = [f"Versions: Python {platform.python_version()}, {versions}", f"Processes: {jax.process_count()}"]
    kinds = [device.device_kind for device in jax.devices()]
    lines += [f"Devices: {kinds.count(kind)} x {kind}{_memory(kind)}" for kind in dict.fromkeys(kinds)]
    gpus = sorted(path.name for path in nodes.glob("nvidia[0-9]*"))
    if jax.default_backend() == "cpu" and (gpus or shutil.which("nvidia-smi")):
        chosen = os.environ.get("JAX_PLATFORMS")
        why = f"JAX_PLATFORMS={chosen} asks for that" if chosen else "pip install 'jax[cuda13]' brings jax's GPU wheels"
        seen = f"{nodes / gpus[0]}" if gpus else "nvidia-smi"
        lines.append(f"warning: JAX uses the CPU although this machine has an NVIDIA GPU ({seen}); {why}")
    return lines


def describe_run(config: configs.TrainConfig, workdir: Path) -> tuple[list[str], list[str]]:
    """Lines about what a run of ``config`` would need, and sentences about why it cannot work.

    Raises:
        InputError: for what the run itself would refuse before its first step: flags, dataset, weights.
    """
    parts = components.build(config)
    objective = components.objective(config, len(parts.class_map.names))
    mesh = sharding.device_mesh()
    lines, problems = [], []

    train, val = parts.select("train"), parts.select("val")
    each = features.size_bytes(1, parts.backbone.feature_shape) + int(np.prod(parts.backbone.logit_shape))
    root = Path(config.data.cache) if config.data.cache else workdir / "features"
    views = 0 if config.data.online else config.data.views
    slices, missing = count_slices(parts, root, [(train, views), (val, 1)])
    needed, free = missing * each, shutil.disk_usage(_existing(root)).free
    saved = checkpoints.whole_steps(workdir / "checkpoints")
    if saved:
        lines.append(f"Run folder {workdir}: holds a run, saved at step {max(saved)}; only --resume goes on there")
    lines.append(f"Cases: {len(train)} to train on and {len(val)} to validate on, {slices} slices (labels were read)")
    lines.append(
        f"Feature cache {root}: {missing} views of slices to compute, {needed / GIGA:.3f} GB of {free / GIGA:.1f} GB "
        "free"
    )
    if needed > free:
        problems.append(
            f"The feature cache needs {needed / GIGA:.3f} GB and {_existing(root)} has {free / GIGA:.3f} GB free; name "
            "another folder with --config.data.cache or take fewer --config.data.views."
        )

    batch, encoder = cost.of_encoder_call(config, parts.backbone, components.encoder_mesh(config))
    lines.append(f"Encoder, {batch} slices a call: {_needs(encoder)}")
    problems += _too_large("The encoder", encoder, "--config.model.encoder_batch=1 or more --config.model.shards")
    try:
        sharding.check_batch_size(mesh, config.batch_size)
    except InputError as error:
        return lines, [*problems, str(error)]
    step = cost.of_train_step(config, parts.backbone, objective, mesh, len(parts.class_map.names))
    lines.append(f"Training step ({config.method}), {config.batch_size // mesh.size} slices a device: {_needs(step)}")
    problems += _too_large("The training step", step, "--config.microbatch=1")
    gradients = sum(leaf.nbytes for leaf in jax.tree.leaves(parts.backbone.trainable))
    exchanged = ", ".join(f"{kind} of {sum(sizes) / MEGA:.3f} MB" for kind, sizes in step.collectives.items())
    exchanged = exchanged if mesh.size > 1 else "none on one device"
    lines.append(f"Exchange between devices, a step: {exchanged}; the gradients are {gradients / MEGA:.3f} MB")
    return lines, problems


def count_slices(
    parts: components.Components, root: Path, groups: Sequence[tuple[Sequence[Case], int]]
) -> tuple[int, int]:
    """Slices that are encoded, and views of them that the cache at ``root`` lacks."""
    slices = missing = 0
    for cases, views in groups:
        for case in (case for case in cases if case.label is not None):
            count = parts.count_slices(case)
            names = cache_jobs.view_names(views)
            slices += count
            missing += count * sum(not (root / case.case_id / view / "done.json").exists() for view in names)
    return slices, missing


def _needs(found: cost.Cost) -> str:
    memory = f"{found.held / MEGA:.1f} MB held and {found.temporary / MEGA:.1f} MB while it runs, per device"
    return f"{memory}; {found.flops / GIGA:.2f} GFLOP per device"


def _too_large(what: str, found: cost.Cost, advice: str) -> list[str]:
    limits = [limit for device in jax.local_devices() if (limit := _limit(device))]
    needed = found.held + found.temporary
    if not limits or needed <= min(limits):
        return []
    return [
        f"{what} needs {needed / GIGA:.2f} GB of memory and a device has {min(limits) / GIGA:.2f} GB; set {advice}, or "
        "use more devices."
    ]


# Ignored: as in calsegx.sharding.
def _limit(device: jax.Device) -> int | None:  # pyright: ignore[reportInvalidTypeForm]
    return (device.memory_stats() or {}).get("bytes_limit")


def _memory(kind: str) -> str:
    limits = [_limit(device) for device in jax.local_devices() if device.device_kind == kind]
    return f", {limits[0] / GIGA:.1f} GB each" if limits and limits[0] else ""


def _existing(folder: Path) -> Path:
    """The folder, or the nearest of its parents that is there."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def define_flags() -> None:
    """``--config.*``, ``--workdir`` and those of several processes."""
    common.define_config()
    common.define_processes()
    flags.DEFINE_string("workdir", ".", "Where the run would be; its cache is <workdir>/features.")


def main() -> None:
    """Print everything; fail where the run cannot work."""
    say: Callable[[str], None] = print if jax.process_index() == 0 else lambda line: None
    for line in describe_machine():
        say(line)
    config = flags.FLAGS.config
    if not config.data.root:
        return
    lines, problems = describe_run(config, Path(flags.FLAGS.workdir))
    for line in lines:
        say(line)
    if problems:
        raise InputError(" ".join(problems))
    say("The run can start.")


if __name__ == "__main__":
    common.run(main, define_flags)
