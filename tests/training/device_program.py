"""Toy runs on several devices, as a program of its own: devices are made at start-up.

python -m tests.training.device_program FOLDER RUNS [COORDINATOR PROCESSES PROCESS_ID]

RUNS is a JSON list of objects: ``name`` (of the run folder in FOLDER), ``devices``, ``config`` (its changes),
``resume`` and ``until`` (after how many steps it is stopped; 0: never).  Several processes share all devices.
"""

import json
import pathlib
import signal
import sys

import jax

from calsegx import features, sharding
from calsegx.training import interruption
from tests.training import toy


class StopAfter(interruption.Stop):
    """Asked to stop after so many steps of this part of the run."""

    def __init__(self, steps):
        super().__init__()
        self._left = steps

    def requested_anywhere(self):
        self._left -= 1
        self._signal = signal.SIGTERM
        return self._left == 0


def main(folder, runs, *distributed):
    if distributed:
        coordinator, processes, process_id = distributed
        jax.distributed.initialize(coordinator, int(processes), int(process_id))
    root = pathlib.Path(folder)
    if jax.process_index() == 0 and not (root / "cache").exists():
        toy.fill(root / "cache")
    sharding.wait_for_all("toy cache")
    cache = features.FeatureCache.open(root / "cache", toy.SIGNATURE)
    for run in json.loads(runs):
        mesh = sharding.device_mesh(jax.devices()[: run["devices"]])
        stop = StopAfter(run["until"]) if run["until"] else None
        try:
            toy.train(toy.config(**run["config"]), cache, root / run["name"], mesh, resume=run["resume"], stop=stop)
        except interruption.Interrupted as stopped:
            print(stopped)


if __name__ == "__main__":
    main(*sys.argv[1:])
