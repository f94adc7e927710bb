"""docs/which-method.md: every method is there, its prices are the benchmark's, its figures the README's."""

import json
import pathlib
import re

import pytest
from absl import flags

from benchmarks import method_cost
from calsegx import experiment
from calsegx.interfaces import InputError

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGE = (DOCS / "which-method.md").read_text()
ROWS = json.loads((DOCS / "method_cost.json").read_text())
STEPS = {(row["decoder"], row["method"]): row for row in ROWS if "decoder" in row}
TABLE = PAGE[PAGE.index("| you have |") : PAGE.index("## Price")]


def test_every_method_and_calibrator_stands_in_the_table():
    named = set(re.findall(r"`\+?(\w+)`", TABLE)) | set(re.findall(r"`(\w+)\+\w+`", PAGE))
    assert {*method_cost.methods(), *experiment.CALIBRATORS} <= named


def test_the_price_tables_are_those_of_the_json():
    begin, end = method_cost.MARKS
    shown = PAGE.split(begin)[1].split(end)[0].strip("\n")
    assert shown == "\n\n".join(method_cost.texts(ROWS))
    counted = dict.fromkeys(decoder for decoder, _ in STEPS)
    assert "tiny" in counted and [(d, name) for d in counted for name in method_cost.methods()] == [*STEPS]


def test_measured_figures_are_the_readmes():
    told = set(re.findall(r"\d\.\d{3}|\d\d\.\d|(?<=: )\d\.\d(?= to)|\d\.\d(?= times)", TABLE))
    assert len(told) > 15 and told <= set(re.findall(r"\d+\.\d+", (ROOT / "README.md").read_text()))


def test_a_step_is_counted_and_timed():
    (row,) = method_cost.step_rows("tiny", ("medsam",), rounds=3)  # with boxes, where the others have points
    assert (
        min(row["flops"], row["temporary_bytes"], row["seconds"]) > 0
        and row["seconds_ratio"] == row["flops_ratio"] == 1
    )


def test_calibrators_are_timed_and_shown(monkeypatch):
    monkeypatch.setattr(method_cost, "IMAGES", 2)
    monkeypatch.setattr(method_cost, "SIDE", 16)
    rows = [*method_cost.fit_rows(1, step_seconds=0.5)]
    assert [row["calibrator"] for row in rows] == [f"+{name}" for name in experiment.CALIBRATORS]
    assert all(row["steps"] == row["seconds"] / 0.5 and row["voxels"] == 512 for row in rows)
    steps = [
        {"decoder": "tiny", "method": "sam_ft", "flops_ratio": 1.0, "temporary_bytes_ratio": 1.0, "seconds_ratio": None}
    ]
    first, second = method_cost.texts(steps + rows)
    assert "| `sam_ft` | 1.00" in first and "+lts" in second


def test_a_page_without_marks_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(method_cost, "step_rows", lambda *_: pytest.fail("the work began"))
    values = flags.FlagValues()
    method_cost.define_flags(values)
    values(["method_cost", f"--page={tmp_path / 'page.md'}"])
    with pytest.raises(InputError, match="no page with the lines"):
        method_cost.run(values)
