"""The corrupted dataset: written, checked, continued, evaluated."""

import csv
import dataclasses
import gzip
import json
import shutil

import nibabel
import numpy as np
import pytest

from calsegx import configs
from calsegx.data import cases as case_tools
from calsegx.data import corruptions, nifti
from calsegx.interfaces import DataError, UsageError
from launch import corrupt, evaluate, train

NAMES, LEVELS = ["motion", "bias_field"], [1, 4]
DOMAINS = {"clean", "motion-1", "motion-4", "bias_field-1", "bias_field-4"}


@pytest.fixture(scope="module")
def data(dataset):
    return configs.DataConfig(root=str(dataset))


@pytest.fixture(scope="module")
def written(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corrupted") / "sweep"
    before = snapshot(data.root)
    assert corrupt.corrupt(data, NAMES, LEVELS, folder, workers=2) == 4 * 5
    assert snapshot(data.root) == before
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """A copy to change; beside the original, so that the references to the labels hold."""
    copy = written.parent / tmp_path.name
    shutil.copytree(written, copy)
    return copy


def snapshot(root):
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in corrupt.Path(root).rglob("*")}


def rows(folder):
    with open(folder / "cases.tsv", newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def test_every_copy_is_a_case_with_the_geometry_type_and_label_of_the_original(written, data):
    originals = {case.case_id: case for case in case_tools.load(data).cases}
    found = case_tools.load(configs.DataConfig(root=str(written)))
    assert found.channels == ("T1", "T1c", "T2", "FLAIR") and found.labels == case_tools.load(data).labels
    assert set(case_tools.domains(found, "scanner")) == DOMAINS and len(found.cases) == 20
    for case in found.cases:
        original = originals[case.case_id.partition("__")[0]]
        assert case.case_id == f"{original.case_id}__{case.scanner}"
        assert (case.subject_id, case.centre, case.split) == (original.subject_id, original.centre, "test")
        assert case.label.samefile(original.label)
        for channel, path in case.images.items():
            first, second = nibabel.load(original.images[channel]), nibabel.load(path)
            np.testing.assert_array_equal(first.affine, second.affine)
            for field in ("dim", "pixdim", "sform_code", "qform_code", "xyzt_units", "datatype"):
                np.testing.assert_array_equal(first.header[field], second.header[field])
            same = np.array_equal(first.dataobj, second.dataobj)
            assert same == (case.scanner == "clean"), path


def test_channels_move_apart_and_the_same_call_gives_the_same_bytes(written, data, tmp_path):
    corrupt.corrupt(data, NAMES, LEVELS, tmp_path / "again")
    files = sorted(path.relative_to(written) for path in written.rglob("*.nii.gz"))
    assert len(files) == 4 * 4 * 5
    for name in [*files, "manifest.json", "dataset.json"]:
        assert (written / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_check_finds_nothing_and_then_what_was_changed(folder, data, written):
    assert corrupt.check(data, written) == (80, [])
    damaged, missing, *_ = sorted((folder / "images").iterdir())
    image = nibabel.load(damaged)
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj) + 1, image.affine), damaged)
    missing.unlink()
    _, differing = corrupt.check(data, folder)
    assert differing == [
        f"images/{damaged.name}: the file is changed or damaged",
        f"images/{missing.name}: the file is missing",
    ]
    shutil.rmtree(folder / "images")  # somebody else's manifest alone
    assert corrupt.check(data, folder) == (80, [])


def test_check_notices_other_voxels_and_another_dataset(folder, data, monkeypatch):
    entries = corruptions.registry._entries

    def doubled(voxels, spacing_mm, level, rng, *, spread=(0.05, 0.12, 0.22, 0.35, 0.5)):
        return voxels * 2

    monkeypatch.setitem(entries, "bias_field", doubled)
    _, differing = corrupt.check(data, folder)
    assert len(differing) == 32
    assert all("bias_field" in line and line.endswith("made here are not those of the manifest") for line in differing)
    monkeypatch.setitem(entries, "bias_field", entries["gamma"])
    with pytest.raises(DataError, match="manifest.json was made with other definitions"):
        corrupt.check(data, folder)
    monkeypatch.undo()
    other = dataclasses.replace(data, root=str(folder))
    with pytest.raises(DataError, match=r"is of another dataset: .* has no case 'subject\d+_A'"):
        corrupt.check(other, folder)


