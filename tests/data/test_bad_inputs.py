"""Every numbered way in which data goes wrong, and where it is shown what happens then.

1-10 files, 11-21 geometry, 22-31 values, 32-35 splits and domains, 36-41 prompts.  Each has one sentence that names the
file and the remedy, exit code 3, and leaves nothing half-written.
"""

import errno
import gzip
import json
import pathlib
import re

import nibabel
import numpy as np
import pytest

from calsegx.data import nifti
from calsegx.interfaces import DataError
from launch import verify
from tests.data.layouts.trees import nnunet_v2
from tests.data.test_verify import AFFINE, SHAPE, change, change_header, image, label, write, write_dataset

ROOT = pathlib.Path(__file__).parent.parent.parent
HERE = "tests/data/test_bad_inputs.py::"
NIFTI, LAYOUTS, CASES = "tests/data/test_nifti.py::", "tests/data/layouts/", "tests/data/test_cases.py::"
FOLDS, SPLIT = "tests/data/test_folds.py::", "tests/launch/test_split.py::"
VERIFY, CLICKS = "tests/data/test_verify.py::", "tests/data/test_clicks.py::"
PROTOCOL = "tests/launch/test_every_protocol.py::"
MAIN_JOB, CALIBRATOR = "tests/launch/test_main_job.py::", "tests/launch/test_every_calibrator.py::"
TABLE = HERE + "test_in_verification"  # the rows of ROWS below

PROOFS = {
    1: (TABLE, HERE + "test_a_mistyped_dataset_folder", NIFTI + "test_missing_file_names_the_nearest"),
    2: (TABLE, NIFTI + "test_bad_content"),
    3: (TABLE, NIFTI + "test_truncated_files"),
    4: (TABLE, NIFTI + "test_broken_gzip_trailer"),
    5: (TABLE, NIFTI + "test_bad_content"),
    6: (TABLE, NIFTI + "test_bad_content"),
    7: (HERE + "test_files_that_cannot_be_read", VERIFY + "test_a_folder_that_may_not_be_entered"),
    8: (TABLE, HERE + "test_the_same_case_in_two_formats_of_nnunet"),
    9: (HERE + "test_unusual_paths",),
    10: (TABLE, CASES + "test_load_checks"),
    11: (TABLE, NIFTI + "test_same_grid"),
    12: (TABLE, VERIFY + "test_geometry_in_three_levels", NIFTI + "test_same_grid"),
    13: (TABLE, VERIFY + "test_geometry_in_three_levels"),
    14: (TABLE, NIFTI + "test_bad_volumes"),
    15: (TABLE, NIFTI + "test_bad_volumes"),
    16: (TABLE, NIFTI + "test_bad_volumes"),
    17: (VERIFY + "test_axes", "tests/data/test_round_trips.py::test_round_trip_and_working_orientation"),
    18: (TABLE, NIFTI + "test_flat_files_and_trailing_axes"),
    19: (VERIFY + "test_one_slice", NIFTI + "test_flat_files_and_trailing_axes"),
    20: (TABLE, VERIFY + "test_units", NIFTI + "test_units_become_millimetres"),
    21: (VERIFY + "test_thick_slices",),
    22: (TABLE, NIFTI + "test_bad_volumes"),
    23: (TABLE,),
    24: (TABLE, NIFTI + "test_scaled_labels_are_integers_and_probability_maps_are_not"),
    25: (TABLE, VERIFY + "test_labels", VERIFY + "test_labels_without_names", CASES + "test_unknown_ids"),
    26: (TABLE, VERIFY + "test_labels", MAIN_JOB + "test_a_case_without_foreground_is_all_background"),
    27: (TABLE, HERE + "test_a_missing_modality_of_nnunet", CASES + "test_channels"),
    28: (TABLE, VERIFY + "test_values_of_images", NIFTI + "test_bad_volumes"),
    29: (
        HERE + "test_descriptions",
        LAYOUTS + "test_nnunet_v2.py::test_bad_descriptions",
        LAYOUTS + "test_table.py::test_full_table",
    ),
    30: (TABLE, VERIFY + "test_a_label_given_as_an_image", CASES + "test_load_checks"),
    31: (TABLE,),
    32: (
        *(VERIFY + "test_a_subject_in_two_splits", VERIFY + "test_duplicates", CASES + "test_leaks_are_refused"),
        *(FOLDS + "test_leaks_are_refused", SPLIT + "test_a_copy_under_another_subject_is_refused"),
    ),
    33: (VERIFY + "test_domains", FOLDS + "test_small_or_incomplete_datasets_are_refused"),
    34: (CALIBRATOR + "test_what_is_tested_is_not_fitted_on", FOLDS + "test_leaks_are_refused"),
    35: (VERIFY + "test_a_split_without_foreground", FOLDS + "test_a_part_without_a_positive_case_is_refused"),
    36: (CLICKS + "test_clicks_that_do_not_fit", CLICKS + "test_json_boxes_that_do_not_fit"),
    37: (
        *(CLICKS + "test_clicks_that_do_not_fit", CLICKS + "test_bad_clicks_files", CLICKS + "test_bad_json"),
        *(CLICKS + "test_bad_csv", PROTOCOL + "test_a_prompt_that_does_not_fit_leaves_no_mask"),
    ),
    38: (CLICKS + "test_units_that_were_mistaken_for_each_other_are_told_apart",),
    39: (CLICKS + "test_check_clicks", PROTOCOL + "test_clicks_in_every_format_give_the_same_masks"),
    40: (
        "tests/data/test_prompts.py::test_centroid_of_a_ring_snaps_into_it",
        "tests/data/test_protocols.py::test_points_lie_where_their_label_says",
    ),
    41: (
        *(CLICKS + "test_check_clicks", CLICKS + "test_a_model_without_prompts_takes_no_clicks"),
        *(PROTOCOL + "test_a_prompt_that_does_not_fit_leaves_no_mask", MAIN_JOB + "test_another_protocol_is_refused"),
    ),
}

