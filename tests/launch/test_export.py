"""From a run to a bundle, and from the bundle alone to the same predictions, bit for bit."""

import dataclasses
import json
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import jax
import numpy as np
import pytest

from calsegx import bundle, files
from calsegx.calibrators import storage
from calsegx.data import phantoms
from calsegx.interfaces import DataError, UsageError
from calsegx.training import model_folder
from launch import calibrate, evaluate, export, predict, train

ROOT = pathlib.Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "bundle.md").read_text()
WHAT = {"license_name": "apache-2.0", "origin": "random numbers, trained on phantoms"}


@pytest.fixture(scope="module")
def weights(small_sam, tmp_path_factory):
    """A copy that can go."""
    return shutil.copytree(small_sam, tmp_path_factory.mktemp("copy") / "sam_small")


@pytest.fixture(scope="module")
def run(config, weights, tmp_path_factory):
    """A calibrated run."""
    folder = tmp_path_factory.mktemp("exported") / "run"
    model = dataclasses.replace(config.model, weights=str(weights))
    train.train(dataclasses.replace(config, model=model), folder)
    calibrate.calibrate(folder, "temperature", "dilated")
    return folder


@pytest.fixture(scope="module")
def evaluation(run, tmp_path_factory):
    """Its evaluation."""
    folder = tmp_path_factory.mktemp("evaluation")
    evaluate.evaluate([run], folder)
    return folder


