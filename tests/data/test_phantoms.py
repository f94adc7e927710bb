"""The phantom generator: what is on disk, what is in it, and that it is the same every time."""

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import scipy.ndimage

from calsegx.data import anatomy, phantoms
from calsegx.interfaces import UsageError

TINY = {"train": 1, "val": 1, "test": 1, "scale": 0.3}
COLUMNS = [
    "case_id",
    "subject_id",
    *(f"image:{channel}" for channel in ("T1", "T1c", "T2", "FLAIR")),
    "label",
    "split",
    "centre",
    "scanner",
    "field_strength",
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("phantoms") / "Dataset001_Phantom"
    phantoms.write_dataset(root, processes=1, **TINY)
    return root


@pytest.fixture(scope="module")
def head() -> anatomy.Anatomy:
    return anatomy.make_anatomy(np.random.default_rng([2024, 2]), scale=0.6)


def _files(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def _rows(root: Path) -> list[dict[str, str]]:
    with open(root / "cases.tsv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_files_depend_on_neither_the_processes_nor_the_other_patients(dataset: Path, tmp_path: Path) -> None:
    root = tmp_path / dataset.name
    phantoms.write_dataset(root, processes=2, **TINY)
    assert _files(root) == _files(dataset)
    # Patient 1 stays the same when there are fewer patients; another seed gives another patient.
    phantoms.write_dataset(tmp_path / "fewer", processes=1, **(TINY | {"val": 0, "test": 0}))
    phantoms.write_dataset(tmp_path / "seed", processes=1, seed=7, **(TINY | {"val": 0, "test": 0}))
    name = "imagesTr/subject001_A_0001.nii.gz"
    assert _files(tmp_path / "fewer")[name] == _files(dataset)[name] != _files(tmp_path / "seed")[name]


def test_layout_is_nnunet_v2_raw_with_a_case_table(dataset: Path) -> None:
    description = json.loads((dataset / "dataset.json").read_text(encoding="utf-8"))
    assert description["channel_names"] == {"0": "T1", "1": "T1c", "2": "T2", "3": "FLAIR"}
    assert description["labels"] == {"background": 0, "necrotic_core": 1, "oedema": 2, "enhancing_rim": 3}
    assert (description["numTraining"], description["file_ending"]) == (2, ".nii.gz")
    rows = _rows(dataset)
    assert list(rows[0]) == COLUMNS
    assert [(r["case_id"], r["subject_id"], r["split"], r["centre"], r["field_strength"]) for r in rows] == [
        ("subject001_A", "subject001", "train", "north", "3.0"),
        ("subject002_A", "subject002", "val", "north", "3.0"),
        ("subject003_A", "subject003", "test", "north", "3.0"),
        ("subject003_B", "subject003", "test", "south", "1.5"),
    ]
    assert rows[3]["image:FLAIR"] == "imagesTs/subject003_B_0003.nii.gz"
    named = {row[column] for row in rows for column in COLUMNS[2:7]}
    assert named | {"dataset.json", "cases.tsv"} == set(_files(dataset))


def test_geometry_of_the_files(dataset: Path) -> None:
    for row in _rows(dataset):
        images = [nib.load(dataset / row[column]) for column in COLUMNS[2:7]]
        for image in images:
            assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (1, 1)
            assert image.header.get_xyzt_units()[0] == "mm"
            assert image.shape == images[0].shape
            np.testing.assert_array_equal(image.affine, images[0].affine)
            np.testing.assert_allclose(image.header.get_qform(), image.affine, atol=1e-3)
            middle = image.affine @ [*((np.array(image.shape) - 1) / 2), 1.0]
            assert np.abs(middle[:3]).max() <= 2.01
        assert [image.get_data_dtype() for image in images] == [np.int16] * 4 + [np.uint8]
        thickness = {"A": 4.0, "B": 5.0}[row["scanner"]]
        np.testing.assert_allclose(images[0].header.get_zooms(), [5.0, 5.0, thickness / 0.3], rtol=1e-5)
        axes = {"A": ("L", "P", "S"), "B": ("R", "A", "S")}[row["scanner"]]
        assert nib.aff2axcodes(images[0].affine) == axes
        oblique = np.rad2deg(nib.affines.obliquity(images[0].affine)).max()
        assert oblique == 0.0 if row["scanner"] == "A" else 3.0 < oblique < 12.0


def test_full_size_grids_are_not_square() -> None:
    assert phantoms.vendor("A").shape == (112, 132, 36)
    assert phantoms.vendor("B").shape == (112, 132, 29)


def test_tumour_regions_are_nested_and_all_there(head: anatomy.Anatomy) -> None:
    label = head.label
    assert set(np.unique(label)) == {0, anatomy.NECROTIC_CORE, anatomy.OEDEMA, anatomy.ENHANCING_RIM}
    core, solid, whole = label == anatomy.NECROTIC_CORE, np.isin(label, [1, 3]), label > 0
    neighbours = scipy.ndimage.binary_dilation(core) & ~core
    assert (label[neighbours] == anatomy.ENHANCING_RIM).all()  # the rim closes around the core
    assert core.sum() < solid.sum() < whole.sum()
    skull = np.isin(head.tissue, [anatomy.Tissue.AIR, anatomy.Tissue.SCALP, anatomy.Tissue.SKULL])
    assert not (whole & skull).any()
    # Irregular: the ball of the tumour's own volume around its centroid misses much of it.
    spacing = np.diag(head.affine)[:3]
    indices = np.argwhere(whole) * spacing
    distance = np.linalg.norm(np.moveaxis(np.indices(label.shape), 0, -1) * spacing - indices.mean(0), axis=-1)
    ball = distance <= np.sort(distance.ravel())[whole.sum() - 1]
    assert 2 * (ball & whole).sum() / (ball.sum() + whole.sum()) < 0.85


def test_the_rim_takes_up_contrast_and_oedema_is_bright_on_flair(head: anatomy.Anatomy) -> None:
    images, label, _ = phantoms.render(head, phantoms.vendor("A", scale=0.6), np.random.default_rng(1))
    assert set(np.unique(label)) == {0, 1, 2, 3}

    def mean(channel: str, region: int) -> float:
        return float(images[channel][label == region].mean() / np.percentile(images[channel], 99.5))

    assert mean("T1c", anatomy.ENHANCING_RIM) > mean("T1", anatomy.ENHANCING_RIM) + 0.05
    assert mean("T1c", anatomy.ENHANCING_RIM) > mean("T1c", anatomy.NECROTIC_CORE) + 0.15
    flair = images["FLAIR"]
    bright = np.percentile(flair, 99.5)
    rest = flair[(flair > 0.2 * bright) & (label == 0)].mean() / bright
    assert mean("FLAIR", anatomy.OEDEMA) > rest + 0.1


def test_a_stroke_has_one_label(tmp_path: Path) -> None:
    root = tmp_path / "stroke"
    phantoms.write_dataset(root, train=1, val=0, test=0, kind="stroke", scale=0.3, processes=1)
    assert json.loads((root / "dataset.json").read_text())["labels"] == {"background": 0, "lesion": 1}
    label = np.asarray(nib.load(root / "labelsTr" / "subject001_A.nii.gz").dataobj)
    assert set(np.unique(label)) == {0, 1}


def _appearance(head: anatomy.Anatomy, scanner: phantoms.Vendor, seed: int) -> np.ndarray:
    """Mean signal of tissue groups in every channel, relative to white matter."""
    images, _, affine = phantoms.render(head, scanner, np.random.default_rng(seed))
    to_working = np.linalg.inv(head.affine) @ affine
    tissue = scipy.ndimage.affine_transform(head.tissue, to_working[:3, :3], to_working[:3, 3], scanner.shape, order=0)
    values = []
    for channel in phantoms.CHANNELS:
        white = images[channel][tissue == anatomy.Tissue.WHITE].mean()
        groups = (anatomy.Tissue.SCALP, anatomy.Tissue.GREY, anatomy.Tissue.CSF, anatomy.Tissue.CORE)
        values += [images[channel][tissue == group].mean() / white for group in groups]
    return np.array(values)


def test_severity_is_one_dial_from_vendor_a_to_vendor_b(head: anatomy.Anatomy) -> None:
    seeds = range(3)
    a = np.mean([_appearance(head, phantoms.vendor("A", scale=0.6), s) for s in seeds], axis=0)
    shift = []
    for severity in (0.0, 0.5, 1.0):
        scanner = phantoms.vendor("B", severity, scale=0.6)
        shift.append(np.abs(np.mean([_appearance(head, scanner, s) for s in seeds], axis=0) - a).mean())
    # The remaining shift is the geometry's: other slices, other angle.
    assert shift[0] < 0.05 < shift[1] < shift[2]
    assert shift[2] > 4 * shift[0]
    table_a, table_b = phantoms.vendor("A", 1.0).tables, phantoms.vendor("B", 0.0).tables
    assert all(np.array_equal(table_a[channel], table_b[channel]) for channel in phantoms.CHANNELS)


def test_two_scans_of_a_patient_agree_in_millimetres(head: anatomy.Anatomy) -> None:
    _, label_a, affine_a = phantoms.render(head, phantoms.vendor("A", scale=0.6), np.random.default_rng(1))
    _, label_b, affine_b = phantoms.render(head, phantoms.vendor("B", scale=0.6), np.random.default_rng(2))
    a_to_b = np.linalg.inv(affine_b) @ affine_a
    whole_a = label_a > 0
    whole_b = scipy.ndimage.affine_transform(
        (label_b > 0).astype(np.uint8), a_to_b[:3, :3], a_to_b[:3, 3], label_a.shape, order=0
    ).astype(bool)
    assert 2 * (whole_a & whole_b).sum() / (whole_a.sum() + whole_b.sum()) > 0.8


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(UsageError, match="is not empty; give --root a new or an empty folder"):
        phantoms.write_dataset(tmp_path, processes=1, **TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = phantoms._write_nifti, []

    def full_disk(path: Path, voxels: np.ndarray, affine: np.ndarray) -> None:
        if len(written) == 7:
            raise OSError(28, "No space left on device")
        written.append(path)
        write(path, voxels, affine)

    monkeypatch.setattr(phantoms, "_write_nifti", full_disk)
    with pytest.raises(OSError, match="No space left"):
        phantoms.write_dataset(tmp_path / "data", processes=1, **TINY)
    assert written and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "abscess"}, "kind 'abscess' is unknown; use one of: tumour, stroke"),
        ({"severity": 1.5}, "severity is 1.5; give a number from 0"),
        ({"train": 0}, "train=0; give at least 1"),
        ({"scale": 0.01}, "scale is 0.01"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_unusable_arguments_are_refused_before_work(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        phantoms.write_dataset(tmp_path / "data", **({"processes": 1} | TINY | options))
    assert not list(tmp_path.iterdir())