T1, T2, SEG = "s1_t1.nii.gz", "s1_t2.nii.gz", "s1_seg.nii.gz"


def content(edit):
    """What changes a file's bytes."""
    return lambda path: path.write_bytes(edit(path.read_bytes()))


def volume(data, affine=AFFINE, **options):
    """What puts another volume in a file's place."""
    return lambda path: write(path.parent, path.name, data, affine, **options)


def moved(millimetres):
    affine = AFFINE.copy()
    affine[0, 3] += millimetres
    return affine


def holding(value):
    data = image(1)
    data[2, 3, 4] = value
    return data


def flip(old):
    """A wrong checksum in the gzip trailer."""
    return old[:-6] + bytes([old[-6] ^ 1]) + old[-5:]


def qform(affine):
    return lambda header: header.set_qform(affine, 1)


RGB = [("R", "u1"), ("G", "u1"), ("B", "u1")]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"

# number, what is done to which file, level, what the sentence says of it; no level: it is in order
ROWS = [
    (1, pathlib.Path.unlink, T2, "error", r"does not exist; the nearest name"),
    (2, content(lambda old: b""), T2, "error", r"is empty \(0 bytes\); copy or download it again"),
    (3, content(lambda old: old[:-40]), T2, "error", r"truncated or damaged: .*; copy or download it again"),
    (4, content(flip), SEG, "error", r"truncated or damaged: .*CRC.*; copy or download it again"),
    (5, content(gzip.decompress), T1, "error", r"is not gzip-compressed, against its name; .*rename it to end in .nii"),
    (6, content(lambda old: POINTER), T1, "error", r"is a pointer, not the image: .*; run 'git lfs pull'"),
    (
        8,
        lambda path: write(path.parent, "s1_t1.nii", image(1)),
        T1,
        "warning",
        r"s1_t1.nii stands beside it; remove one",
    ),
    (10, lambda folder: change(folder, "s1", case_id="S0"), "", "error", r"'s0' and 'S0' .* lower case; rename one"),
    (11, volume(label(1, 2)[:-1]), SEG, "error", r"different shapes .*; resample s1_seg.nii.gz to the grid of s1_t1"),
    (12, volume(label(2, 1), moved(0.5)), SEG, "error", r"up to 0.5 mm apart: .*; resample .*, or correct the wrong"),
    (12, volume(label(2, 1), moved(0.004)), SEG, "note", r"up to 0.004 mm apart .*within the tolerance .* is used"),
    (13, volume(image(11), moved(2)), T2, "error", r"up to 2 mm apart: .*; resample s1_t2.nii.gz"),
    (14, volume(image(1), codes=(0, 0)), T1, "error", r"has no affine .*; set one of them"),
    (
        15,
        volume(image(1), header_edit=qform(np.eye(4))),
        T1,
        "error",
        r"sform LPS, qform RAS; set the code of the wrong",
    ),
    (
        15,
        volume(image(1), header_edit=qform(moved(5))),
        T1,
        "warning",
        r"up to 5 mm apart .*; set the code of the wrong",
    ),
    (16, volume(image(1), header_edit=change_header(srow_y=0)), T1, "error", r"singular\); correct its header"),
    (16, volume(image(1), header_edit=change_header(pixdim=-1)), T1, "error", r"expected positive .*: correct pixdim"),
    (
        18,
        volume(np.stack([image(1)] * 2, -1)),
        T1,
        "error",
        r"holds 2 volumes .* or split it into one file per channel",
    ),
    (18, volume(image(1)[..., None]), T1, "", ""),
    (20, volume(image(1), header_edit=change_header(xyzt_units=0)), T1, "note", r"millimetres: set xyzt_units"),
    (22, volume(holding(np.nan)), T1, "error", r"1 NaN or infinite voxels .*; replace them"),
    (22, volume(holding(np.inf)), T1, "error", r"1 NaN or infinite voxels .*; replace them"),
    (
        23,
        volume(np.full(SHAPE, 3, np.int16)),
        T1,
        "error",
        r"is constant: every voxel is 3; export it again or leave it",
    ),
    (24, volume(label(2, 1) * 1.00000002), SEG, "", ""),
    (
        25,
        volume(label(1, 2, 4)),
        SEG,
        "error",
        r"holds the label ids 4; expected only 0, 1, 2: correct the file, or name",
    ),
    (26, volume(label()), SEG, "warning", r"is empty: no voxel has a label; check"),
    (26, volume(label(1)), SEG, "warning", r"has no voxel of rim; check"),
    (27, volume(image(1)), T2, "warning", r"same voxels as .*s1_t1.nii.gz .*; check that no modality is missing"),
    (28, volume(np.zeros(SHAPE, RGB)), T1, "error", r"colour or complex\); expected one real number per voxel"),
    (28, volume(np.ones(SHAPE, np.complex64)), T1, "error", r"colour or complex\); expected one real number per voxel"),
    (30, volume(np.roll(label(1, 2), 1, axis=1)), T1, "error", r"same voxels as .*s1_seg.nii.gz .*: export it again"),
    (31, volume(image(1) / 900), SEG, "error", r"is not a label file: .* so threshold a probability map first"),
]