def test_a_killed_run_keeps_what_is_whole(folder, data):
    damaged, missing, *others = sorted((folder / "images").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:1000])
    missing.unlink()
    (folder / "cases.tsv").unlink()
    half = folder / "images" / f".{missing.name}.123.tmp"
    half.write_bytes(b"\x1f")
    times = {path: path.stat().st_mtime_ns for path in others}
    assert corrupt.corrupt(data, NAMES, LEVELS, folder) == 20
    assert times == {path: path.stat().st_mtime_ns for path in others}
    assert corrupt.check(data, folder) == (80, []) and len(rows(folder)) == 20 and not half.exists()


def test_an_interrupted_run_leaves_whole_files_and_can_go_on(data, tmp_path, monkeypatch):
    write, count = nifti.write, []

    def interrupted(*arguments):
        count.append(1)
        if len(count) == 7:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(nifti, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        corrupt.corrupt(data, ["gamma"], [2], tmp_path / "out")
    monkeypatch.undo()
    assert not (tmp_path / "out" / "cases.tsv").exists()
    images = list((tmp_path / "out" / "images").iterdir())
    known = json.loads((tmp_path / "out" / "manifest.json").read_text())["files"]
    assert 6 <= len(images) == len(known) < 32
    for path in images:
        gzip.decompress(path.read_bytes())
    times = {path: path.stat().st_mtime_ns for path in images}
    assert corrupt.corrupt(data, ["gamma"], [2], tmp_path / "out") == 8
    assert corrupt.check(data, tmp_path / "out") == (32, [])
    assert times == {path: path.stat().st_mtime_ns for path in images}


def test_more_can_be_asked_for_later_but_not_less(folder, data):
    with pytest.raises(UsageError, match="holds .*bias_field-4.* which this call does not ask for"):
        corrupt.corrupt(data, NAMES, [1], folder)
    assert corrupt.corrupt(data, [*NAMES, "gamma"], LEVELS, folder) == 4 * 7


def test_where_it_does_not_write(data, dataset, tmp_path):
    with pytest.raises(UsageError, match="lies inside the dataset"):
        corrupt.corrupt(data, NAMES, LEVELS, dataset / "corrupted")
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="is neither empty nor of this script"):
        corrupt.corrupt(data, NAMES, LEVELS, tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="manifest.json is damaged"):
        corrupt.corrupt(data, NAMES, LEVELS, tmp_path)
    assert not (dataset / "corrupted").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["letter.txt", "manifest.json"]


def test_names_and_levels_are_read():
    assert corrupt.read_names(["all"]) == corruptions.names() and corrupt.read_levels(["all"]) == [1, 2, 3, 4, 5]
    assert corrupt.read_names(["blur", "blur"]) == ["blur"] and corrupt.read_levels(["3", "1"]) == [3, 1]
    with pytest.raises(UsageError, match="no corruption named 'moton'.*Did you mean 'motion'"):
        corrupt.read_names(["moton"])
    with pytest.raises(UsageError, match="--corruption is empty"):
        corrupt.read_names([])
    with pytest.raises(UsageError, match="register it"):
        corrupt.read_names(["calsegx.data.corruptions.kspace:motion"])
    for texts in (["6"], ["1", "x"], []):
        with pytest.raises(UsageError, match="is no level; give all or some of 1, 2, 3, 4, 5"):
            corrupt.read_levels(texts)


