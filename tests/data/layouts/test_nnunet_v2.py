"""nnU-Net v2 raw datasets, and what is wrong with them."""

import shutil
from pathlib import Path

import pytest

from calsegx import configs
from calsegx.data import cases, layouts
from calsegx.interfaces import DataError
from tests.data.layouts.trees import nnunet_v2, touch


def test_cases_and_channels(tmp_path):
    nnunet_v2(tmp_path)
    touch(tmp_path / "imagesTr" / ".DS_Store", tmp_path / "imagesTs" / "c_0000.nii.gz")
    touch(tmp_path / "imagesTs" / "c_0001.nii.gz")
    dataset = layouts.detect(tmp_path)
    assert dataset.channels == ("T1", "FLAIR")
    assert [(c.case_id, c.split, c.label is None) for c in dataset.cases] == [
        ("a", "", False),
        ("b", "", False),
        ("c", "test", True),
    ]
    assert dataset.cases[1].images["FLAIR"] == tmp_path / "imagesTr" / "b_0001.nii.gz"
    touch(tmp_path / "labelsTs" / "c.nii.gz")
    assert layouts.detect(tmp_path).cases[2].label == tmp_path / "labelsTs" / "c.nii.gz"


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("imagesTr/b_0001.nii.gz", r"Case 'b' has no file .*b_0001.nii.gz \(channel 'FLAIR'\)"),
        ("labelsTr/b.nii.gz", r"Case 'b' has no label .*b.nii.gz"),
        ("imagesTr/b_000?.nii.gz", r"labelsTr.b.nii.gz has no image b_0000.nii.gz"),
    ],
)
def test_missing_files(tmp_path, removed, message):
    nnunet_v2(tmp_path)
    for path in tmp_path.glob(removed):
        path.unlink()
    with pytest.raises(DataError, match=message):
        layouts.detect(tmp_path)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ("imagesTr/a_0002.nii.gz", "is a channel that dataset.json does not name"),
        ("imagesTr/a.nii.gz", "is not named <case>_<4 digits>"),
        ("imagesTr/a_0000.nii", "does not end in .nii.gz"),
        ("labelsTs/z.nii.gz", "has no image z_0000.nii.gz"),
    ],
)
def test_surplus_files(tmp_path, added, message):
    touch(nnunet_v2(tmp_path) / added)
    with pytest.raises(DataError, match=message):
        layouts.detect(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": {"background": 0, "a": True}}, "label 'a' is True; expected name: id"),
        ({"labels": {"background": 0, "whole": []}}, r"label 'whole' is \[\]; expected .* a list"),
        ({"labels": {"background": 0, "a": [1, 2], "b": [2, 1]}}, "same id"),
        ({"labels": {"background": 0, "all": [0, 1]}}, "must be 'background', and only that"),
        ({"labels": {"background": [0, 1], "a": 2}}, "must be 'background', and only that"),
        ({"labels": {"background": 0, "a": [1, 2, 3], "a_1": 3}}, "get the same names; rename a region"),
        ({"labels": {"0": "background", "1": "tumour"}}, "label '0' is 'background'; expected name: id"),
        ({"labels": None}, "labels are missing"),
        ({"labels": {"background": 0, "tumour": 1, "ignore": 2}}, "'ignore'"),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, "same id"),
        ({"labels": {"other": 0, "a": 1}}, "must be 'background'"),
        ({"channel_names": {"0": "T1", "2": "T2"}}, "channel_names"),
        ({"channel_names": ["T1"]}, "channel_names"),
        ({"file_ending": ".png"}, "file_ending is '.png'"),
        ({"numTraining": 7}, "numTraining is 7, imagesTr holds 2"),
        ({"dataset": []}, "dataset is a list; expected case"),
        ({"dataset": {"a": "a.nii.gz"}}, "case 'a' of dataset is 'a.nii.gz'; expected"),
        ({"dataset": {"a": {"images": ["t1.nii.gz", "f.nii.gz"]}}}, "case 'a' of dataset is .*; expected"),
        ({"dataset": {"a": {"images": ["t1.nii.gz"], "label": "l.nii.gz"}}}, "has 1 images; .* channels T1, FLAIR"),
        (
            {"dataset": {"a": {"images": ["t.nii.gz", "f.nii.gz"], "label": "l.nii.gz"}}},
            "2, 'dataset' lists 1 cases",
        ),
    ],
)
def test_bad_descriptions(tmp_path, changes, message):
    with pytest.raises(DataError, match=message) as caught:
        layouts.detect(nnunet_v2(tmp_path, **changes))
    assert "dataset.json" in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_malformed_json(tmp_path, text):
    nnunet_v2(tmp_path)
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(DataError, match=r"dataset.json"):
        layouts.detect(tmp_path)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (  # BraTS: every id is the innermost region's own
            {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3},
            {"background": 0, "whole": 1, "core": 2, "enhancing": 3},
        ),
        (  # two ids of one region
            {"background": [0], "liver": [1, 2, 5], "vessel": [5]},
            {"background": 0, "liver_1": 1, "liver_2": 2, "vessel": 5},
        ),
        ({"a": [4, 7], "b": [4, 7, 9], "c": 4}, {"c": 4, "a": 7, "b": 9}),
    ],
)
def test_regions_become_exclusive_labels(tmp_path, labels, expected):
    dataset = layouts.detect(nnunet_v2(tmp_path, labels=labels, regions_class_order=[1, 2, 3]))
    assert dataset.labels == expected