def snapshot(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def attempt(folder, output, error):
    """Verification of the folder; its one result is whole, its exit code is that of invalid data or none."""
    before = snapshot(folder)
    if error:
        with pytest.raises(DataError, match=re.escape(str(folder))) as caught:
            verify.verify_dataset(folder, output=output)
        assert caught.value.exit_code == 3 and "\n" not in str(caught.value)
    else:
        verify.verify_dataset(folder, output=output)
    assert snapshot(folder) == before
    assert [path.name for path in output.iterdir()] == ["verify.json"]
    return json.loads((output / "verify.json").read_text())["findings"]


@pytest.mark.parametrize(("number", "damage", "name", "level", "said"), ROWS, ids=[f"{row[0]:02d}" for row in ROWS])
def test_in_verification(tmp_path, number, damage, name, level, said):
    folder = write_dataset(tmp_path / "data")
    damage(folder / name)
    findings = attempt(folder, tmp_path / "out", level == "error")
    if not level:
        assert findings == []
        return
    fitting = [f for f in findings if f["level"] == level and re.search(said, f["message"])]
    assert len(fitting) == 1, findings
    assert name in fitting[0]["message"] and fitting[0]["message"].endswith(".") and "\n" not in fitting[0]["message"]
    assert name in fitting[0]["file"] and fitting[0]["case_id"] in ("s1", "S0")
    assert all(f["case_id"] in ("s1", "S0", "") for f in findings)


def test_a_mistyped_dataset_folder(tmp_path):
    write_dataset(tmp_path / "Dataset001_Phantom")
    with pytest.raises(
        DataError, match=r"Dataset01_Phantom does not exist.*did you mean 'Dataset001_Phantom'"
    ) as caught:
        verify.verify_dataset(tmp_path / "Dataset01_Phantom", output=tmp_path / "out")
    assert caught.value.exit_code == 3 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])  # permission; a drive that vanished
