"""The log of a run."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calsegx import files
from calsegx.interfaces import InputError


def read(path: Path) -> list[dict[str, Any]]:
    """The entries of a ``metrics.jsonl``, none if there is no file.

    Raises:
        InputError: for a line that is no entry; only the last may be cut off, by an interruption while it was written.
    """
    lines = path.read_text().splitlines() if path.exists() else []
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
    """``metrics.jsonl``: one JSON object a line.  Lines after the step the run starts from are dropped.

    Args:
        path: of the file.
        start: steps done when the run starts or goes on.
    """

    def __init__(self, path: Path, start: int):
        self._path = path
        kept = [entry for entry in read(path) if entry["step"] <= start]
        before = kept[-1]["seconds"] if kept else 0.0
        self._zero = time.monotonic() - before
        files.write_atomically(path, "".join(json.dumps(entry) + "\n" for entry in kept))

    def seconds(self) -> float:
        """Training time so far, over all parts of the run."""
        return time.monotonic() - self._zero

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line."""
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, "seconds": round(self.seconds(), 3), **values}) + "\n")
