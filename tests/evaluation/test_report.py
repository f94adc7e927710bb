import dataclasses
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from calsegx.evaluation import compare, evaluate, figures, report
from calsegx.metrics import calibration, statistics
from tests.evaluation import synthetic


def record(rows, source="A", targets=("B",), **fields):
    return report.Record("A title", rows, source, targets, "scanner", **fields)


def about(sentences, start):
    (found,) = (s for s in sentences if s.startswith(start))
    return found


def with_effect(dice, ece, **options):
    """SAM-FT, and FIP that differs from it by the given DSC and ECE on both domains."""
    effects = {"sam_ft": ((0.0, 0.05), (-0.1, 0.05)), "sam_fip": ((dice, 0.05 + ece), (-0.1 + dice, 0.05 + ece))}
    return synthetic.rows(["sam_ft", "sam_fip"], effects=effects, **options)


@pytest.mark.parametrize(
    ("dice", "ece", "word", "evidence"),
    [
        (0.1, -0.04, "helps", ["DSC +", "better", "ECE [p>0.01] -0.0"]),
        (-0.1, 0.04, "hurts", ["DSC -", "worse", "ECE [p>0.01] +0.0"]),
        (-0.1, -0.04, "mixed", ["worse", "better"]),
        (0.0, 0.0, "no measurable difference", ["DSC 0.0 points, no measurable difference"]),
    ],
)
def test_the_verdict_follows_the_numbers(dice, ece, word, evidence):
    noise = 0.0 if dice == 0 else 0.01
    sentences = report.verdict(record(with_effect(dice, ece, noise=noise)))
    for where in ("scanner A (source)", "scanner B (target)"):
        sentence = about(sentences, f"FIP on {where}: ")
        assert sentence.startswith(f"FIP on {where}: {word} against SAM-FT: ")
        for text in evidence:
            assert text in sentence


def test_an_interval_that_includes_zero_is_no_measurable_difference():
    rows = with_effect(0.002, 0.0005, noise=0.08, seeds=(42,))
    sentence = about(report.verdict(record(rows)), "FIP on scanner B")
    low, high = map(float, re.search(r"DSC \S+ points, .*?95 % CI (\S+) to ([^,]+),", sentence).groups())
    assert low < 0 < high
    assert "no measurable difference against SAM-FT: DSC" in sentence


def test_temperature_scaling_is_the_other_reference():
    sentence = about(
        report.verdict(record(synthetic.rows(["sam_ft", "sam_ft+ts", "sam_fip", "sam_fip+ts"], noise=0.005))),
        "FIP on scanner B",
    )
    against, both = sentence.split(" Against SAM-FT + TS it hurts: ")[1].split(" With TS on both sides: ")
    assert against.startswith("ECE [p>0.01] +0.0") and ", worse (" in against
    assert both.startswith("ECE [p>0.01] -0.0") and ", better (" in both


def test_a_fixed_region_that_disagrees_is_said():
    rows = [
        dataclasses.replace(r, value=r.value + 0.2)
        if (r.method, r.metric, r.region) == ("sam_fip", evaluate.ECE, "dilated")
        else r
        for r in with_effect(0.0, -0.04)
    ]
    sentence = about(report.verdict(record(rows)), "FIP on scanner A")
    assert "On the same voxels for every method it says otherwise: ECE [dilated] +0.1" in sentence


def test_methods_that_do_not_beat_the_prompt_are_named():
    names = ["prompt_only_disc", "vanilla_sam", "sam_ft", "calsam"]
    effects = {**synthetic.EFFECTS, "sam_ft": ((0.08, 0), (0.02, 0))}
    sentences = report.verdict(record(synthetic.rows(names, effects=effects, noise=0.01)))
    target = about(sentences, "Prompt-only disc on scanner B (target)")
    assert "not measurably beaten in DSC by Vanilla SAM (-" in target
    assert "CalSAM" not in target
    assert about(sentences, "Vanilla SAM on scanner B").endswith("beaten in DSC by every other method.")
    worse = {**synthetic.EFFECTS, "sam_ft": ((0.08, 0), (-0.2, 0)), "calsam": ((0.04, 0), (-0.2, 0))}
    rows = synthetic.rows(names, effects=worse, noise=0.01)
    assert "SAM-FT (-" in about(report.verdict(record(rows)), "Prompt-only disc on scanner B")
    assert "CalSAM is not measurably better than the prompt-only disc" in report.headline(record(rows))


