"""Metrics and losses against what a PyTorch user has: MONAI, torchmetrics, and the losses written in PyTorch.

python -m benchmarks.metrics --json=docs/metrics.json --page=docs/metrics.md

1. ``surface``: DSC, HD95 and ASSD of every class of one volume; MONAI's one-hot tensors are made beforehand.
2. ``calibration``: ECE, CECE, Brier score and NLL of that volume, and the memory at the whole and a quarter of it.
3. ``losses``: value and gradient of every loss and of CRaC's penalty, float32; jitted, compiled beforehand.

The two sides take turns in one process, after both gave the same results.  ``floor_mib`` is what has to be read and
written at least: the inputs once and the gradient once.  On a CPU.
"""

import functools
import importlib.metadata
import json
import pathlib
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from benchmarks import metrics_problem as problems

# isort: split
import numpy as np
import torch

from benchmarks import measure
from calsegx import files
from calsegx.interfaces import InputError, UsageError

TABLES = ("surface", "calibration", "losses")
OTHERS = {"surface": "MONAI", "calibration": "torchmetrics", "losses": "PyTorch"}
TARGETS = {"surface": 0.5, "calibration": 0.25, "losses": 1.0}
OUR_THREADS = {"surface": "numpy 1, search tree all", "calibration": "1", "losses": "all"}
VERSIONS = {name: importlib.metadata.version(name) for name in ("monai", "torchmetrics")}
TOLERANCE = 1e-5  # relative, L2
PAUSE = 0.02  # seconds before every call, until PyTorch's threads no longer spin in wait for work
MARKS = ("<!-- tables of benchmarks.metrics: begin -->", "<!-- tables of benchmarks.metrics: end -->")
COLUMNS = {
    **{"what": "", "seconds": ".4f", "other": "", "other_seconds": ".4f", "ratio": ".2f", "target": ".2f"},
    **{"threads": "", "other_threads": "d", "difference": ".0e", "floor_mib": ".1f"},
}
EXTRA = {
    "surface": {},
    "calibration": {
        "other_error": ".0e",
        **{"peak_mib": ".0f", "quarter_peak_mib": ".0f"},
        **{"other_peak_mib": ".0f", "other_quarter_peak_mib": ".0f"},
    },
    "losses": {"compile_seconds": ".2f"},
}


def define_flags(values: flags.FlagValues) -> None:
    """The command line."""
    listed = functools.partial(flags.DEFINE_list, flag_values=values)
    listed("tables", list(TABLES), "Which tables to make.")
    listed("volume", ["155", "240", "240"], "Voxels along each axis of the volume.")
    listed("images", ["8", "256", "256"], "Batch, height and width of the losses' images.")
    listed("losses", problems.loss_names(), "Which losses.")
    number = functools.partial(flags.DEFINE_integer, lower_bound=1, flag_values=values)
    number("rounds", 5, "Timed calls of each metric.")
    number("loss_rounds", 25, "Timed calls of each loss.")
    flags.DEFINE_bool("isolated", True, "Measure memory, in fresh processes.", flag_values=values)
    define = functools.partial(flags.DEFINE_string, flag_values=values)
    define("json", "", "File to write the rows to.")
    define("page", "", "Page whose tables, between two marker comments, are to be replaced.")
    define("case", "", "Used by the benchmark itself: measure the memory of this one, print JSON.")


def run(options: flags.FlagValues) -> list[measure.Row]:
    """Check, measure, print, write.

    Raises:
        UsageError: for a flag with an unusable value.
        InputError: when two sides disagree, or the page has no marker comments.
    """
    if options.case:
        print(json.dumps({"peak_bytes": problems.calibration_peak(**json.loads(options.case))}))
        return []
    _check(options)
    torch.set_num_threads(measure.cores())
    measure.warn_if_busy()
    rows, texts = [], []
    for name in options.tables:
        found = table(name, options)
        rows += found
        title = "{}: {device}, load average {load:.1f} before the run".format(name, **found[0])
        texts.append("\n".join([title, "", *measure.table(found, COLUMNS | EXTRA[name])]))
        print(f"\n{texts[-1]}\n", flush=True)
    measure.publish(options, MARKS, texts, rows)
    return rows


