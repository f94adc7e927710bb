"""Checkpoints of a run: a guard around Orbax that refuses to overwrite, to start afresh or to mix runs."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from calsegx import configs
from calsegx.interfaces import InputError
from calsegx.training import state as train_state

KEPT = 2  # the newest checkpoints; the one before the newest is there when the newest turns out to be damaged

# What may change between the parts of one run: none of it changes a number of the result.  Whether the data
# and the weights are still the same is seen from their fingerprints, wherever they lie.
MAY_DIFFER = ("config.log_every", "config.save_every", "config.validate_every", "config.data.root",
              "config.data.cache", "config.model.weights", "config.model.encoder_batch", "devices")  # fmt: skip


class Checkpoints:
    """The checkpoints of one run folder, ``<workdir>/checkpoints``.  A context manager.

    Args:
        folder: where they are; it is created.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.LatestN(KEPT), cleanup_tmp_directories=True
        )
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        except OSError as error:
            raise InputError(
                f"The checkpoint folder {self.folder} cannot be used ({error}); name a writable --workdir."
            ) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._manager.close()

    def latest_step(self) -> int | None:
        """The newest step that was saved, or None."""
        return self._manager.latest_step()

    def check_start(self, resume: bool) -> int:
        """Check that the folder fits what the user asked for, before any work.

        Returns:
            The steps done: those of the newest checkpoint, or 0 for a new run.

        Raises:
            InputError: ``--resume`` without a checkpoint, or a new run where there is one.
        """
        latest = self.latest_step()
        if latest is None:
            if not resume:
                return 0
            raise InputError(
                f"--resume found no checkpoint in {self.folder}; name the --workdir of the run to go on "
                "with, or leave --resume out to start a new run (a run is never started afresh by --resume)."
            )
        if not resume:
            raise InputError(
                f"{self.folder} already holds a run, saved at step {latest}; go on with it with --resume, or "
                "name another --workdir."
            )
        return latest

    def save(
        self,
        step: int,
        state: train_state.TrainState,
        iterator: grain.DatasetIterator,
        record: Mapping[str, Any],
    ) -> None:
        """Save and wait until it is on disk: when this returns, the step can be resumed.

        Args:
            step: steps done.
            state: of the training.
            iterator: of the training batches, for its position.
            record: what must be the same when the run goes on: configuration and fingerprints, JSON values.

        Raises:
            InputError: when the disk refuses.
        """
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=grain.checkpoint.CheckpointSave(iterator),
            record=ocp.args.JsonSave({**record, "state_sha256": _digest(state)}),
        )
        try:
            self._manager.save(step, args=items, force=True)
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise InputError(
                f"The checkpoint of step {step} cannot be written to {self.folder} ({error}); free some "
                "space, then go on from the last checkpoint with --resume."
            ) from error

    def restore(
        self,
        step: int,
        abstract: train_state.TrainState,
        iterator: grain.DatasetIterator,
        record: Mapping[str, Any],
    ) -> tuple[train_state.TrainState, dict[str, Any]]:
        """Read the state saved at ``step``, with the shardings of ``abstract``; ``iterator`` goes to its position.

        Returns:
            The state, and the record that was saved with it.

        Raises:
            InputError: when the run was saved with another ``record`` (the fields that differ are listed), or
                when the checkpoint cannot be read.
        """
        saved = self._read(step, record=ocp.args.JsonRestore()).record
        digest = saved.pop("state_sha256", None)
        different = configs.differences(saved, record)
        changes = [
            f"{key} was {old!r} and is {new!r}" for key, (old, new) in different.items() if key not in MAY_DIFFER
        ]
        if changes:
            raise InputError(
                f"The run in {self.folder} cannot go on with other settings: {'; '.join(changes)}; restore "
                "them, or start a new run in another --workdir."
            )
        restored = self._read(
            step,
            state=ocp.args.StandardRestore(abstract),
            data=grain.checkpoint.CheckpointRestore(iterator),
        )
        # Orbax restores a flipped byte without a word.
        if _digest(restored.state) != digest:
            raise InputError(
                f"The checkpoint {self.folder / str(step)} is damaged: what was read is not what was saved; move this "
                "folder away and use --resume again, which takes the one before it."
            )
        return restored.state, saved

    def _read(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"The checkpoint {self.folder / str(step)} cannot be read ({error}); move this folder away "
                "and use --resume again, which takes the one before it."
            ) from error


def _digest(state: train_state.TrainState) -> str:
    """SHA-256 over the bytes of all arrays of the state."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    return digest.hexdigest()
