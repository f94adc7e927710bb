"""The golden cases of losses and metrics: read, mapped to our functions by their method, compared.

The generator of the files writes the same ``method`` texts for every seed, shape and set of hyperparameters, so a case
is mapped by its method and its ``hparams``, never by its id or its values.  A mapping is a function ``case -> {role:
array}`` under one or several patterns of methods; ``Close`` loosens what a library computed in float32 and names the
parity option that it took, ``Left`` says why an output is not reproduced.
"""

import collections
import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

FLOAT64 = 1e-9
FLOAT32 = 1e-5  # MONAI, torchmetrics and torch-uncertainty compute in float32 inside
KINDS = {
    "losses": ("losses", "priors", "lagrangian", "fisher", "likelihood"),
    "metrics": ("calibration", "overlap/surface", "calibrators", "scores", "ranks"),
}
UNKNOWN = "unknown method"


@dataclasses.dataclass(frozen=True)
class Case:
    """One case: arrays as they were stored, channels-first."""

    id: str
    method: str
    source: str
    hparams: Mapping[str, Any]
    outputs: Mapping[str, np.ndarray]
    inputs: Mapping[str, np.ndarray]

    def __getitem__(self, role: str) -> np.ndarray:
        return self.inputs[role]

    @property
    def logits(self) -> np.ndarray:
        """Channels-last."""
        return np.moveaxis(self.inputs["logits"], 1, -1)

    @property
    def labels(self) -> np.ndarray:
        return self.inputs["labels"]


class Close(NamedTuple):
    """A value with a tolerance of its own (relative to the largest expected entry), or under a parity option."""

    actual: Any
    tolerance: float = FLOAT64
    parity: str = ""
    where: Any = True  # entries that are compared
    reason: str = ""  # why the others are not


class Left(NamedTuple):
    """An output that is not compared, and why."""

    reason: str


class Entry(NamedTuple):
    pattern: re.Pattern[str]
    kind: str
    compute: Callable[..., Mapping[str, Any]]


class Outcome(NamedTuple):
    kind: str
    status: str  # passed, parity or left
    parity: list[str]
    left: list[str]
    error: float  # the largest error as a part of its tolerance


entries: list[Entry] = []


def maps(kind: str, *patterns: str) -> Callable[[Callable], Callable]:
    """Register a function for the methods that begin like one of the patterns.

    It is called with the case and, as keywords, with the named groups of the pattern (numbers as numbers).
    """

    def register(compute: Callable) -> Callable:
        entries.extend(Entry(re.compile(pattern), kind, compute) for pattern in patterns)
        return compute

    return register


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def prefix_of(given: str | None, name: str, folder: pathlib.Path) -> pathlib.Path:
    """The prefix that ``--golden-NAME`` gives, relative to ``folder``, or that of the files of the project."""
    return folder / given if given else pathlib.Path(__file__).parents[1] / "golden" / name


def read(prefix: pathlib.Path) -> list[dict[str, Any]]:
    """The cases of ``prefix.json`` as they are written there, without their arrays."""
    return json.loads(prefix.with_name(prefix.name + ".json").read_text())["cases"]


