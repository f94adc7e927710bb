"""launch.predict of files that are no dataset: what it writes, how it goes on, that cases do not disturb each other."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import nibabel
import numpy as np
import pytest
from PIL import Image

from calsegx import configs
from calsegx.data import loose_files
from calsegx.evaluation import prediction_files
from calsegx.interfaces import DataError, UsageError
from calsegx.training import interruption, model_folder
from calsegx.uncertainty import scores
from launch import components, export, predict

ROOT = pathlib.Path(__file__).parent.parent.parent

AFFINE = np.array([[-1.0, 0.1, 0, 5], [0.1, 1.2, 0, -3], [0, 0, 3, 7], [0, 0, 0, 1]])
DEPTHS = {"p1": 3, "p2": 5, "p3": 4}  # slices of the cases
CHANNELS = ("T1c", "T2")


def save_model(config, folder, **changes):
    """A model that was never trained: where its outputs lie does not depend on that."""
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, channels="T1c,T2,T2", cache=""), **changes
    )
    parts = components.build(config)
    none = {"train": (), "val": ()}
    record = components.metadata(parts, components.feature_cache(parts, folder).fingerprint, none)
    record |= {"config": configs.to_dict(config), "backbone": parts.backbone.fingerprint, "cases": []}
    model_folder.save(folder, parts.backbone.trainable, record)
    return folder


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    return save_model(config, tmp_path_factory.mktemp("run"))


def volume(path, depth, seed):
    data = np.random.default_rng(seed).integers(1, 900, (14, 15, depth)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(data, AFFINE), path)


@pytest.fixture
def scans(tmp_path):
    """A folder of scans with two channels each."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for seed, (case_id, depth) in enumerate(DEPTHS.items()):
        for number in range(len(CHANNELS)):
            volume(folder / f"{case_id}_{number:04d}.nii.gz", depth, 10 * seed + number)
    return folder


def click(path, **moved):
    """A click in every slice of every case but its first; ``moved`` gives some cases another column."""
    lines = ["case_id,i,j,k,label"]
    for case_id, depth in DEPTHS.items():
        lines += [f"{case_id},{moved.get(case_id, 6)},7,{k},1" for k in range(1, depth)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def clicks(tmp_path):
    return click(tmp_path / "clicks.csv")


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_of_files(run, scans, clicks, tmp_path, capsys):
    before = content(scans)
    masks = predict.predict(run, tmp_path / "out", str(scans), clicks)
    assert [mask.name for mask in masks] == [f"{case_id}.nii.gz" for case_id in DEPTHS]
    per_case = ("{}.nii.gz", "{}.json", "{}_prob-whole_tumour.nii.gz", "{}_uncertainty.nii.gz")
    assert set(content(tmp_path / "out")) == {
        *(name.format(case_id) for name in per_case for case_id in DEPTHS),
        *("labels.json", "predictions.json"),
    }
    assert content(scans) == before
    for case_id, depth in DEPTHS.items():
        image = nibabel.load(scans / f"{case_id}_0000.nii.gz")
        mask, probability, uncertainty = (
            nibabel.load(tmp_path / "out" / f"{case_id}{name}.nii.gz")
            for name in ("", "_prob-whole_tumour", "_uncertainty")
        )
        for output in (mask, probability, uncertainty):
            assert output.shape == image.shape == (14, 15, depth)
            np.testing.assert_array_equal(output.affine, image.affine)
            assert output.header["sform_code"] == image.header["sform_code"]
        values, entropy = np.asarray(probability.dataobj), np.asarray(uncertainty.dataobj)
        assert entropy.dtype == np.float32 and values[..., 1:].all() and not values[..., 0].any()
        np.testing.assert_array_equal(entropy, scores.predictive_entropy(values[..., None]))
        assert not entropy[..., 0].any()  # no prompt, so background by protocol
        record = json.loads((tmp_path / "out" / f"{case_id}.json").read_text())
        report = record["report"]
        assert (report["slices"]["total"], report["slices"]["prompted"]) == (depth, depth - 1)
        assert report["training_domain"]["unknown"]  # the model was never trained
        volume_ml = np.count_nonzero(mask.dataobj) * abs(np.linalg.det(AFFINE)) / 1000
        assert report["classes"]["whole_tumour"]["volume_ml"] == pytest.approx(volume_ml)
        assert record["prompts"] == {"protocol": "gt_points", "source": "of a file"}
        assert record["uncertainty"] == prediction_files.UNCERTAINTY
    said = capsys.readouterr().out
    assert "Predicted 3 cases, 9 slices, in " in said and "slices/s" in said and "s per case" in said


def test_cases_do_not_disturb_each_other(run, scans, clicks, tmp_path):
    """Together, where batches hold slices of several cases, as alone; channels in files as in a fourth axis."""
    predict.predict(run, tmp_path / "together", str(scans), clicks)
    together = content(tmp_path / "together")
    for case_id in DEPTHS:
        paths = sorted(scans.glob(f"{case_id}_*"))
        stacked = np.stack([np.asarray(nibabel.load(path).dataobj) for path in paths], axis=-1)
        (tmp_path / "stacked").mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(stacked, AFFINE), tmp_path / "stacked" / f"{case_id}.nii.gz")
    predict.predict(run, tmp_path / "of_stacked", str(tmp_path / "stacked"), clicks)
    for name in (name for name in together if name.endswith(".nii.gz")):
        one, other = (nibabel.load(tmp_path / folder / name) for folder in ("together", "of_stacked"))
        np.testing.assert_array_equal(one.dataobj, other.dataobj)

    rows = clicks.read_text().splitlines()
    clicks.write_text("\n".join(row for row in rows if row.startswith(("case_id", "p2"))))
    predict.predict(run, tmp_path / "alone", clicks_file=clicks, listed=sorted(scans.glob("p2_*")))
    alone = content(tmp_path / "alone")
    assert len(alone) == 6 and alone == {name: together[name] for name in alone}


