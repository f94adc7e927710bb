"""The tiny job of the fault proofs as a process: its data, how it starts, and what it leaves behind."""

import contextlib
import dataclasses
import importlib
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent.parent
# A server process that has imported everything and started nothing: a job forked from it starts as a script does,
# without the seconds of importing.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["launch.train", "launch.evaluate", "tests.faults.jobs"])


class Failure(AssertionError):
    """Something did not hold that the contract promises."""


def expect(holds: Any, sentence: str) -> None:
    """Raise ``Failure`` with ``sentence`` unless ``holds``."""
    if not holds:
        raise Failure(sentence)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A phantom dataset, a very small SAM with random weights, and a cache of compiled functions, in one folder."""

    folder: Path
    compiled: Path

    @property
    def dataset(self) -> Path:
        return self.folder / "Dataset001_Phantom"

    @property
    def weights(self) -> Path:
        return self.folder / "sam"

    def arguments(self, workdir: Path, method: str = "calsam", **options: Any) -> list[str]:
        """The command line of ``launch.train``: 12 steps, a checkpoint after every third."""
        values = {
            "data.root": self.dataset,
            "data.source": "A",
            "data.channels": "T1c,T2,FLAIR",
            "data.classes": "whole_tumour=1+2+3",
            "model.weights": self.weights,
            "method": method,
            "batch_size": 4,
            "steps": 12,
            "log_every": 1,
            "save_every": 3,
            "validate_every": 4,
            **options,
        }
        return [*(f"--config.{name}={value}" for name, value in values.items()), f"--workdir={workdir}"]


def make_inputs(folder: Path) -> Inputs:
    """Write them, in a process of their own; compiled functions are kept where the environment says, or with them."""
    inputs = Inputs(folder, Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or folder / "compiled"))
    process = _processes.Process(target=_make, args=(inputs,))
    process.start()
    process.join()
    expect(process.exitcode == 0, "the inputs could not be made")
    return inputs


def _make(inputs: Inputs) -> None:
    import jax

    from calsegx.data import phantoms
    from calsegx.models.sam import weights
    from tests.launch.conftest import SMALL

    phantoms.write_dataset(inputs.dataset, train=3, val=1, test=2, scale=0.35, processes=1)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(scale=0.1, size=leaf.shape), weights.template(SMALL))
    weights.save(inputs.weights, SMALL, params, "Random numbers. Not a medical device.")


class Job:
    """A script of ``launch`` that runs in a process of its own and prints to ``<workdir>.log``."""

    def __init__(
        self,
        inputs: Inputs,
        arguments: Sequence[str],
        *,
        script: str = "launch.train",
        before: Callable[[], None] | None = None,
    ):
        """``before`` (which can be pickled) is called in the process before the script."""
        number, output = tempfile.mkstemp(suffix=".log", dir=inputs.folder)
        os.close(number)
        self._output = Path(output)
        self.process = _processes.Process(
            target=_run, args=(str(inputs.compiled), script, list(arguments), output, before)
        )
        self.process.start()

    def said(self) -> str:
        """What it printed so far, to both streams."""
        return self._output.read_text(errors="replace")

    def send(self, number: int) -> None:
        """Send a signal, if it has not ended by itself."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def wait(self, seconds: float = 300) -> int:
        """Its exit code, or minus the number of the signal that ended it."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise Failure(f"still running after {seconds} s; it said: {self.said()[-500:]}")
        return self.process.exitcode

    def wait_for(self, text: str, seconds: float = 300) -> bool:
        """Wait until it has printed ``text``, or False when it ends without."""
        end = time.monotonic() + seconds
        while text not in self.said():
            if self.process.exitcode is not None or time.monotonic() > end:
                return text in self.said()
            time.sleep(0.005)
        return True


def run(inputs: Inputs, arguments: Sequence[str], **options: Any) -> tuple[int, str]:
    """A whole job: its exit code and what it said."""
    job = Job(inputs, arguments, **options)
    return job.wait(), job.said()


def _run(compiled: str, script: str, arguments: list[str], output: str, before: Callable[[], None] | None) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    import jax

    # Keep every compiled function, also the fast ones: a start is then a matter of seconds.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", compiled)
    from launch import common

    common._enable_compilation_cache = lambda: jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if before is not None:
        before()
    sys.argv = [script, *arguments]
    module = importlib.import_module(script)
    common.run(module.main, module.define_flags)
