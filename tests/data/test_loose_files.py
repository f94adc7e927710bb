"""Image files of no dataset: which are cases, which channels they hold, what is refused."""

import pathlib

import nibabel
import numpy as np
import pytest
from PIL import Image

from calsegx.data import loose_files, nifti
from calsegx.interfaces import DataError

TWO = ("T1", "FLAIR")


def volume(path, shape=(4, 5, 3), seed=0):
    data = np.random.default_rng(seed).integers(1, 99, shape).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(data, np.diag([-1.0, -2, 3, 1])), path)


def picture(path, colours=()):
    Image.fromarray(np.full((4, 5, *colours), 9, np.uint8)).save(path)


def test_every_image_is_a_case_and_masks_are_said_to_be_left_out(tmp_path, capsys):
    left_out = ("b_prob-tumour.nii.gz", "b_uncertainty.nii.gz", "a_seg.nii.gz", "a-mask.png", "done.nii.gz")
    for name in ("b.nii.gz", "scan_2019.nii", "c_0000.nii.gz", ".hidden.nii.gz", *left_out):
        picture(tmp_path / name) if name.endswith(".png") else volume(tmp_path / name)
    picture(tmp_path / "d.png")
    (tmp_path / "done.json").write_text('{"made_from": {}}')
    (tmp_path / "notes.txt").write_text("mine")
    found = loose_files.of_folder(tmp_path, ["T1"])
    assert {case.case_id: case.images["T1"].name for case in found.cases} == {
        **{"b": "b.nii.gz", "c": "c_0000.nii.gz", "d": "d.png", "scan_2019": "scan_2019.nii"}
    }
    assert all(case.label is None and not case.volumes for case in found.cases) and found.channels == ("T1",)
    assert "left out as masks or predictions, by their names: 5 (a-mask.png, a_seg.nii.gz, " in capsys.readouterr().err


def test_channels_are_numbered_in_the_models_order(tmp_path):
    for name in ("p1_0000", "p1_0001", "p2_0001", "p2_0000"):
        volume(tmp_path / f"{name}.nii.gz")
    volume(tmp_path / "q.nii.gz", (4, 5, 3, 2))
    found = loose_files.of_folder(tmp_path, TWO)
    assert [case.case_id for case in found.cases] == ["p1", "p2", "q"]
    assert {name: path.name for name, path in found.cases[1].images.items()} == {
        "T1": "p2_0000.nii.gz",
        "FLAIR": "p2_0001.nii.gz",
    }
    assert found.cases[2].volumes == {"T1": 0, "FLAIR": 1} and set(found.cases[2].images) == set(TWO)


def test_colours_go_by_their_names(tmp_path):
    picture(tmp_path / "p.png", (3,))
    (case,) = loose_files.of_folder(tmp_path, ("green", "red")).cases
    assert case.volumes == {"green": 1, "red": 0}
    (case,) = loose_files.of_folder(tmp_path, ("A", "B", "C")).cases
    assert case.volumes == {"A": 0, "B": 1, "C": 2}


def test_a_dataset_of_a_layout_is_no_folder_of_files(tmp_path):
    volume(tmp_path / "elsewhere.nii.gz")
    (tmp_path / "cases.tsv").write_text("case_id\timage:T2\nmine\telsewhere.nii.gz\n")
    assert loose_files.of_folder(tmp_path, TWO) is None


@pytest.mark.parametrize(
    ("names", "channels", "message"),
    [
        ({"p_0000": 3}, TWO, r"'p' has no file p_0001 \(channel 'FLAIR'\) in .*0000 T1, 0001 FLAIR"),
        ({"p_0000": 3, "p_0001": 3, "p_0002": 3}, TWO, r"p_0002.nii.gz is a channel that the model does not have"),
        ({"p": 3}, TWO, r"holds 1 volume\(s\), but the model has 2 channel\(s\) \(T1, FLAIR\).*p_0000, p_0001"),
        ({"p": (3, 2)}, ("T1",), r"holds 2 volume\(s\), but the model has 1 channel"),
        ({"p": 3, "p_0000": 3}, ("T1",), r"p.nii.gz and .*p_0000.nii.gz are both of the case 'p'"),
        ({"p_0000": 3, "p_0001": 4}, TWO, r"different shapes .* \(3, 5, 4\) and \(4, 5, 4\); resample"),
        ({"P": 3, "p": 3}, ("T1",), "differ only in upper and lower case"),
        ({"p_seg": 3}, TWO, r"no image .* beside 1 masks or predictions"),
    ],
)
def test_what_is_refused(tmp_path, names, channels, message):
    for name, depth in names.items():
        volume(tmp_path / f"{name}.nii.gz", (4, 5, *(depth if isinstance(depth, tuple) else (depth,))))
    with pytest.raises(DataError, match=message):
        loose_files.of_folder(tmp_path, channels)


def test_a_list_takes_what_it_names(tmp_path):
    for name in ("a.nii.gz", "a.nii", "x_seg.nii.gz"):
        volume(tmp_path / name)
    (case,) = loose_files.of_files([tmp_path / "x_seg.nii.gz"], ["T1"], tmp_path).cases
    assert case.case_id == "x_seg"
    for paths, message in (
        (["a.nii.gz", "a.nii"], "both of the case 'a'"),
        (["b.nii.gz"], "b.nii.gz .an image to predict. does not exist; the nearest name"),
        (["a.txt"], "a.txt .* does not exist"),
    ):
        with pytest.raises(DataError, match=message):
            loose_files.of_files([tmp_path / name for name in paths], ["T1"], tmp_path)
    (tmp_path / "scan.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match="scan.jpg is no image that can be read"):
        loose_files.of_files([tmp_path / "scan.jpg"], ["T1"], tmp_path)


def test_a_damaged_header_stops_no_other_case(tmp_path):
    for name in ("good_0000", "good_0001", "bad_0000"):
        volume(tmp_path / f"{name}.nii.gz")
    for name in ("bad_0001", "broken"):
        (tmp_path / f"{name}.nii.gz").write_bytes(b"nothing")
    assert len(loose_files.of_folder(tmp_path, TWO).cases) == 3


@pytest.mark.parametrize("axis", nifti.WORKING_AXES)
def test_a_reference_is_the_volume_without_its_voxels(tmp_path, axis):
    path: pathlib.Path = tmp_path / "a.nii.gz"
    volume(path)
    reference, whole = nifti.read_reference(path, axis), nifti.read(path, slice_axis=axis)
    assert reference.voxels.shape == whole.voxels.shape and reference.spacing_mm == whole.spacing_mm
    np.testing.assert_array_equal(reference.affine, whole.affine)
    np.testing.assert_array_equal(reference.orientation, whole.orientation)
    assert not reference.voxels.any() and set(reference.voxels.strides) == {0}