def test_a_broken_batch_goes_on(run, scans, clicks, tmp_path, monkeypatch, capsys):
    predict.predict(run, tmp_path / "whole", str(scans), clicks)
    original, written = prediction_files.write, []

    def stop_after_the_first(*arguments):
        written.append(original(*arguments))
        os.kill(os.getpid(), signal.SIGINT)
        return written[-1]

    monkeypatch.setattr(prediction_files, "write", stop_after_the_first)
    sentence = "1 of 3 cases are predicted; the same command goes on"
    with pytest.raises(interruption.Interrupted, match=sentence) as stopped:
        predict.predict(run, tmp_path / "out", str(scans), clicks)
    assert stopped.value.exit_code == 130
    monkeypatch.setattr(prediction_files, "write", lambda *arguments: written.append(arguments) or original(*arguments))
    assert len(predict.predict(run, tmp_path / "out", str(scans), clicks)) == 3
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert len(written) == 3 and "1 of 3 cases were done before" in capsys.readouterr().out

    def again():
        written.clear()
        masks = predict.predict(run, tmp_path / "out", str(scans), clicks)
        assert [mask.name for mask in masks] == [f"{case_id}.nii.gz" for case_id in DEPTHS]
        return [arguments[1].record.stem for arguments in written]

    assert again() == []
    volume(scans / "p1_0001.nii.gz", DEPTHS["p1"], 77)
    assert again() == ["p1"]
    click(clicks, p2=3)
    assert again() == ["p2"]
    (tmp_path / "out" / "p3_uncertainty.nii.gz").unlink()
    assert again() == ["p3"]
    record = tmp_path / "out" / "p3.json"
    record.write_bytes(record.read_bytes()[:-30])
    assert again() == ["p3"] and again() == []


def test_another_models_folder_is_refused(run, config, scans, clicks, tmp_path):
    predict.predict(run, tmp_path / "out", str(scans), clicks, limit=3)
    before = content(tmp_path / "out")
    params, record = model_folder.load(run)
    del record["decoder_sha256"]
    model_folder.save(tmp_path / "other", {**params, "mask_tokens": params["mask_tokens"] + 1}, record)
    with pytest.raises(UsageError, match="holds predictions of another model.*differing: decoder"):
        predict.predict(tmp_path / "other", tmp_path / "out", str(scans), clicks)
    assert content(tmp_path / "out") == before
    with pytest.raises(DataError, match="no image .* beside 9 masks or predictions"):
        loose_files.of_folder(tmp_path / "out", CHANNELS)  # never predicted on its own output


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["p3,1,1,9,1"], r"clicks.csv, line 11: the voxel \(1, 1, 9\) is outside the image of case 'p3'"),
        (["p3,1,1,0,0"], r"clicks.csv, line 11: .* case 'p3' has only background clicks"),
        (["p3,1,1,1,2"], "trained with points"),
        (["p9,1,1,1,1"], "'p9' is not among the cases"),
    ],
)
def test_prompts_are_checked_before_the_first_case(run, scans, clicks, tmp_path, rows, message):
    clicks.write_text(clicks.read_text() + "\n".join(rows) + "\n")
    with pytest.raises(DataError, match=message):
        predict.predict(run, tmp_path / "out", str(scans), clicks)
    assert not (tmp_path / "out").exists()


def test_what_a_model_is_to_be_given(run, config, scans, tmp_path):
    boxes = save_model(config, tmp_path / "boxes", protocol="gt_box")
    with pytest.raises(UsageError, match=r"'p1' has no reference labels .*; give clicks \(label 1 on the target in"):
        predict.predict(run, tmp_path / "out", str(scans))
    with pytest.raises(UsageError, match=r"give a box \(corners of the labels 2 and 3\) on every slice .* --prompts"):
        predict.predict(boxes, tmp_path / "out", str(scans))
    assert not (tmp_path / "out").exists()
    table = {case_id: [{"box": [2, 3, 1, 9, 9, 1]}] for case_id in DEPTHS}
    (tmp_path / "boxes.json").write_text(json.dumps(table))
    masks = predict.predict(boxes, tmp_path / "out", str(scans), tmp_path / "boxes.json")
    record = json.loads(masks[0].with_name("p1.json").read_text())
    assert record["prompts"]["protocol"] == "gt_box" and record["report"]["slices"]["prompted"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["class_points", "random_points", "volume_points", "none"])
