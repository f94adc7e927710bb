"""Parts of the report that look across domains, metrics and cases."""

import dataclasses
import math

import numpy as np
import pytest

from calsegx.evaluation import (
    compare,
    comparison_figures,
    evaluate,
    gallery,
    rankings,
    report,
    report_parts,
    review,
    transfer,
)
from calsegx.interfaces import Case
from calsegx.metrics import ranks
from tests.evaluation import synthetic
from tests.evaluation.test_figures import pixels
from tests.evaluation.test_report import record, render

NAMES = ["vanilla_sam", "sam_ft", "calsam"]


def moved(rows, domain, name, change):
    """The rows of a domain again, under another name and with another DSC."""
    return [
        dataclasses.replace(r, domain=name, value=r.value + (change if r.metric == evaluate.DSC else 0))
        for r in rows
        if r.domain == domain
    ]


def undefined(rows, hit):
    return [dataclasses.replace(r, value=math.nan, defined=False) if hit(r) else r for r in rows]


def corrupted(names=NAMES, **options):
    clean = [
        dataclasses.replace(r, domain="clean") for r in synthetic.rows(names, domains=["A"], noise=0.01, **options)
    ]
    domains = [f"{name}-{level}" for name in ("motion", "noise", "bias-field") for level in (1, 2, 3, 4, 5)]
    worse = [row for d in domains for row in moved(clean, "clean", d, -0.05 * int(d[-1]))]
    return record(clean + worse, source="", targets=["clean", *domains])


def test_the_matrix_has_the_worst_target_and_the_gap_to_it():
    rows = synthetic.rows(["sam_ft", "calsam"], noise=0.0)
    made = record(rows + moved(rows, "B", "C", -0.1), targets=("B", "C"))
    line = transfer.matrix(made, evaluate.DSC, "volume")[0]
    assert (line.method, line.worst) == ("sam_ft", "C")
    assert line.source - line.gap == pytest.approx(line.targets["C"])
    assert line.mean == pytest.approx((line.targets["B"] + line.targets["C"]) / 2)
    ece = transfer.matrix(made, evaluate.ECE, "p>0.01")[0]
    assert ece.gap == pytest.approx(max(ece.targets.values()) - ece.source) and ece.gap > 0
    dice, _ = report_parts.matrices(made)
    heads = "scanner A (source)|scanner B (target)|scanner C (target)|mean of 2 targets|worst target|gap to the worst"
    assert dice.domains == heads.split("|")
    assert dice.rows[0][1][-2].endswith("(C)") and dice.rows[0][1][-1] == "+24.0"
    assert report_parts.matrices(record(rows, targets=())) == []


def test_a_target_without_a_value_is_not_the_worst():
    rows = undefined(synthetic.rows(["sam_ft"]), lambda r: r.domain == "B" and r.metric == evaluate.DSC)
    (line,) = transfer.matrix(record(rows), evaluate.DSC, "volume")
    assert line.worst == "" and math.isnan(line.gap) and math.isnan(line.mean)
    assert report_parts.matrices(record(rows))[0].rows[0][1][1:] == ["undefined"] * 3


def test_many_targets_and_no_source_leave_their_columns_out():
    dice, _ = report_parts.matrices(corrupted())
    assert dice.domains == ["mean of 16 targets", "worst target"]
    assert dice.rows[0][1][1].endswith("-5)")


def test_ranks_are_those_of_the_metrics_module():
    rows = synthetic.rows(NAMES, noise=0.1, cases=12)
    found = rankings.rank(rows, ["A"])
    index = compare.index(rows)
    subjects = [f"subject_{i:02d}" for i in range(12)]

    def scores(metric):
        return np.array([[compare._by(index[n, "A", *metric], "subject_id")[s] for s in subjects] for n in NAMES])

    cube = np.stack([scores(metric) for metric in rankings.RANKED], axis=2)
    higher = [evaluate.higher_is_better(name) for name, _ in rankings.RANKED]
    assert found.metrics == list(rankings.RANKED) and found.subjects == [12] * 6 and found.left_out == []
    np.testing.assert_array_equal(found.sum_rank, ranks.sum_rank(cube, higher).value)
    np.testing.assert_allclose(found.mean_case_rank, ranks.mean_case_rank(cube, higher).value)
    np.testing.assert_allclose(found.of_cases.mean(axis=1), found.mean_case_rank)
    assert found.friedman_p[0] == ranks.friedman(cube[..., 0], True).p < 0.01


def test_ranks_without_a_metric_a_method_or_a_test():
    rows = synthetic.rows(NAMES, cases=8)
    no_ece = [r for r in rows if (r.method, r.metric) != ("calsam", evaluate.ECE)]  # masks alone have no confidence
    found = rankings.rank(no_ece, ["A"])
    assert found.left_out == [("ECE", "dilated"), ("ECE", "p>0.01")]
    (_, _, note), _ = report_parts.rank_maps(record(no_ece))
    assert note == "Left out, because no subject has a value of every method: ECE [dilated], ECE [p>0.01]."
    two = rankings.rank(synthetic.rows(["sam_ft", "calsam"]), ["A"])
    assert all(map(math.isnan, two.friedman_p)) and list(two.sum_rank) == [10, 8]
    assert pixels(comparison_figures.rank_map(two, "two")).size
    assert rankings.rank(synthetic.rows(["sam_ft"]), ["A"]) is None
    assert rankings.rank(undefined(rows, lambda r: True), ["A"]) is None


def test_a_subject_seen_in_several_domains_counts_once():
    rows = synthetic.rows(NAMES, cases=7)
    assert rankings.rank(rows, ["A", "B"]).subjects == [7] * 6


