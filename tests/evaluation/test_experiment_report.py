"""The report over all folds of an experiment: what is pooled, and what is said to be missing."""

import dataclasses
import json
import re

import pytest

from calsegx.evaluation import evaluate, experiment_files, experiment_report, pooled, verdict
from tests.evaluation import synthetic
from tests.evaluation.test_report import Page

NAMES = ["vanilla_sam", "sam_ft", "sam_ft+ts", "calsam"]


def part(fold, source, rows, **fields):
    given = {"training_subjects": 0, "protocol": "gt_points", "images": pooled.AS_THEY_ARE} | fields
    link = (f"evaluation/{fold.replace(' ', '_')}/report.html",)
    return pooled.Part(fold, source=source, rows=rows, reports=link, **given)


def both_ways(names=NAMES, **options):
    rows = synthetic.rows(names, noise=0.01, **options)
    worse = [dataclasses.replace(r, value=r.value - 0.1) if r.metric == evaluate.DSC else r for r in rows]
    return [part("A to B", "A", rows), part("B to A", "B", worse)]


def without(domain, rows):
    """A fold of leave-one-domain-out: its cases, whose domain an evaluation without a source does not name."""
    found = [r for r in rows if r.domain == domain]
    return part(
        f"without {domain}",
        "",
        [dataclasses.replace(r, domain="", subject_id=f"{r.subject_id}{domain}") for r in found],
    )


def experiment(parts, **fields):
    return experiment_report.Experiment("A title", pooled.joined(parts), "scanner", ["sam_ft", "calsam"], **fields)


