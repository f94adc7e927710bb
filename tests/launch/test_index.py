"""launch.index: what it says, and that the index it writes is the dataset again."""

import csv
import dataclasses
import pathlib
import subprocess
import sys

import nibabel
import numpy as np
import pytest

from calsegx import configs
from calsegx.data import index, layouts
from calsegx.interfaces import DataError, UsageError
from launch import index as launch_index
from launch import train
from launch import verify as launch_verify
from tests.data.layouts import fake, trees

ROOT = pathlib.Path(__file__).parents[2]
MAKE = {"brats": fake.brats_2019, "atlas": fake.atlas, "ibsr": fake.ibsr, "bids": fake.bids}


def value(lines, title):
    (line,) = (line for line in lines if line.startswith(title))
    return line.removeprefix(title)


def test_what_it_says(tmp_path, capsys):
    lines = launch_index.index_dataset(fake.brats_2019(tmp_path))
    assert lines[:5] == [
        "Layout: brats",
        "Cases: 3 of 2 subjects",
        "Channels: T1, T1c, T2, FLAIR",
        "Shape (slices x rows x columns): 6x20x24 (3)",
        "Spacing in mm (slices x rows x columns): median 3 x 1 x 1, from 3 x 1 x 1 to 3 x 1 x 1",
    ]
    # A block of 12 x 4 x 4 voxels of 3 cubic millimetres.
    assert value(lines, "  4 enhancing_tumour: ") == "in 3 of 3 cases, median 0.576 ml, from 0.576 to 0.576"
    assert value(lines, "Centres: ") == "TCIA01 (2), CBICA (1)"
    assert value(lines, "Scanners: ") == "unknown (3)" and value(lines, "Splits: ") == "not assigned (3)"
    assert "Reading: 3/3 cases" in capsys.readouterr().out


def test_labels_that_are_not_declared_and_cases_without(tmp_path):
    root = fake.atlas(tmp_path)
    mask = next(root.rglob("sub-r009s001*mask.nii.gz"))
    fake.write(mask.parent, mask.name, ids=(1, 7))
    lines = launch_index.index_dataset(root)
    assert value(lines, "Cases: ") == "4 of 4 subjects, 1 without a label"
    assert value(lines, "  7 (not declared): ").startswith("in 1 of 3 cases, median 0.576 ml")
    assert value(lines, "Splits: ") == "not assigned (3), test (1)"


def test_headers_only_reads_no_label(tmp_path):
    root = fake.brats_2019(tmp_path)
    next(root.rglob("*seg.nii.gz")).write_bytes(b"no NIfTI")
    lines = launch_index.index_dataset(root, headers_only=True)
    assert "  4 enhancing_tumour" in lines and value(lines, "Shape").endswith("6x20x24 (3)")
    with pytest.raises(DataError, match=r"_seg\.nii\.gz is not gzip-compressed, against its name"):
        launch_index.index_dataset(root)
    next(root.rglob("*t1.nii.gz")).write_bytes(b"no NIfTI")
    with pytest.raises(DataError, match=r"_t1\.nii\.gz has no readable header"):
        launch_index.index_dataset(root, headers_only=True)


def test_grid_is_in_working_axes(tmp_path):
    affine = np.array([[0, 0, -0.5, 0], [2.0, 0, 0, 0], [0, 0.7, 0, 0], [0, 0, 0, 1]])  # axes A, S, L
    image = nibabel.Nifti1Image(np.ones((3, 4, 5), np.int16), affine)
    image.header.set_xyzt_units("mm")
    image.to_filename(tmp_path / "a.nii")
    (tmp_path / "cases.tsv").write_text("case_id\timage:T1\na\ta.nii\n")
    (measured,) = index.measure(layouts.detect(tmp_path), workers=1)
    assert measured.shape == (4, 3, 5)
    np.testing.assert_allclose(measured.spacing_mm, (0.7, 2.0, 0.5), rtol=1e-6)
    assert measured.volumes_ml == {}


@pytest.mark.parametrize("name", MAKE)
def test_the_written_index_is_the_dataset(tmp_path, name):
    root, output = MAKE[name](tmp_path / "data"), tmp_path / "index"
    before = {path: path.stat().st_mtime_ns for path in sorted(root.rglob("*"))}
    first = launch_index.index_dataset(root, output=output)
    assert {path: path.stat().st_mtime_ns for path in sorted(root.rglob("*"))} == before
    read, written = layouts.detect(output), layouts.detect(root)
    assert (read.cases, read.channels, read.labels) == (written.cases, written.channels, written.labels)
    second = launch_index.index_dataset(output, output=tmp_path / "again")
    first = [line for line in first if not line.startswith("Not used: ")]  # that is about the dataset's folder
    assert (first[0], second[0]) == (f"Layout: {name}", "Layout: table") and first[1:] == second[1:]
    assert (output / "cases.tsv").read_bytes() == (tmp_path / "again" / "cases.tsv").read_bytes()


