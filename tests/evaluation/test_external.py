"""Other tools' predictions are read as what they are, and give the rows of our own."""

import json
import math

import nibabel
import numpy as np
import pytest
from PIL import Image

from calsegx.data import classes, images, nifti
from calsegx.evaluation import evaluate, external, predict
from calsegx.interfaces import Case, DataError, UsageError

SHAPE = (7, 8, 9)  # x, y, z of the files
LABELS = {"background": 0, "core": 1, "oedema": 2, "enhancing": 3}
CLASSES = classes.parse("core=1,rim=2+3", LABELS)
TURN = np.deg2rad(20)
AFFINES = {
    "ras": np.diag([1.0, 1.2, 2.5, 1]),
    "lps": np.diag([-1.0, -1.2, 2.5, 1]),
    "permuted": np.array([[0, 0, -2.5, 30], [1.0, 0, 0, -5], [0, 1.2, 0, 7], [0, 0, 0, 1]]),
    "oblique": np.array(
        [
            [math.cos(TURN), 0, 2.5 * math.sin(TURN), 3],
            [0, -1.2, 0, 11],
            [-math.sin(TURN), 0, 2.5 * math.cos(TURN), 4],
            [0, 0, 0, 1],
        ]
    ),
}


def save(path, array, affine):
    image = nibabel.Nifti1Image(array, affine)
    image.set_sform(affine, 1)
    image.set_qform(affine, 0)
    image.to_filename(path)
    return path


def make_case(folder, affine=AFFINES["oblique"]):
    """A case whose label has the four ids."""
    folder.mkdir(exist_ok=True)
    label = np.random.default_rng(0).integers(0, 4, SHAPE).astype(np.uint8)
    image = save(folder / "image.nii.gz", label.astype(np.float32), affine)
    return Case("c1", "c1", {"T1": image}, save(folder / "label.nii.gz", label, affine), "test")


@pytest.fixture
def case(tmp_path):
    return make_case(tmp_path / "data")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "nnunet").mkdir()
    return tmp_path / "nnunet"


def opened(folder, class_map=CLASSES, slice_axis="axial"):
    return external.Predictions("nnU-Net", folder, class_map, slice_axis)


def own_prediction(case, slice_axis="axial"):
    """Our softmax ``[D, H, W, 3]`` of background, core and rim: mostly right."""
    label = classes.to_indices(CLASSES, images.read_labels(case.label, slice_axis).voxels, case.label)
    logits = np.random.default_rng(1).normal(0, 1.5, (*label.shape, 3)) + 2 * np.eye(3)[label]
    return predict.probabilities(logits)


def in_file_axes(case, probabilities, folder, slice_axis="axial"):
    """``[x, y, z, C]`` as the label file has its axes, by way of maps that our own writer makes."""
    like = images.read_labels(case.label, slice_axis)
    for channel in range(probabilities.shape[-1]):
        images.write(folder / f"channel{channel}", probabilities[..., channel], like, np.float32)
    paths = [folder / f"channel{channel}.nii.gz" for channel in range(probabilities.shape[-1])]
    return np.stack([np.asarray(nibabel.load(path).dataobj) for path in paths], axis=-1)


def save_npz(folder, by_file, key="probabilities", name="c1"):
    np.savez_compressed(folder / f"{name}.npz", **{key: by_file.transpose(3, 2, 1, 0)})


def a_mask(folder):
    save(folder / "c1.nii.gz", np.ones(SHAPE, np.uint8), AFFINES["oblique"])


def picture(path, pixels):
    Image.fromarray(pixels).save(path)


def rows(case, probabilities, slice_axis="axial"):
    label = images.read_labels(case.label, slice_axis)
    truth = classes.to_indices(CLASSES, label.voxels, case.label)
    key = evaluate.CaseKey("m", 0, case.case_id, case.subject_id, "A", "test")
    found, _ = evaluate.evaluate_case(probabilities, truth, label.spacing_mm, CLASSES.names, key)
    return list(map(str, found))  # NaN equals itself here


