"""Train the mask decoder on cached features of one domain.

python -m launch.train --config.data.root=DATASET --config.data.source=A --config.method=calsam --workdir=runs/x

Methods: sam_ft (task loss), sam_fip (+ Fisher penalty), sam_cmp (+ confidence penalty), calsam (both), crac (CRaC's
augmented Lagrangian).  The task loss is any sum of losses: --config.loss="sam + 0.1*mbls_penalty(margin=5)".
With ``--config.data.online`` training slices are read, augmented and encoded anew in every step (docs/data/cache.md).
``--resume`` goes on from the newest whole checkpoint.  The run folder holds ``config.json``, ``metrics.jsonl``,
``checkpoints/`` and, at the end, ``model/``, which ``launch.evaluate`` and ``launch.predict`` read.  SIGTERM, SIGINT
and SIGUSR1 finish the step, save it and end; docs/failure-contract.md says what is promised, docs/scaling.md how to use
several devices and processes.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from calsegx import configs, features, files, locks, sharding
from calsegx.data import images, training_domain
from calsegx.interfaces import Case, InputError
from calsegx.training import checkpoints, interruption, loop, progress
from launch import common, components


def train(
    config: configs.TrainConfig, workdir: Path, resume: bool = False, allow_config_change: bool = False
) -> dict[str, Any]:
    """One run: fill the cache where needed, train, save the model; returns the run's summary.

    Of several processes the first holds the run folder's lock for all.
    """
    if resume and not (workdir / "checkpoints").is_dir():
        raise InputError(f"--resume found no run in {workdir}; name the --workdir of the run to go on with.")
    config = with_absolute_paths(config)
    parts = components.build(config)
    files.check_outside(workdir, parts.dataset.root, "--workdir")
    train_cases, val_cases = parts.select("train"), parts.select("val")
    objective = components.objective(config, len(parts.class_map.names))
    mesh = sharding.device_mesh()
    sharding.check_batch_size(mesh, config.batch_size)

    first = jax.process_index() == 0
    if first:
        components.note_coarse_axis(parts, train_cases)
    with locks.exclusive(workdir) if first else contextlib.nullcontext(), interruption.Stop() as stop:
        checkpoints.check_start(workdir / "checkpoints", resume)  # before hours of encoding
        cache = components.feature_cache(parts, workdir)
        online, fingerprints, cached = None, {}, {"train": config.data.views, "val": 1}
        if config.data.online:
            online, fingerprints = components.train_online(parts, train_cases, stop)
            train_cases, cached = tuple(c for c in train_cases if c.case_id in fingerprints), {"val": 1}
        components.fill_cache(parts, cache, cached, stop)
        from_cache = [case.case_id for case in (*train_cases, *val_cases) if case.case_id not in fingerprints]
        fingerprints |= {case_id: cache.fingerprint(case_id, "view0") for case_id in from_cache}
        domain = training_domain.describe(looks(parts, None if online else cache, train_cases, stop)) if first else None
        if first and not resume:  # a resumed run may be refused for other settings, and keeps the file it has
            files.write_atomically(workdir / "config.json", json.dumps(configs.to_dict(config), indent=2) + "\n")
        summary = loop.train(
            config,
            parts.backbone,
            cache,
            [case.case_id for case in train_cases],
            [case.case_id for case in val_cases],
            workdir,
            objective=objective,
            mesh=mesh,
            resume=resume,
            metadata={
                **components.metadata(parts, fingerprints.__getitem__, {"train": train_cases, "val": val_cases}),
                "training_domain": domain,
            },
            stop=stop,
            allow_config_change=allow_config_change,
            online=online,
        )
        if first and resume and allow_config_change:
            files.write_atomically(workdir / "config.json", json.dumps(configs.to_dict(config), indent=2) + "\n")
    return summary


def looks(
    parts: components.Components, cache: features.FeatureCache | None, cases: Sequence[Case], stop: interruption.Stop
) -> Iterator[training_domain.Look]:
    """What some of the training cases look like; images are read only where the cache does not know.

    Without a cache nobody knows how the encoder sees them; one that is trained too sees them differently at every step.
    """
    chosen = training_domain.chosen(cases)
    with progress.Progress("Looking at training cases", len(chosen), "cases", quiet=cache is not None) as bar:
        for done, case in enumerate(chosen, start=1):
            stop.check("no step was trained by this call.")
            known = cache.intensities(case.case_id, "view0") if cache else None
            slices = None
            if cache is not None and parts.config.model.backbone not in configs.WHOLE:
                grid = images.read_reference(case.images[parts.channels[0]], parts.config.data.slice_axis)
                encoded = cache.read_case(case.case_id, "view0").features
                slices = training_domain.slice_vectors(encoded, parts.geometry(grid))
            yield training_domain.Look(parts.prepare(case).intensities if known is None else known, slices)
            bar.update(done, case.case_id)


def with_absolute_paths(config: configs.TrainConfig) -> configs.TrainConfig:
    """The same configuration, whose dataset, cache, folds and weights are found again from anywhere."""
    paths = {name: _absolute(getattr(config.data, name)) for name in ("root", "cache", "splits")}
    data = dataclasses.replace(config.data, **paths)
    model = dataclasses.replace(config.model, weights=_absolute(config.model.weights))
    return dataclasses.replace(config, data=data, model=model)


def _absolute(path: str) -> str:
    return str(Path(path).resolve()) if path else ""


def define_flags() -> None:
    """``--config.*``, ``--workdir``, ``--resume``, ``--allow_config_change`` and those of several processes."""
    common.define_config()
    common.define_processes()
    common.define_folder("workdir", "Run folder.")
    flags.DEFINE_bool("resume", False, "Go on from the newest whole checkpoint in --workdir.")
    flags.DEFINE_bool("allow_config_change", False, "Go on with --resume although settings or data have changed.")


def main() -> None:
    """Train, and say what came out."""
    config = flags.FLAGS.config
    summary = train(config, Path(flags.FLAGS.workdir), flags.FLAGS.resume, flags.FLAGS.allow_config_change)
    if jax.process_index():
        return
    validation = summary["validation_loss"]
    print(
        f"Trained {configs.method_name(config)} for {summary['steps']} steps in {summary['seconds']:.0f} s"
        + (f", validation loss {validation:.4f}" if validation is not None else "")
        + f"; the model{_of_step(summary)} is in {summary['model']}"
    )


def _of_step(summary: dict[str, Any]) -> str:
    return "" if summary["exported_step"] == summary["steps"] else f" of step {summary['exported_step']}"


if __name__ == "__main__":
    common.run(main, define_flags)
