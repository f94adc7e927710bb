"""The log of a run."""

import json
import time
from collections.abc import Mapping
from pathlib import Path

from calsegx import files


class MetricsLog:
    """``metrics.jsonl``: one JSON object a line.  Lines after the step the run starts from are dropped.

    Args:
        path: of the file.
        start: steps done when the run starts or goes on.
    """

    def __init__(self, path: Path, start: int):
        self._path = path
        kept = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                entry = json.loads(line)
            except ValueError:  # the line that was being written when the run was interrupted
                continue
            if entry["step"] <= start:
                kept.append(entry)
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