def test_headline():
    line = report.headline(record(synthetic.rows(["sam_ft", "calsam"], noise=0.0)))
    assert line.startswith("On scanner B, SAM-FT loses 14.0 DSC points and CalSAM loses 4.0 DSC points compared with")
    assert "CalSAM against SAM-FT: DSC +6.0 points (better), ECE [p>0.01] -0.100 (better)" in line
    assert "\n" not in line


def test_headline_names_the_worst_of_several_targets():
    rows = synthetic.rows(["sam_ft"], noise=0.0)
    worse = [dataclasses.replace(r, domain="C", value=r.value - 0.2) for r in rows if r.domain == "B"]
    assert report.headline(record(rows + worse, targets=("B", "C"))).startswith("On scanner C, SAM-FT loses 34.0")


def test_few_subjects_and_one_seed_are_said():
    sentences = report.verdict(record(with_effect(0.1, 0.0, cases=3, seeds=(7,))))
    assert "too few subjects to compare against SAM-FT" in about(sentences, "FIP on scanner A")
    assert about(sentences, "Seeds") == "Seeds: one (7), so nothing is known about the spread between trainings."


def test_what_was_not_run_is_said():
    sentences = report.verdict(record(with_effect(0.0, 0.0, cases=3)))
    assert "Not evaluated: CMP, FIP + CMP." in sentences
    assert any("SAM-FT with temperature scaling" in s for s in sentences)
    alone = report.verdict(record(synthetic.rows(["calsam"], cases=3)))
    assert any(s.startswith("SAM-FT: not evaluated") for s in alone)
    assert report.verdict(record([])) == ["Nothing to say: there are no results."]
    away = [r for r in synthetic.rows(["calsam"]) if r.domain == "B"]
    both = away + [dataclasses.replace(r, domain="C", value=r.value - 0.3) for r in away]
    line = report.headline(dataclasses.replace(record(both, targets=("B", "C")), source=""))
    assert re.fullmatch(r"On scanner C, the worst of 2 scanners, CalSAM has DSC [\d.]+ points.", line)
    pair = [dataclasses.replace(r, method="sam_ft") for r in both]
    line = report.headline(dataclasses.replace(record(both + pair, targets=("B", "C")), source=""))
    assert line.startswith("On scanner C, the worst of 2 scanners, CalSAM against SAM-FT: DSC 0.0 points")
    assert report.headline(record([])) == "There are no results."


def test_other_trainings_are_judged_against_sam_ft_too():
    """The same method with another loss, or another weight of a penalty."""
    renamed = {"sam_fip": "sam_ft:sam + 0.1*mbls_penalty", "sam_cmp": "sam_cmp:CMP 0.25"}
    rows = [
        dataclasses.replace(r, method=renamed.get(r.method, r.method))
        for r in synthetic.rows(["sam_ft", "sam_fip", "sam_cmp"], noise=0.005)
    ]
    sentences = report.verdict(record(rows))
    assert "helps against SAM-FT" in about(sentences, "SAM-FT (sam + 0.1*mbls_penalty) on scanner B (target)")
    assert about(sentences, "SAM-FT + CMP (CMP 0.25) on scanner A (source)")
    assert "Not evaluated: FIP, FIP + CMP." in sentences


def test_undefined_metrics_and_absent_classes_are_said():
    rows = [
        dataclasses.replace(r, value=math.nan, defined=False)
        if r.metric == evaluate.HD95 or (r.class_name == "core" and r.metric == evaluate.DSC)
        else r
        for r in synthetic.rows(["sam_ft"], cases=3, class_names=("core", "oedema"))
    ]
    sentences = report.verdict(record(rows))
    assert about(sentences, "Class core on scanner A").endswith("of SAM-FT.")
    assert "undefined in every case of SAM-FT" in about(sentences, f"{evaluate.HD95} on scanner B")
    nothing = [dataclasses.replace(r, value=math.nan, defined=False) for r in rows]
    assert sum("undefined in every case of SAM-FT" in s for s in report.verdict(record(nothing))) == 2  # one per domain