@pytest.mark.parametrize(
    ("affine", "slice_axis"),
    [("ras", "axial"), ("lps", "coronal"), ("permuted", "sagittal"), ("oblique", "axial"), ("oblique", "sagittal")],
)
def test_every_kind_of_file_gives_the_rows_of_our_own(tmp_path, folder, affine, slice_axis):
    case = make_case(tmp_path / "data", AFFINES[affine])
    own = own_prediction(case, slice_axis)
    by_file = in_file_axes(case, own, tmp_path, slice_axis)
    found, kinds = opened(folder, slice_axis=slice_axis), []

    def check():
        np.testing.assert_array_equal(found.read(case), own[..., 1:])
        kinds.extend(found.survey([case]).kinds)

    # From the last that is looked for to the first, so that each takes precedence over what lies there already.
    save(folder / "c1.nii.gz", by_file, nibabel.load(case.label).affine)
    check()
    like = images.read_labels(case.label, slice_axis)
    (folder / "c1.nii.gz").unlink()
    mask = classes.to_file_ids(CLASSES, predict.segment(own[..., 1:]))
    nifti.write(folder / "c1.nii.gz", mask, like, np.uint8)
    of_mask = found.read(case)
    assert set(np.unique(of_mask)) == {0, 1}
    np.testing.assert_array_equal(predict.segment(of_mask), predict.segment(own[..., 1:]))
    kinds.extend(found.survey([case]).kinds)
    for index, name in enumerate(CLASSES.names, start=1):
        images.write(folder / f"c1_prob-{name}", own[..., index], like, np.float32)
    check()
    save_npz(folder, by_file, "softmax")
    check()
    save_npz(folder, by_file)
    check()
    assert rows(case, found.read(case), slice_axis) == rows(case, own[..., 1:], slice_axis)
    assert kinds == [external.VOLUMES, external.MASKS, external.MAPS, external.NPZ, external.NPZ]


def test_maps_of_pictures_as_prediction_writes_them(tmp_path, folder):
    label = np.random.default_rng(0).integers(0, 4, (6, 5)).astype(np.uint8)
    picture(tmp_path / "label.png", label)
    case = Case("c1", "c1", {"grey": tmp_path / "label.png"}, tmp_path / "label.png", "test")
    own, like = own_prediction(case)[..., 1:], images.read_labels(case.label)
    for index, name in enumerate(CLASSES.names):
        images.write(folder / f"c1_prob-{name}", own[..., index], like, np.float32)
    found = opened(folder)
    assert found.survey([case]).kinds == {external.MAPS: 1}
    np.testing.assert_allclose(found.read(case), own, atol=0.5 / 65535 + 1e-7)
    for name in CLASSES.names:  # of a picture without foreground
        images.write(folder / f"c1_prob-{name}", 0 * own[..., 0], like, np.float32)
    assert not found.read(case).any()


def test_masks_have_the_same_distances_and_the_calibration_of_certainty(case, folder):
    own = own_prediction(case)[..., 1:]
    label = images.read_labels(case.label)
    nifti.write(folder / "c1.nii", classes.to_file_ids(CLASSES, predict.segment(own)), label, np.uint8)
    given, truth = opened(folder).read(case), classes.to_indices(CLASSES, label.voxels, case.label)
    of_masks = [row for row in rows(case, own) if "region='volume'" in row]
    assert [row for row in rows(case, given) if "region='volume'" in row] == of_masks and len(of_masks) > 20
    wrong = float(np.mean(predict.segment(given) != truth))
    ece = next(r for r in rows(case, given) if "class_name='all', metric='ECE', region='all'" in r)
    assert float(ece.split("value=")[1].split(",")[0]) == pytest.approx(wrong, abs=1e-12)


@pytest.mark.parametrize("affine", AFFINES)
@pytest.mark.parametrize("reader", ["NibabelIOWithReorient", "SimpleITKIO"])
def test_a_reader_that_reorients_has_written_in_ras(tmp_path, folder, affine, reader):
    case = make_case(tmp_path / "data", AFFINES[affine])
    own = own_prediction(case)
    image = nibabel.Nifti1Image(in_file_axes(case, own, tmp_path), nibabel.load(case.label).affine)
    stored = nibabel.as_closest_canonical(image) if "Reorient" in reader else image
    save_npz(folder, np.asarray(stored.dataobj))
    (folder / "plans.json").write_text(json.dumps({"image_reader_writer": reader}))
    np.testing.assert_array_equal(opened(folder).read(case), own[..., 1:])


