import csv
import dataclasses
import json
import math

import pytest

from calsegx.evaluation import evaluate, methods, tables
from tests.evaluation import synthetic


def test_methods_come_in_display_order_and_unknown_ones_last():
    given = ["mine", "calsam+ts", "sam_ft", "prompt_only_disc", "calsam", "sam_ft", "other"]
    assert methods.order(given) == ["prompt_only_disc", "sam_ft", "calsam", "calsam+ts", "mine", "other"]
    assert methods.display("sam_fip+ts") == "SAM-FT + FIP + TS"
    assert methods.display("mine") == "mine"
    assert methods.display("sam_ft:sam + 0.1*mbls_penalty(margin=5)+ts") == (
        "SAM-FT (sam + 0.1*mbls_penalty(margin=5)) + TS"
    )


def test_a_number_that_rounds_to_zero_has_no_sign():
    column = tables.Column("DSC", "volume", "DSC (points)", "", 100.0, 1)
    shown = [tables.number(column, value, None, signed=True) for value in (-4e-4, 0.0, 4e-4, -6e-4, 6e-4)]
    assert shown == ["0.0", "0.0", "0.0", "-0.1", "+0.1"]
    assert [tables.number(column, value, 0.01) for value in (-4e-4, -6e-4)] == ["0.0 ± 1.0", "-0.1 ± 1.0"]


def test_cases_are_written_in_long_format(tmp_path):
    rows = synthetic.rows(["sam_ft"], cases=2)
    rows.append(dataclasses.replace(rows[0], case_id="with, comma", value=math.nan, defined=False))
    path = tmp_path / "out" / "cases.csv"
    tables.write_cases(path, rows)
    with path.open(newline="") as file:
        header, *lines = csv.reader(file)
    assert ",".join(header) == "method,seed,case_id,subject_id,domain,split,class,metric,region,value,defined"
    assert lines == [[str(value) for value in dataclasses.astuple(row)] for row in rows]
    assert lines[-1][2] == "with, comma" and lines[-1][-2:] == ["nan", "False"]
    assert [float(line[9]) for line in lines[:-1]] == [row.value for row in rows[:-1]]
    assert [p.name for p in path.parent.iterdir()] == ["cases.csv"]


def test_summary_has_nnunets_keys_and_no_nan(tmp_path):
    rows = synthetic.rows(["sam_ft", "calsam"], seeds=(42,), cases=3, class_names=("core", "oedema"))
    rows = [
        dataclasses.replace(r, value=math.nan, defined=False)
        if r.class_name == "oedema" and r.metric == evaluate.DSC and r.case_id.startswith("case_00")
        else r
        for r in rows
    ]
    path = tmp_path / "summary.json"
    files = {"case_00_A": ("p/case_00_A.nii.gz", "r/case_00_A.nii.gz")}
    tables.write_summary(path, rows, ["core", "oedema"], "calsam", "A", ["B"], files)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads(path.read_text(), parse_constant=refuse)
    assert len(content["metric_per_case"]) == 6
    first = content["metric_per_case"][0]
    assert first["prediction_file"] == "p/case_00_A.nii.gz"
    assert first["metrics"]["2"]["Dice"] is None
    own = [r for r in rows if r.method == "calsam" and r.metric == evaluate.DSC and not math.isnan(r.value)]
    for label, name in (("1", "core"), ("2", "oedema")):
        values = [r.value for r in own if r.class_name == name]
        assert content["mean"][label]["Dice"] == pytest.approx(sum(values) / len(values))
    halves = [content["mean"][label]["Dice"] for label in "12"]
    assert content["foreground_mean"]["Dice"] == pytest.approx(sum(halves) / 2)
    assert {s["method"] for s in content["calsegx"]["summary"]} == {"sam_ft", "calsam"}
    assert {(g["source"], g["target"]) for g in content["calsegx"]["gaps"]} == {("A", "B")}


def test_overview_marks_the_best_and_counts_the_undefined():
    rows = synthetic.rows(["sam_ft", "calsam"], noise=0.0, cases=4)
    rows = [
        dataclasses.replace(r, defined=False)
        if (r.method, r.domain, r.metric, r.case_id) == ("calsam", "B", evaluate.HD95, "case_01_B")
        else r
        for r in rows
    ]
    source, target, gap = tables.overview(rows, "A", ["B"], "scanner")
    assert (source.title, target.title, gap.title) == ("Source: scanner A", "Target: scanner B", "Gap: A to B")
    cells = dict(target.rows)
    # Not where the label selects the voxels: there the over-confident may win.
    assert [c.best for c in cells["calsam"]] == [c.region != "gt_fg" for c in tables.COLUMNS]
    assert not any(c.best for c in cells["sam_ft"])
    assert cells["calsam"][1].note == "undef. 2/8"  # one case, two seeds
    assert cells["sam_ft"][1].note == "undef. 0/8"
    assert dict(source.rows)["sam_ft"][0].best
    assert dict(gap.rows)["sam_ft"][0].text.startswith("+14.0")
    assert not any(c.best for _, line in gap.rows for c in line)


def test_overview_says_what_is_missing():
    rows = [
        dataclasses.replace(r, value=math.nan, defined=False) if r.metric == evaluate.HD95 else r
        for r in synthetic.rows(["sam_ft"], domains=["A"], seeds=(42,), cases=2)
        if r.metric != evaluate.NLL
    ]
    blocks = tables.overview(rows, "A", ["B"])
    cells = blocks[0].rows[0][1]
    assert cells[1].text == "undefined in every case"
    assert cells[1].note == "undef. 2/2"
    assert cells[-1].text == "not measured"
    assert "±" not in cells[0].text
    assert blocks[1].rows == [] == blocks[2].rows


def test_markdown_has_a_line_for_every_method_and_the_definitions():
    text = tables.markdown(tables.overview(synthetic.rows(cases=3), "A", ["B"]))
    lines = text.splitlines()
    width = lines[0].count("|")
    assert all(line.count("|") == width for line in lines if line.startswith("|"))
    assert sum(line.startswith("| CalSAM + TS |") for line in lines) == 3
    for column in tables.COLUMNS:
        assert f"* {column.title}: {column.definition}." in lines
    assert "ECE [gt_fg] (selected by the label)" in lines[0]


def test_the_further_metrics_have_a_table_of_their_own():
    rows = synthetic.rows(["sam_ft", "calsam"], cases=3)
    shown = {(c.metric, c.region) for c in (*tables.COLUMNS, *tables.MORE_COLUMNS)}
    assert {metric for metric, _ in shown} == {row.metric for row in rows}
    blocks = tables.overview(rows, "A", ["B"], "scanner", tables.MORE_COLUMNS)
    text = tables.markdown(blocks, tables.MORE_COLUMNS)
    assert "not measured" not in text
    for title in ("NSD@2mm", "lesion F1", "absolute volume difference (ml)", "TACE [p>0.01]"):
        assert title in text.splitlines()[0]
