import dataclasses

import numpy as np
import pytest

from calsegx.evaluation import calibration_figures, calibration_parts, evaluate, report
from calsegx.metrics import calibration, margins
from tests.evaluation import synthetic
from tests.evaluation.test_report import render

CLASSES = ("core", "oedema", "rim")
SECTIONS = ("Reliability by region", "Reliability by class", "Distribution of the logits")


def prediction(classes=CLASSES, seed=0, shape=(3, 12, 12)):
    """Logits, foreground probabilities and truth of a case."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (*shape, len(classes) + 1))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    return logits, probabilities.astype(np.float32), rng.integers(0, len(classes) + 1, shape)


def evaluated(classes=CLASSES, names=("sam_ft",), domains=("A", "B"), **fields):
    """A record with the statistics and margins of one case per method and domain."""
    statistics, found = {}, {}
    for index, name in enumerate(names):
        for domain in domains:
            logits, probabilities, truth = prediction(classes, index)
            key = evaluate.CaseKey(name, 1, "case", "subject", domain, "test")
            _, sums = evaluate.evaluate_case(probabilities[..., 1:], truth, (1.0, 1.0, 1.0), classes, key)
            statistics |= {(name, domain, region): value for region, value in sums.items()}
            found[name, domain] = margins.histogram(logits, truth)
    rows = synthetic.rows(names, domains=["A", "B"][: len(domains)], cases=3, seeds=(1,), class_names=classes)
    rows = [dataclasses.replace(row, domain=domains["AB".index(row.domain)]) for row in rows]
    values = {"statistics": statistics, "margins": found} | fields
    return report.Record("t", rows, domains[0], domains[1:], "scanner", **values)


@pytest.fixture
def drawn(monkeypatch):
    """What the figures were asked to show."""
    calls = []
    for name in ("reliability_grid", "margin_histograms"):
        monkeypatch.setattr(calibration_figures, name, lambda *given: calls.append(given) or b"")
    return calls


def test_a_classs_curve_is_the_one_computed_directly(drawn):
    made = evaluated()
    calibration_parts.reliability_by_class(made)
    ((grid, title, *_),) = drawn
    assert title == "SAM-FT, region p>0.01" and list(grid) == ["scanner A (source)", "scanner B (target)"]
    assert list(grid["scanner A (source)"]) == ["background", *CLASSES]
    _, probabilities, truth = prediction()
    inside = 1 - probabilities[..., 0] > 0.01
    for index, (curve, ece) in enumerate(grid["scanner A (source)"].values()):
        of_class = (truth[inside] == index).astype(int)
        alone = calibration.calibration_statistics(probabilities[inside][:, index], of_class, score="foreground")
        np.testing.assert_array_equal(curve.count, alone.reliability_curve().count)
        np.testing.assert_allclose(curve.accuracy, alone.reliability_curve().accuracy)
        np.testing.assert_allclose(curve.confidence, alone.reliability_curve().confidence, rtol=1e-5)
        assert ece == pytest.approx(alone.ece(), abs=1e-6)


def test_every_region_with_statistics_has_a_column(drawn):
    made = evaluated()
    calibration_parts.reliability_by_region(made)
    ((grid, *_),) = drawn
    assert list(grid["scanner B (target)"]) == list(evaluate.REGIONS)
    curve, ece = grid["scanner B (target)"]["gt_fg"]
    direct = made.statistics["sam_ft", "B", "gt_fg"]
    assert ece == direct.ece() and np.array_equal(curve.count, direct.count)


def test_margins_of_many_targets_are_shown_together(drawn):
    made = evaluated()
    many = {("sam_ft", f"site {i}"): made.margins["sam_ft", "A"] for i in range(6)}
    rows = [dataclasses.replace(made.rows[0], domain=domain) for _, domain in many]
    sites = [domain for _, domain in many]
    calibration_parts.margin_histograms(report.Record("t", rows, sites[0], sites[1:], margins=many))
    ((panels, _, limit),) = drawn
    assert list(panels) == ["site 0 (source)", "5 targets together"]
    assert np.array_equal(panels["5 targets together"], 5 * panels["site 0 (source)"])
    assert limit == calibration_figures.margin_limit(list(many.values()))


def test_the_axis_of_margins_holds_all_voxels():
    def limit(*values):
        return calibration_figures.margin_limit(
            [margins.histogram(np.array(values)[:, None], np.ones(len(values), int))]
        )

    assert (limit(0.1), limit(-7.0, 2.0), limit(10.2), limit(99.0)) == (5, 10, 15, 30)
    assert calibration_figures.margin_limit([]) == 5


def test_sections_appear_where_there_is_something_to_show(tmp_path):
    page = render(tmp_path / "report.html", evaluated())
    assert all(section in page.text for section in SECTIONS)
    assert "Without logits, so left out" not in page.text
    one_class = evaluated(classes=("tumour",), names=("prompt_only_disc", "sam_ft"), domains=("A",))
    one_class = dataclasses.replace(one_class, margins={("sam_ft", "A"): one_class.margins["sam_ft", "A"]})
    page = render(tmp_path / "report.html", one_class)
    assert [section in page.text for section in SECTIONS] == [True, False, True]
    assert "Without logits, so left out: Prompt-only disc." in page.text
    page = render(tmp_path / "report.html", evaluated(statistics={}, margins={}))
    assert not any(section in page.text for section in SECTIONS)


def test_classes_that_never_occur_and_empty_regions_are_drawn(tmp_path):
    empty = calibration.calibration_statistics(np.zeros((0, 4)), np.zeros(0, int))
    _, probabilities, _ = prediction()
    absent = calibration.calibration_statistics(probabilities.reshape(-1, 4), np.zeros(432, int))
    statistics = {("sam_ft", domain, "gt_fg"): empty for domain in "AB"}
    statistics |= {("sam_ft", "A", "p>0.01"): absent, ("sam_ft", "B", "p>0.01"): empty}
    nothing = {("sam_ft", "A"): np.zeros((2, margins.BINS), int)}
    page = render(tmp_path / "report.html", evaluated(statistics=statistics, margins=nothing))
    assert all(section in page.text for section in SECTIONS)
    assert "nan" not in page.text.lower().split()
