"""docs/evaluation-protocol.md: its tables are the simulation's, what it says of them holds, its example runs."""

import importlib.util
import pathlib
import re

import numpy as np
import pytest
from scipy import special

from calsegx.evaluation import compare, evaluate
from calsegx.metrics import regions, statistics

DOCS = pathlib.Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "evaluation-protocol.md").read_text()
_spec = importlib.util.spec_from_file_location("foreground_ece", DOCS / "foreground_ece.py")
simulation = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(simulation)


def test_the_tables_are_the_simulations(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(re.sub(r"0\.\d{3}", "0.999", PAGE))
    simulation.write(page)
    between = [text.split(simulation.MARKS[0])[1].split(simulation.MARKS[1])[0] for text in (page.read_text(), PAGE)]
    assert between[0] == between[1] and between[0].count("\n|") == 17


def test_the_figures_of_the_text_are_the_tables():
    start, end = (PAGE.index(mark) for mark in simulation.MARKS)
    text = PAGE[:start] + PAGE[end : PAGE.index("## Undefined cases")]
    told = set(re.findall(r"\b0\.0\d{2,3}", text))
    assert len(told) == 5 and told <= set(re.findall(r"0\.\d+", PAGE[start:end])), told


@pytest.mark.parametrize(("lesions", "preferred"), [("clear", 2.0), ("faint", 0.5)])
def test_only_the_papers_region_prefers_a_model_that_is_not_calibrated(lesions, preferred):
    found = {factor: simulation.measure(lesions, factor) for factor in simulation.MODELS}
    assert len({values["dsc"] for values in found.values()}) == 1
    for region in simulation.REGIONS:
        best = min(found, key=lambda factor: found[factor][region])
        assert best == (preferred if region == "gt_fg" else 1.0)
    for values in found.values():
        assert values["gt_fg"] >= abs(values["recall"] - values["confidence"])


def test_of_a_calibrated_model_p_on_the_foreground_is_the_ratio_of_its_moments():
    pairs = [(special.expit(z).ravel(), truth.ravel()) for z, truth in simulation.cases("clear")]
    p, truth = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    assert p[truth].mean() == pytest.approx((p**2).mean() / p.mean(), abs=0.005)
    assert 1 - p[truth].mean() == pytest.approx(0.19, abs=0.005)


def test_an_invented_structure_is_seen_where_the_page_says():
    without, with_it = (simulation.measure("clear", 1.0, invented) for invented in (False, True))
    assert with_it["dsc"] == pytest.approx(without["dsc"] - 0.05, abs=0.005)
    assert with_it["gt_fg"] == without["gt_fg"] and with_it["dilated"] == without["dilated"]
    assert with_it["p>0.01"] > 5 * without["p>0.01"] and with_it["all"] > 5 * without["all"]


def test_four_times_the_voxels_are_a_quarter_of_the_error():
    errors = [simulation.in_field(side, 2.0) for side in simulation.FIELDS_MM]
    np.testing.assert_allclose(np.divide(errors[1:], errors[:-1]), 0.25, rtol=0.01)


def test_the_regions_and_limits_are_the_evaluations():
    rows = re.findall(r"^\| `(\S+)` \|.*\| (the model|the label|nobody) \|", PAGE, re.MULTILINE)
    assert [name for name, _ in rows] == [*evaluate.REGIONS]
    assert all((chosen != "the label") == regions.label_independent(name) for name, chosen in rows)
    assert f"{evaluate.BINS} of equal width" in PAGE and f"NSD at {evaluate.NSD_MM:g} mm" in PAGE
    assert f"within {regions.DILATION_MM:g} mm" in PAGE and f"{statistics.RESAMPLES} resamples" in PAGE
    assert f"below {compare.SIGNIFICANCE}" in PAGE and f"Fewer than {statistics.FEWEST_PAIRS} common" in PAGE


def test_the_example_runs(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names = {}
    exec(compile(block, "docs/evaluation-protocol.md", "exec"), names)
    assert names["difference"].low > 0 and names["difference"].p < 0.05
    assert re.fullmatch(r"0\.\d{3} \[0\.\d{3}, 0\.\d{3}\], p = 0\.\d{3}\n", capsys.readouterr().out)
