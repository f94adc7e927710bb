"""How every benchmark measures: functions take turns, memory in a fresh process, the machine in words, rows to JSON.

Ratios within one run are what to quote: a shared machine drifts by more than most effects, and functions that take
turns in a random order drift alike.
"""

import ctypes
import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
from absl import app, flags

from calsegx import files, memory
from calsegx.interfaces import InputError

Row = dict[str, Any]
Key = TypeVar("Key")
LOAD = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # before this program adds its own
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def main(define_flags: Callable[[flags.FlagValues], None], run: Callable[[flags.FlagValues], Any]) -> None:
    """A benchmark's command line: flags, then ``run``; an InputError is one sentence and its exit code."""

    def guarded(argv: Sequence[str]) -> None:
        del argv
        if flags.FLAGS.keep_memory:
            memory.keep_freed_memory()
        try:
            run(flags.FLAGS)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(error.exit_code)

    define_flags(flags.FLAGS)
    words = "All frameworks under calsegx.memory, as the launch scripts; --nokeep_memory: glibc's default."
    flags.DEFINE_bool("keep_memory", True, words)
    app.run(guarded)


def interleave(
    functions: Mapping[Key, Callable[[], Any]], rounds: int, warmups: int = 1, pause: float = 0.0
) -> dict[Key, list[float]]:
    """Seconds of each call, the functions taking turns in an order drawn anew in every round.

    A fixed order would give each function the same predecessor: after PyTorch, OpenMP's threads still spin for a while,
    which matters for calls of milliseconds: let those ``pause``.

    Args:
        functions: by name; each blocks until its result is there (``jax.block_until_ready``,
            ``torch.cuda.synchronize``).
        rounds: timed calls of each function.
        warmups: untimed calls of each function before (compilation, autotuning).
        pause: seconds to sleep before every timed call.

    Returns:
        ``{name: [seconds of every round]}``.
    """
    names = list(functions)
    for _ in range(warmups):
        for name in names:
            functions[name]()
    seconds: dict[Key, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(names, len(names)):
            time.sleep(pause)
            start = time.perf_counter()
            functions[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(seconds: Sequence[float]) -> list[float]:
    """Lower and upper quartile; of a single value, that value twice."""
    if len(seconds) < 2:
        return [seconds[0], seconds[0]]
    lower, _, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    return [lower, upper]


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """The machine in words, its cores, its load average at the start, the versions of jax and torch (None: missing)."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        words = f"{cores()} cores, {_processor()}"
    else:
        words = f"{jax.device_count()} x {device.device_kind}"
    return {"device": words, "cores": cores(), "load": LOAD, "jax": jax.__version__, "torch": _version("torch")}


def warn_if_busy() -> None:
    """Say so when other programs use the cores.

    A busy core makes PyTorch's small operations up to 100 times slower: OpenMP's threads spin for their time slice,
    waiting for one that has no core.  ``OMP_WAIT_POLICY=passive`` prevents that, at some cost on a quiet machine.
    """
    load = LOAD
    if load is not None and load > 0.25 * cores():
        words = f"warning: the load average is {load:.1f} on {cores()} cores; ratios to PyTorch need a quiet machine"
        print(words, file=sys.stderr, flush=True)


def xla_cost(compiled: Any) -> tuple[float, int]:
    """XLA's FLOPs of a compiled step, and the bytes of its temporary and result buffers."""
    analysis = compiled.cost_analysis()
    analysis = analysis[0] if isinstance(analysis, list) else analysis
    buffers = compiled.memory_analysis()
    return float(analysis["flops"]), int(buffers.temp_size_in_bytes + buffers.output_size_in_bytes)


def run_isolated(module: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Row:
    """Run ``python -m module arguments`` in a fresh process; its last line of output is a JSON object.

    Args:
        module: with a ``main``.
        arguments: of its command line.
        environment: variables to add.

    Returns:
        That object.

    Raises:
        InputError: when the process fails, with the end of what it said.
    """
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(environment or {})})
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip())[-500:]
        raise InputError(f"The isolated case `{' '.join(command)}` ended with code {done.returncode}: {said}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def rss_growth(function: Callable[[], Any]) -> int | None:
    """Bytes by which one call raises the resident memory of this process at its peak.

    Call it once, in a fresh process (``run_isolated``) in which everything is compiled and nothing has run: memory that
    an allocator kept from an earlier call would not be counted.  None where the kernel does not tell (not Linux,
    or a sandbox that forbids to reset the peak).
    """
    if not _STATUS.exists():
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # what compilation freed goes back to the system, so that the call cannot hide in it
    try:
        _CLEAR.write_text("5")  # the peak starts from the present
    except OSError:
        return None
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def device_peak(function: Callable[[], Any]) -> int | None:
    """Bytes that one call adds at its peak to what JAX holds on an accelerator; None where it does not tell.

    Call it in a fresh process, with everything compiled and nothing run: the device keeps one peak per process.
    """
    device = jax.devices()[0]
    before = device.memory_stats()
    function()
    after = device.memory_stats()
    return after["peak_bytes_in_use"] - before["bytes_in_use"] if before and after else None


def write_json(path: str | Path, rows: Sequence[Row]) -> None:
    """Write the rows as a JSON list, one row per line, whole or not at all."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    files.write_atomically(Path(path), f"[\n{lines}\n]\n")


def table(rows: Sequence[Row], columns: Mapping[str, str]) -> list[str]:
    """A markdown table, also readable as it is: ``columns`` maps a row's key to a format (``".2f"``, ``""``)."""
    header = [name.replace("_", " ") for name in columns]
    body = [[_cell(row.get(name), form) for name, form in columns.items()] for row in rows]
    widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *body]
    return [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]


def print_table(rows: Sequence[Row], columns: Mapping[str, str]) -> None:
    """Print ``table(rows, columns)``."""
    print("\n".join(table(rows, columns)), flush=True)


def publish(options: flags.FlagValues, marks: tuple[str, str], texts: Sequence[str], rows: Sequence[Row]) -> None:
    """Tables between the marker comments of ``--page``, rows to ``--json``, where asked for."""
    if options.page:
        files.write_between(Path(options.page), marks, "\n\n".join(texts))
    if options.json:
        write_json(options.json, rows)
        print(f"The rows are in {options.json}")


def _cell(value: Any, form: str) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else format(value, form)


def _processor() -> str:
    """The processor's name where the system tells it."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _status(field: str) -> int:
    """A field of this process's memory status, in bytes."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise InputError(f"{_STATUS} has no {field}; run the benchmark on Linux, or without --peak=rss.")