def table(name: str, options: flags.FlagValues) -> list[measure.Row]:
    """The rows of one table.

    Raises:
        InputError: when two sides disagree.
    """
    say(f"{name}: building, checking that both sides agree")
    volume, images = (tuple(map(int, sizes)) for sizes in (options.volume, options.images))
    rounds = options.rounds
    if name == "surface":
        comparisons = [problems.surfaces(volume, with_background) for with_background in (False, True)]
    elif name == "calibration":
        comparisons = [problems.calibrations(volume)]
    else:
        comparisons = [problems.loss(loss, images) for loss in options.losses]
        rounds = options.loss_rounds
    differences = [agreement(comparison, OTHERS[name]) for comparison in comparisons]
    say(f"{name}: {rounds} rounds of {len(comparisons)} comparisons")
    calls = {(c.what, side): call for c in comparisons for side, call in (("ours", c.ours), ("theirs", c.theirs))}
    seconds = measure.interleave(calls, rounds, pause=PAUSE)
    memory = peaks(volume) if name == "calibration" and options.isolated else {}
    machine, rows = measure.machine(), []
    for comparison, difference in zip(comparisons, differences, strict=True):
        ours, theirs = (seconds[comparison.what, side] for side in ("ours", "theirs"))
        row = {
            "table": name,
            "what": comparison.what,
            "size": list(images if name == "losses" else volume),
            "seconds": statistics.median(ours),
            "seconds_spread": measure.spread(ours),
            "other": OTHERS[name],
            "other_seconds": statistics.median(theirs),
            "other_seconds_spread": measure.spread(theirs),
            "ratio": statistics.median(ours) / statistics.median(theirs),
            "target": TARGETS[name],
            "threads": OUR_THREADS[name],
            "other_threads": torch.get_num_threads(),
            "difference": difference,
            "other_error": comparison.other_error,
            "floor_bytes": comparison.floor_bytes,
            "floor_mib": comparison.floor_bytes / 2**20,
            "compile_seconds": comparison.compile_seconds,
            "rounds": rounds,
            **memory,
            **machine,
            **VERSIONS,
        }
        rows.append(row)
    return rows


def agreement(comparison: problems.Comparison, other: str) -> float:
    """The largest relative difference (L2) of the two sides' results.

    Raises:
        InputError: when it exceeds the tolerance: a time would compare two different things.
    """
    pairs = zip(*comparison.results, strict=True)
    largest = max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)
    if not largest <= TOLERANCE:
        raise InputError(
            f"calsegx and {other} disagree in {comparison.what!r} by {largest:.1e}, more than {TOLERANCE}; nothing is "
            "timed until they agree."
        )
    return largest


def peaks(volume: Sequence[int]) -> measure.Row:
    """What the calibration of the whole volume and of a quarter of it adds to its inputs, in fresh processes."""
    found: dict[str, Any] = {}
    for prefix, side in (("", "calsegx"), ("other_", "torchmetrics")):
        for part, depth in (("", volume[0]), ("quarter_", volume[0] // 4)):
            say(f"calibration: memory of {side} at {depth} slices")
            case = json.dumps({"side": side, "shape": [depth, *volume[1:]]})
            # Freed memory goes back to the system: what building the volume freed must not hide the call's.
            peak = measure.run_isolated("benchmarks.metrics", [f"--case={case}", "--nokeep_memory"])["peak_bytes"]
            found[f"{prefix}{part}peak_bytes"] = peak
            found[f"{prefix}{part}peak_mib"] = None if peak is None else peak / 2**20
    return found


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def _check(options: flags.FlagValues) -> None:
    if options.page:
        files.split_page(pathlib.Path(options.page), MARKS)
    for flag, known in (("tables", TABLES), ("losses", problems.loss_names())):
        unknown = [name for name in getattr(options, flag) if name not in known]
        if unknown:
            raise UsageError(f"--{flag} has {unknown[0]!r}, which is none of {', '.join(known)}.")
    for flag in ("volume", "images"):
        sizes = getattr(options, flag)
        smallest = (8, 8, 8) if flag == "volume" else (2, 8, 8)
        if len(sizes) != 3 or any(not n.isdigit() or int(n) < low for n, low in zip(sizes, smallest, strict=True)):
            raise UsageError(f"--{flag}={','.join(sizes)} must be three whole numbers of at least {smallest}.")


if __name__ == "__main__":
    measure.main(define_flags, run)