class Page(HTMLParser):
    """Collects what the page loads, its text and its open tags."""

    def __init__(self):
        super().__init__()
        self.loads, self.text, self.open = [], "", []

    def handle_starttag(self, tag, attributes):
        self.loads += [value for name, value in attributes if name in ("src", "href")]
        assert tag not in ("script", "link", "iframe")
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def render(path, made):
    report.write_report(path, made)
    html = path.read_text(encoding="utf-8")
    page = Page()
    page.feed(html)
    assert page.open == []
    assert all(value.startswith("data:image/png;base64,") for value in page.loads)
    assert "url(" not in html and "@import" not in html
    assert "Not a medical device" in page.text
    assert "The prompt leaks the answer" in page.text
    return page


def test_the_whole_report_is_one_self_contained_file(tmp_path):
    rng = np.random.default_rng(0)
    sums = calibration.calibration_statistics(rng.dirichlet([1, 1, 1], 300), rng.integers(0, 3, 300))
    statistics = {("sam_ft", domain, "p>0.01"): sums for domain in "AB"}
    truth = np.zeros((12, 12), bool)
    truth[3:6, 3:8] = True
    drawn = figures.overlay(rng.random((12, 12)), truth, {}, (1.0, 1.0), "best")
    made = record(
        synthetic.rows(["sam_ft", "sam_ft+ts", "calsam"], cases=6, class_names=("core", "oedema")),
        description={"Dataset": "<b>phantoms & more</b>"},
        statistics=statistics,
        logs={"sam_ft": [{"step": 1, "task": 1.0}, {"step": 2, "task": 0.5}]},
        gallery=[report.Picture("best case", drawn)],
    )
    page = render(tmp_path / "report.html", made)
    # Reliability, by region and by class, scatter, training, gallery, ranks of source and target.
    assert len(page.loads) == 8
    assert "<b>phantoms & more</b>" in page.text  # escaped, so it is text
    assert "Source: scanner A" in page.text and "Gap: A to B" in page.text
    assert "scanner B (target), class oedema" in page.text
    for name in ("HD95 [max_directed, empty=diagonal] (mm)", "ECE [dilated]", "undef. 0/12"):
        assert name in page.text
    for name in ("Further metrics", "ECE [gt_fg] (selected by the label)", "lesion F1", "gt_fg is the true foreground"):
        assert name in page.text
    assert report.headline(made) in page.text
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    "made",
    [
        record(synthetic.rows(["calsam"], domains=["A"], seeds=(1,), cases=2), targets=()),
        record(synthetic.rows(["sam_ft", "calsam+ts"], domains=["A"], cases=2), targets=("B",)),
        report.Record(
            "No domains", [dataclasses.replace(r, domain="") for r in synthetic.rows(["sam_ft"], ["A"])], "", ()
        ),
        record([]),
    ],
    ids=["one domain", "target without results", "unnamed domain", "nothing"],
)
def test_partial_evaluations_render(tmp_path, made):
    page = render(tmp_path / "report.html", made)
    assert not re.search(r"\bnan\b|\bNone\b", page.text)


def test_the_unnamed_domain_has_a_name_in_sentences():
    rows = [dataclasses.replace(r, domain="") for r in synthetic.rows(["sam_ft", "calsam"], domains=["A"])]
    made = report.Record("t", rows, "", ())
    assert report.headline(made).startswith("On the test cases, CalSAM against SAM-FT: DSC")
    assert any(s.startswith("FIP + CMP on the test cases: ") for s in report.verdict(made))


def test_trained_methods_that_beat_every_guess_are_said_to():
    names = ["prompt_only_disc", "vanilla_sam", "sam_ft", "calsam"]
    sentences = report.verdict(record(synthetic.rows(names)))
    sentence = about(sentences, "Trained methods on scanner A")
    assert "every one of them beats Prompt-only disc, Vanilla SAM in DSC" in sentence


def test_an_interval_alone_convinces_nobody():
    difference = statistics.PairedDifference(-0.001, -0.003, -0.0001, 0.077, 12, 0)
    assert compare._verdict(difference, higher=False) == compare.NO_DIFFERENCE
    assert compare._verdict(difference._replace(p=0.04), higher=False) == compare.BETTER