def test_volumes_and_default_classes_are_written(tmp_path):
    dataset = layouts.detect(fake.brats_2019(tmp_path / "data"))
    changed = tuple(dataclasses.replace(case, volumes={"T1c": 1, "T2": 3}) for case in dataset.cases)
    dataset = dataclasses.replace(dataset, cases=changed, default_classes="whole_tumour=1+2+4")
    table = index.write_cases(dataset, tmp_path / "index")
    with open(table, newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    assert [row["volume:T1c"] + row["volume:T2"] for row in rows] == ["13"] * 3
    assert "volume:T1" not in rows[0]
    read = layouts.detect(tmp_path / "index")
    assert read.cases == dataset.cases and read.default_classes == "whole_tumour=1+2+4"


def test_pictures(tmp_path):
    root = trees.pictures(tmp_path / "data", count=3)
    lines = launch_index.index_dataset(root, output=tmp_path / "index")
    assert lines[0] == "Layout: images_2d" and value(lines, "Cases: ") == "3 of 3 subjects"
    assert value(lines, "Spacing in mm (slices x rows x columns): ").startswith("median 1 x 1 x 1")
    read = layouts.detect(tmp_path / "index")
    assert (read.cases, read.labels) == (layouts.detect(root).cases, layouts.detect(root).labels)


def test_metadata_adds_the_domain(tmp_path, capsys):
    root = fake.bids(tmp_path / "data")
    table = tmp_path / "participants.csv"
    table.write_text("Subject,Manufacturer,Center,field_strength\n01,GE,Basel,3\nsub-02,Siemens,n/a,\n99,GE,Bern,3\n")
    lines = launch_index.index_dataset(root, metadata=table, output=tmp_path / "index")
    assert value(lines, "Scanners: ") == "GE (1), Siemens (1), unknown (1)"
    assert value(lines, "Centres: ") == "unknown (2), Basel (1)"
    told = capsys.readouterr().err
    assert "warning: " in told and "no line for 1 subjects of the dataset: 03\n" in told
    assert "names 1 subjects that the dataset does not have: 99\n" in told
    found = [(case.scanner, case.centre, case.field_strength) for case in layouts.detect(tmp_path / "index").cases]
    assert found == [("GE", "Basel", "3"), ("Siemens", "", ""), ("", "", "")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name\tsite\nsub-01\tBern\n", "line 1: no column names the subject; expected one of participant_id"),
        ("", "line 1: no column names the subject.*the columns are none"),
        ("subject\tage\nsub-01\t44\n", "gives no subject a centre, scanner or field strength; expected a column of"),
        ("subject\tsite\n1\tBern\n", r"names none of the dataset's subjects \(01, 02, 03\), but 1; is '1' the subject"),
        ("subject\tsite\n01\tBern\n01\tBasel\n", "line 3: subject '01' has .*Basel.* but .*Bern.* further up"),
        ("subject\tsite\n\tBern\n01\tBern\n", "line 2: no subject; name one, or remove the line"),
        (None, "does not exist"),
    ],
)
def test_metadata_that_cannot_be_used(tmp_path, text, message):
    root, table = fake.bids(tmp_path / "data"), tmp_path / "table.tsv"
    if text is not None:
        table.write_text(text)
    with pytest.raises(DataError, match=message):
        launch_index.index_dataset(root, metadata=table, output=tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_where_it_does_not_write(tmp_path):
    root = fake.bids(tmp_path / "data")
    with pytest.raises(UsageError, match="lies inside the dataset, which is never written to; name another folder"):
        launch_index.index_dataset(root, output=root / "index")
    output = tmp_path / "mine"
    output.mkdir()
    (output / "cases.tsv").write_text("by hand")
    with pytest.raises(UsageError, match=r"cases\.tsv is there already, with other content"):
        launch_index.index_dataset(root, output=output)
    assert [path.name for path in output.iterdir()] == ["cases.tsv"] and not (root / "index").exists()


def test_a_missing_file_is_named(tmp_path):
    (tmp_path / "cases.tsv").write_text("case_id\timage:T1\na\ta.nii\n")
    with pytest.raises(DataError, match=r"a\.nii \(case a, T1\) does not exist"):
        launch_index.index_dataset(tmp_path)


def test_the_command(tmp_path):
    fake.ibsr(tmp_path / "data")
    command = [sys.executable, "-m", "launch.index", f"--data={tmp_path / 'data'}", f"--output={tmp_path / 'index'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Layout: ibsr\n" in done.stdout and "  3 white_matter: in 3 of 3 cases, median 0.576 ml" in done.stdout
    assert "Not used: 12 image files, for example IBSR_01/IBSR_01_ana.nii.gz\n" in done.stdout
    place = tmp_path / "index"
    assert done.stdout.endswith(f"The index is in {place / 'cases.tsv'}; use it with --config.data.root={place}\n")


THREE_SUBJECTS = {
    "bids": fake.bids,
    "atlas": fake.atlas,
    "ibsr": fake.ibsr,
    "brats 2019": lambda root: fake.brats_2019(root, [f"BraTS19_CBICA_AA{letter}_1" for letter in "ABC"]),
    "brats 2023": lambda root: fake.brats_2023(root, [f"BraTS-GLI-0000{number}-000" for number in range(3)]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", THREE_SUBJECTS)
def test_training_needs_the_folder_alone(tmp_path, name, small_sam):
    root = THREE_SUBJECTS[name](tmp_path / "data")
    config = configs.TrainConfig(
        method="sam_ft",
        steps=1,
        batch_size=2,
        data=configs.DataConfig(root=str(root), views=1),
        model=configs.ModelConfig(weights=str(small_sam)),
    )
    assert launch_verify.verify_dataset(root).examined
    summary = train.train(config, tmp_path / "run")
    assert summary["steps"] == 1 and np.isfinite(summary["validation_loss"])


def test_volumes_of_sheared_labels(tmp_path):
    affine = np.array([[1.0, 0.5, 0, 0], [0, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]])  # 2 mm^3: a shear keeps volumes
    for name in ("image", "label"):
        image = nibabel.Nifti1Image(np.ones((5, 5, 4), np.int16), affine)
        image.header.set_xyzt_units("mm")
        image.to_filename(tmp_path / f"{name}.nii")
    (tmp_path / "cases.tsv").write_text("case_id\timage:T1\tlabel\na\timage.nii\tlabel.nii\n")
    (measured,) = index.measure(layouts.detect(tmp_path), workers=1)
    assert measured.volumes_ml == {1: pytest.approx(0.2)}
