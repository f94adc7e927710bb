"""Every registered calibrator, by name, on one trained tiny run: fitted, saved, shown, and applied in prediction."""

import dataclasses
import json
import re
import shutil

import nibabel
import numpy as np
import pytest

from calsegx import calibrators
from calsegx.calibrators import storage
from calsegx.interfaces import DataError, UsageError
from calsegx.training import model_folder
from launch import calibrate, components, predict, train

OPTIONS = {name: "(epochs=5, learning_rate=0.01)" for name in ("local_temperature", "image_temperature")}


class Eraser:
    """A calibrator that leaves no foreground."""

    spatial = False

    @staticmethod
    def fit(chunks, labels=None, *, provenance=None):
        seen = sum(len(logits) for logits, _ in chunks)
        if not seen:
            raise DataError("no voxels")
        return {"provenance": provenance, "identifiable": True, "voxels": seen, "voxels_seen": seen}

    @staticmethod
    def apply(params, logits, image=None):
        return -np.abs(logits)


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """SAM-FT after a few steps: its logits are hardly better than chance, which can be calibrated near the tumour."""
    folder = tmp_path_factory.mktemp("calibrated") / "run"
    train.train(config, folder)
    return folder


def brier(probability, label):
    """Over the whole volume, from files."""
    truth = np.asarray(nibabel.load(label).dataobj) > 0
    return float(np.mean((np.asarray(nibabel.load(probability).dataobj, np.float64) - truth) ** 2))


@pytest.mark.parametrize("name", calibrators.names())
def test_each_is_fitted_saved_shown_and_applied(name, run, dataset, tmp_path):
    done = calibrate.calibrate(run, name + OPTIONS.get(name, ""), "dilated")
    stored, params = storage.load(run / "model" / "calibrator.json")
    assert (stored, params["identifiable"]) == (name, True) and params["nll_after"] < params["nll_before"]
    record = model_folder.load(run)[1]
    provenance = params["provenance"]
    assert (provenance["split"], provenance["region"]) == ("val", "dilated")
    assert provenance["cases"] == record["seen"]["val"] and provenance["decoder_sha256"] == record["decoder_sha256"]

    text = calibrate.table(done)
    for shown in ("validation, scanner A (1 case): DSC", "test, scanner B (2 cases): DSC", "gt_fg*", "undefined 0/2"):
        assert shown in text
    if "temperature" in name:
        assert text.count("labels unchanged") == 3

    # Prediction reads the images and encodes anew: its probabilities are those that the table is about.
    (mask,) = predict.predict(run, tmp_path, limit=1)
    case_id = mask.name.removesuffix(".nii.gz")
    before, after = (
        next(
            row.value
            for row in done.rows
            if (row.method, row.case_id, row.metric, row.region) == (method, case_id, "Brier", "all")
        )
        for method in ("before", "after")
    )
    written = brier(tmp_path / f"{case_id}_prob-whole_tumour.nii.gz", dataset / "labelsTs" / mask.name)
    assert written == pytest.approx(after, rel=1e-5) and written != pytest.approx(before, rel=1e-4)


def test_it_can_be_left_out_and_changes_nothing_where_it_is_not_identifiable(run, tmp_path, capsys):
    done = calibrate.calibrate(run, "vector", "gt_fg")
    assert "not identifiable, so the logits stay as they are: no voxel has class 0" in calibrate.summary(done)
    volumes = []
    for name, calibrated in (("unidentified", True), ("none", False)):
        (mask,) = predict.predict(run, tmp_path / name, limit=1, calibrated=calibrated)
        path = tmp_path / name / mask.name.replace(".nii.gz", "_prob-whole_tumour.nii.gz")
        volumes.append(np.asarray(nibabel.load(path).dataobj))
    np.testing.assert_array_equal(*volumes)
    notes = capsys.readouterr().err
    assert "calibrated by vector, fitted on validation voxels, region gt_fg (not identifiable: no change)" in notes
    assert "probabilities are the decoder's own" in notes


def test_a_calibrator_of_another_model_is_refused(run, tmp_path):
    calibrate.calibrate(run, "temperature", "dilated")
    params, record = model_folder.load(run)
    assert calibrate.of_run(run / "model", record) == storage.load(run / "model" / "calibrator.json")
    shutil.copytree(run / "model", tmp_path / "model")
    del record["decoder_sha256"]
    model_folder.save(tmp_path, {**params, "mask_tokens": params["mask_tokens"] + 1}, record)
    with pytest.raises(DataError, match=r"calibrator.json was fitted on another decoder .* --nocalibrate"):
        predict.predict(tmp_path, tmp_path / "out")
    assert len(predict.predict(tmp_path, tmp_path / "out", limit=1, calibrated=False)) == 1


