"""The whole way on small phantoms: train, evaluate, predict, through the functions that the scripts call."""

import csv
import dataclasses
import json
import shutil

import nibabel
import numpy as np
import pytest

from calsegx.data import cases as case_tools
from calsegx.data import phantoms
from calsegx.evaluation import case_report
from calsegx.interfaces import DataError, InputError, UsageError
from calsegx.training import caching, checkpoints, model_folder
from launch import cache_features, components, evaluate, predict, train, trained_runs


@pytest.fixture(scope="module")
def runs(config, tmp_path_factory):
    """SAM-FT and CalSAM, trained for a few steps."""
    folder = tmp_path_factory.mktemp("runs")
    for method in ("sam_ft", "calsam"):
        train.train(dataclasses.replace(config, method=method), folder / method)
    return [folder / "sam_ft", folder / "calsam"]


@pytest.fixture(scope="module")
def record(runs, drawn, tmp_path_factory):
    """Their evaluation."""
    folder = tmp_path_factory.mktemp("evaluation")
    with drawn():
        return folder, evaluate.evaluate(runs, folder)


def test_training_leaves_a_log_and_a_model(runs):
    lines = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert all(line["penalty"] > 0 and 0 < line["cmp"] < 1 for line in lines if "loss" in line)
    params, model = model_folder.load(runs[1])
    assert model["class_names"] == ["whole_tumour"] and model["class_ids"] == [[1, 2, 3]]
    assert model["config"]["protocol"] == "gt_points"
    start = components.of_model(model, "").backbone.trainable
    moved = np.abs(params["mask_tokens"] - np.asarray(start["mask_tokens"])).max()
    assert 0 < moved < 0.01


def test_the_model_knows_what_its_training_cases_look_like(config, runs):
    record = model_folder.load(runs[0])[1]
    domain = record["training_domain"]
    assert domain["cases"] == 3 and set(domain["intensities"]) == {"T1c", "T2", "FLAIR"}
    assert not any(case_id in json.dumps(domain) for case_id in record["cases"])
    assert domain == model_folder.load(runs[1])[1]["training_domain"]  # it follows from data and encoder alone
    parts = components.build(config)
    encode = caching.case_encoder(parts.backbone, 0, components.encoder_mesh(config))
    case = parts.prepare(parts.select("test")[0])
    probabilities = np.zeros((*case.reference.voxels.shape, 1), np.float32)
    report = case_report.case_report(probabilities, ["tumour"], case, "gt_points", encode(case), domain)
    assert report["training_domain"]["distance"] > 0 and report["training_domain"]["limit"] > 0
    low, high = (domain["intensities"]["T2"][end][1] for end in ("lowest", "highest"))
    assert low / 2 < report["intensities"]["T2"][1] < high * 2


def test_the_encoder_stays_frozen_and_the_cache_is_shared(config, runs):
    parts = components.build(config)
    cache = components.feature_cache(parts, runs[0])
    case = parts.select("train")[0]
    assert cache.has(case.case_id, "view1", case_tools.fingerprint(case))
    assert not (runs[0] / "features").exists()  # both runs used config.data.cache


def test_evaluation_has_every_method_on_both_scanners(record):
    _, result = record
    methods = {row.method for row in result.rows}
    assert methods == {
        *("prompt_only_disc", "prompt_only_ellipse", "vanilla_sam"),
        *("sam_ft", "sam_ft+ts", "calsam", "calsam+ts"),
    }
    assert (result.source, list(result.targets)) == ("A", ["B"])
    by_case = {(row.method, row.case_id) for row in result.rows}
    assert len(by_case) == len(methods) * 4  # two patients, each on two scanners
    # Temperature scaling never changes a decision.
    dice = {(r.method, r.case_id): r.value for r in result.rows if r.metric == "DSC" and r.class_name == "all"}
    for (method, case_id), value in dice.items():
        if method.endswith("+ts"):
            assert dice[method.removesuffix("+ts"), case_id] == pytest.approx(value, nan_ok=True)