def test_a_list_of_files(tmp_path):
    listed = {
        "s\u00e4 2": {"images": ["x/t1.nii.gz", "../x/fl air.nii.gz"], "label": "y/s.nii.gz"},
        "s1": {"images": ["/z/t1.nii.gz", "/z/flair.nii.gz"], "label": "/z/s.nii.gz"},
    }
    nnunet_v2(tmp_path, dataset=listed)
    touch(tmp_path / "imagesTs" / "c_0000.nii.gz", tmp_path / "imagesTs" / "c_0001.nii.gz")
    first, second, test = layouts.detect(tmp_path).cases  # imagesTr is not looked at
    assert (first.case_id, first.split) == ("s1", "")
    assert first.images == {"T1": Path("/z/t1.nii.gz"), "FLAIR": Path("/z/flair.nii.gz")}
    assert second.images["FLAIR"] == tmp_path / "../x/fl air.nii.gz"
    assert second.label == tmp_path / "y/s.nii.gz"
    assert (test.case_id, test.split) == ("c", "test")


def test_a_list_of_files_needs_no_folders(tmp_path):
    listed = {"a": {"images": ["t1.nii.gz", "f.nii.gz"], "label": "l.nii.gz"}}
    nnunet_v2(tmp_path, cases=("a",), dataset=listed)
    for folder in ("imagesTr", "labelsTr"):
        shutil.rmtree(tmp_path / folder)
    assert [case.case_id for case in layouts.detect(tmp_path).cases] == ["a"]


def test_names_with_spaces_and_beyond_ascii(tmp_path):
    names = ("Z\u00fcrich 01", "\u60a3\u8005_2")
    nnunet_v2(tmp_path, cases=names)
    loaded = cases.load(configs.DataConfig(root=str(tmp_path)))
    assert {case.case_id for case in loaded.cases} == set(names)
    assert all(path.is_file() for case in loaded.cases for path in (*case.images.values(), case.label))


def test_a_case_in_training_and_test(tmp_path):
    nnunet_v2(tmp_path)
    touch(*(tmp_path / "imagesTs" / f"a_000{number}.nii.gz" for number in range(2)))
    with pytest.raises(DataError, match="Cases 'a' and 'a' of .* stand there twice"):
        cases.load(configs.DataConfig(root=str(tmp_path)))
