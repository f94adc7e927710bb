"""Dataset folders: hand-written tables and nnU-Net v2, and what is wrong with them."""

import json

import pytest

from calsegx.data import layouts
from calsegx.interfaces import DataError, UsageError


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def write_table(root, text, encoding="utf-8"):
    (root / "cases.tsv").write_text(text.replace(" ", "\t"), encoding=encoding)


def nnunet(root, cases=("a", "b"), channels=("T1", "FLAIR"), **changes):
    description = {
        "channel_names": {str(i): name for i, name in enumerate(channels)},
        "labels": {"background": 0, "tumour": 1},
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
        **changes,
    }
    (root / "dataset.json").write_text(json.dumps(description))
    for case in cases:
        touch(*(root / "imagesTr" / f"{case}_{i:04d}.nii.gz" for i in range(len(channels))))
        touch(root / "labelsTr" / f"{case}.nii.gz")
    return root


def test_full_table(tmp_path):
    (tmp_path / "dataset.json").write_text('\ufeff{"labels": {"background": 0, "core": 4}}', encoding="utf-8")
    write_table(
        tmp_path,
        "case_id subject_id image:T1 image:T2 label split centre scanner field_strength age\n"
        "s1a s1 x/s1_t1.nii.gz x/s1_t2.nii.gz y/s1.nii.gz test Basel GE 3.0 44\n"
        "\n"
        "s2a s2 x/s2_t1.nii.gz x/s2_t2.nii.gz\n",
        "utf-8-sig",
    )
    dataset = layouts.detect(tmp_path)
    assert dataset.channels == ("T1", "T2")
    assert dataset.labels == {"background": 0, "core": 4}
    first, second = dataset.cases
    assert (first.case_id, first.subject_id, first.split) == ("s1a", "s1", "test")
    assert (first.centre, first.scanner, first.field_strength) == ("Basel", "GE", "3.0")
    assert first.images == {"T1": tmp_path / "x/s1_t1.nii.gz", "T2": tmp_path / "x/s1_t2.nii.gz"}
    assert first.label == tmp_path / "y/s1.nii.gz"
    assert (second.label, second.split, second.scanner) == (None, "", "")


def test_minimal_table_wins_over_nnunet(tmp_path):
    nnunet(tmp_path)
    write_table(tmp_path, "case_id image:T1\nonly imagesTr/a_0000.nii.gz\n")
    dataset = layouts.detect(tmp_path)
    assert [case.case_id for case in dataset.cases] == ["only"]
    assert dataset.cases[0].subject_id == "only"
    assert len(layouts.detect(tmp_path, "nnunet_v2").cases) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("case_id image:T1\n", "no cases"),
        ("case_id,image:T1\na,b\n", "line 1: no tab"),
        ("case image:T1\na b\n", "line 1: the column case_id is missing"),
        ("case_id label\na b\n", r"line 1: expected a column image:<channel>"),
        ("case_id image:T1 center\na b c\n", "line 1: unknown column 'center'; did you mean 'centre'"),
        ("case_id image:T1 image:T1\na b c\n", "line 1: the column 'image:T1' stands there twice"),
        ("case_id image:T1\na b c\n", "line 2: 3 fields"),
        ("case_id image:T1 label\na b c\nb\n", "line 3, column image:T1: empty"),
        ("case_id image:T1 split\na b training\n", "line 2, column split: 'training'"),
        ("case_id image:T1\na b\n\na c\n", "line 4, column case_id: 'a' stands in line 2 already"),
    ],
)
def test_bad_tables(tmp_path, text, message):
    write_table(tmp_path, text)
    with pytest.raises(DataError, match=message) as caught:
        layouts.detect(tmp_path)
    assert "cases.tsv" in str(caught.value)


def test_table_in_another_encoding(tmp_path):
    write_table(tmp_path, "case_id image:T1\nz\u00fcrich b\n", "latin-1")
    with pytest.raises(DataError, match=r"cases.tsv cannot be read as tab-separated UTF-8"):
        layouts.detect(tmp_path)


def test_nnunet(tmp_path):
    nnunet(tmp_path)
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
def test_nnunet_missing_files(tmp_path, removed, message):
    nnunet(tmp_path)
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
def test_nnunet_surplus_files(tmp_path, added, message):
    touch(nnunet(tmp_path) / added)
    with pytest.raises(DataError, match=message):
        layouts.detect(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": {"background": 0, "whole": [1, 2]}}, r"region \[1, 2\].*classes=whole=1\+2"),
        ({"labels": {"0": "background", "1": "tumour"}}, "label '0' is 'background'; expected name: id"),
        ({"labels": None}, "labels are missing"),
        ({"labels": {"background": 0, "tumour": 1, "ignore": 2}}, "'ignore'"),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, "same id"),
        ({"labels": {"other": 0, "a": 1}}, "must be 'background'"),
        ({"channel_names": {"0": "T1", "2": "T2"}}, "channel_names"),
        ({"channel_names": ["T1"]}, "channel_names"),
        ({"file_ending": ".png"}, "file_ending is '.png'"),
        ({"numTraining": 7}, "numTraining is 7, imagesTr holds 2"),
        ({"dataset": {}}, "write a cases.tsv"),
    ],
)
def test_bad_descriptions(tmp_path, changes, message):
    with pytest.raises(DataError, match=message) as caught:
        layouts.detect(nnunet(tmp_path, **changes))
    assert "dataset.json" in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_malformed_json(tmp_path, text):
    nnunet(tmp_path)
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(DataError, match=r"dataset.json"):
        layouts.detect(tmp_path)


def test_folders_of_no_layout(tmp_path):
    with pytest.raises(DataError, match="is empty"):
        layouts.detect(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        layouts.detect(tmp_path / "nowhere")
    touch(tmp_path / "scan.nii.gz")
    with pytest.raises(DataError, match=r"table \(A tab-separated cases.tsv.*nnunet_v2 \(A dataset.json") as caught:
        layouts.detect(tmp_path)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(DataError, match="is not of the layout table"):
        layouts.detect(tmp_path, "table")
    with pytest.raises(UsageError, match="nnunet_v2"):
        layouts.detect(tmp_path, "nnunet")


def test_nnunet_v1_is_not_taken_for_v2(tmp_path):
    nnunet(tmp_path)
    (tmp_path / "dataset.json").write_text('{"modality": {"0": "T1"}, "labels": {"0": "background"}}')
    with pytest.raises(DataError, match="no known layout"):
        layouts.detect(tmp_path)