def test_channels_of_label_ids_are_added_to_classes(case, folder, tmp_path):
    logits = np.random.default_rng(2).normal(0, 2, (*images.read_labels(case.label).voxels.shape, 4))
    softmax = predict.probabilities(logits)
    expected = np.stack([softmax[..., 1], softmax[..., 2] + softmax[..., 3]], axis=-1)
    by_file = in_file_axes(case, softmax, tmp_path)
    save_npz(folder, by_file)  # four channels: the dataset's four label ids
    np.testing.assert_array_equal(opened(folder).read(case), expected)
    # In the order of the ids, whatever the order of the names; the ignored label has no channel.
    labels = {"background": 0, "c": 3, "a": 1, "b": 2, "ignore": 4}
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    np.testing.assert_array_equal(opened(folder).read(case), expected)
    # As nnU-Net once saved them: float16, and zeros where the image had been cropped.
    half = by_file.astype(np.float16)
    half[:2] = 0
    save_npz(folder, half)
    found = opened(folder).read(case)
    crop = np.abs(found - expected).max(axis=-1) > 1e-3
    assert crop.sum() == 2 * SHAPE[1] * SHAPE[2] and np.all(found[crop] == 0) and found.sum(axis=-1).max() < 1.001


def test_regions_are_classes_as_they_are(case, folder, tmp_path):
    labels = {"background": 0, "whole": [1, 2, 3], "tumour": [1, 3], "enhancing": 3}
    (folder / "dataset.json").write_text(json.dumps({"labels": labels, "regions_class_order": [2, 1, 3]}))
    shape = images.read_labels(case.label).voxels.shape
    regions = np.random.default_rng(3).uniform(0, 1, (*shape, 3)).astype(np.float32)  # a sigmoid for each
    save_npz(folder, in_file_axes(case, regions, tmp_path))
    for spec, index in (("whole=1+2+3", 0), ("core=3+1", 1), ("enhancing=3", 2)):
        found = opened(folder, classes.parse(spec, LABELS)).read(case)
        np.testing.assert_array_equal(found, regions[..., [index]])
    with pytest.raises(DataError, match=r"ids 1\+2\+3, 1\+3, 3, of which the class oedema = 2 cannot be made"):
        opened(folder, classes.parse("oedema=2", LABELS)).read(case)
    with pytest.raises(DataError, match="core, enhancing sum to 1.*though classes exclude each other"):
        (folder / "dataset.json").unlink()
        save_npz(folder, in_file_axes(case, regions[..., :2], tmp_path))
        opened(folder, classes.parse("core=1,enhancing=3", LABELS)).read(case)
    save_npz(folder, in_file_axes(case, regions[..., :1], tmp_path))  # one channel, one class
    np.testing.assert_array_equal(opened(folder, classes.parse("whole=1+2+3", LABELS)).read(case), regions[..., :1])


