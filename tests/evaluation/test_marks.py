"""What is tested against what, and how it is marked in the tables."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest

from calsegx.evaluation import compare, evaluate, latex, marks, tables
from calsegx.metrics import statistics
from tests.evaluation import synthetic

DSC, ECE = (evaluate.DSC, evaluate.VOLUME), (evaluate.ECE, "p>0.01")


def test_the_strongest_baseline_is_by_dsc_and_ece_on_the_source_and_never_ours():
    rows = synthetic.rows()
    # SAM-FT + TS has the DSC of SAM-FT and a smaller ECE; on the target vanilla SAM would lose by more.
    assert marks.strongest(rows, "A", ["B"]) == ("sam_ft+ts", "A")
    assert marks.strongest([r for r in rows if r.domain == "B"], "A", ["B"])[1] == "B"
    ours = synthetic.rows(["sam_fip", "sam_cmp+ts", "calsam"])
    assert marks.strongest(ours, "A", ["B"]) is None
    assert "No stars" in " ".join(marks.legend(ours, "A", ["B"]))
    masks_only = [r for r in rows if (r.method, r.metric) != ("sam_ft+ts", evaluate.ECE)]
    assert marks.strongest(masks_only, "A", ["B"])[0] != "sam_ft+ts"


def test_a_mask_has_no_marks_for_calibration_errors_and_is_no_baseline():
    """Its ECE on the voxels that it predicts is 1 - precision: here 0, with the best DSC too."""
    rows = synthetic.rows(["sam_ft", "calsam"])
    rows += [dataclasses.replace(r, metric=evaluate.MCE, value=r.value + 0.1) for r in rows if r.metric == evaluate.ECE]
    made = [dataclasses.replace(r, method="Tool", value=r.value + 0.1) for r in rows if r.method == "sam_ft"]
    errors = (evaluate.ECE, evaluate.MCE)
    masks = [dataclasses.replace(r, value=0.0) if r.metric in errors else r for r in made]
    assert marks.certain(rows + masks) == {"Tool"} and not marks.certain(rows + made)
    assert not marks.certain([dataclasses.replace(r, method="prompt_only_disc") for r in masks])
    assert marks.strongest(rows + masks, "A", ["B"]) == ("sam_ft", "A")
    columns = [column.title for column in tables.COLUMNS]
    dsc, ece = columns.index("DSC (points)"), columns.index("ECE [p>0.01]")
    cells = dict(tables.overview(rows + masks, "A", ["B"])[0].rows)
    assert cells["Tool"][dsc].best and not cells["Tool"][ece].best and cells["calsam"][ece].best
    assert not cells["Tool"][ece].stars


def test_p_values_are_corrected_over_the_methods_of_the_column():
    rows = synthetic.rows(["sam_ft", "vanilla_sam", "sam_fip", "calsam"], noise=0.1)
    index = compare.index(rows)
    names = ["vanilla_sam", "sam_ft", "sam_fip", "calsam"]
    found = compare.corrected_p_values(index, names, "sam_ft", "B", *DSC)
    plain = [compare.compare(index, name, "sam_ft", "B", *DSC).p_value for name in found]
    assert list(found) == ["vanilla_sam", "sam_fip", "calsam"]
    np.testing.assert_allclose(list(found.values()), statistics.holm(np.array(plain)))
    assert max(np.array(list(found.values())) / plain) > 1


def test_stars_follow_the_corrected_p():
    rows = synthetic.rows(["sam_ft", "sam_fip", "calsam"], cases=20, noise=0.001)
    source, _, gap = tables.overview(rows, "A", ["B"])
    cells = dict(source.rows)
    assert [c.stars for c in cells["sam_ft"]] == [""] * len(tables.COLUMNS)
    # 20 differences of one sign: p = 2^-19, twice that after the correction; none where the label selects.
    assert [c.stars for c in cells["calsam"]] == ["" if c.region == "gt_fg" else "***" for c in tables.COLUMNS]
    assert not any(c.stars or c.second for _, line in gap.rows for c in line)
    few = tables.overview(synthetic.rows(["sam_ft", "calsam"], cases=5), "A", [])
    assert not any(c.stars for _, line in few[0].rows for c in line)


def test_second_is_the_next_value_and_ties_share_a_mark():
    names = ["vanilla_sam", "sam_ft", "sam_ft+ts", "calsam"]
    cells = {n: line[0] for n, line in tables.overview(synthetic.rows(names, cases=5, noise=0.0), "A", [])[0].rows}
    assert [cells[n].best for n in names] == [False, True, True, False]
    assert [cells[n].second for n in names] == [False, False, False, True]
    two = tables.overview(synthetic.rows(["sam_ft", "calsam"], cases=5, noise=0.0), "A", [])[0]
    assert not any(c.second for _, line in two.rows for c in line)


def test_the_interval_is_of_the_mean_over_subjects():
    rows = synthetic.rows(["sam_ft"], domains=["A"])
    cell = tables.overview(rows, "A", [])[0].rows[0][1][0]
    low, high = map(float, re.fullmatch(r"\[(.*), (.*)\]", cell.interval).groups())
    assert low < float(cell.text.split()[0]) < high
    one = tables.overview(synthetic.rows(["sam_ft"], domains=["A"], cases=1), "A", [])[0].rows[0][1][0]
    assert one.interval == ""


def test_markdown_and_latex_show_the_same_marks():
    rows = synthetic.rows(["vanilla_sam", "sam_ft", "sam_fip"], cases=20, noise=0.0)
    rows = [dataclasses.replace(r, method="a_b 5%" if r.method == "sam_fip" else r.method) for r in rows]
    blocks, legend = tables.overview(rows, "A", ["B"], "scanner"), marks.legend(rows, "A", ["B"])
    markdown, tex = tables.markdown(blocks), latex.latex(blocks, legend=legend)
    cells = [c for block in blocks for _, line in block.rows for c in line]
    best, second, stars = (sum(bool(getattr(c, name)) for c in cells) for name in ("best", "second", "stars"))
    assert best and second and stars
    body = "\n".join(line for line in markdown.splitlines() if not line.startswith("| **"))
    assert (body.count("**"), body.count("<u>"), body.count(r"\*\*\*")) == (2 * best, second, stars)
    assert (tex.count(r"\textbf{"), tex.count(r"\underline{")) == (best, second)
    assert tex.count(r"\textsuperscript{***}") == stars
    assert r"a\_b 5\%" in tex and "a_b" not in tex
    assert tex.count(r"\begin{table}") == tex.count(r"\end{table}") == len(blocks)
    assert tex.count("{") - tex.count(r"\{") == tex.count("}") - tex.count(r"\}")
    widths = {line.count(" & ") for line in tex.splitlines() if line.endswith(r" \\")}
    assert widths == {len(tables.COLUMNS)}
    for column in tables.COLUMNS:
        assert latex.escape(column.definition) in tex


def test_empty_blocks_are_whole_tables():
    rows = synthetic.rows(["sam_ft"], domains=["A"])
    assert "No results." in latex.latex(tables.overview(rows, "A", ["B"]))


def test_summary_counts_voxels_as_nnunet_does(tmp_path):
    truth = np.zeros((4, 8, 8), np.uint8)
    truth[1:3, 2:6, 2:6] = 1  # 32 voxels
    probabilities = np.zeros((*truth.shape, 2), np.float32)
    probabilities[1:3, 2:6, 2:7, 0] = 0.9  # those and 8 more
    probabilities[1, 2, 2, 0] = 0  # without one
    key = evaluate.CaseKey("sam_ft", 1, "case", "subject", "A", "test")
    rows, _ = evaluate.evaluate_case(probabilities, truth, (1.0, 1.0, 1.0), ["core", "oedema"], key)
    tables.write_summary(tmp_path / "summary.json", rows, ["core", "oedema"], "sam_ft", "A", [])
    content = json.loads((tmp_path / "summary.json").read_text())
    metrics = content["metric_per_case"][0]["metrics"]
    expected = {"TP": 31, "FP": 8, "FN": 1, "TN": 216, "n_pred": 39, "n_ref": 32}
    assert {name: metrics["1"][name] for name in expected} == expected
    assert all(isinstance(metrics["1"][name], int) for name in expected)
    assert metrics["1"]["IoU"] == pytest.approx(31 / 40) and metrics["1"]["Dice"] == pytest.approx(62 / 71)
    assert metrics["2"]["IoU"] is None and metrics["2"]["TN"] == 256 and metrics["2"]["n_ref"] == 0
    assert content["mean"]["1"]["n_ref"] == 32
    assert content["foreground_mean"]["TP"] == 31 / 2


def test_voxel_counts_have_no_gap():
    rows = [
        evaluate.Row("m", 1, f"c{d}", f"s{d}", d, "test", "core", metric, "volume", 0.5, True)
        for d in "AB"
        for metric in (evaluate.IOU, *evaluate.COUNTS)
    ]
    assert [g.metric for g in evaluate.generalisation_gaps(rows, "A", "B")] == [evaluate.IOU]
    assert not math.isnan(evaluate.generalisation_gaps(rows, "A", "B")[0].mean)
