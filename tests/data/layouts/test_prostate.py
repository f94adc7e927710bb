"""The multi-site prostate collection, and what is wrong with it."""

import pytest

from calsegx import configs
from calsegx.data import cases, classes, layouts
from calsegx.interfaces import DataError
from tests.data.layouts.trees import prostate, touch


def test_cases_and_centres(tmp_path):
    dataset = cases.load(configs.DataConfig(root=str(prostate(tmp_path))))
    assert dataset.channels == ("T2",)
    assert [(case.case_id, case.subject_id, case.centre) for case in dataset.cases] == [
        ("BIDMC_Case00", "BIDMC_Case00", "BIDMC"),
        ("BIDMC_Case01", "BIDMC_Case01", "BIDMC"),
        ("RUNMC_Case00", "RUNMC_Case00", "RUNMC"),
    ]
    assert dataset.cases[1].label == tmp_path / "BIDMC/Case01_Segmentation.nii.gz"
    assert dataset.cases[2].images == {"T2": tmp_path / "RUNMC/Case00.nii"}
    class_map = classes.parse(dataset.default_classes, dataset.labels)
    assert (class_map.names, class_map.ids) == (("prostate",), ((1, 2),))


def test_one_folder_is_not_enough(tmp_path):
    touch(tmp_path / "HK/Case01.nii.gz", tmp_path / "HK/Case01_segmentation.nii.gz")
    with pytest.raises(DataError, match="no known layout"):
        layouts.detect(tmp_path)
    (tmp_path / "UCL").mkdir()
    assert [case.centre for case in layouts.detect(tmp_path).cases] == ["HK"]


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ("Case02.nii.gz", r"Case02.nii.gz has no label Case02_segmentation.nii.gz beside it"),
        ("Case02_seg.nii.gz", r"Case02_seg.nii.gz has no image Case02.nii.gz beside it"),
        ("Case00.nii", r"Case00.nii.gz and .*Case00.nii are both of Case00"),
        ("Case00_seg.nii.gz", r"Case00_segmentation.nii.gz and .*Case00_seg.nii.gz are both of Case00"),
        ("Case00_ADC.nii.gz", r"Case00_ADC.nii.gz is not named CaseXX.nii.gz or"),
    ],
)
def test_files_that_do_not_pair(tmp_path, added, message):
    touch(prostate(tmp_path) / "BIDMC" / added)
    with pytest.raises(DataError, match=message):
        layouts.detect(tmp_path)