def test_floats_unlabelled_cases_and_other_splits(tmp_path, capsys):
    root = tmp_path / "floats"
    root.mkdir()
    rng = np.random.default_rng(0)
    for name in "ab":
        voxels = rng.normal(size=(12, 10, 3)).astype(np.float32)  # z-scores
        nibabel.save(nibabel.Nifti1Image(voxels, np.diag([2, 2, 5, 1.0])), root / f"{name}.nii")
    (root / "cases.tsv").write_text("case_id\timage:T1\tsplit\na\ta.nii\ttrain\nb\tb.nii\ttest\n")
    description = {"labels": {"background": 0, "a": 1, "b": 2}, "default_classes": "whole=1+2"}
    (root / "dataset.json").write_text(json.dumps(description))
    data = configs.DataConfig(root=str(root))
    assert corrupt.corrupt(data, ["gibbs"], [5], tmp_path / "out", "all") == 4
    assert "do not evaluate a model on subjects it was trained on" in capsys.readouterr().err
    found = case_tools.load(configs.DataConfig(root=str(tmp_path / "out")))
    assert all(case.label is None for case in found.cases)
    assert (found.labels, found.default_classes) == (description["labels"], "whole=1+2")
    image = nibabel.load(tmp_path / "out" / "images" / "a__gibbs-5_0000.nii.gz")
    assert image.get_data_dtype() == np.float32 and np.asarray(image.dataobj).min() < 0


@pytest.mark.parametrize(
    ("dtype", "slope", "stored"), [("i2", 1, "<i2"), (">u2", 1, ">u2"), ("u1", 0.5, "<f4"), ("i4", 1, "<f4")]
)
def test_the_type_of_the_file_is_kept_where_it_holds_unscaled_small_integers(tmp_path, dtype, slope, stored):
    root = tmp_path / "one"
    root.mkdir()
    header = nibabel.Nifti1Header(endianness=">" if dtype.startswith(">") else "<")
    header.set_data_dtype(dtype)
    voxels = np.arange(12 * 10 * 3).reshape(12, 10, 3) % 90
    image = nibabel.Nifti1Image(voxels.astype(dtype), np.diag([2, 2, 5, 1.0]), header)
    image.header.set_slope_inter(slope, 0)
    nibabel.save(image, root / "a.nii")
    (root / "cases.tsv").write_text("case_id\timage:T1\tsplit\na\ta.nii\ttest\n")
    corrupt.corrupt(configs.DataConfig(root=str(root)), ["blur"], [5], tmp_path / "out")
    clean = nibabel.load(tmp_path / "out" / "images" / "a__clean_0000.nii.gz")
    assert clean.get_data_dtype() == np.dtype(stored)
    np.testing.assert_array_equal(np.asarray(clean.dataobj), np.asarray(nibabel.load(root / "a.nii").dataobj))


def test_a_sweep_is_evaluated_by_domain(config, folder, tmp_path):
    lines = (folder / "cases.tsv").read_text().splitlines()
    one = [line for line in lines if line.startswith(("case_id", lines[1].partition("__")[0]))]
    (folder / "cases.tsv").write_text("\n".join(one) + "\n")  # one patient of one scanner is enough
    train.train(config, tmp_path / "run")
    record = evaluate.evaluate([tmp_path / "run"], tmp_path / "evaluation", str(folder))
    assert {row.domain for row in record.rows} == DOMAINS
    for name in ("summary.json", "table.md"):
        text = (tmp_path / "evaluation" / name).read_text()
        assert all(domain in text for domain in DOMAINS)


@pytest.mark.slow
def test_all_corruptions_at_all_levels_are_evaluated(config, data, tmp_path):
    domains = {"clean", *(f"{name}-{level}" for name in corruptions.names() for level in corruptions.LEVELS)}
    names, levels = corrupt.read_names(["all"]), corrupt.read_levels(["all"])
    assert corrupt.corrupt(data, names, levels, tmp_path / "out", workers=2) == 4 * len(domains)
    train.train(config, tmp_path / "run")
    record = evaluate.evaluate([tmp_path / "run"], tmp_path / "evaluation", str(tmp_path / "out"))
    assert {row.domain for row in record.rows} == domains