def test_evaluation_writes_its_files(record):
    folder, result = record
    assert {p.name for p in folder.iterdir()} == {
        *("cases.csv", "summary.json", "table.md", "table.tex", "temperatures.json", "report.html", "SHA256SUMS")
    }
    with (folder / "cases.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(result.rows)
    summary = json.loads((folder / "summary.json").read_text())
    assert {"metric_per_case", "mean", "foreground_mean"} <= summary.keys()
    html = (folder / "report.html").read_text()
    assert "CalSAM" in html and "not a medical device" in html.lower()
    assert 'src="http' not in html and len(result.gallery) == 4  # two domains of two cases: best and worst


def test_validation_and_prediction_give_the_same_dice(record, runs, tmp_path, dataset):
    """Prediction reads images and encodes online; evaluation reads the cache.  Both must see the same frames."""
    _, result = record
    predict.predict(runs[0], tmp_path)
    for row in result.rows:
        if row.method != "sam_ft" or row.metric != "DSC" or row.class_name != "all":
            continue
        mask = nibabel.load(tmp_path / f"{row.case_id}.nii.gz")
        truth = nibabel.load(dataset / "labelsTs" / f"{row.case_id}.nii.gz")
        predicted, reference = np.asarray(mask.dataobj) > 0, np.asarray(truth.dataobj) > 0
        dice = 2 * (predicted & reference).sum() / (predicted.sum() + reference.sum())
        assert dice == pytest.approx(row.value, abs=1e-12)


def test_predictions_have_the_geometry_of_the_input(runs, tmp_path, dataset):
    written = predict.predict(runs[0], tmp_path)
    assert len(written) == 4
    for path in written:
        image = nibabel.load(dataset / "imagesTs" / path.name.replace(".nii.gz", "_0000.nii.gz"))
        mask = nibabel.load(path)
        probability = nibabel.load(tmp_path / path.name.replace(".nii.gz", "_prob-whole_tumour.nii.gz"))
        assert mask.get_data_dtype() == np.uint8 and probability.get_data_dtype() == np.float32
        for output in (mask, probability):
            assert output.shape == image.shape
            np.testing.assert_array_equal(output.affine, image.affine)
            for form in ("sform_code", "qform_code", "xyzt_units"):
                assert output.header[form] == image.header[form]
        values = np.asarray(probability.dataobj)
        assert ((values > 0.5) == (np.asarray(mask.dataobj) > 0)).all()


def test_clicks_replace_the_reference_labels(runs, tmp_path, dataset):
    """A copy of the test images without labels, segmented from a table of clicks."""
    case_id = next((dataset / "imagesTs").glob("*_0000.nii.gz")).name.replace("_0000.nii.gz", "")
    clinic = tmp_path / "clinic"
    (clinic / "imagesTs").mkdir(parents=True)
    (clinic / "imagesTr").mkdir()
    (clinic / "labelsTr").mkdir()
    for path in (dataset / "imagesTs").glob(f"{case_id}_*"):
        (clinic / "imagesTs" / path.name).write_bytes(path.read_bytes())
    description = json.loads((dataset / "dataset.json").read_text()) | {"numTraining": 0}
    (clinic / "dataset.json").write_text(json.dumps(description))
    label = np.asarray(nibabel.load(dataset / "labelsTs" / f"{case_id}.nii.gz").dataobj) > 0
    k = int(label.sum(axis=(0, 1)).argmax())
    i, j = np.argwhere(label[:, :, k])[0]
    clicks = tmp_path / "clicks.tsv"
    clicks.write_text(f"case_id\ti\tj\tk\tlabel\n{case_id}\t{i}\t{j}\t{k}\t1\n{case_id}\t0\t0\t{k}\t0\n")

    with pytest.raises(UsageError, match=f"{case_id}.*no reference labels.*--prompts"):
        predict.predict(runs[0], tmp_path / "out", str(clinic))
    (mask,) = predict.predict(runs[0], tmp_path / "out", str(clinic), clicks)
    volume = np.asarray(nibabel.load(mask).dataobj)
    assert (tmp_path / "out" / "labels.json").is_file()
    assert not np.delete(volume, k, axis=2).any()  # slices without a click are background


def test_another_hospitals_dataset(runs, tmp_path, dataset):
    """All labelled cases of another folder are scored; nothing of it is fitted on."""
    other = tmp_path / "Dataset002_Elsewhere"
    phantoms.write_dataset(other, train=1, val=0, test=1, scale=0.35, seed=7, processes=1)
    result = evaluate.evaluate(runs[:1], tmp_path / "evaluation", str(other))
    assert (result.source, list(result.targets)) == ("", ["A", "B"])
    assert len({row.case_id for row in result.rows}) == 3
    assert "Dataset002_Elsewhere" in (tmp_path / "evaluation" / "report.html").read_text()


def test_nothing_that_was_trained_on_is_scored(runs, tmp_path, dataset):
    copied = tmp_path / "copy"
    shutil.copytree(dataset, copied)
    with pytest.raises(DataError, match="'subject001_A' holds the same files as case 'subject001_A'"):
        evaluate.evaluate(runs[:1], tmp_path / "evaluation", str(copied))
    _, model = model_folder.load(runs[0])
    test = components.of_model(model, "").select("test")
    model["seen"]["val"][0]["subject_id"] = test[0].subject_id
    with pytest.raises(DataError, match=f"'{test[0].case_id}' is of subject"):
        trained_runs.check_unseen(model, test, same_dataset=True)


def test_another_protocol_is_refused(runs, tmp_path):
    with pytest.raises(UsageError, match="trained with the prompt protocol 'gt_points', not with --protocol='gt_box'"):
        evaluate.evaluate(runs, tmp_path, protocol="gt_box")


def test_runs_that_differ_are_not_compared(runs, tmp_path, config):
    other = tmp_path / "other"
    params, model = model_folder.load(runs[0])
    model["config"]["protocol"] = "gt_box"
    model_folder.save(other, params, model)
    with pytest.raises(UsageError, match="differ in protocol .'gt_box' and 'gt_points'."):
        evaluate.evaluate([runs[0], other], tmp_path)
    model["config"]["protocol"], model["seen"]["val"] = "gt_points", []
    model_folder.save(other, params, model)
    with pytest.raises(UsageError, match="differ in training or validation cases"):
        evaluate.evaluate([runs[0], other], tmp_path)
    with pytest.raises(UsageError, match="repeats sam_ft with seed 42"):
        evaluate.evaluate([runs[0], runs[0]], tmp_path)


def test_several_classes_with_boxes(config, cache, tmp_path):
    """Three nested regions, softmax over four logits, box prompts; zero-shot SAM has no part in it."""
    data = dataclasses.replace(config.data, classes="", cache=str(cache / "classes"))
    config = dataclasses.replace(config, data=data, protocol="gt_box", method="sam_cmp", steps=2)
    train.train(config, tmp_path / "run")
    result = evaluate.evaluate([tmp_path / "run"], tmp_path / "evaluation")
    names = {row.class_name for row in result.rows}
    assert names == {"all", "necrotic_core", "oedema", "enhancing_rim"}
    assert "vanilla_sam" not in {row.method for row in result.rows}
    written = predict.predict(tmp_path / "run", tmp_path / "predictions", limit=1)
    assert set(np.unique(nibabel.load(written[0]).dataobj)) <= {0, 1, 2, 3}


def test_resume_goes_on_and_gives_the_same_model(config, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.train(config, whole)
    original = checkpoints.Checkpoints.save

    def stop_after_saving(self, step, *rest):
        original(self, step, *rest)
        raise KeyboardInterrupt

    checkpoints.Checkpoints.save = stop_after_saving
    try:
        with pytest.raises(KeyboardInterrupt):
            train.train(config, parts)
    finally:
        checkpoints.Checkpoints.save = original
    assert not (parts / "model").exists()
    train.train(config, parts, resume=True)
    weights = [(folder / "model" / "decoder.safetensors").read_bytes() for folder in (whole, parts)]
    assert weights[0] == weights[1]


def test_a_run_is_never_overwritten_nor_started_afresh(config, runs, tmp_path):
    before = (runs[0] / "config.json").read_text()
    with pytest.raises(InputError, match="already holds a run, saved at step 4; go on with it with --resume"):
        train.train(dataclasses.replace(config, seed=1), runs[0])
    assert (runs[0] / "config.json").read_text() == before
    with pytest.raises(InputError, match="--resume found no run in .*typo"):
        train.train(config, tmp_path / "typo", resume=True)
    assert not (tmp_path / "typo").exists()
    with pytest.raises(InputError, match="seed"):
        train.train(dataclasses.replace(config, seed=1), runs[0], resume=True)
    assert (runs[0] / "config.json").read_text() == before


def test_caching_ahead(config, tmp_path):
    data = dataclasses.replace(config.data, cache="", views=1)
    root = cache_features.cache_features(dataclasses.replace(config, data=data), tmp_path)
    views = sorted(p.parent.name for p in root.glob("*/view0/done.json"))
    assert len(views) == 3 + 1 + 4


def test_a_cache_of_other_features_is_refused(config, cache):
    data = dataclasses.replace(config.data, upper_percentile=99.0)
    parts = components.build(dataclasses.replace(config, data=data))
    with pytest.raises(InputError, match="frames.upper_percentile is 99.5, this run has 99.0"):
        components.feature_cache(parts, cache)


def test_a_case_without_foreground_is_all_background(runs, tmp_path, dataset):
    """No slice has a prompt, so nothing is encoded: the answer is an empty mask, not an error."""
    healthy = tmp_path / "data"
    shutil.copytree(dataset, healthy)
    for path in (healthy / "labelsTs").glob("*.nii.gz"):
        image = nibabel.load(path)
        nibabel.save(nibabel.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine, image.header), path)
    written = predict.predict(runs[0], tmp_path / "out", str(healthy), split="test")
    assert len(written) == 4
    assert not any(np.asarray(nibabel.load(path).dataobj).any() for path in written)


def test_a_failing_case_stops_no_other(runs, tmp_path, dataset):
    broken = tmp_path / "data"
    for path in dataset.rglob("*"):
        target = broken / path.relative_to(dataset)
        target.mkdir(parents=True) if path.is_dir() else target.write_bytes(path.read_bytes())
    victim = sorted((broken / "imagesTs").glob("*_0001.nii.gz"))[0]
    victim.write_bytes(victim.read_bytes()[:-100])
    with pytest.raises(DataError, match=rf"1 of 4 cases failed; the first: .*{victim.name}"):
        predict.predict(runs[0], tmp_path / "out", str(broken), split="test")
    assert len(list((tmp_path / "out").glob("*_prob-*.nii.gz"))) == 3
