"""Another tool's results folder beside trained runs: evaluated identically to our own."""

import csv
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from calsegx.data import images
from calsegx.evaluation import external, marks, methods, study, verdict
from calsegx.interfaces import DataError, UsageError
from calsegx.training import model_folder
from launch import components, evaluate, train
from launch import experiment as launcher
from tests.launch.test_bad_input import run
from tests.launch.test_experiment import plan as plan  # a fixture

TOOL = "nnU-Net"


@pytest.fixture(scope="module")
def folder(config, tmp_path_factory):
    """A run, and its predictions of the test cases in the form of nnU-Net v2's results."""
    folder = tmp_path_factory.mktemp("external")
    train.train(config, folder / "run")
    (folder / "results").mkdir()
    params, record = model_folder.load(folder / "run")
    parts = components.of_model(record, "")
    cache = components.feature_cache(parts, folder / "run")
    components.encode(parts, cache, [(case, 1) for case in parts.select("test")])
    work = study.Study(cache, parts.backbone, parts.class_map, config.protocol, "scanner", parts.config.data)
    params = jax.device_put(params)
    for case in parts.select("test"):
        subject = study.load(work, case)
        ours = study.foreground(subject, study.slice_logits(work, work.decode, params, subject))
        both = np.concatenate([1 - ours.sum(axis=-1, keepdims=True), ours], axis=-1)
        # Back to the file's axes, not by the code under test.
        order, flips = images.read(next(iter(case.images.values()))).orientation.astype(int).T
        back = tuple(slice(None, None, flips[list(order).index(axis)]) for axis in range(3))
        by_file = both[back].transpose(*order, 3)
        path = folder / "results" / f"{case.case_id}.npz"
        np.savez_compressed(path, probabilities=by_file.transpose(3, 2, 1, 0))
    (folder / "results" / "plans.json").write_text(json.dumps({"image_reader_writer": "SimpleITKIO"}))
    return folder


@pytest.fixture(scope="module")
def beside(folder):
    """The evaluation with the results folder beside the run."""
    return evaluate.evaluate([folder / "run"], folder / "beside", external={TOOL: folder / "results"})


def test_the_rows_are_those_of_the_run(beside):
    ours = [row for row in beside.rows if row.method == "sam_ft"]
    theirs = [row for row in beside.rows if row.method == TOOL]
    assert [str(dataclasses.replace(row, method="sam_ft", seed=ours[0].seed)) for row in theirs] == [*map(str, ours)]
    assert len(theirs) > 100 and {row.seed for row in theirs} == {study.NO_SEED}
    for (method, domain, region), sums in beside.statistics.items():
        if method == TOOL:
            assert sums.ece() == beside.statistics["sam_ft", domain, region].ece()


def test_it_stands_in_everything_that_is_written(folder, beside):
    written = folder / "beside"
    html, table = (written / "report.html").read_text(), (written / "table.md").read_text()
    lines = [line for line in table.splitlines() if line.startswith(f"| {TOOL} |")]
    assert lines and not any("±" in line for line in lines)
    assert "nnU-Net: 4 cases of probabilities (.npz) from the folder results, SHA-256" in html
    about = json.loads((written / "summary.json").read_text())["calsegx"]["external"]
    assert [(one["method"], one["folder"], one["kinds"]) for one in about] == [(TOOL, "results", {external.NPZ: 4})]
    assert TOOL in (written / "table.tex").read_text()
    assert str(folder) not in html  # the folder's name alone
    found = {c.method for c in beside.comparisons}
    assert TOOL in found and not methods.is_ours(TOOL)
    assert marks.strongest(beside.rows, "A", ["B"]) is not None
    assert any(sentence.startswith("Seeds: one (42)") for sentence in verdict.verdict(beside))


def test_a_missing_case_is_named_before_the_encoder_runs(folder, tmp_path, monkeypatch):
    shutil.copytree(folder / "results", tmp_path / "results")
    lost = sorted((tmp_path / "results").glob("*.npz"))[0]
    lost.unlink()
    monkeypatch.setattr(components, "encode", None)
    with pytest.raises(DataError, match=f"no prediction of 1 of 4 test cases: {lost.stem}; expected CASE.npz"):
        evaluate.evaluate([folder / "run"], tmp_path / "out", external={TOOL: tmp_path / "results"})
    with pytest.raises(UsageError, match="there is no folder"):
        evaluate.evaluate([folder / "run"], tmp_path / "out", external={TOOL: tmp_path / "absent"})
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
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
    lost = tmp_path / "truth1" / "subject002_A.nii.gz"  # tested in the second fold
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
