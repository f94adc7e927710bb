"""Train the mask decoder on cached features of one domain.

python -m launch.train --config.data.root=DATASET --config.data.source=A --config.method=calsam --workdir=runs/x

Methods: sam_ft (task loss), sam_fip (+ Fisher penalty), sam_cmp (+ confidence penalty), calsam (both).  ``--resume``
goes on from the newest checkpoint.  The run folder holds ``config.json``, ``metrics.jsonl``, ``checkpoints/`` and,
at the end, ``model/``, which ``launch.evaluate`` and ``launch.predict`` read.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from absl import flags

from calsegx import configs, files, sharding
from calsegx.interfaces import InputError
from calsegx.training import checkpoints, loop
from launch import common, components


def train(config: configs.TrainConfig, workdir: Path, resume: bool = False) -> dict[str, Any]:
    """One run: fill the cache where needed, train, save the model; returns the run's summary."""
    if resume and not (workdir / "checkpoints").is_dir():
        raise InputError(f"--resume found no run in {workdir}; name the --workdir of the run to go on with.")
    # Absolute, so that dataset, cache and weights are found again from anywhere.
    data = dataclasses.replace(config.data, root=_absolute(config.data.root), cache=_absolute(config.data.cache))
    model = dataclasses.replace(config.model, weights=_absolute(config.model.weights))
    config = dataclasses.replace(config, data=data, model=model)
    parts = components.build(config)
    train_cases, val_cases = parts.select("train"), parts.select("val")
    num_classes = len(parts.class_map.names)
    task_loss, penalised_loss, confidence_loss = components.loss_terms(config, num_classes)
    mesh = sharding.data_mesh()
    sharding.check_batch_size(mesh, config.batch_size)
    with checkpoints.Checkpoints(workdir / "checkpoints") as saved:
        saved.check_start(resume)  # before hours of encoding, and before config.json is replaced

    cache = components.feature_cache(parts, workdir)
    components.fill_cache(parts, cache, {"train": config.data.views, "val": 1})

    if not resume:  # a resumed run may be refused for other settings, and keeps the file it has
        files.write_atomically(workdir / "config.json", json.dumps(configs.to_dict(config), indent=2) + "\n")
    return loop.train(
        config,
        parts.backbone,
        cache,
        [case.case_id for case in train_cases],
        [case.case_id for case in val_cases],
        workdir,
        task_loss=task_loss,
        penalised_loss=penalised_loss,
        confidence_loss=confidence_loss,
        mesh=mesh,
        resume=resume,
        metadata=components.metadata(parts, cache, {"train": train_cases, "val": val_cases}),
    )


def _absolute(path: str) -> str:
    return str(Path(path).resolve()) if path else ""


def define_flags() -> None:
    """``--config.*``, ``--workdir``, ``--resume``."""
    common.define_config()
    common.define_folder("workdir", "Run folder.")
    flags.DEFINE_bool("resume", False, "Go on from the newest checkpoint in --workdir.")


def main() -> None:
    """Train, and say what came out."""
    config = flags.FLAGS.config
    summary = train(config, Path(flags.FLAGS.workdir), flags.FLAGS.resume)
    validation = summary["validation_loss"]
    print(
        f"Trained {config.method} for {summary['steps']} steps in {summary['seconds']:.0f} s"
        + (f", validation loss {validation:.4f}" if validation is not None else "")
        + f"; the model is in {summary['model']}"
    )


if __name__ == "__main__":
    common.run(main, define_flags)
