"""Hand-written tables, and what is wrong with them."""

import pytest

from calsegx.data import layouts
from calsegx.interfaces import DataError
from tests.data.layouts.trees import nnunet_v2, write_table


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


def test_minimal_table_wins_over_nnunet_v2(tmp_path):
    nnunet_v2(tmp_path)
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
        ("case_id image:T1 volume:T2\na b 0\n", "line 1: the column volume:T2 has no column image:T2"),
        ("case_id image:T1 volume:T1\na b -1\n", "line 2, column volume:T1: '-1'; expected 0, 1, 2"),
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


def test_volumes_of_a_file(tmp_path):
    write_table(
        tmp_path,
        "case_id image:T1 volume:T1 image:T2 volume:T2 image:FLAIR\n"
        "a x.nii 0 x.nii 3 f.nii\n"
        "b t1.nii  t2.nii  f2.nii\n",
    )
    first, second = layouts.detect(tmp_path).cases
    assert first.volumes == {"T1": 0, "T2": 3}
    assert first.images["T1"] == first.images["T2"] == tmp_path / "x.nii"
    assert second.volumes == {}