def test_files_that_cannot_be_read(tmp_path, monkeypatch, number):
    folder = write_dataset(tmp_path / "data")
    read = pathlib.Path.read_bytes

    def refuse(path):
        if path.name == T2:
            raise OSError(number, "refused", str(path))
        return read(path)

    monkeypatch.setattr(pathlib.Path, "read_bytes", refuse)
    (finding,) = attempt(folder, tmp_path / "out", error=True)
    assert (finding["level"], finding["case_id"]) == ("error", "s1")
    assert f"{T2} cannot be read (refused); check permissions and the drive." in finding["message"]


def test_unusual_paths(tmp_path):
    """Spaces, other alphabets and more than 260 characters: nothing is wrong with them."""
    folder = write_dataset(tmp_path / "Ärztliche Aufnahmen 脳" / ("long name " * 12) / ("x" * 150) / "data")
    (folder / T1).rename(folder / "Übung 1 (t1).nii.gz")
    change(folder, "s1", **{"image:T1": "Übung 1 (t1).nii.gz", "case_id": "Übung 1", "subject_id": "Übung"})
    assert len(str(folder)) > 260
    assert attempt(folder, tmp_path / "out ü", error=False) == []
    volume = nifti.read(folder / "Übung 1 (t1).nii.gz")
    nifti.write(folder / "Übung 1.nii.gz", volume.voxels, volume, np.float32)
    np.testing.assert_array_equal(nibabel.load(folder / "Übung 1.nii.gz").dataobj, image(1))


def test_the_same_case_in_two_formats_of_nnunet(tmp_path):
    (tmp_path / "data").mkdir()
    (nnunet_v2(tmp_path / "data") / "imagesTr" / "a_0000.nii").write_bytes(b"x")
    refused_as_a_whole(tmp_path, r"a_0000.nii does not end in .nii.gz, .*; convert or move it")


def test_a_missing_modality_of_nnunet(tmp_path):
    (tmp_path / "data").mkdir()
    (nnunet_v2(tmp_path / "data") / "imagesTr" / "b_0001.nii.gz").unlink()
    refused_as_a_whole(tmp_path, r"Case 'b' has no file .*b_0001.nii.gz \(channel 'FLAIR'\); add it or remove the case")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", r"dataset.json is not readable JSON .*; correct it"),
        ("[1]", r"dataset.json holds a list; expected a JSON object"),
        ('\ufeff{"channel_names": {"0": "T1"}, "labels": {"background": 0}}', r"dataset.json: file_ending is None"),
        (
            '{"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0}, "file_ending": ".nii.gz", '
            '"numTraining": 7}',
            r"dataset.json: numTraining is 7, imagesTr holds 2 cases; add the missing files or correct the number",
        ),
    ],
    ids=["malformed", "no object", "BOM", "numTraining"],
)
def test_descriptions(tmp_path, text, said):
    (tmp_path / "data").mkdir()
    (nnunet_v2(tmp_path / "data") / "dataset.json").write_text(text, encoding="utf-8")
    refused_as_a_whole(tmp_path, said)


def refused_as_a_whole(tmp_path, said):
    """The index cannot be read: one sentence, exit code 3, and nothing is written."""
    with pytest.raises(DataError, match=said) as caught:
        verify.verify_dataset(tmp_path / "data", output=tmp_path / "out")
    assert caught.value.exit_code == 3 and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_every_number_is_proved_by_tests_that_exist():
    assert sorted(PROOFS) == list(range(1, 42))
    for number, tests in PROOFS.items():
        assert tests, number
        for test in tests:
            file, _, name = test.partition("::")
            assert f"\ndef {name}(" in (ROOT / file).read_text(), f"{number}: {test}"
    assert {number for number, tests in PROOFS.items() if TABLE in tests} == {row[0] for row in ROWS}