def test_the_rank_map_grows_with_its_methods():
    few, many = (rankings.rank(synthetic.rows(names, cases=3), ["A"]) for names in (NAMES, synthetic.METHODS))
    few, many = (pixels(comparison_figures.rank_map(found, "t")).shape for found in (few, many))
    assert many[0] > 1.3 * few[0]


def test_corruptions_are_recognised_by_their_names():
    found = transfer.corruptions(["clean", "motion-3", "motion-1", "bias-field-5", "site-2000", "motion-7"])
    assert found == {
        "bias-field": {0: "clean", 5: "bias-field-5"},
        "motion": {0: "clean", 1: "motion-1", 3: "motion-3"},
    }
    assert list(found["motion"]) == [0, 1, 3]
    assert transfer.corruptions(["A-1", "A-2"]) == {}
    assert report_parts.corruption_curves(record(synthetic.rows(["sam_ft"]))) == []


def test_a_corruption_sweep_has_curves_and_leaves_the_panels_per_domain_out(tmp_path):
    made = corrupted(cases=2)
    page = render(tmp_path / "report.html", made)
    assert "Under corruption" in page.text and "there are more than 12" in page.text
    assert "Accuracy against calibration" not in page.text
    assert len(page.loads) == 3  # ranks of all targets, DSC, ECE


def test_curves_of_many_methods_have_larger_panels():
    levels = {name: {0: "clean", 5: f"{name}-5"} for name in ("motion", "noise")}
    values = {("sam_ft", "clean"): 0.7, ("sam_ft", "motion-5"): math.nan}
    few = comparison_figures.corruption_curves(values, levels, ["sam_ft"], "DSC (points)", 100)
    many = comparison_figures.corruption_curves(values, levels, list(synthetic.METHODS), "ECE")
    assert pixels(many).shape[1] > 1.5 * pixels(few).shape[1]


def test_confidence_is_of_the_top_label_where_something_is_seen():
    probabilities = np.zeros((2, 3, 4, 2))
    probabilities[0, 0, 0] = [0.7, 0.2]
    probabilities[0, 0, 1] = [0.1, 0.1]  # background, 0.8
    probabilities[1, 0, 0] = [0.005, 0.0]
    assert review.mean_confidence(probabilities) == pytest.approx((0.7 + 0.8) / 2)
    assert math.isnan(review.mean_confidence(np.zeros((2, 3, 4, 1))))


def test_the_least_confident_cases_come_first_and_are_compared_with_their_dsc(tmp_path):
    rows = synthetic.rows(["sam_ft"], domains=["A"], seeds=(1,), cases=12)
    dice = {r.case_id: r.value for r in rows if r.metric == evaluate.DSC and r.class_name == evaluate.ALL}
    mask = np.zeros((2, 2), bool)
    snapshots = [
        gallery.Snapshot(_case(name), "A", 0, mask, (1.0, 1.0), {}, {"sam_ft": value / 2 + 0.4})
        for name, value in dice.items()
    ]
    snapshots.append(gallery.Snapshot(_case("empty"), "A", 0, mask, (1.0, 1.0), {}, {"sam_ft": math.nan}))
    found = gallery.reviews(snapshots, rows, ("sam_ft", 1))
    assert found[0].case_id == "empty" and math.isnan(found[0].dsc)
    assert [r.case_id for r in found[1:]] == sorted(dice, key=lambda name: dice[name])
    assert review.agreement(found).r == pytest.approx(1)
    page = render(tmp_path / "report.html", record(rows, targets=(), reviews=found, reviewed="SAM-FT, seed 1"))
    assert "The 10 of 13 cases with the lowest confidence of SAM-FT, seed 1: mean probability" in page.text
    assert "over 12 cases is r = 1.00" in page.text and "nothing predicted" in page.text
    few = report_parts.review_note(record(rows, reviews=found[:2], reviewed="SAM-FT"))
    assert "Too few cases" in few


def _case(name):
    return Case(case_id=name, subject_id=name, images={}, label=None, split="test")


@pytest.mark.parametrize(
    ("hit", "start", "words"),
    [
        (lambda r: r.class_name == "core", "Class core on scanner B", "in no case, neither in the truth nor"),
        (lambda r: r.metric == evaluate.ECE, "ECE [p>0.01]", "undefined in every case of SAM-FT"),
        (lambda r: r.method == "calsam", "DSC, ", "undefined in every case of CalSAM"),
    ],
    ids=["a class absent everywhere", "a metric undefined everywhere", "a method undefined everywhere"],
)
def test_what_is_undefined_renders_and_is_said(tmp_path, hit, start, words):
    rows = undefined(synthetic.rows(["sam_ft", "calsam"], cases=3, class_names=("core", "oedema")), hit)
    made = record(rows)
    assert any(s.startswith(start) and words in s for s in report.verdict(made))
    page = render(tmp_path / "report.html", made)
    assert words in page.text and "undefined" in page.text


def test_one_seed_and_a_missing_method_render_and_are_said(tmp_path):
    made = record(synthetic.rows(["vanilla_sam", "sam_ft", "calsam"], seeds=(42,), cases=4))
    page = render(tmp_path / "report.html", made)
    assert "one (42), so nothing is known about the spread" in page.text
    assert "Not evaluated: FIP, CMP." in report.verdict(made)
    only_on_one = [r for r in made.rows if (r.method, r.domain) != ("calsam", "B")]
    render(tmp_path / "other.html", record(only_on_one))
    assert "± 0" not in page.text
