"""The log of a run: ``metrics.jsonl`` always, TensorBoard where it is asked for."""

import hashlib
import json
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from calsegx import files
from calsegx.interfaces import InputError, UsageError


def read(path: Path, position: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """The entries of a ``metrics.jsonl``, none if there is no file.

    Args:
        path: of the file.
        position: ``MetricsLog.position`` at the end of the run, where it is known: the file must be the one then.

    Raises:
        InputError: for a line that is no entry; only the last may be cut off, by an interruption while it was written.
            When the file is not the one of ``position``.
    """
    content = path.read_bytes() if path.exists() else b""
    if position and path.exists() and not _is_at(content, position):
        raise InputError(
            f"{path} is not the log that was written with the model beside it: it is damaged or was edited; restore "
            "it, or remove it to do without."
        )
    lines = content.decode(errors="replace").splitlines()
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            entries.append({"step": entry["step"], **entry})
        except (ValueError, TypeError, KeyError) as error:
            if number < len(lines):
                raise InputError(
                    f"{path}, line {number}: not an entry of the log; correct or remove the line."
                ) from error
    return entries


class MetricsLog:
    """``metrics.jsonl``: one JSON object a line.

    A run that goes on cuts off what was written after its checkpoint.  A file that up to there is not what was written
    is moved to ``metrics.jsonl.set-aside`` with a word, and the log begins anew.

    Args:
        path: of the file; None: nothing is written (all processes but the first).
        start: ``position`` at the checkpoint that the run goes on from; empty or None: a new run, an empty log.
        mirror: is given every entry too; when it fails it is dropped with a word, and training goes on.
        say: for that word.
    """

    def __init__(
        self,
        path: Path | None,
        start: Mapping[str, Any] | None = None,
        mirror: Callable[[int, Mapping[str, Any]], None] | None = None,
        say: Callable[[str], None] = print,
    ):
        self._path, self._mirror, self._say = path, mirror, say
        start = start or {"bytes": 0, "sha256": _digest(b""), "seconds": 0.0}
        self._zero = time.monotonic() - start["seconds"]
        kept = path.read_bytes()[: start["bytes"]] if path and path.exists() else b""
        if path and not _is_at(kept, start):
            aside = path.with_name(f"{path.name}.set-aside")
            if path.exists():
                os.replace(path, aside)
            say(
                f"{path} is not what was written up to the checkpoint (damaged, edited or missing); what is there was "
                f"moved to {aside.name}, and the log begins anew."
            )
            kept = b""
        self._bytes, self._hash = len(kept), hashlib.sha256(kept)
        if path:
            files.write_atomically(path, kept)

    def seconds(self) -> float:
        """Training time so far, over all parts of the run."""
        return time.monotonic() - self._zero

    def position(self) -> dict[str, Any]:
        """Where the log is, as JSON values; what was written is on disk for good.

        Raises:
            InputError: when the disk refuses.
        """
        if self._path is not None:
            try:
                with self._path.open("rb") as file:
                    os.fsync(file.fileno())
            except OSError as error:
                raise self._unwritten(error) from error
        return {"bytes": self._bytes, "sha256": self._hash.hexdigest(), "seconds": round(self.seconds(), 3)}

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line.

        Raises:
            InputError: when the disk refuses.
        """
        if self._path is None:
            return
        line = (json.dumps({"step": step, "seconds": round(self.seconds(), 3), **values}) + "\n").encode()
        try:
            with self._path.open("ab") as file:
                file.write(line)
        except OSError as error:
            raise self._unwritten(error) from error
        self._bytes += len(line)
        self._hash.update(line)
        if self._mirror is not None:
            try:
                self._mirror(step, values)
            except Exception as error:  # whatever a logger does must not stop the training
                self._mirror = None
                self._say(f"TensorBoard's log failed ({error}) and is left out from here; {self._path.name} goes on.")

    def _unwritten(self, error: OSError) -> InputError:
        return InputError(
            f"{self._path} cannot be written ({error.strerror}); free some space, then go on with --resume."
        )


def _is_at(content: bytes, position: Mapping[str, Any]) -> bool:
    return len(content) == position["bytes"] and _digest(content) == position["sha256"]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def tensorboard(folder: Path) -> Callable[[int, Mapping[str, Any]], None]:
    """A mirror that writes numbers for TensorBoard.

    Raises:
        UsageError: when tensorboardX is not installed.
    """
    try:
        import tensorboardX  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UsageError(
            "--config.tensorboard needs the package tensorboardX; install it with pip install 'calsegx[tensorboard]'."
        ) from error
    writers: list[Any] = []

    def write(step: int, values: Mapping[str, Any]) -> None:
        if not writers:  # opened by the first entry, so that a folder that cannot be used stops no training either
            writers.append(tensorboardX.SummaryWriter(str(folder)))
        writer = writers[0]
        for name, value in values.items():
            if isinstance(value, int | float):
                writer.add_scalar(name, value, step)
        writer.flush()

    return write


class SpikeWatch:
    """Notices losses far above the recent ones.

    A spike is a loss above the median of the last ``window`` by more than ``factor`` times their median absolute
    deviation, and by more than that median itself; the first half window only fills it.
    """

    def __init__(self, window: int = 50, factor: float = 10.0):
        self.recent: deque[float] = deque(maxlen=window)
        self._factor = factor

    def sees(self, loss: float) -> float | None:
        """The recent median if ``loss`` is a spike, else None."""
        recent, median = list(self.recent), None
        if 2 * len(recent) >= (self.recent.maxlen or 0):
            middle = statistics.median(recent)
            spread = statistics.median(abs(value - middle) for value in recent)
            if loss - middle > max(self._factor * spread, middle):
                median = middle
        self.recent.append(loss)
        return median
