"""Names of predictions, whose they are, and which are whole."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from calsegx.data import classes, clicks, layouts, nifti
from calsegx.evaluation import prediction_files
from calsegx.interfaces import Case, DataError, UsageError
from calsegx.uncertainty import scores

CLASSES = classes.parse("core=1,oedema 2=2+3", {})
MODEL = {"decoder": "abc", "calibrator": None}


def case_of(case_id, ending=".nii.gz"):
    return Case(case_id, case_id, {"T1": Path(f"{case_id}{ending}")}, None, "test")


def planned(tmp_path, *case_ids, bids=False, names=CLASSES.names):
    return prediction_files.plan(tmp_path, [case_of(case_id) for case_id in case_ids], names, bids)


@pytest.fixture
def reference(tmp_path):
    path = tmp_path / "image.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.ones((4, 5, 3), np.int16), np.diag([-1.0, -2, 3, 1])), path)
    return nifti.read(path)


def write(tmp_path, plan, reference, made_from):
    rng = np.random.default_rng(0)
    probabilities = (rng.dirichlet((1, 1, 1), reference.voxels.shape)[..., 1:]).astype(np.float32)
    record = {"case_id": "a", "made_from": made_from}
    return probabilities, prediction_files.write(tmp_path, plan, probabilities, reference, CLASSES, record)


def test_bids_names(tmp_path):
    found = planned(tmp_path, "sub-01_ses-2", "Pat_3.b", bids=True)
    files = found["sub-01_ses-2"]
    folder = tmp_path / "sub-01" / "ses-2" / "anat"
    assert files.mask == folder / "sub-01_ses-2_space-orig_seg-calsegx_dseg"
    assert files.record == folder / "sub-01_ses-2_space-orig_seg-calsegx_dseg.json"
    assert files.probabilities["oedema 2"] == folder / "sub-01_ses-2_space-orig_seg-calsegx_label-oedema2_probseg"
    assert found["Pat_3.b"].mask == tmp_path / "sub-Pat3b" / "anat" / "sub-Pat3b_space-orig_seg-calsegx_dseg"


@pytest.mark.parametrize(
    ("case_ids", "bids", "names", "message"),
    [
        (["a_1", "a1"], True, ["x"], "case 'a_1' and case 'a1' would both be written to .*leave --bids out"),
        (["a"], True, ["x 1", "x1"], "would both be written to .*rename a case or a class"),
        (["a"], False, ["x", "X"], "would both be written to .*rename a case or a class"),
        (["a", "a_prob-x"], False, ["x"], "case 'a' and case 'a_prob-x' would both"),
        (["a", "a_uncertainty"], False, ["x"], "case 'a' and case 'a_uncertainty' would both"),
        (["Labels"], False, ["x"], "the folder's labels.json and case 'Labels'"),
        (["___"], True, ["x"], "The case '___' has no letter a-z or digit"),
        (["a"], True, ["+"], "has no letter a-z or digit"),
    ],
)
def test_names_that_collide_are_refused(tmp_path, case_ids, bids, names, message):
    with pytest.raises(UsageError, match=message):
        planned(tmp_path, *case_ids, bids=bids, names=names)


def test_pictures_are_no_bids(tmp_path):
    with pytest.raises(UsageError, match="--bids takes NIfTI volumes"):
        prediction_files.plan(tmp_path, [case_of("a", ".png")], ["x"], True)


def test_a_case_is_whole_when_its_record_says_so(tmp_path, reference):
    plan = planned(tmp_path, "a")["a"]
    made_from = prediction_files.made_from(MODEL, "f", None)
    assert prediction_files.whole(tmp_path, plan, made_from) is None
    probabilities, mask = write(tmp_path, plan, reference, made_from)
    assert prediction_files.whole(tmp_path, plan, made_from) == mask == tmp_path / "a.nii.gz"
    uncertainty = nifti.read(tmp_path / "a_uncertainty.nii.gz").voxels
    np.testing.assert_array_equal(uncertainty, scores.predictive_entropy(probabilities))
    assert set(np.unique(nifti.read_labels(mask).voxels)) == {0, 1, 2}
    record = json.loads(plan.record.read_text())
    assert record["files"]["probabilities"] == {name: f"a_prob-{name}.nii.gz" for name in CLASSES.names}

    table = clicks.Clicks(Path("c"), ["line 2"], np.ones((1, 3)), np.array([False]), np.array([1]))
    moved = clicks.Clicks(Path("c"), ["line 9"], np.ones((1, 3)), np.array([False]), np.array([0]))
    others = [
        prediction_files.made_from(MODEL, "g", None),
        prediction_files.made_from(MODEL | {"calibrator": "x"}, "f", None),
        *(prediction_files.made_from(MODEL, "f", t) for t in (table, moved)),
    ]
    assert len({json.dumps(other) for other in [made_from, *others]}) == 5
    assert all(prediction_files.whole(tmp_path, plan, other) is None for other in others)
    content = plan.record.read_text()
    for damaged in (content[:-40], content.replace('"a"', '"b"'), ""):
        plan.record.write_text(damaged)
        assert prediction_files.whole(tmp_path, plan, made_from) is None
    plan.record.write_text(content)
    whole = mask.read_bytes()
    mask.write_bytes(whole[:-1])
    assert prediction_files.whole(tmp_path, plan, made_from) is None
    mask.write_bytes(whole)
    assert prediction_files.whole(tmp_path, plan, made_from) == mask
    (tmp_path / "a_prob-core.nii.gz").unlink()
    assert prediction_files.whole(tmp_path, plan, made_from) is None


def test_a_folder_is_of_one_model(tmp_path):
    output = tmp_path / "out"
    prediction_files.claim(output, MODEL, CLASSES, False, {})
    assert json.loads((output / "labels.json").read_text()) == {"background": 0, "core": 1, "oedema 2": 2}
    prediction_files.claim(output, MODEL, CLASSES, False, {})
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    with pytest.raises(UsageError, match=r"another model, calibrator or form \(differing: calibrator\)"):
        prediction_files.claim(output, MODEL | {"calibrator": "b"}, CLASSES, False, {})
    with pytest.raises(UsageError, match=r"differing: file names \(--bids\)"):
        prediction_files.claim(output, MODEL, CLASSES, True, {})
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    (output / "predictions.json").write_text("{}")
    with pytest.raises(DataError, match="predictions.json is damaged"):
        prediction_files.claim(output, MODEL, CLASSES, False, {})


@pytest.mark.parametrize("name", ["a.nii.gz", "a_uncertainty.nii", "a_prob-core.nii.gz", "a.json", "labels.json"])
def test_a_file_that_no_prediction_wrote_is_never_replaced(tmp_path, name):
    plan = planned(tmp_path, "a")
    (tmp_path / name).write_text("by hand")
    with pytest.raises(UsageError, match=f"{name} is there and was not written by a prediction"):
        prediction_files.claim(tmp_path, MODEL, CLASSES, False, plan)
    assert [path.name for path in tmp_path.iterdir() if path.name != "image.nii.gz"] == [name]
    (tmp_path / name).unlink()
    prediction_files.claim(tmp_path, MODEL, CLASSES, False, plan)
    (tmp_path / "a.nii.gz").write_text("of an earlier call")
    prediction_files.claim(tmp_path, MODEL, CLASSES, False, plan)


def test_a_bids_derivative_is_read_as_the_labels_of_its_dataset(tmp_path, reference):
    raw = tmp_path / "raw"
    (raw / "sub-01" / "anat").mkdir(parents=True)
    (raw / "dataset_description.json").write_text("{}")
    (raw / "sub-01" / "anat" / "sub-01_T1w.nii.gz").write_bytes((tmp_path / "image.nii.gz").read_bytes())
    output = raw / "derivatives" / "calsegx"
    prediction_files.claim(output, MODEL, CLASSES, True, {})
    plan = prediction_files.plan(output, [case_of("sub-01")], CLASSES.names, True)["sub-01"]
    write(output, plan, reference, {})
    description = json.loads((output / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative" and description["GeneratedBy"][0]["Name"] == "calsegx"
    name, found = layouts.recognise(raw)
    assert name == "bids" and found.labels == {"background": 0, "core": 1, "oedema 2": 2}
    assert found.cases[0].label == plan.mask.with_name(f"{plan.mask.name}.nii.gz")


def test_predictive_entropy():
    cases = {
        (0.5,): 1.0,
        (0.0,): 0.0,
        (1.0,): 0.0,
        (1 / 3, 1 / 3): 1.0,
        (1.0, 0.0): 0.0,
        (0.5, 0.0): np.log(2) / np.log(3),
    }
    for foreground, expected in cases.items():
        assert scores.predictive_entropy(np.array([foreground]))[0] == pytest.approx(expected, abs=1e-6)
    q = 0.2
    expected = -(q * np.log(q) + (1 - q) * np.log(1 - q)) / np.log(2)
    assert scores.predictive_entropy(np.array([[q]]))[0] == pytest.approx(expected, rel=1e-6)
    over = scores.predictive_entropy(np.array([[0.6, 0.4 + 1e-7]], np.float32))  # a sum above 1 by rounding
    assert np.isfinite(over).all() and over.dtype == np.float32