def test_one_that_costs_the_segmentation_is_saved_with_a_warning(run):
    done = calibrate.calibrate(run, f"{__name__}:Eraser", "dilated")
    assert list(done.relabelled) == ["validation, scanner A", "test, scanner A", "test, scanner B"]
    name, params = storage.load(done.path)
    dsc = params["provenance"]["validation_dsc"]
    found = [r.value for r in done.rows if (r.domain, r.metric, r.method) == ("validation, scanner A", "DSC", "before")]
    assert dsc["before"] == pytest.approx(np.mean(found)) and dsc["before"] > 0.01 and dsc["after"] == 0
    said = f"mean DSC of the validation cases {100 * dsc['before']:.1f} -> 0.0 points; .* --nocalibrate"
    assert re.search(said, calibrate.segmentation_warning(name, params))

    harmless = calibrate.calibrate(run, "temperature", "dilated").params
    assert harmless["provenance"]["validation_dsc"] == {"before": dsc["before"], "after": dsc["before"]}
    assert calibrate.segmentation_warning("temperature", harmless) is None
    del harmless["provenance"]["validation_dsc"]  # a file of an earlier version
    assert calibrate.segmentation_warning("temperature", harmless) is None


def test_it_is_shown_on_another_dataset(run, dataset, tmp_path):
    """The test cases as a folder of their own: nothing of it is fitted on, and nothing is written to it."""
    other = tmp_path / "Dataset002_Elsewhere"
    for name in ("imagesTr", "labelsTr"):
        (other / name).mkdir(parents=True)
    for name in ("imagesTs", "labelsTs"):
        shutil.copytree(dataset / name, other / name)
    description = json.loads((dataset / "dataset.json").read_text()) | {"numTraining": 0}
    (other / "dataset.json").write_text(json.dumps(description))
    done = calibrate.calibrate(run, "temperature", "dilated", str(other))
    assert [case["case_id"] for case in done.params["provenance"]["cases"]] == ["subject004_A"]
    assert list(done.relabelled) == ["validation, scanner A", "test, scanner unknown"]
    assert len({row.case_id for row in done.rows}) == 1 + 4


def test_what_is_tested_is_not_fitted_on(run, monkeypatch):
    parts = components.of_model(model_folder.load(run)[1], "")
    val = parts.select("val")[0]
    cases = [dataclasses.replace(c, subject_id=val.subject_id) if c.split == "test" else c for c in parts.dataset.cases]
    leaky = dataclasses.replace(parts, dataset=dataclasses.replace(parts.dataset, cases=tuple(cases)))
    monkeypatch.setattr(components, "of_model", lambda record, root: leaky)
    with pytest.raises(UsageError, match=f"subjects of the test split: {val.subject_id} are in both"):
        calibrate.calibrate(run)


def test_other_validation_cases_than_the_trainings_are_refused(run, tmp_path):
    params, record = model_folder.load(run)
    record["seen"]["val"] = record["seen"]["train"]
    model_folder.save(tmp_path, params, record)
    with pytest.raises(DataError, match="'subject004_A' is not among the 3 that the run was validated on"):
        calibrate.calibrate(tmp_path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("dirichlt", "no calibrator named 'dirichlt'.*Did you mean 'dirichlet'"),
        ("dirichlet(odr=1)", "'dirichlet' has no option 'odr'; it has: odir, intercept"),
        ("dirichlet(odir=-1)", "weights of at least 0, got odir=-1"),
        ("dirichlet(odir=much)", "'dirichlet.odir=much.' has an option of another type"),
        ("temperature(provenance=1)", "'temperature' has no option 'provenance'"),
        ("temperature + vector", "'temperature . vector' has a part that is no calibrator"),
        ("temperature(", "'temperature.' cannot be read"),
    ],
)
def test_calibrators_that_cannot_be_used(text, sentence):
    with pytest.raises(UsageError, match=sentence):
        calibrate.read_calibrator(text)


def test_an_unknown_region_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(UsageError, match="no region named 'foreground'"):
        calibrate.calibrate(tmp_path / "nowhere", region="foreground")