def render(folder, made):
    experiment_files.write(folder, made, ["tumour"])
    html = (folder / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(html)
    assert page.open == [] and "Not a medical device" in page.text
    assert not re.search(r"\bnan\b|\bNone\b", page.text)
    assert all(load.startswith(("data:image/png;base64,", "evaluation/")) for load in page.loads)
    return page


def mean(found, method, domain, metric=evaluate.DSC):
    rows = [
        r for r in found.rows if (r.class_name, r.metric, r.method, r.domain) == (evaluate.ALL, metric, method, domain)
    ]
    (summary,) = evaluate.summarise(rows)
    return summary.mean


def test_both_ways_are_pooled_by_whether_the_domain_was_seen():
    (family,) = pooled.families(both_ways())
    found = pooled.pool(family, "scanner")
    assert (found.source, found.targets, found.kind) == (pooled.IN, [pooled.OUT], "")
    first, second = (
        pooled.pool(pooled.Family(0, "gt_points", pooled.AS_THEY_ARE, [p]), "scanner") for p in family.parts
    )
    seen = (mean(first, "sam_ft", "A") + mean(second, "sam_ft", "B")) / 2
    unseen = (mean(first, "sam_ft", "B") + mean(second, "sam_ft", "A")) / 2
    assert mean(found, "sam_ft", pooled.IN) == pytest.approx(seen)
    assert mean(found, "sam_ft", pooled.OUT) == pytest.approx(unseen)


def test_folds_that_test_each_case_once_are_one_test_set():
    rows = synthetic.rows(NAMES, cases=4)
    (family,) = pooled.families([without(domain, rows) for domain in "AB"])
    found = pooled.pool(family, "centre")
    assert (found.source, list(found.targets)) == ("", []) and {r.domain for r in found.rows} == {""}
    assert len(found.rows) == len(rows)


def test_the_report_of_both_ways_has_a_block_for_each_source(tmp_path):
    page = render(tmp_path, experiment(both_ways(cases=4), description={"Dataset": "<b>phantoms</b>"}))
    for text in ("Trained on scanner A", "Trained on scanner B", "scanner A (target)", "<b>phantoms</b>"):
        assert text in page.text
    assert "On unseen domains, SAM-FT loses" in page.text and "Source: seen domains" in page.text
    assert "Nothing: every planned method has results" in page.text
    links = [load for load in page.loads if not load.startswith("data:")]
    assert links == ["evaluation/A_to_B/report.html", "evaluation/B_to_A/report.html"]
    content = json.loads((tmp_path / "summary.json").read_text())
    # Every model that tested a case has an entry: 2 folds x 2 domains x 4 cases x 2 seeds.
    assert len(content["metric_per_case"]) == 32 and content["calsegx"]["method"] == "calsam"
    (family,) = content["calsegx"]["experiment"]
    assert {gap["target"] for gap in family["gaps"]} == {pooled.OUT} and family["folds"] == 2
    assert "seen domains" in (tmp_path / "table.tex").read_text()


def test_the_summary_is_of_a_trained_method(tmp_path):
    rows = synthetic.rows(["vanilla_sam", "calsam"], cases=2, seeds=(1,))
    rows = [dataclasses.replace(r, method="focal") if r.method == "calsam" else r for r in rows]
    experiment_files.write(tmp_path, experiment([part("", "A", rows)]), ["tumour"])
    assert json.loads((tmp_path / "summary.json").read_text())["calsegx"]["method"] == "focal"


def test_the_report_of_left_out_domains_compares_the_folds(tmp_path):
    rows = synthetic.rows(NAMES, cases=2, seeds=(1,))
    page = render(tmp_path, experiment([without(domain, rows) for domain in "AB"]))
    assert "Fold by fold" in page.text and "fold without A" in page.text and "mean of 2 targets" in page.text
    assert "every case is tested once" in page.text


def test_sizes_protocols_and_corruptions_have_sections_of_their_own(tmp_path):
    rows = synthetic.rows(["sam_ft", "calsam"], cases=2, seeds=(1,))
    clean = [dataclasses.replace(r, domain="clean") for r in rows if r.domain == "A"]
    noisy = [dataclasses.replace(r, domain="noise-1") for r in rows if r.domain == "B"]
    parts = [part("", "A", rows, training_subjects=size) for size in (2, 4)]
    parts += [part("", "A", rows, protocol="random_points")]
    parts += [part("", "clean", clean + noisy, images=pooled.CORRUPTED)]
    page = render(tmp_path, experiment(parts))
    for text in ("Training subjects", "gt_points, 4 training subjects", "random_points", "Under corruption"):
        assert text in page.text
    found = {path.relative_to(tmp_path / "tables").as_posix() for path in (tmp_path / "tables").rglob("*.md")}
    assert {"subjects2/gt_points/mbls.md", "random_points/nacl.md", "gt_points_corrupted/calsam_table2.md"} <= found


def test_what_the_grid_saw_is_shown(tmp_path):
    rule = {"lowest": "ECE", "region": "p>0.01", "within_dsc_points": 1.0}
    candidates = [{"weights": {"lambda1": 0.1}, "dsc": 0.81, "value": 0.05}]
    candidates += [{"weights": {"lambda1": 0.3}, "dsc": 0.5, "value": float("nan")}]
    seen = {"rule": rule, "methods": {"calsam": {"chosen": {"lambda1": 0.1}, "candidates": candidates}}}
    page = render(tmp_path, experiment(both_ways(cases=2, seeds=(1,)), selections={"fold0": seen}))
    text = (tmp_path / "report.html").read_text()
    assert 'lambda1 = 0.1</td><td>81.0</td><td>0.0500</td><td class="text">chosen</td>' in text
    assert 'lambda1 = 0.3</td><td>50.0</td><td>undefined</td><td class="text"></td>' in text
    assert "at most 1 points below SAM-FT's" in page.text


def test_what_is_missing_is_said(tmp_path):
    first, second = both_ways(cases=2, seeds=(1,))
    less = dataclasses.replace(second, rows=[r for r in second.rows if r.method != "sam_ft"])
    made = experiment([first, less])
    made = dataclasses.replace(made, planned=["sam_ft", "calsam", "crac"])
    assert experiment_report.missing(made) == [
        "Planned, but without any result: CRaC.",
        "SAM-FT, prompts gt_points: no result on fold B to A.",
    ]
    render(tmp_path, made)


MANY = ["sam_ft", "sam_ft+ts", "sam_fip", "sam_cmp", "calsam", "focal", "mbls", "nacl"]


def many_rows(domains):
    """Rows of many methods: focal, MbLS and NACL are SAM-FT again."""
    like = {"focal": "sam_ft", "mbls": "sam_ft", "nacl": "sam_ft"}
    rows = synthetic.rows([name for name in MANY if name not in like], noise=0.01)
    rows += [dataclasses.replace(r, method=name) for name in like for r in rows if r.method == like[name]]
    return [dataclasses.replace(r, domain=d) for d in domains for r in rows if r.domain == ("A" if d == "A" else "B")]


def test_a_verdict_of_many_methods_is_short_and_puts_the_strongest_first():
    found = verdict.verdict(experiment_report.Record("t", many_rows("AB"), "A", ["B"], "scanner"))
    (sentence,) = [s for s in found if s.startswith("Against SAM-FT on scanner B (target): helps: ")]
    helps, same = sentence.rstrip(".").split("; no measurable difference: ")
    assert "FIP (DSC +" in helps and "FIP + CMP (DSC +" in helps
    assert {"CMP", "Focal", "MbLS", "NACL"} == set(same.split(", "))
    assert len(found) < 20


def test_of_many_targets_the_worst_is_described_and_the_others_are_counted():
    targets = list("BCDEFGHI")
    found = verdict.verdict(experiment_report.Record("t", many_rows(["A", *targets]), "A", targets, "centre"))
    assert any(s.startswith("Over 8 targets against SAM-FT: FIP, FIP + CMP: better DSC on 8") for s in found)
    assert len({s.split("centre ")[1][0] for s in found if "(target)" in s}) == 1
    assert len(found) < 25
