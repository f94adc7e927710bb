"""IBSR-18: the same kind of image and of label for every case, and a trailing axis."""

import pytest

from calsegx.data import layouts, nifti
from calsegx.interfaces import DataError
from tests.data.layouts import fake


def kinds(root):
    dataset = layouts.detect(root)
    return {case.images["T1"].name[8:] for case in dataset.cases}, {case.label.name[8:] for case in dataset.cases}


@pytest.mark.parametrize("inside", [".", "IBSR_V2.0_nifti_stripped"])
def test_brain_and_filled_tissues(tmp_path, inside):
    fake.ibsr(tmp_path / inside)
    dataset = layouts.detect(tmp_path)
    assert [case.case_id for case in dataset.cases] == ["IBSR_01", "IBSR_02", "IBSR_03"]
    assert dataset.labels == {"background": 0, "cerebrospinal_fluid": 1, "grey_matter": 2, "white_matter": 3}
    assert kinds(tmp_path) == ({"ana_strip.nii.gz"}, {"segTRI_fill_ana.nii.gz"})
    case = dataset.cases[0]
    image, label = nifti.read(case.images["T1"]), nifti.read_labels(case.label)
    assert image.header.get_data_shape() == (*fake.SHAPE, 1)  # as the files have it
    nifti.same_grid(image, case.images["T1"], label, case.label)


def test_one_kind_for_all_cases(tmp_path):
    root = fake.ibsr(tmp_path)
    (root / "IBSR_02" / "IBSR_02_ana_strip.nii.gz").unlink()
    assert kinds(root) == ({"ana.nii.gz"}, {"segTRI_fill_ana.nii.gz"})
    (root / "IBSR_03" / "IBSR_03_segTRI_fill_ana.nii.gz").unlink()
    assert kinds(root) == ({"ana.nii.gz"}, {"segTRI_ana.nii.gz"})
    (root / "IBSR_01" / "IBSR_01_segTRI_ana.nii.gz").unlink()
    with pytest.raises(DataError, match=r"'IBSR_01' has no file .*IBSR_01_segTRI_ana\.nii\.gz, and not every case has"):
        layouts.detect(root)
