"""Another tool's results folder beside trained runs: evaluated identically to our own."""

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest

from calsegx.data import images
from calsegx.evaluation import external, marks, methods, study, verdict
from calsegx.interfaces import DataError, UsageError
from launch import components, evaluate, train
from launch import experiment as launcher
from tests.launch.test_bad_input import run
from tests.launch.test_experiment import plan as plan  # a fixture

TOOL = "nnU-Net"


@pytest.fixture(scope="module")
def evaluated(config, tmp_path_factory):
    """A run, its evaluation, and its predictions in the form of nnU-Net v2's results."""
    folder = tmp_path_factory.mktemp("external")
    train.train(config, folder / "run")
    results, score = folder / "results", study.score
    results.mkdir()

    def keep(work, subject, method, seed, probabilities, *rest):
        if method == "sam_ft":
            image = images.read(next(iter(subject.case.images.values())))
            both = np.concatenate([1 - probabilities.sum(axis=-1, keepdims=True), probabilities], axis=-1)
            order, flips = image.orientation[:, 0].astype(int), image.orientation[:, 1].astype(int)
            back = [slice(None, None, flips[list(order).index(axis)]) for axis in range(3)]
            by_file = both[tuple(back)].transpose(*order, 3)  # not by the code under test
            np.savez_compressed(results / f"{subject.case.case_id}.npz", probabilities=by_file.transpose(3, 2, 1, 0))
        return score(work, subject, method, seed, probabilities, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "score", keep)
        plain = evaluate.evaluate([folder / "run"], folder / "plain")
    (results / "plans.json").write_text(json.dumps({"image_reader_writer": "SimpleITKIO"}))
    return folder, plain


@pytest.fixture(scope="module")
def beside(evaluated):
    """The evaluation with the results folder beside the run."""
    folder, _ = evaluated
    return evaluate.evaluate([folder / "run"], folder / "beside", external={TOOL: folder / "results"})


def test_the_rows_are_those_of_the_run(evaluated, beside):
    ours = [row for row in beside.rows if row.method == "sam_ft"]
    theirs = [row for row in beside.rows if row.method == TOOL]
    assert [str(dataclasses.replace(row, method="sam_ft", seed=ours[0].seed)) for row in theirs] == [*map(str, ours)]
    assert len(theirs) > 100 and {row.seed for row in theirs} == {study.NO_SEED}
    assert [str(row) for row in beside.rows if row.method != TOOL] == [*map(str, evaluated[1].rows)]
    for (method, domain, region), sums in beside.statistics.items():
        if method == TOOL:
            assert sums.ece() == beside.statistics["sam_ft", domain, region].ece()


def test_it_stands_in_everything_that_is_written(evaluated, beside):
    folder = evaluated[0] / "beside"
    html, table = (folder / "report.html").read_text(), (folder / "table.md").read_text()
    lines = [line for line in table.splitlines() if line.startswith(f"| {TOOL} |")]
    assert lines and not any("±" in line for line in lines)
    assert "nnU-Net: 4 cases of probabilities (.npz) from the folder results, SHA-256" in html
    about = json.loads((folder / "summary.json").read_text())["calsegx"]["external"]
    assert [(one["method"], one["folder"], one["kinds"]) for one in about] == [(TOOL, "results", {external.NPZ: 4})]
    assert f"| {TOOL} |" in table and TOOL in (folder / "table.tex").read_text()
    assert str(evaluated[0]) not in html  # the folder's name alone
    found = {c.method for c in beside.comparisons}
    assert TOOL in found and not methods.is_ours(TOOL)
    assert marks.strongest(beside.rows, "A", ["B"]) is not None
    assert any(
        sentence.startswith(f"Seeds: one ({evaluated[1].rows[-1].seed})") for sentence in verdict.verdict(beside)
    )


def test_a_missing_case_is_named_before_the_encoder_runs(evaluated, tmp_path, monkeypatch):
    folder, _ = evaluated
    shutil.copytree(folder / "results", tmp_path / "results")
    lost = sorted((tmp_path / "results").glob("*.npz"))[0]
    lost.unlink()
    monkeypatch.setattr(components, "encode", None)
    with pytest.raises(DataError, match=f"no prediction of 1 of 4 test cases: {lost.stem}; expected CASE.npz"):
        evaluate.evaluate([folder / "run"], tmp_path / "out", external={TOOL: tmp_path / "results"})
    with pytest.raises(UsageError, match="there is no folder"):
        evaluate.evaluate([folder / "run"], tmp_path / "out", external={TOOL: tmp_path / "absent"})
    assert not (tmp_path / "out").exists()


def test_the_flag_is_checked_first(tmp_path):
    code, stderr = run("evaluate", f"--workdir={tmp_path / 'x'}", "--runs=/nowhere", "--external=nnU-Net")
    assert code == 2 and "expected NAME=FOLDER" in stderr and not (tmp_path / "x").exists()


@pytest.mark.slow
def test_an_experiment_scores_masks_of_every_fold_and_notices_new_ones(plan, dataset, tmp_path, monkeypatch):
    for number in (0, 1):
        shutil.copytree(dataset / "labelsTs", tmp_path / f"truth{number}")
        for label in (dataset / "labelsTr").iterdir():
            shutil.copy(label, tmp_path / f"truth{number}")
    path = plan(source="", folds={"protocol": "kfold", "folds": 2}, external={"Readers": str(tmp_path / "truth{fold}")})
    lost = next((tmp_path / "truth1").glob("*.nii.gz"))
    lost.rename(tmp_path / lost.name)
    with pytest.raises(DataError, match=f"truth1 .Readers. has no prediction of 1 of .* test cases: {lost.name[:-7]}"):
        launcher.experiment(path, tmp_path / "out")
    assert not (tmp_path / "out" / "runs").exists()
    (tmp_path / lost.name).rename(lost)

    launcher.experiment(path, tmp_path / "out")
    with (tmp_path / "out" / "cases.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row["method"], row["metric"]) == ("Readers", "DSC")]
    assert {row["fold"] for row in rows} == {"1 of 2", "2 of 2"} and {row["value"] for row in rows} == {"1.0"}
    assert "| Readers | **100.0**" in (tmp_path / "out" / "table.md").read_text()

    again, original = [], evaluate.evaluate
    monkeypatch.setattr(evaluate, "evaluate", lambda *given, **rest: [again.append(given[1]), original(*given, **rest)])
    launcher.experiment(path, tmp_path / "out")
    assert again == []
    image = images.read_labels(lost)
    empty = np.zeros_like(image.voxels)
    lost.unlink()
    images.write(lost.with_name(lost.name[:-7]), empty, image, np.uint8)
    launcher.experiment(path, tmp_path / "out")
    assert [folder.parent.name for folder in again] == ["fold1"]
