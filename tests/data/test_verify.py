"""Verification: each check finds what it is for, on small files, and nothing on a dataset that is in order."""

import dataclasses
import functools
import json

import nibabel
import numpy as np
import pytest

from calsegx.data import layouts, verify
from tests.data.test_nifti import make

AFFINE = np.diag([-1.0, -1.0, 1.5, 1.0])
SHAPE = (6, 7, 8)
HEADER = ("case_id", "subject_id", "image:T1", "image:T2", "label", "split", "scanner")


def image(seed):
    return np.random.default_rng(seed).uniform(10, 900, SHAPE).astype(np.float32)


def label(*ids):
    data = np.zeros(SHAPE, np.uint8)
    for position, value in enumerate(ids):
        data[1 + position, 2:5, 2:5] = value
    return data


def write(folder, name, data, affine=AFFINE, **options):
    return make(folder / name, data, affine, **options)


def write_dataset(folder):
    """Four subjects of two scanners, two channels, in order in every respect."""
    folder.mkdir(parents=True)
    rows = [HEADER]
    for number in range(4):
        name = f"s{number}"
        write(folder, f"{name}_t1.nii.gz", image(number))
        write(folder, f"{name}_t2.nii.gz", image(10 + number))
        write(folder, f"{name}_seg.nii.gz", np.roll(label(1, 2), number, axis=1))
        files = (f"{name}_t1.nii.gz", f"{name}_t2.nii.gz", f"{name}_seg.nii.gz")
        rows.append((name, name, *files, "test" if number == 3 else "train", "AABB"[number]))
    write_table(folder, rows)
    (folder / "dataset.json").write_text('{"labels": {"background": 0, "core": 1, "rim": 2}}')
    return folder


@pytest.fixture
def root(tmp_path):
    return write_dataset(tmp_path / "data")


def write_table(folder, rows):
    (folder / "cases.tsv").write_text("\n".join("\t".join(row) for row in rows) + "\n")


def change(folder, name, **cells):
    """Other cells in the row of one case."""
    rows = [line.split("\t") for line in (folder / "cases.tsv").read_text().splitlines()]
    for row in rows[1:]:
        if row[0] == name:
            for column, value in cells.items():
                row[rows[0].index(column)] = value
    write_table(folder, rows)


def found(folder, level=None):
    """(level, check, case) of all findings."""
    report = verify.verify(layouts.detect(folder), workers=2)
    return [(f.level, f.check, f.case_id) for f in report.findings if level in (None, f.level)]


def sentence(folder, check):
    """The only finding of a check."""
    (message,) = [f.message for f in verify.verify(layouts.detect(folder)).findings if f.check == check]
    return message


def test_a_dataset_in_order(root):
    seen = []
    report = verify.verify(layouts.detect(root), done=lambda count, name: seen.append((count, name)))
    assert report.findings == ()
    assert seen == [(1, "s0"), (2, "s1"), (3, "s2"), (4, "s3")]
    content = json.loads(json.dumps(report.to_json()))
    assert content["valid"] and content["counts"] == {"error": 0, "warning": 0, "note": 0}
    files = content["cases"]["s0"]["files"]
    assert list(files) == ["image:T1", "image:T2", "label"]
    t1, seg = files["image:T1"], files["label"]
    assert (t1["shape"], t1["spacing_mm"], t1["orientation"]) == ([8, 7, 6], [1.5, 1.0, 1.0], "LPS")
    assert seg["ids"] == {"0": pytest.approx(0.477), "1": pytest.approx(0.0135), "2": pytest.approx(0.0135)}


