"""Real scans, those that nibabel ships for its own tests: verified, segmented, and back on exactly their own grid."""

import dataclasses
import pathlib
import shutil

import nibabel
import numpy as np
import pytest
from nibabel.testing import data_path

from calsegx import configs
from calsegx.interfaces import DataError
from calsegx.training import model_folder
from launch import components, index, predict, verify

# File -> the voxel that is clicked on.  Big-endian integers and floats, LAS and RAS, oblique, NIfTI-2, several volumes.
VOLUMES = {
    "anatomical.nii": (16, 20, 12),
    "reoriented_anat_moved.nii": (10, 13, 11),
    "example4d.nii.gz": (64, 40, 11),
    "example_nifti2.nii.gz": (16, 10, 6),
    "functional.nii": (8, 10, 1),
}
VOLUME = 1  # which volume of those with several is the channel
TWO_VALUES = "standard.nii.gz"  # 0 and 255: no scan, in spite of its name
BROKEN = "resampled_anat_moved.nii"  # NaN outside the head
HEADER = ("dim", "pixdim", "qform_code", "sform_code", "xyzt_units", "srow_x", "srow_y", "srow_z", "quatern_b")


def make_clinic(folder, names):
    """The volumes as a dataset of one channel without labels."""
    folder.mkdir()
    lines = ["case_id\timage:T1c\tvolume:T1c\tscanner"]
    for name in names:
        shutil.copyfile(pathlib.Path(data_path) / name, folder / name)
        volume = VOLUME if len(nibabel.load(folder / name).shape) > 3 else ""
        lines.append(f"{name.split('.')[0]}\t{name}\t{volume}\tunknown scanner")
    (folder / "cases.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def clinic(tmp_path_factory):
    return make_clinic(tmp_path_factory.mktemp("real") / "clinic", [*VOLUMES, TWO_VALUES])


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """The run folder of a model of one channel, untrained: where its outputs lie does not depend on that."""
    folder = tmp_path_factory.mktemp("run")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, channels="T1c", cache=""))
    parts = components.build(config)
    record = components.metadata(parts, components.feature_cache(parts, folder).fingerprint, {})
    record |= {"config": configs.to_dict(config), "backbone": parts.backbone.fingerprint, "cases": []}
    model_folder.save(folder, parts.backbone.trainable, record)
    return folder


def test_verification_of_real_scans(clinic, tmp_path):
    report = verify.verify_dataset(clinic, output=tmp_path)
    found = {(finding.level, finding.check, finding.case_id) for finding in report.findings}
    assert found == {
        ("warning", "label-as-image", "standard"),  # it holds 0 and 255 alone
        ("warning", "slices", "standard"),  # 2 x 3 x 1 mm
        ("note", "units", "standard"),
        ("note", "domains", ""),
        ("note", "axes", "example4d"),  # oblique
        ("note", "axes", "example_nifti2"),
        ("note", "slices", "functional"),  # 8 x 4 x 4 mm
    }
    files = {item.case.case_id: item.files["image:T1c"] for item in report.examined}
    assert index.index_dataset(clinic)[1] == "Cases: 6 of 6 subjects, 6 without a label"
    assert {name: contents.orientation for name, contents in files.items()} == {
        "example4d": "LAS",
        "example_nifti2": "LAS",
        "functional": "LAS",
        "anatomical": "LAS",
        "reoriented_anat_moved": "RAS",
        "standard": "RAS",
    }
    assert files["anatomical"].shape == (25, 41, 33) and files["anatomical"].spacing_mm == (2.0, 2.0, 2.0)


def test_a_real_scan_with_nan_is_refused(tmp_path):
    clinic = make_clinic(tmp_path / "clinic", ["anatomical.nii", BROKEN])
    with pytest.raises(DataError, match=r"1 error\(s\), in 1 of 2 cases"):
        verify.verify_dataset(clinic)
    report = verify.verify_dataset(clinic, on_error="skip")
    assert "has 153 NaN or infinite voxels of 1071" in report.failing()["resampled_anat_moved"]


def test_predictions_of_real_scans_lie_on_their_grid(clinic, run, tmp_path):
    clicks = ["case_id\ti\tj\tk\tlabel"]
    for name, voxel in {**VOLUMES, TWO_VALUES: (2, 2, 3)}.items():
        clicks.append("\t".join(map(str, (name.split(".")[0], *voxel, 1))))
    (tmp_path / "clicks.tsv").write_text("\n".join(clicks) + "\n")
    with pytest.raises(DataError, match="1 of 6 cases failed; the first: standard: .*constant"):  # and stops no other
        predict.predict(run, tmp_path / "out", str(clinic), tmp_path / "clicks.tsv")
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 3 * len(VOLUMES)
    for name, (_, _, k) in VOLUMES.items():
        case_id = name.split(".")[0]
        original = nibabel.load(clinic / name)
        mask = nibabel.load(tmp_path / "out" / f"{case_id}.nii.gz")
        probability = nibabel.load(tmp_path / "out" / f"{case_id}_prob-whole_tumour.nii.gz")
        for output in (mask, probability):
            assert output.shape == original.shape[:3] and type(output) is type(original)
            np.testing.assert_array_equal(output.affine, original.affine)
            for field in HEADER if len(original.shape) == 3 else HEADER[2:]:
                np.testing.assert_array_equal(output.header[field], original.header[field], err_msg=f"{name} {field}")
        values = np.asarray(probability.dataobj)
        assert values[:, :, k].std() > 0  # the clicked slice, in the file's own axes
        assert not np.delete(values, k, axis=2).any()
        np.testing.assert_array_equal(np.asarray(mask.dataobj) > 0, values > 0.5)
        assert original.get_fdata().tobytes() == nibabel.load(pathlib.Path(data_path) / name).get_fdata().tobytes()
