"""Checkpoints of a run: a guard around Orbax that knows which are whole, and never mixes runs.

Orbax makes a step's folder appear only when it is complete, but restores a flipped byte without a word and takes an
empty folder named ``7`` for a checkpoint.  So a step counts here when it has a **manifest**: the size and SHA-256 of
every file, written last.  Layout of ``<workdir>/checkpoints``::

    500/state/...       parameters, optimiser, step, multipliers: Orbax's own files
    500/record/...      configuration and fingerprints, JSON
    500/metrics/...     the validation loss
    500/manifest.json   written last; without it the step does not count
    500.set-aside       what a run found without a manifest or damaged, and moved out of the way
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent import futures
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from calsegx import configs, files, sharding
from calsegx.interfaces import InputError
from calsegx.training import state as train_state

FORMAT = 2
KEPT = 2  # the newest checkpoints, beside the best one
METRIC = "validation_loss"
_MANIFEST = "manifest.json"

# What may change between the parts of one run.  Whether the data and the weights are still the same is seen from their
# fingerprints, wherever they lie.
MAY_DIFFER = ("config.log_every", "config.save_every", "config.validate_every", "config.export", "config.tensorboard",
              "config.data.root", "config.data.splits", "config.data.cache", "config.data.workers",
              "config.model.weights", "config.model.encoder_batch", "config.model.shards")  # fmt: skip
MAY_ROUND = ("devices", "config.microbatch")  # may change too, but sums round differently then, which is said


class Checkpoints:
    """The checkpoints of one run folder, ``<workdir>/checkpoints``, for one training run.  A context manager.

    The caller holds the run folder's lock (``locks.exclusive``).  With several processes each of them makes one; what
    is said of writing is done by the first.

    Args:
        folder: where they are; it is created.
        say: told, from a thread, what happened: ``saved step 500``.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = lambda line: None):
        self.folder = Path(folder).absolute()
        self._say = say
        self.skipped: list[str] = []  # sentences about steps that do not count
        try:
            if jax.process_index() == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._set_aside()
            sharding.wait_for_all("checkpoints set aside")
            self._steps = whole_steps(self.folder)
        except OSError as error:
            raise self._unusable(error) from error
        best = preservation_policy.BestN(
            n=1, get_metric_fn=_metric, reverse=True, keep_checkpoints_without_metrics=False
        )
        keep = [preservation_policy.LatestN(KEPT), best]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(keep),
            best_fn=_metric,
            best_mode="min",
            cleanup_tmp_directories=True,
            # When a folder cannot be made in the background, Orbax waits ten minutes for it.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        except OSError as error:
            raise self._unusable(error) from error
        self._finisher = futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._finishing: futures.Future[None] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and jax.process_count() > 1:
            self._finisher.shutdown(wait=False)  # a save that goes on may wait for a process that is gone
            return
        try:
            if error is None:
                self.wait()
        finally:
            self._finisher.shutdown()  # also after an error: a save that goes on is finished
            with contextlib.suppress(OSError, ValueError, RuntimeError):  # of a save, which ``wait`` has raised already
                self._manager.close()

    def latest_step(self) -> int | None:
        """The newest step that was saved whole, or None."""
        return self._steps[-1] if self._steps else None

    def save(
        self,
        step: int,
        state: train_state.TrainState,
        record: Mapping[str, Any],
        memory: Mapping[str, Any],
        validation_loss: float | None = None,
    ) -> None:
        """Start to save: the state is copied when this returns, and on disk when ``say`` is told so or after ``wait``.

        Args:
            step: steps done.
            state: of the training.
            record: what must be the same when the run goes on: configuration and fingerprints, JSON values.
            memory: what the loop remembers beside the state, JSON values.
            validation_loss: of this step, if it is known; the checkpoint with the lowest is kept.

        Raises:
            InputError: when the disk refuses, now or for the save before.
        """
        self.wait()
        metrics = {METRIC: math.inf if validation_loss is None else float(validation_loss)}  # Orbax wants one each time
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            record=ocp.args.JsonSave({"record": dict(record), "memory": dict(memory)}),
        )
        try:
            self._manager.save(step, args=items, metrics=metrics, force=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise self._unwritten(step, error) from error
        self._finishing = self._finisher.submit(self._finish, step)

    def wait(self) -> None:
        """Return when what ``save`` started is on disk.

        Raises:
            InputError: when the disk refused.
        """
        if self._finishing is not None:
            finishing, self._finishing = self._finishing, None
            finishing.result()

    def restore(
        self,
        step: int,
        abstract: train_state.TrainState,
        record: Mapping[str, Any],
        *,
        allow_config_change: bool = False,
    ) -> tuple[train_state.TrainState, dict[str, Any], list[str]]:
        """Read the state saved at ``step``, with the shardings of ``abstract``, whatever the devices it was saved on.

        Returns:
            The state, the memory, and the changes of the record since then: ``config.seed was 3 and is 4``.

        Raises:
            InputError: when the run was saved with another ``record`` (the fields that differ are listed), unless
                ``allow_config_change``; when the state does not fit ``abstract``.
        """
        saved = self._read(step, record=ocp.args.JsonRestore()).record
        different = {k: v for k, v in configs.differences(saved["record"], record).items() if k not in MAY_DIFFER}
        refused = [_change(key, pair) for key, pair in different.items() if key not in MAY_ROUND]
        if refused and not allow_config_change:
            raise InputError(
                f"The run in {self.folder} cannot go on with other settings: {'; '.join(refused)}; restore them, start "
                "a new run in another --workdir, or go on all the same with --allow_config_change."
            )
        changes = [_change(key, pair) for key, pair in different.items()]
        return self._read(step, state=ocp.args.StandardRestore(abstract)).state, saved["memory"], changes

    def best_step(self) -> int | None:
        """The step with the lowest validation loss among those that are kept, or None."""
        losses = {step: loss for step in self._steps if (loss := validation_loss(self.folder / str(step))) is not None}
        return min(losses, key=lambda step: (losses[step], step)) if losses else None

    def _finish(self, step: int) -> None:
        try:
            self._manager.wait_until_finished()
            if jax.process_index() == 0:
                write_manifest(self.folder / str(step))
        except (OSError, ValueError, RuntimeError, InputError) as error:
            raise self._unwritten(step, error) from error
        self._steps = sorted(set(self._manager.all_steps()) & {*self._steps, step})
        self._say(f"saved step {step}")

    def _set_aside(self) -> None:
        """Move what is no whole checkpoint out of Orbax's way, and remember why."""
        for folder in _numbered(self.folder):
            problem = problem_of(folder)
            if problem:
                aside = folder.with_name(f"{folder.name}.set-aside")
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
                self.skipped.append(f"Step {folder.name} was skipped: {problem}; it was moved to {aside.name}.")

    def _read(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"The checkpoint {self.folder / str(step)} cannot be read into this run ({_short(error)}); go on with "
                "the settings it was saved with, or start a new run in another --workdir."
            ) from error

    def _unusable(self, error: OSError) -> InputError:
        return InputError(f"The checkpoint folder {self.folder} cannot be used ({error}); name a writable --workdir.")

    def _unwritten(self, step: int, error: Exception) -> InputError:
        latest = self.latest_step()
        kept = f"; step {latest} is kept" if latest is not None else ""
        return InputError(
            f"The checkpoint of step {step} cannot be written to {self.folder} ({_short(error)}){kept}; free some "
            "space, then go on from the last checkpoint with --resume."
        )


def check_start(folder: Path, resume: bool) -> int:
    """Check that the checkpoints in ``folder`` fit what the user asked for, before any work; changes nothing.

    Returns:
        The steps done: those of the newest whole checkpoint, or 0 for a new run.

    Raises:
        InputError: ``resume`` without a checkpoint, or a new run where there is one.
    """
    steps = whole_steps(folder)
    if resume and not steps:
        damaged = [f"step {entry.name}: {problem_of(entry)}" for entry in _numbered(folder)]
        found = f"found no whole checkpoint in {folder} ({'; '.join(damaged)})" if damaged else (
            f"found no checkpoint in {folder}")  # fmt: skip
        raise InputError(
            f"--resume {found}; name the --workdir of the run to go on with, or leave --resume out to start afresh, "
            "which --resume never does."
        )
    if steps and not resume:
        raise InputError(
            f"{folder} already holds a run, saved at step {max(steps)}; go on with it with --resume, or name another "
            "--workdir."
        )
    return max(steps, default=0)


def whole_steps(folder: Path) -> list[int]:
    """The steps in ``folder`` whose files are all as their manifest says."""
    return [int(entry.name) for entry in _numbered(folder) if problem_of(entry) is None]


def problem_of(folder: Path) -> str | None:
    """What is wrong with a step's folder, or None: every file has the size and SHA-256 that were recorded."""
    try:
        content = files.unseal((folder / _MANIFEST).read_bytes())
        if content["format"] != FORMAT:
            return f"it has the format {content['format']}, this version of calsegx reads {FORMAT}"
        recorded = content["files"]
        for name, (size, sha256) in recorded.items():
            path = folder / name
            if not path.is_file():
                return f"its file {name} is missing"
            if path.stat().st_size != size or _file_digest(path) != sha256:
                return f"its file {name} is not what was saved"
        extra = sorted({str(path.relative_to(folder)) for path in _files(folder)} - {*recorded, _MANIFEST})
        return f"it holds {extra[0]}, which was not saved with it" if extra else None
    except FileNotFoundError:
        return "its saving was not finished"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {_MANIFEST} cannot be read ({error})"


def write_manifest(folder: Path) -> None:
    """Write ``manifest.json`` of a step that is complete, after its files are on disk for good."""
    listed = {}
    for path in _files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        listed[str(path.relative_to(folder))] = [path.stat().st_size, _file_digest(path)]
    files.write_atomically(folder / _MANIFEST, files.seal({"format": FORMAT, "files": listed}))


def validation_loss(folder: Path) -> float | None:
    """The validation loss that was saved with a step, or None."""
    loss = json.loads((folder / "metrics" / "metrics").read_text())[METRIC]
    return loss if math.isfinite(loss) else None


def _change(key: str, pair: tuple[Any, Any]) -> str:
    rounding = " (sums round differently)" if key in MAY_ROUND else ""
    return f"{key} was {pair[0]!r} and is {pair[1]!r}{rounding}"


def _metric(metrics: Mapping[str, float]) -> float:
    return metrics[METRIC]


def _numbered(folder: Path) -> list[Path]:
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted(
        (entry for entry in entries if re.fullmatch("0|[1-9][0-9]*", entry.name)), key=lambda entry: int(entry.name)
    )


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _short(error: Exception) -> str:
    """The first line: Orbax and TensorStore add pages of their own state."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
