"""nnU-Net v1 and Decathlon datasets, and what is wrong with them."""

import pytest

from calsegx.data import layouts
from calsegx.interfaces import DataError
from tests.data.layouts.trees import decathlon, nnunet_v1, touch

CHANNELS = ("FLAIR", "T1w", "t1gd", "T2w")


def test_decathlon(tmp_path):
    dataset = layouts.detect(decathlon(tmp_path))
    assert dataset.channels == CHANNELS
    assert dataset.labels == {"background": 0, "edema": 1, "non-enhancing tumor": 2, "enhancing tumour": 3}
    first, second, test = dataset.cases
    assert (first.case_id, first.subject_id, first.split) == ("BRATS_001", "BRATS_001", "")
    assert first.images == dict.fromkeys(CHANNELS, tmp_path / "imagesTr/BRATS_001.nii.gz")
    assert first.volumes == {"FLAIR": 0, "T1w": 1, "t1gd": 2, "T2w": 3}
    assert second.label == tmp_path / "labelsTr/BRATS_002.nii.gz"
    assert (test.case_id, test.split, test.label) == ("BRATS_485", "test", None)


def test_one_modality_is_one_volume(tmp_path):
    dataset = layouts.detect(decathlon(tmp_path, modality={"0": "CT"}))
    assert dataset.channels == ("CT",)
    assert all(case.volumes == {} for case in dataset.cases)


def test_files_per_channel(tmp_path):
    nnunet_v1(tmp_path)
    touch(tmp_path / "labelsTs/la_001.nii.gz")
    dataset = layouts.detect(tmp_path)
    first, _, test = dataset.cases
    assert first.images == {name: tmp_path / f"imagesTr/la_003_000{i}.nii.gz" for i, name in enumerate(("T2", "ADC"))}
    assert first.volumes == {}
    assert test.label == tmp_path / "labelsTs/la_001.nii.gz"


def test_resource_forks_that_are_listed(tmp_path):
    entry = {"image": "./imagesTr/._la_1.nii.gz", "label": "./labelsTr/._la_1.nii.gz"}
    whole = {"image": "./imagesTr/la_1.nii.gz", "label": "./labelsTr/la_1.nii.gz"}
    decathlon(tmp_path, cases=("la_1",), training=[entry, whole], test=["./imagesTs/._t.nii.gz"], numTraining=2)
    assert [case.case_id for case in layouts.detect(tmp_path).cases] == ["la_1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modality": ["T2"]}, r"modality is \['T2'\]; expected"),
        ({"modality": {"0": "T2", "2": "ADC"}}, "modality is .* consecutive numbers"),
        ({"labels": None}, "labels are None; expected"),
        ({"labels": {"background": 0, "tumour": 1}}, r'expected \{"0": "background", "1": "tumour"\} \(nnU-Net v1\)'),
        ({"labels": {"0": "background", "1": "a", "2": "a"}}, "two labels have the same name"),
        ({"labels": {"0": "air", "1": "a"}}, "must be 'background'"),
        ({"numTraining": 3}, "numTraining is 3, 'training' lists 2 cases"),
        ({"training": {"a": 1}, "numTraining": 0}, "training is a dict; expected a list"),
        ({"training": ["a.nii.gz"], "numTraining": 1}, "training holds 'a.nii.gz'; expected"),
        ({"test": [{"label": "a.nii.gz"}]}, "test holds .*; expected the path of an image"),
        ({"test": ["./imagesTs/a.png"]}, "test names './imagesTs/a.png'; expected a file that ends in"),
        ({"training": [], "test": [], "numTraining": 0}, "lists no case"),
    ],
)
def test_bad_descriptions(tmp_path, changes, message):
    with pytest.raises(DataError, match=message) as caught:
        layouts.detect(nnunet_v1(tmp_path, **changes))
    assert "dataset.json" in str(caught.value)


def test_missing_and_ambiguous_images(tmp_path):
    nnunet_v1(tmp_path)
    (tmp_path / "imagesTr/la_004_0001.nii.gz").unlink()
    with pytest.raises(DataError, match=r"'la_004' .* has 1 images; expected la_004.nii.gz .* la_004_0000.nii.gz to"):
        layouts.detect(tmp_path)
    touch(*(tmp_path / f"imagesTr/la_004_000{number}.nii.gz" for number in (1, 2)))
    with pytest.raises(DataError, match="'la_004' .* has 3 images; expected"):
        layouts.detect(tmp_path)
    touch(tmp_path / "imagesTr/la_003.nii.gz")
    with pytest.raises(DataError, match=r"Case 'la_003' has both .*la_003.nii.gz and .*la_003_0000.nii.gz; remove"):
        layouts.detect(tmp_path)
