"""BraTS folders of every year, and what is wrong with them."""

import numpy as np
import pytest

from calsegx.data import classes, layouts
from calsegx.interfaces import DataError
from tests.data.layouts import fake


def by_id(dataset):
    return {case.case_id: case for case in dataset.cases}


def test_2019_gives_centre_and_subject(tmp_path):
    fake.brats_2019(tmp_path)
    fake.brats_case(tmp_path / "LGG" / "BraTS19_TMC_06290_1")
    dataset = layouts.detect(tmp_path)
    assert dataset.channels == ("T1", "T1c", "T2", "FLAIR")
    assert dataset.labels == {"background": 0, "necrotic_core": 1, "oedema": 2, "enhancing_tumour": 4}
    cases = by_id(dataset)
    assert {name: (case.subject_id, case.centre) for name, case in cases.items()} == {
        "BraTS19_CBICA_AAB_1": ("BraTS19_CBICA_AAB", "CBICA"),
        "BraTS19_TCIA01_131_1": ("BraTS19_TCIA01_131", "TCIA01"),
        "BraTS19_TCIA01_131_2": ("BraTS19_TCIA01_131", "TCIA01"),
        "BraTS19_TMC_06290_1": ("BraTS19_TMC_06290", "TMC"),
    }
    case, folder = cases["BraTS19_TMC_06290_1"], tmp_path / "LGG" / "BraTS19_TMC_06290_1"
    assert case.images["T1c"] == folder / "BraTS19_TMC_06290_1_t1ce.nii.gz"
    assert case.label == folder / "BraTS19_TMC_06290_1_seg.nii.gz"
    assert not any(case.split for case in dataset.cases)


def test_2020_takes_the_centre_from_the_name_mapping(tmp_path):
    data = tmp_path / "MICCAI_BraTS2020_TrainingData"
    for number in (1, 2):
        fake.brats_case(data / f"BraTS20_Training_00{number}", ending=".nii")
    fake.brats_case(data / "BraTS20_Training_355", kinds=("t1", "t1ce", "t2", "flair"), ending=".nii")
    fake.write(data / "BraTS20_Training_355", "W39_1998.09.19_Segm.nii")
    fake.brats_case(
        tmp_path / "MICCAI_BraTS2020_ValidationData" / "BraTS20_Validation_001", ("t1", "t1ce", "t2", "flair"), ".nii"
    )
    (data / "name_mapping.csv").write_text(
        "Grade,BraTS_2017_subject_ID,BraTS_2018_subject_ID,TCGA_TCIA_subject_ID,BraTS_2019_subject_ID,"
        "BraTS_2020_subject_ID\n"
        "HGG,Brats17_CBICA_AAB_1,Brats18_CBICA_AAB_1,NA,BraTS19_CBICA_AAB_1,BraTS20_Training_001\n"
        "HGG,NA,NA,NA,NA,BraTS20_Training_002\n"
    )
    cases = by_id(layouts.detect(tmp_path))
    first, second = cases["BraTS20_Training_001"], cases["BraTS20_Training_002"]
    assert (first.subject_id, first.centre) == ("BraTS19_CBICA_AAB", "CBICA")
    assert (second.subject_id, second.centre) == ("BraTS20_Training_002", "")
    assert cases["BraTS20_Training_355"].label.name == "W39_1998.09.19_Segm.nii"
    assert (cases["BraTS20_Validation_001"].label, cases["BraTS20_Validation_001"].split) == (None, "test")
    (data / "name_mapping.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"name_mapping\.csv cannot be read"):
        layouts.detect(tmp_path)


def test_2023_time_points_are_one_subject(tmp_path):
    dataset = layouts.detect(fake.brats_2023(tmp_path))
    assert dataset.channels == ("T1", "T1c", "T2", "FLAIR")
    assert [case.subject_id for case in dataset.cases] == ["BraTS-GLI-00000"] * 2 + ["BraTS-GLI-00002"]
    assert dataset.cases[0].images["FLAIR"].name == "BraTS-GLI-00000-000-t2f.nii.gz"
    assert dataset.cases[0].label.name == "BraTS-GLI-00000-000-seg.nii.gz"


@pytest.mark.parametrize(
    ("make", "ids"),
    [
        (lambda root: fake.brats_case(root / "BraTS2021_00000"), [0, 1, 2, 4]),
        (fake.brats_2023, [0, 1, 2, 3]),
        (lambda root: fake.brats_2023(root, ["BraTS-MEN-00004-000", "BraTS-SSA-00002-000"]), [0, 1, 2, 3]),
        (lambda root: fake.brats_2023(root, ["BraTS-PED-00002-000"]), [0, 1, 2, 3, 4]),
    ],
)
def test_predictions_go_back_to_the_ids_of_the_release(tmp_path, make, ids):
    make(tmp_path)
    dataset = layouts.detect(tmp_path)
    class_map = classes.parse(dataset.default_classes, dataset.labels)
    assert classes.to_file_ids(class_map, np.arange(len(ids))).tolist() == ids
    enhancing = class_map.names.index("enhancing_tumour") + 1
    assert classes.to_file_ids(class_map, np.array([enhancing])) == dataset.labels["enhancing_tumour"]


def test_validation_data_is_for_testing(tmp_path):
    dataset = layouts.detect(fake.brats_2023(tmp_path, seg=False))
    assert {(case.label, case.split) for case in dataset.cases} == {(None, "test")}


def remove(name):
    return lambda root: next(root.rglob(name)).unlink()


def twice(root):
    (root / "again").mkdir()
    (root / "HGG" / "BraTS19_CBICA_AAB_1").rename(root / "again" / "BraTS19_CBICA_AAB_1")
    fake.brats_2019(root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("BraTS19_CBICA_AAB_1_flair.nii.gz"), r"'BraTS19_CBICA_AAB_1' has no 'flair' image in .*CBICA_AAB_1;"),
        (remove("BraTS19_CBICA_AAB_1_seg.nii.gz"), r"'BraTS19_CBICA_AAB_1' in .* has no 'seg' file, but .*TCIA01"),
        (fake.brats_2023, "different label ids; name the folder of one release"),
        (twice, r"'BraTS19_CBICA_AAB_1' is twice in"),
        (lambda root: fake.brats_case(root / "HGG" / "BraTS19_CBICA_AAB_1", ending=".nii"), "are one image twice"),
    ],
)
def test_refusals(tmp_path, change, message):
    change(fake.brats_2019(tmp_path))
    with pytest.raises(DataError, match=message):
        layouts.detect(tmp_path)


def test_sub_challenges_with_other_ids_do_not_mix(tmp_path):
    fake.brats_2023(tmp_path, ["BraTS-PED-00002-000", "BraTS-GLI-00002-000"])
    with pytest.raises(DataError, match=r"GLI-00002-000 and .*PED-00002-000 have different label ids"):
        layouts.detect(tmp_path)
