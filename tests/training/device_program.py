"""Toy runs on some devices, as a program of its own, since devices are made at start-up.

python -m tests.training.device_program FOLDER RUNS [COORDINATOR PROCESSES PROCESS_ID]

RUNS is JSON: a list of ``[name, number of devices, config changes, resume]``.  Each leaves ``FOLDER/name`` behind, like
``launch.train``; several processes share all their devices.
"""

import json
import pathlib
import sys

import jax

from calsegx import sharding
from calsegx.training import state  # noqa: F401  (everything is imported before the processes meet)
from tests.training import toy


def main(folder: str, runs: str, *distributed: str) -> None:
    """Run them one after the other."""
    if distributed:
        coordinator, processes, process_id = distributed
        jax.distributed.initialize(coordinator, int(processes), int(process_id))
    root = pathlib.Path(folder)
    if jax.process_index() == 0 and not (root / "cache").exists():
        toy.fill(root / "cache")
    sharding.wait_for_all("toy cache")
    cache = toy.features.FeatureCache.open(root / "cache", toy.SIGNATURE)
    for name, devices, changes, resume in json.loads(runs):
        mesh = sharding.device_mesh(jax.devices()[:devices])
        summary = toy.train(toy.config(**changes), cache, root / name, mesh, resume=resume)
        print(jax.process_index(), name, mesh.size, summary["loss"])


if __name__ == "__main__":
    main(*sys.argv[1:])
