"""Results in the papers' layouts."""

import dataclasses
import math

import pytest

from calsegx.evaluation import evaluate, methods, paper_tables, tables
from tests.evaluation import synthetic
from tests.evaluation.test_report import record

NAMES = ["sam_ft", "sam_fip", "calsam"]


def cells(table, name):
    (row,) = [row for row in table.rows if row[0] == methods.display(name)]
    return row[1:]


def test_calsams_first_table_has_the_gap_of_every_metric():
    made = record(synthetic.rows(NAMES, noise=0.0))
    table = paper_tables.calsam_domains(made)
    assert table.heads == ["Method", *["in", "out", "gap"] * 3]
    inside, outside, gap, *_ = cells(table, "sam_ft")
    first, second = (float(text.split(" ±")[0]) for text in (inside, outside))
    assert float(gap) == pytest.approx(first - second, abs=0.11) and gap == "+14.0"
    assert cells(table, "sam_ft")[8] == "+0.090"  # the ECE rises, which is a degradation
    assert "Prompts: gt_points" in table.caption and "undefined 0 of 120 values" in table.caption


def test_the_ablation_has_four_lines_and_a_rule_for_what_was_not_trained():
    table = paper_tables.calsam_ablation(record(synthetic.rows(NAMES)))
    assert [row[:2] for row in table.rows] == [["no", "no"], ["yes", "no"], ["no", "yes"], ["yes", "yes"]]
    assert set(table.rows[2][2:]) == {paper_tables.RULE} and paper_tables.RULE not in table.rows[3]
    assert "SAM-FT + CMP is not in the experiment." in table.notes


def test_shifts_are_targets_or_corruptions_over_their_levels():
    rows = synthetic.rows(NAMES, noise=0.0)
    table = paper_tables.calsam_shifts(record(rows))
    assert table.groups == [("scanner B", 3)]
    clean = [dataclasses.replace(r, domain="clean") for r in rows if r.domain == "A"]
    levels = [
        dataclasses.replace(r, domain=f"motion-{level}", value=r.value - 0.1 * level * (r.metric == evaluate.DSC))
        for level in (1, 3)
        for r in rows
        if r.domain == "A"
    ]
    made = record(clean + levels, source="clean", targets=("motion-1", "motion-3"))
    (table,) = paper_tables.of(made)
    assert table.groups == [("motion", 3)]
    plain = float(cells(paper_tables.mbls(record(rows)), "sam_ft")[0].split(" ±")[0])
    assert float(cells(table, "sam_ft")[0]) == pytest.approx(plain - 20, abs=0.11)


def test_ranks_are_those_of_the_columns():
    table = paper_tables.nacl(record(synthetic.rows(NAMES, noise=0.0)))
    sums = {name: float(cells(table, name)[-3]) for name in NAMES}
    # SAM-FT: first in DSC and HD95 on A, last in all else; FIP and CalSAM are the same and share the smaller rank.
    assert sums == {"sam_ft": 2 * 1 + 6 * 3, "sam_fip": 2 * 2 + 6 * 1, "calsam": 2 * 2 + 6 * 1}
    assert [cells(table, name)[-1] for name in NAMES] == ["3", "1", "1"]
    assert cells(table, "sam_ft")[-2] == "2.50"


def test_undefined_values_are_rules_and_are_counted():
    rows = [
        dataclasses.replace(r, value=math.nan, defined=False) if r.metric == evaluate.HD95 else r
        for r in synthetic.rows(NAMES)
    ]
    made = record(rows)
    table = paper_tables.mbls(made)
    assert cells(table, "sam_ft")[1] == paper_tables.RULE
    assert "HD95 (mm): 95 % Hausdorff" in table.caption and "undefined 120 of 120 values" in table.caption
    assert "2 left out" in paper_tables.nacl(made).caption
    assert "0 " not in cells(table, "sam_ft")[1] and table.notes


@pytest.mark.parametrize(
    ("made", "count"),
    [
        (record(synthetic.rows(["calsam"], ["A"], seeds=(1,), cases=2), targets=()), 3),
        (record([]), 0),
        (record(synthetic.rows(["sam_ft"], ["B"])), 4),
    ],
    ids=["one method", "nothing", "no source"],
)
def test_what_there_is_is_written(made, count):
    found = paper_tables.of(made)
    assert len(found) == count
    for table in found:
        assert all(len(row) == len(table.heads) for row in table.rows)
        assert sum(size for _, size in table.groups) == len(table.heads) - 1
        for text in (paper_tables.markdown(table), paper_tables.tex(table)):
            assert " nan" not in text and text.count("\n") >= 4


def test_latex_is_balanced_and_escaped():
    text = paper_tables.tex(paper_tables.calsam_ablation(record(synthetic.rows(NAMES))))
    body = text.replace(r"\{", "").replace(r"\}", "")
    assert body.count("{") == body.count("}") and paper_tables.RULE not in text
    assert " 95 \\% " in text and "gt\\_points" in text and " & ---" in text
    lines = [line for line in text.splitlines() if line.startswith(("no &", "yes &"))]
    assert len(lines) == 4 and all(line.count(" & ") == 7 for line in lines)
    assert tables.escape("a|b") == "a\\|b"
