"""What several processes make of the test cases, each of its share, put together again as one would have made it."""

import base64
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from calsegx import sharding
from calsegx.evaluation import evaluate, figures, gallery, study
from calsegx.interfaces import Case
from calsegx.metrics import binning, calibration


@dataclass(frozen=True)
class Scored:
    """What the evaluation keeps of one case."""

    rows: list[evaluate.Row]
    statistics: study.Statistics
    margins: study.Margins
    picture: gallery.Snapshot
    jittered: dict[float, list[evaluate.Row]] = dataclasses.field(default_factory=dict)  # by amount


def deal(cases: Sequence[Case], score: Callable[[Case], Scored]) -> Iterator[tuple[Case, Scored]]:
    """``score`` of every case, in their order; every process computes its share and gets all.

    They go through the cases in rounds, one case each, so that no message is larger than what is kept of one.
    """
    index, count = sharding.process()
    for start in range(0, len(cases), count):
        turn = cases[start : start + count]
        own = score(turn[index]) if index < len(turn) else None
        if own is not None and count == 1:
            yield turn[0], own
            continue
        for case, content in zip(turn, sharding.gather_bytes(b"" if own is None else to_bytes(own)), strict=False):
            yield case, from_bytes(content, case)


def to_bytes(scored: Scored) -> bytes:
    """As JSON that gives every number back exactly; the case itself is left out."""
    picture = {name: value for name, value in vars(scored.picture).items() if name != "case"}
    content = {
        "rows": [dataclasses.astuple(row) for row in scored.rows],
        "statistics": list(scored.statistics.items()),
        "margins": list(scored.margins.items()),
        "picture": picture,
        "jittered": [(amount, [dataclasses.astuple(row) for row in rows]) for amount, rows in scored.jittered.items()],
    }
    return json.dumps(content, default=_plain).encode()


def from_bytes(content: bytes, case: Case) -> Scored:
    """The inverse of ``to_bytes``."""
    values = json.loads(content, object_hook=_arrays)
    picture = values["picture"]
    picture["spacing_mm"] = tuple(picture["spacing_mm"])
    picture["results"] = {name: figures.Overlay(**overlay) for name, overlay in picture["results"].items()}
    return Scored(
        [evaluate.Row(*row) for row in values["rows"]],
        {tuple(slot): _statistics(sums) for slot, sums in values["statistics"]},
        {tuple(slot): counts for slot, counts in values["margins"]},
        gallery.Snapshot(case, **picture),
        {amount: [evaluate.Row(*row) for row in rows] for amount, rows in values["jittered"]},
    )


def _statistics(sums: dict[str, Any]) -> calibration.CalibrationStatistics:
    bins = {name: binning.Bins(*sums[name]) for name in ("top_label", "classes")}
    return calibration.CalibrationStatistics(**{**sums, **bins})


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        data = base64.b64encode(value.tobytes()).decode()
        return {"dtype": value.dtype.str, "shape": value.shape, "base64": data}
    return value.item() if isinstance(value, np.generic) else vars(value)  # a dataclass


def _arrays(values: dict[str, Any]) -> Any:
    if values.keys() != {"dtype", "shape", "base64"}:
        return values
    return np.frombuffer(base64.b64decode(values["base64"]), values["dtype"]).reshape(values["shape"])