@pytest.fixture(autouse=True)
def user_cache(tmp_path, monkeypatch):
    """Where zips are unpacked."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user_cache"))
    return tmp_path / "user_cache" / "calsegx" / "bundles"


@pytest.fixture(scope="module")
def new_cases(tmp_path_factory):
    """A dataset that the run has not seen."""
    root = tmp_path_factory.mktemp("new") / "Dataset002_New"
    phantoms.write_dataset(root, train=1, val=0, test=1, scale=0.35, processes=1, seed=7)
    return root


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_predictions_need_the_bundle_alone_and_are_the_runs(run, weights, new_cases, tmp_path):
    wanted = tmp_path / "wanted"
    predict.predict(run, wanted, str(new_cases), limit=2)
    export.export(run, tmp_path / "made" / "bundle", **WHAT)
    export.export(run, tmp_path / "made" / "bundle.zip", **WHAT)
    moved = shutil.move(tmp_path / "made", tmp_path / "moved")
    hidden = [path.rename(path.with_name("hidden")) for path in (run, weights)]
    try:
        for name in ("bundle", "bundle.zip"):
            predict.predict(moved / name, tmp_path / f"predicted {name}", str(new_cases), limit=2)
            found = content(tmp_path / f"predicted {name}")
            assert len(found) == 2 + 2 * 4 and found == content(wanted)
    finally:
        for path, original in zip(hidden, (run, weights), strict=True):
            path.rename(original)
    assert np.isfinite(storage.load(moved / "bundle" / "calibrator.json")[1]["temperature"])


def test_nothing_private_goes_along(run, dataset, tmp_path):
    folder = export.export(run, tmp_path / "bundle", **WHAT)
    record = json.loads((run / "model" / "model.json").read_text())
    names = {case[key] for cases in record["seen"].values() for case in cases for key in ("case_id", "subject_id")}
    assert len(names) >= 4
    text = b"".join(path.read_bytes() for path in folder.glob("*.*")).decode(errors="replace")
    for private in (*names, str(dataset.parent), str(run), "/tmp", "cache/"):
        assert private not in text, private
    _, public = model_folder.load(folder)
    assert {split: len(cases) for split, cases in public["seen"].items()} == {"train": 3, "val": 1}
    with pytest.raises(DataError, match="holds the same files as case 'train case"):
        evaluate.evaluate([folder], tmp_path / "evaluation", str(dataset))


def test_folder_and_zip_hold_the_same_and_the_same_bytes_again(run, evaluation, user_cache, tmp_path):
    folder = export.export(run, tmp_path / "bundle", **WHAT, evaluation=evaluation)
    zips = [export.export(run / "model", tmp_path / f"{n}.zip", **WHAT, evaluation=evaluation) for n in (1, 2)]
    assert zips[0].read_bytes() == zips[1].read_bytes()
    unpacked = bundle.open_bundle(zips[0])
    assert bundle.open_bundle(zips[1]) == unpacked and unpacked.parent == user_cache
    assert [path.name for path in user_cache.iterdir()] == [unpacked.name]
    assert (unpacked / "SHA256SUMS").read_text() == (folder / "SHA256SUMS").read_text()
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
    with zipfile.ZipFile(zips[0]) as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    assert {path.name for path in tmp_path.iterdir()} == {"1.zip", "2.zip", "bundle", "user_cache"}


def test_the_card_says_what_was_measured(run, evaluation, tmp_path):
    folder = export.export(run, tmp_path / "bundle", **WHAT, evaluation=evaluation, data_licence="cc-by-4.0")
    card = (folder / "README.md").read_text()
    head, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, re.DOTALL).groups()
    fields = dict(line.split(": ", 1) for line in head.splitlines())
    assert fields["license"] == "apache-2.0" and json.loads(fields["datasets"]) == ["Dataset001_Phantom"]
    assert {"DSC", "ECE", "Brier"} <= set(json.loads(fields["metrics"]))
    headings = re.findall(r"^## (.*)", body, re.MULTILINE)
    assert headings == [
        *("Intended use", "Out-of-scope use", "Training domains", "Results", "Calibration", "Limits"),
        "Licence and origin",
    ]
    assert "**Not a medical device.**" in body and "Licence of the training data: cc-by-4.0." in body
    assert "Scanner A of the dataset Dataset001_Phantom: 3 train, 1 val cases of 4 subjects" in body
    summary = json.loads((evaluation / "summary.json").read_text())["calsegx"]["summary"]
    for domain in ("A", "B"):
        (mean,) = (
            entry["mean"]
            for entry in summary
            if (entry["method"], entry["domain"], entry["metric"], entry["class_name"])
            == ("sam_ft", domain, "DSC", "all")
        )
        row = rf"\| scanner {domain}(?: \(test cases of the source\))? \| own \| 2 \| {100 * mean:.1f} ± \d+\.\d \|"
        assert re.search(row, body), domain
    assert body.count("(test cases of the source)") == 2  # the decoder's own probabilities, and scaled ones
    assert "fitted on the validation cases (1), region dilated" in body

    card = (export.export(run, tmp_path / "unknown", "Our terms", "ours") / "README.md").read_text()
    assert 'license: other\nlicense_name: "Our terms"' in card and "Not evaluated" in card


def test_a_bundle_is_evaluated_as_its_run(run, new_cases, tmp_path):
    folder = export.export(run, tmp_path / "bundle", **WHAT)
    rows = {
        name: {
            (row.method, row.case_id, row.metric, row.region, row.class_name): row.value
            for row in evaluate.evaluate([path], tmp_path / name, str(new_cases)).rows
        }
        for name, path in (("of the run", run), ("of the bundle", folder))
    }
    own = {key: value for key, value in rows["of the bundle"].items() if key[0] == "sam_ft"}
    np.testing.assert_array_equal(list(own.values()), [rows["of the run"][key] for key in own])
    assert {key[0] for key in rows["of the bundle"]} == {"vanilla_sam", "sam_ft", "sam_ft+ts"}
    assert bundle.open_bundle(folder) == folder  # nothing was written to it
    with pytest.raises(UsageError, match="A model bundle knows no dataset: name one with --data"):
        evaluate.evaluate([folder], tmp_path / "nothing")


def test_a_bundles_own_calibrator_is_shown_whatever_its_kind(run, new_cases, tmp_path):
    """Of a spatial one, which sees the image, it is the one that predict applies."""
    copy = shutil.copytree(run, tmp_path / "copy")
    calibrate.calibrate(copy, "local_temperature(epochs=2, learning_rate=0.05)", "dilated")
    folder = export.export(copy, tmp_path / "bundle", **WHAT)
    done = evaluate.evaluate([folder], tmp_path / "evaluation", str(new_cases))
    assert {row.method for row in done.rows} == {"vanilla_sam", "sam_ft", "sam_ft+lts"}
    (kept,) = json.loads((tmp_path / "evaluation" / "calibrators.json").read_text())
    assert (kept["calibrator"], kept["voxels"]) == (
        "local_temperature",
        storage.load(folder / "calibrator.json")[1]["voxels"],
    )
    brier = {
        row.method: row.value
        for row in done.rows
        if (row.case_id, row.metric, row.region, row.class_name) == (done.rows[0].case_id, "Brier", "all", "all")
    }
    assert brier["sam_ft"] != brier["sam_ft+lts"]


def test_the_encoder_can_be_left_out_and_put_back(run, weights, new_cases, tmp_path):
    folder = export.export(run, tmp_path / "bundle", **WHAT, encoder="reference")
    assert not (folder / "encoder").exists()
    with pytest.raises(DataError, match="comes without its encoder"):
        predict.predict(folder, tmp_path / "none", str(new_cases))
    shutil.copytree(weights, folder / "encoder")
    assert len(predict.predict(folder, tmp_path / "predicted", str(new_cases), limit=1)) == 1


def test_incomplete_or_foreign_input_is_refused(run, evaluation, dataset, config, tmp_path):
    def refused(kind, match, **change):
        with pytest.raises(kind, match=match):
            export.export(**{"run": run, "output": tmp_path / "bundle", **WHAT, **change})
        assert not (tmp_path / "bundle").exists()

    refused(UsageError, "--license must say", license_name=" ")
    refused(UsageError, "--origin must say", origin="")
    refused(UsageError, "lies inside the dataset", output=dataset / "bundle.zip")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    refused(UsageError, "exists already", output=tmp_path / "full")
    refused(UsageError, "exists already", output=tmp_path / "full" / "notes.txt")

    copy = shutil.copytree(evaluation, tmp_path / "evaluation")
    (copy / "cases.csv").write_text((copy / "cases.csv").read_text().replace("0.", "0.9", 1))
    refused(DataError, "cases.csv has another SHA-256", evaluation=copy)
    refused(DataError, "is no evaluation", evaluation=tmp_path / "nowhere")

    other = tmp_path / "other"
    params, record = model_folder.load(run)
    del record["decoder_sha256"]
    model_folder.save(other, {**params, "mask_tokens": params["mask_tokens"] + 1}, record)
    refused(DataError, "did not score this model", run=other, evaluation=evaluation)
    shutil.copy(run / "model" / "calibrator.json", other / "model" / "calibrator.json")
    refused(DataError, "fitted on another decoder", run=other)
    (other / "model" / "calibrator.json").unlink()
    model_folder.save(other, {**params, "mask_tokens": params["mask_tokens"][:, :-1]}, record)
    refused(DataError, "arrays are not those of the backbone's decoder", run=other)
    outside = json.loads(json.dumps(record))
    outside["config"]["data"]["intensity"] = "my_module:mine"
    model_folder.save(other, params, outside)
    refused(UsageError, "code from outside calsegx", run=other)
    outside = json.loads(json.dumps(record))
    outside["backbone"] = "0" * 64
    model_folder.save(other, params, outside)
    refused(UsageError, "restore those weights", run=other)

    (tmp_path / "empty").mkdir()
    made = export.export(run, tmp_path / "empty", **WHAT)
    refused(UsageError, "is a bundle already", run=made)
    assert jax.tree.all(jax.tree.map(np.array_equal, model_folder.load(made)[0], params))
    assert files.unseal((made / "model.json").read_bytes())["config"]["model"]["weights"] == "encoder"


def test_the_page_is_right(run, tmp_path, monkeypatch, capsys):
    path = export.export(run, tmp_path / "calsam.zip", **WHAT)
    told = set(re.findall(r"`([\w./]+)`", "".join(re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE))))
    with zipfile.ZipFile(path) as archive:
        assert {re.sub("/.*", "/", name) for name in archive.namelist()} == told
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(code, "docs/bundle.md", "exec"), {})
    assert capsys.readouterr().out == "['whole_tumour'] (1, 96, 120)\n"


@pytest.mark.parametrize("script", sorted(set(re.findall(r"-m launch\.(\w+)", PAGE))))
def test_every_flag_of_the_page_exists(script):
    lines = re.findall(rf"^python -m launch\.{script}(.*)$", PAGE, re.MULTILINE)
    command = [sys.executable, "-m", f"launch.{script}", "--helpfull"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    wanted = {flag for line in lines for flag in re.findall(r"--(\w+)", line)}
    assert wanted and wanted <= set(re.findall(r"^  --(?:\[no\])?(\w+)", listed, re.MULTILINE))