def uniform(channels, shape=SHAPE):
    return np.full((*shape, channels), 1 / channels, np.float32)


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (lambda f: save_npz(f, uniform(3, (7, 8, 10))), r"shape \(3, 10, 8, 7\); expected channels and \(9, 8, 7\)"),
        (lambda f: save_npz(f, uniform(3).transpose(2, 1, 0, 3)), r"c1.npz has the shape \(3, 7, 8, 9\)"),
        (lambda f: save_npz(f, uniform(5)), r"has 5 channels; expected 4 .*, 3 .* or 2"),
        (lambda f: save_npz(f, uniform(3) * 0.9), "sum to 1 only within 0.1, expected 0.001"),
        (lambda f: save_npz(f, uniform(3) * 12 - 6), "values from -2 to -2; expected probabilities from 0 to 1"),
        (lambda f: save_npz(f, uniform(3) * np.nan), "has 1512 values that are no number"),
        (lambda f: save_npz(f, uniform(3) * 0), "is 0 in every channel and voxel"),
        (lambda f: save_npz(f, uniform(2)), "sum to 1 everywhere, so that one may be the background"),
        (lambda f: save_npz(f, uniform(3)[..., :0]), "expected numbers"),
        (
            lambda f: [save_npz(f, uniform(3)), (f / "dataset.json").write_text('{"labels": ["background", "a"]}')],
            "labels is .*expected name: id or list of ids",
        ),
        (lambda f: save_npz(f, uniform(3), "logits"), "holds logits; expected the array probabilities or softmax"),
        (lambda f: save_npz(f, uniform(3).astype(object)), "c1.npz cannot be read"),
        (lambda f: np.savez(f / "c1.npz", probabilities=uniform(3)[0]), r"shape \(8, 9, 3\) and type float32"),
        (lambda f: (f / "c1.npz").write_bytes(b"PK\x03\x04 and no more"), "c1.npz cannot be read"),
        (
            lambda f: save(f / "c1_prob-core.nii.gz", uniform(1)[..., 0], AFFINES["oblique"]),
            "holds c1_prob-core.nii.gz of case 'c1', but not c1_prob-rim.nii.gz; add the map of every class",
        ),
        (lambda f: [a_mask(f), (f / "c1_prob-Core.nii.gz").touch()], "holds c1_prob-Core.nii.gz of case 'c1', but not"),
        (lambda f: [a_mask(f), (f / "c1_prob-core.nii").touch()], "but not c1_prob-rim.nii; add"),
        (lambda f: save(f / "c1.nii.gz", uniform(3), AFFINES["ras"]), "label.nii.gz and .*c1.nii.gz"),
        (lambda f: save(f / "c1.nii.gz", np.full(SHAPE, 9, np.uint8), AFFINES["oblique"]), "holds the label ids 9"),
        (lambda f: save(f / "c1.nii.gz", uniform(2)[..., 0], AFFINES["oblique"]), "c1.nii.gz is not a label file"),
        (lambda f: save(f / "c1.nii.gz", np.ones((7, 8, 8), np.uint8), AFFINES["oblique"]), "have different shapes"),
        (
            lambda f: [save_npz(f, uniform(3)), (f / "dataset.json").write_text('{"labels": {"no": 0, "a": 1}}')],
            "has 3 channels, but dataset.json beside it describes 2",
        ),
        (
            lambda f: [save_npz(f, uniform(3)), (f / "dataset.json").write_text('{"labels": {"0": "background"}}')],
            "labels is .*expected name: id or list of ids",
        ),
        (lambda f: [a_mask(f), (f / "c1_prob-core.png").touch()], "but not c1_prob-rim.png; add"),
        (
            lambda f: [picture(f / f"c1_prob-{n}.png", np.zeros(SHAPE[:2], np.uint8)) for n in CLASSES.names],
            "c1_prob-core.png is no probability map; expected grey values of 16 bits",
        ),
        (lambda f: save_npz(f, uniform(3), name="c2"), "has no prediction of 1 of 1 test cases: c1; expected CASE.npz"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_in_a_sentence(case, folder, write, sentence):
    write(folder)
    with pytest.raises(DataError, match=sentence) as caught:
        opened(folder).survey([case])
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_survey_notices_other_files(case, folder):
    save_npz(folder, uniform(3))
    first = opened(folder).survey([case])
    assert first == opened(folder).survey([case]) and first.kinds == {external.NPZ: 1}
    assert str(first).startswith("nnU-Net: 1 cases of probabilities (.npz) from the folder nnunet, SHA-256 ")
    save_npz(folder, np.eye(3, dtype=np.float32)[np.zeros(SHAPE, int)])
    second = opened(folder).survey([case])
    (folder / "plans.json").write_text("{}")
    assert len({first.sha256, second.sha256, opened(folder).survey([case]).sha256}) == 3


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["predictions"], "expected NAME=FOLDER"),
        (["=predictions"], "expected NAME=FOLDER"),
        (["a=.", "a=."], "names 'a' twice"),
        (["nnU-Net+TS=."], "use letters, digits"),
        (["_hidden=."], "use letters, digits"),
        (["calsam=."], "that is the name of a method here"),
        (["sam-ft=."], "that is the name of a method here"),
        (["nnU-Net=/nowhere"], "there is no folder /nowhere"),
    ],
)
def test_names_that_cannot_stand_beside_ours(given, sentence):
    with pytest.raises(UsageError, match=sentence):
        external.parse(given)


def test_names_and_folders(tmp_path):
    assert external.parse([f"nnU-Net 3d (v2)={tmp_path}"]) == {"nnU-Net 3d (v2)": tmp_path}