def test_the_hash_is_of_the_voxels_not_of_the_file(root, tmp_path):
    report = verify.verify(layouts.detect(root))
    before = report.examined[0].files["image:T1"].sha256
    flipped = AFFINE @ np.array([[-1, 0, 0, SHAPE[0] - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    write(root, "s0_t1.nii.gz", image(0)[::-1].astype(np.float64), flipped)
    after = verify.verify(layouts.detect(root)).examined[0].files["image:T1"]
    assert (after.sha256, after.orientation) == (before, "RPS")


def test_every_unreadable_file_is_listed_and_stops_no_other(root):
    (root / "s0_t1.nii.gz").write_bytes(b"")
    (root / "s1_seg.nii.gz").unlink()
    content = (root / "s2_t2.nii.gz").read_bytes()
    (root / "s2_t2.nii.gz").write_bytes(content[:-30])
    assert found(root, "error") == [("error", "file", f"s{number}") for number in range(3)]
    report = verify.verify(layouts.detect(root))
    assert list(report.failing()) == ["s0", "s1", "s2"] and not report.dataset_fails()
    assert list(report.examined[0].files) == ["image:T2", "label"]


def test_a_folder_that_may_not_be_entered(root, monkeypatch):
    def refuse(path, slice_axis):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("calsegx.data.nifti.read_labels", refuse)
    assert found(root, "error") == [("error", "file", f"s{number}") for number in range(4)]


@pytest.mark.parametrize(
    ("shift", "expected"), [(1e-5, []), (3e-3, [("note", "geometry", "s1")]), (0.3, [("error", "geometry", "s1")])]
)
@pytest.mark.parametrize("name", ["s1_seg.nii.gz", "s1_t2.nii.gz"])
def test_geometry_in_three_levels(root, name, shift, expected):
    moved = AFFINE.copy()
    moved[0, 3] += shift
    write(root, name, label(2, 1) if "seg" in name else image(11), moved)
    assert found(root) == expected
    if expected:
        message = sentence(root, "geometry")
        assert name in message and "s1_t1.nii.gz" in message and f"{shift:.2g} mm" in message
        assert ("resample" in message) == (expected[0][0] == "error")


def test_another_shape(root):
    write(root, "s1_seg.nii.gz", label(1, 2)[:, :-1])
    assert "(8, 7, 6) and (8, 6, 6); resample s1_seg.nii.gz" in sentence(root, "geometry")


def change_header(**fields):
    def edit(header):
        for name, value in fields.items():
            header[name] = value

    return edit


def test_sform_and_qform_that_differ(root):
    moved = AFFINE.copy()
    moved[2, 3] += 4
    write(root, "s1_t1.nii.gz", image(1), header_edit=lambda header: header.set_qform(moved, 1))
    assert found(root) == [("warning", "header", "s1")]
    assert "up to 4 mm apart and the sform is used" in sentence(root, "header")


def test_units(root):
    for name, data in (("t1", image(1)), ("t2", image(11)), ("seg", label(2, 1))):
        affine = np.diag([-1e3, -1e3, 1.5e3, 1.0])
        write(root, f"s1_{name}.nii.gz", data, affine, header_edit=lambda header: header.set_xyzt_units("micron"))
    assert found(root) == [("warning", "units", "s1")] * 3  # one for each file
    write(root, "s2_t1.nii.gz", image(2), header_edit=lambda header: header.set_xyzt_units("unknown"))
    assert ("note", "units", "s2") in found(root)


def test_a_unit_that_makes_no_sense(root):
    for name, data in (("t1", image(1)), ("t2", image(11)), ("seg", label(2, 1))):
        write(root, f"s1_{name}.nii.gz", data, np.diag([-1e3, -1e3, 1.5e3, 1.0]))
    assert "1.5e+03 x 1e+03 x 1e+03 mm, which no scanner makes" in sentence(root, "units")


@pytest.mark.parametrize(
    ("sides", "level", "said"),
    [
        ((-1, -1, 6), "note", "axial slices are 6.0 times"),
        ((-1, -4, 1), "warning", "--config.data.slice_axis=coronal"),
        ((-5, -1, 1), "warning", "--config.data.slice_axis=sagittal"),
    ],
)
def test_thick_slices(root, sides, level, said):
    for name, data in (("t1", image(1)), ("t2", image(11)), ("seg", label(2, 1))):
        write(root, f"s1_{name}.nii.gz", data, np.diag([*sides, 1.0]))
    assert found(root) == [(level, "slices", "s1")]
    assert said in sentence(root, "slices")


@pytest.mark.parametrize(
    ("shape", "level", "said"), [((6, 7), "note", "axial"), ((6, 1, 8), "warning", "slice_axis=coronal")]
)
def test_one_slice(root, shape, level, said):
    seg = np.zeros(shape, np.uint8)
    seg.flat[:6] = [1, 1, 2, 2, 1, 2]
    for name, data in (("t1", 1), ("t2", 2)):
        write(root, f"s1_{name}.nii.gz", np.random.default_rng(data).uniform(1, 9, shape).astype(np.float32))
    write(root, "s1_seg.nii.gz", seg)
    assert found(root) == [(level, "slices", "s1")]
    assert said in sentence(root, "slices")


@pytest.mark.parametrize("kind", ["oblique", "sheared"])
def test_axes(root, kind):
    turn = np.array([[0.8, -0.6, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0]])
    affine = np.eye(4)
    affine[:3, :3] = turn if kind == "oblique" else [[1.0, 0.2, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    for name, data in (("t1", image(1)), ("t2", image(11)), ("seg", label(2, 1))):
        write(root, f"s1_{name}.nii.gz", data, affine, codes=(1, 0))
    assert found(root) == [("note", "axes", "s1")]
    assert {"oblique": "oblique by 36.9 degrees", "sheared": "up to 11.3 degrees off"}[kind] in sentence(root, "axes")


def test_values_of_images(root):
    write(root, "s0_t1.nii.gz", np.full(SHAPE, 7, np.int16))
    write(root, "s1_t1.nii.gz", image(1) - 400)
    int64 = functools.partial(nibabel.Nifti1Image, dtype="int64")
    write(root, "s2_t1.nii.gz", image(2).astype(np.int64), image_class=int64)
    write(root, "s3_t1.nii.gz", image(3).astype(np.int64) + 2**25, image_class=int64)
    assert found(root) == [
        ("error", "constant", "s0"),
        ("warning", "negative", "s1"),
        ("warning", "type", "s3"),
        ("note", "type", "s2"),
    ]


def test_labels(root):
    write(root, "s0_seg.nii.gz", label(1, 5))
    write(root, "s1_seg.nii.gz", label(1))
    write(root, "s2_seg.nii.gz", label())
    write(root, "s3_seg.nii.gz", label(1, 2) * 0.5)
    assert found(root) == [
        ("error", "file", "s3"),
        ("error", "label-ids", "s0"),
        ("warning", "empty-label", "s0"),
        ("warning", "empty-label", "s1"),
        ("warning", "empty-label", "s2"),
        ("warning", "empty-label", ""),  # rim stands in none
        ("note", "label-ids", ""),  # 1, 5
    ]
    assert "holds the label ids 5; expected only 0, 1, 2" in next(
        f.message for f in verify.verify(layouts.detect(root)).findings if f.check == "label-ids"
    )


def test_labels_without_names(root):
    (root / "dataset.json").unlink()
    assert found(root) == [("warning", "label-ids", "")]
    assert "1, 2 mean; name them" in sentence(root, "label-ids")


def test_a_split_without_foreground(root):
    write(root, "s3_seg.nii.gz", label())
    assert ("error", "splits", "") in found(root)
    report = verify.verify(layouts.detect(root))
    assert report.dataset_fails() and not report.failing()


def test_a_subject_in_two_splits(root):
    change(root, "s3", subject_id="s1", scanner="A")
    change(root, "s2", scanner="A")
    assert found(root, "error") == [("error", "splits", "")]
    assert "Subject 's1'" in sentence(root, "splits") and "test, train" in sentence(root, "splits")


def test_duplicates(root):
    write(root, "s1_t1.nii.gz", image(0))  # of another subject
    write(root, "s2_t2.nii.gz", image(2))  # the same modality twice
    write(root, "s3_seg.nii.gz", label(1, 2))  # another case's label
    assert found(root) == [
        ("error", "duplicate", "s1"),
        ("warning", "duplicate", "s2"),
        ("warning", "duplicate", "s3"),
    ]
    change(root, "s1", subject_id="s0")
    assert ("warning", "duplicate", "s1") in found(root)


def test_a_label_given_as_an_image(root):
    write(root, "s1_t1.nii.gz", np.roll(label(1, 2), 1, axis=1).astype(np.float32))
    assert found(root) == [("error", "label-as-image", "s1"), ("warning", "label-as-image", "s1")]
    write(root, "s1_seg.nii.gz", label(2, 1))
    assert found(root) == [("warning", "label-as-image", "s1")]
    assert "only the values 0, 1, 2" in sentence(root, "label-as-image")


def test_the_same_case_with_both_endings(root):
    write(root, "s1_t1.nii", image(1))
    assert "s1_t1.nii stands beside it" in sentence(root, "twice")


def test_case_ids(root):
    change(root, "s1", case_id="S0")
    assert found(root) == [("error", "case-id", "S0")]
    change(root, "S0", **{"case_id": "s1", "image:T2": "s1_t1.nii.gz"})
    assert ("error", "case-id", "s1") in found(root)


def test_domains(root):
    change(root, "s3", scanner="C")
    assert found(root) == [("warning", "domains", "")] * 2  # B and C, one subject each
    for number in range(4):
        change(root, f"s{number}", scanner="A")
    assert found(root) == [("note", "domains", "")]
    for number in range(4):
        change(root, f"s{number}", scanner="")
    assert "neither scanner nor centre" in sentence(root, "domains")


def test_an_interrupt_does_not_wait_for_all_cases(root, monkeypatch):
    started = []
    read = verify.examine

    def slow(case, labels):
        started.append(case.case_id)
        return read(case, labels)

    def interrupt(count, name):
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "examine", slow)
    dataset = layouts.detect(root)
    many = dataclasses.replace(dataset, cases=dataset.cases * 50)
    with pytest.raises(KeyboardInterrupt):
        verify.verify(many, workers=1, done=interrupt)
    assert len(started) < 100