@functools.cache
def _arrays(prefix: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(prefix.with_name(prefix.name + ".npz")) as archive:
        return dict(archive)


def load(prefix: pathlib.Path, case: Mapping[str, Any]) -> Case:
    """A case with its arrays; ``role: path/*`` becomes ``role/name`` for every array of the folder."""

    def arrays(names: Mapping[str, str]) -> Iterator[tuple[str, np.ndarray]]:
        for role, name in names.items():
            if name.endswith("*"):
                found = [key for key in _arrays(prefix) if key.startswith(name[:-1])]
                yield from ((f"{role}/{key.removeprefix(name[:-1])}", _arrays(prefix)[key]) for key in found)
            else:
                yield role, _arrays(prefix)[name]

    fields = {key: case[key] for key in ("id", "method", "source", "hparams")}
    return Case(**fields, inputs=dict(arrays(case["inputs"])), outputs=dict(arrays(case["outputs"])))


def stored(name: str, case_id: str) -> Case:
    """A case of the project's own files."""
    prefix = prefix_of(None, name, pathlib.Path())
    return load(prefix, next(case for case in read(prefix) if case["id"] == case_id))


def entry_of(case: Case) -> tuple[Entry, dict[str, Any]]:
    """The mapping of a case and the values in its method's text."""
    found = [(entry, match) for entry in entries if (match := entry.pattern.match(case.method))]
    assert len(found) == 1, (
        f"The method {case.method!r} of case {case.id} is known to {len(found)} mappings in tests/golden_cases, "
        "expected one; add a pattern for it there."
    )
    entry, match = found[0]
    return entry, {name: _number(text) for name, text in match.groupdict().items() if text is not None}


def check(case: Case) -> Outcome:
    """Compute a case with our functions and compare every output.

    Raises:
        AssertionError: for a method no mapping knows, outputs that a mapping forgot, and differences: one line each.
    """
    entry, values = entry_of(case)
    computed = entry.compute(case, **values)
    forgotten = sorted(set(case.outputs) - set(computed))
    assert not forgotten, f"Case {case.id}: {entry.compute.__name__} says nothing about the outputs {forgotten}."
    errors, problems, parity, left = [0.0], [], set(), set()
    for role, expected in case.outputs.items():
        ours = computed[role]
        if isinstance(ours, Left):
            left.add(ours.reason)
            continue
        close = ours if isinstance(ours, Close) else Close(ours)
        parity |= {close.parity} - {""}
        left |= set() if np.all(close.where) else {close.reason}
        errors.append(error := _error(close, expected) / close.tolerance)
        if not error <= 1:
            problems.append(f"{role}: {error * close.tolerance:.2g} instead of at most {close.tolerance:g}")
    assert not problems, f"Case {case.id} ({case.method}), hparams {case.hparams}, relative errors: {problems}"
    compared = len(case.outputs) - sum(isinstance(computed[role], Left) for role in case.outputs)
    status = "left" if compared == 0 else "parity" if parity else "passed"
    return Outcome(entry.kind, status, sorted(parity), sorted(left), max(errors))


def _error(close: Close, expected: np.ndarray) -> float:
    """The largest difference relative to the largest expected entry; inf where NaN, infinities or shapes differ.

    Relative to the array, because single entries of a gradient cancel; values below 1e-6 count as 1e-6.
    """
    actual, expected = np.asarray(close.actual, np.float64), np.asarray(expected, np.float64)
    if actual.shape != expected.shape:
        return np.inf
    where = np.broadcast_to(close.where, expected.shape)
    actual, expected = actual[where], expected[where]
    finite = np.isfinite(expected)
    if not np.array_equal(actual[~finite], expected[~finite], equal_nan=True):
        return np.inf
    if not finite.any():
        return 0.0
    scale = max(np.abs(expected[finite]).max(), 1e-6)
    return float(np.nan_to_num(np.abs(actual[finite] - expected[finite]).max() / scale, nan=np.inf))


def table(records: list[dict[str, Any]]) -> list[str]:
    """How many cases of each kind passed, under which parity option, or are not reproduced and why."""
    columns = {"passed": "passed", "parity": "parity option", "left": "not reproduced", "failed": "FAILED"}
    titles = "".join(f"{title:>16}" for title in columns.values())
    lines = [f"{'':18}{'cases':>7}{titles}{'error/tolerance':>18}"]
    for kind in (*KINDS["losses"], *KINDS["metrics"], UNKNOWN):
        if rows := [record for record in records if record["kind"] == kind]:
            counts = "".join(f"{sum(row['status'] == status for row in rows):>16}" for status in columns)
            lines.append(f"{kind:18}{len(rows):>7}{counts}{max(row.get('error', 0) for row in rows):>18.1e}")
    for title, key in (("under a parity option", "parity"), ("outputs that are not compared", "left")):
        reasons = collections.Counter(reason for record in records for reason in record.get(key, ()))
        lines += [f"{title}:"] if reasons else []
        lines += [f"  {count:>3} cases: {reason}" for reason, count in reasons.most_common()]
    return lines