def test_every_protocol_predicts_new_files(config, scans, clicks, tmp_path, protocol):
    model = save_model(config, tmp_path / "model", protocol=protocol)
    masks = predict.predict(model, tmp_path / "out", str(scans), None if protocol == "none" else clicks)
    record = json.loads(masks[1].with_name("p2.json").read_text())
    assert record["report"]["slices"]["prompted"] == (5 if protocol in configs.EVERY_SLICE else 4)


def test_failures_are_listed_and_stop_no_other(run, scans, clicks, tmp_path, capsys):
    (scans / "p2_0001.nii.gz").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"1 of 3 cases failed; the first: p2: .*p2_0001.nii.gz"):
        predict.predict(run, tmp_path / "out", str(scans), clicks)
    assert {path.name for path in (tmp_path / "out").glob("*.json")} == {
        *("p1.json", "p3.json", "labels.json", "predictions.json")
    }
    assert capsys.readouterr().err.count("failed: p2: ") == 1
    volume(scans / "p2_0001.nii.gz", DEPTHS["p2"], 5)
    assert len(predict.predict(run, tmp_path / "out", str(scans), clicks)) == 3
    assert "2 of 3 cases were done before" in capsys.readouterr().out


def test_a_bids_derivative(run, scans, clicks, tmp_path):
    masks = predict.predict(run, tmp_path / "out", str(scans), clicks, bids=True)
    folder = tmp_path / "out" / "sub-p1" / "anat"
    assert masks[0] == folder / "sub-p1_space-orig_seg-calsegx_dseg.nii.gz"
    assert {path.name.removeprefix("sub-p1_space-orig_seg-calsegx_") for path in folder.iterdir()} == {
        *("dseg.nii.gz", "dseg.json", "label-wholetumour_probseg.nii.gz", "uncertainty.nii.gz")
    }
    assert (tmp_path / "out" / "seg-calsegx_dseg.tsv").read_text() == "index\tname\n0\tbackground\n1\twhole_tumour\n"
    sidecar = json.loads((folder / "sub-p1_space-orig_seg-calsegx_dseg.json").read_text())
    assert sidecar["files"]["mask"] == "sub-p1/anat/sub-p1_space-orig_seg-calsegx_dseg.nii.gz"
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert predict.predict(run, tmp_path / "out", str(scans), clicks, bids=True) == masks
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    with pytest.raises(UsageError, match="differing: file names"):
        predict.predict(run, tmp_path / "out", str(scans), clicks)


def test_pictures_and_lists(run, config, tmp_path):
    grey = save_model(config, tmp_path / "grey", protocol="none")
    params, record = model_folder.load(grey)
    del record["decoder_sha256"]
    model_folder.save(grey, params, record | {"channels": ["grey"] * 3})
    for name in ("a", "b"):
        pixels = np.random.default_rng(ord(name)).integers(1, 255, (20, 16)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    listed = [tmp_path / "a.png", tmp_path / "b.png"]
    masks = predict.predict(grey, tmp_path / "out", listed=listed)
    assert [mask.name for mask in masks] == ["a.png", "b.png"]
    with Image.open(tmp_path / "out" / "a_uncertainty.png") as picture:
        assert picture.mode == "I;16" and picture.size == (16, 20) and np.asarray(picture).any()
    with pytest.raises(UsageError, match=r"--output=.* is the folder of .*a.png, which must not be replaced"):
        predict.predict(grey, tmp_path, listed=listed)
    with pytest.raises(UsageError, match="one of the two"):
        predict.predict(grey, tmp_path / "out", str(tmp_path), listed=listed)


@pytest.mark.slow
def test_the_commands_of_the_page_run(run, scans, clicks, tmp_path):
    """In a folder where what they name lies; p01 is one of the scans."""
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    shutil.copytree(run, tmp_path / "runs" / "mine" / "calsam")
    export.export(run, tmp_path / "calsam.zip", "apache-2.0", "random numbers")
    (tmp_path / "clicks.tsv").write_text(clicks.read_text().replace(",", "\t"))
    (tmp_path / "p01.tsv").write_text("case_id\ti\tj\tk\tlabel\np01\t6\t7\t1\t1\n")
    for number in range(2):
        shutil.copyfile(scans / f"p1_{number:04d}.nii.gz", tmp_path / f"p01_{number:04d}.nii.gz")
    commands = re.findall(
        r"^python -m (launch\.predict .*)$", (ROOT / "docs" / "prediction.md").read_text(), re.MULTILINE
    )
    for command in commands:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "user_cache")}
        done = subprocess.run(
            [sys.executable, "-m", *command.split()], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "slices/s" in done.stdout and "masks with their probabilities are in" in done.stdout
    assert (tmp_path / "predictions" / "p3.json").is_file() and (tmp_path / "p01" / "p01_uncertainty.nii.gz").is_file()
    assert len(list((tmp_path / "derivatives" / "calsegx").glob("sub-*/anat/*_dseg.nii.gz"))) == 3
