"""ATLAS v2.0, with and without its outer folder."""

import pytest

from calsegx.data import layouts
from calsegx.interfaces import DataError
from tests.data.layouts import fake


@pytest.mark.parametrize("inside", ["ATLAS_2", "."])
def test_cohort_is_the_centre(tmp_path, inside):
    root = fake.atlas(tmp_path, inside)
    (root / inside / "dataset_description.json").write_text("{}")  # it looks like BIDS, and is read as ATLAS
    name, dataset = layouts.recognise(root)
    assert (name, dataset.channels, dataset.labels) == ("atlas", ("T1w",), {"background": 0, "lesion": 1})
    assert [(case.case_id, case.subject_id, case.centre, case.split) for case in dataset.cases] == [
        ("sub-r001s001_ses-1", "sub-r001s001", "R001", ""),
        ("sub-r001s002_ses-1", "sub-r001s002", "R001", ""),
        ("sub-r009s001_ses-1", "sub-r009s001", "R009", ""),
        ("sub-r010s001_ses-1", "sub-r010s001", "R010", "test"),
    ]
    first, last = dataset.cases[0], dataset.cases[-1]
    assert first.images["T1w"].name == "sub-r001s001_ses-1_space-MNI152NLin2009aSym_T1w.nii.gz"
    assert first.label.name == "sub-r001s001_ses-1_space-MNI152NLin2009aSym_label-L_desc-T1lesion_mask.nii.gz"
    assert last.label is None and last.images["T1w"].is_file()


@pytest.mark.parametrize("kind", ["T1w", "label-L_desc-T1lesion_mask"])
def test_half_a_training_case_is_refused(tmp_path, kind):
    root = fake.atlas(tmp_path)
    next(root.rglob(f"sub-r001s002*{kind}.nii.gz")).unlink()
    with pytest.raises(DataError, match=rf"'sub-r001s002_ses-1' has no file .*{kind}\.nii\.gz; add it"):
        layouts.detect(root)


def test_other_names_are_not_atlas(tmp_path):
    fake.write(tmp_path, "Training/R001/sub-r001s001/ses-1/anat/sub-r001s001_ses-1_T1w.nii.gz")
    assert layouts.registry.get("atlas")(tmp_path) is None
