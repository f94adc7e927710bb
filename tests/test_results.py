"""docs/results/phantoms.md and the README's table: made of the experiment's numbers, and current."""

import dataclasses
import importlib.util
import json
import pathlib

import numpy as np
import pytest

from calsegx.evaluation import evaluate, tables
from tests.evaluation import synthetic

ROOT = pathlib.Path(__file__).parent.parent
_spec = importlib.util.spec_from_file_location("results", ROOT / "docs" / "results.py")
results = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(results)


@pytest.fixture(scope="module")
def rows():
    found = synthetic.rows()
    early = [r for r in found if r.method in ("sam_ft", "sam_ft+ts")]
    ellipse = [r for r in found if r.method == "prompt_only_disc"]
    return [
        *found,
        *(dataclasses.replace(r, method=r.method.replace("sam_ft", "early_stopping")) for r in early),
        *(dataclasses.replace(r, method="prompt_only_ellipse") for r in ellipse),
    ]


@pytest.fixture(scope="module")
def experiment(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiment")
    tried = [{"weights": {"lambda1": w}, "dsc": 0.7 + w / 10, "value": 0.2 - w / 10} for w in (0.1, 0.3)]
    baseline = {"chosen": {}, "candidates": [{"weights": {}, "dsc": 0.7, "value": 0.2}]}
    selection = {
        "rule": {"lowest": "ECE", "region": "p>0.01", "within_dsc_points": 1.0},
        "methods": {"sam_ft": baseline, "sam_fip": {"chosen": {"lambda1": 0.3}, "candidates": tried}},
    }
    (folder / "selection").mkdir()
    for protocol in results.PROTOCOLS:
        (folder / "selection" / f"fold0_{protocol}.json").write_text(json.dumps(selection))
        evaluation = folder / "evaluation" / "fold0" / protocol
        evaluation.mkdir(parents=True)
        tables.write_cases(evaluation / "cases.csv", rows)
    return folder


def test_the_page_and_the_table_say_what_the_rows_say(rows, experiment):
    content = json.loads(json.dumps(results.read(experiment, "5 minutes")))
    page, table = results.page(content), results.readme_table(content)
    key = ("sam_fip", "B", evaluate.ALL, evaluate.DSC)
    scores = [r.value for r in rows if (r.method, r.domain, r.class_name, r.metric) == key]
    (line,) = [line for line in table.splitlines() if line.startswith("| SAM-FT + FIP |")]
    assert line.split(" | ")[2].startswith(f"{100 * np.mean(scores):.1f} ± ")
    assert "took 5 minutes" in page and "| SAM-FT + FIP | lambda1 0.3 | 73.0 | 0.170 | chosen |" in page
    assert "| SAM-FT + FIP | lambda1 0.1 | 71.0 | 0.190 |  |" in page


def test_what_is_called_better_is(rows, experiment):
    found = {
        (c["method"], c["reference"], c["domain"], c["metric"], c["region"]): c
        for c in results.read(experiment, "")["comparisons"]["gt_points"]
    }
    fip = found["sam_fip", "sam_ft", "B", *results.ECE]
    assert fip["verdict"] == "better" and fip["low"] < fip["difference"] < fip["high"] < 0
    assert fip["p_value"] > 2 * 0.5**10  # corrected
    assert found["sam_fip", "sam_ft+ts", "A", *results.ECE]["verdict"] == "worse"
    assert found["sam_cmp", "sam_ft", "B", *results.ECE]["verdict"] == "no measurable difference"
    assert not [key for key in found if key[0].endswith("+ts") and not key[1].endswith("+ts")]


def test_what_is_committed_is_what_the_script_writes():
    content = json.loads(results.CONTENT.read_text())
    assert results.PAGE.read_text() == results.page(content)
    assert (
        "\n\n".join([results.MARKS[0], results.readme_table(content), results.MARKS[1]]) in results.README.read_text()
    )
