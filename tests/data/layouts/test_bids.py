"""BIDS: raw images, masks in derivatives, domains from participants.tsv or the JSON beside an image."""

import json

import pytest

from calsegx.data import layouts
from calsegx.interfaces import DataError
from tests.data.layouts import fake


def table(path, text):
    path.write_text(text.replace(" ", "\t"))


def test_masks_of_derivatives(tmp_path):
    root = fake.bids(tmp_path, subjects=("sub-01", "sub-02"))
    fake.write(root, *(f"sub-03/anat/sub-03_{image}.nii.gz" for image in ("T1w", "T2w", "FLAIR")))
    fake.write(root, "derivatives/fmriprep/sub-01/anat/sub-01_desc-brain_mask.nii.gz")
    name, dataset = layouts.recognise(root)
    assert (name, dataset.channels, dataset.labels) == ("bids", ("FLAIR", "T1w"), {"background": 0, "lesion": 1})
    first, _, third = dataset.cases
    assert (first.case_id, first.subject_id, first.split) == ("sub-01", "sub-01", "")
    assert first.images["T1w"] == root / "sub-01" / "anat" / "sub-01_T1w.nii.gz"
    assert first.label == root / "derivatives" / "manual" / "sub-01" / "anat" / "sub-01_desc-lesion_mask.nii.gz"
    assert (third.label, third.split) == (None, "test")


def test_sessions_and_repeated_suffixes(tmp_path):
    root = fake.bids(tmp_path, subjects=())
    for session in ("ses-a", "ses-b"):
        case = f"sub-01_{session}"
        fake.write(root / "sub-01" / session / "anat", f"{case}_T1w.nii.gz", f"{case}_ce-gd_T1w.nii.gz")
        fake.write(root / "sub-01" / session / "anat", f"{case}_acq-{session[-1]}_FLAIR.nii.gz")
        fake.write(root / "sub-01" / session / "anat", f"{case}_dseg.nii.gz")  # no image, and not in derivatives
        masks = (f"{case}_space-MNI_mask.nii.gz", f"{case}_mask.nii.gz")
        fake.write(root / "derivatives" / "x" / "sub-01" / session, *masks)
    dataset = layouts.detect(root)
    assert dataset.channels == ("FLAIR", "T1w", "ce-gd_T1w") and dataset.labels == {"background": 0, "mask": 1}
    assert [(case.case_id, case.subject_id) for case in dataset.cases] == [
        ("sub-01_ses-a", "sub-01"),
        ("sub-01_ses-b", "sub-01"),
    ]
    assert dataset.cases[1].images["FLAIR"].name == "sub-01_ses-b_acq-b_FLAIR.nii.gz"
    assert dataset.cases[1].label == root / "derivatives" / "x" / "sub-01" / "ses-b" / "sub-01_ses-b_mask.nii.gz"


@pytest.mark.parametrize("name", ["dseg.tsv", "desc-aseg_dseg.tsv", "sub-{}/anat/sub-{}_desc-aseg_dseg.tsv"])
def test_names_of_labels(tmp_path, name):
    root = fake.bids(tmp_path, mask="desc-aseg_dseg")
    assert layouts.detect(root).labels == {}
    for number in ("01", "02", "03"):
        path = root / "derivatives" / "manual" / name.format(number, number)
        table(path, "index name color\n0 Unknown #000\n2 white_matter #fff\n3 cortex #ccc\n")
    assert layouts.detect(root).labels == {"background": 0, "white_matter": 2, "cortex": 3}
    table(path, "index name\n2 cortex\n2 white_matter\n")
    with pytest.raises(DataError, match="the same id"):
        layouts.detect(root)
    table(path, "index\n2\n")
    with pytest.raises(DataError, match=r"dseg\.tsv needs the columns index \(integers\) and name"):
        layouts.detect(root)
    table(path, "index name\n5 pallidum\n")
    if "sub-" in name:
        with pytest.raises(DataError, match="have different labels; write a cases.tsv"):
            layouts.detect(root)
    else:
        assert layouts.detect(root).labels == {"background": 0, "pallidum": 5}


def test_domains(tmp_path):
    root = fake.bids(tmp_path)
    sidecar = {"InstitutionName": "Basel", "Manufacturer": "GE", "ManufacturersModelName": "Signa"}
    (root / "T1w.json").write_text(json.dumps({**sidecar, "MagneticFieldStrength": 1.5}))
    (root / "FLAIR.json").write_text(json.dumps({"Manufacturer": "Siemens", "MagneticFieldStrength": 3}))
    (root / "sub-02" / "anat" / "sub-02_FLAIR.json").write_text(json.dumps(sidecar))
    table(root / "participants.tsv", "participant_id age site\nsub-01 44 Bern\nsub-02 n/a n/a\n")
    found = [(case.centre, case.scanner, case.field_strength) for case in layouts.detect(root).cases]
    assert found == [("Bern", "Siemens", "3"), ("Basel", "GE Signa", "3"), ("", "Siemens", "3")]


def test_refusals(tmp_path):
    root = fake.bids(tmp_path)
    fake.write(root, "derivatives/manual/sub-02/anat/sub-02_desc-two_mask.nii.gz")
    with pytest.raises(DataError, match=r"'sub-02' has several masks \(.*lesion_mask.*two_mask.*write a cases\.tsv"):
        layouts.detect(root)
    fake.write(root, "derivatives/net/sub-02/anat/sub-02_dseg.nii.gz")
    with pytest.raises(DataError, match=r"manual and .*net all hold masks; write a cases\.tsv"):
        layouts.detect(root)
    fake.bids(tmp_path / "other", subjects=("sub-01",), images=("T1w",))
    fake.bids(tmp_path / "other", subjects=("sub-02",), images=("T2w",))
    with pytest.raises(DataError, match=r"no image that every case has \(sub-01: T1w; sub-02: T2w"):
        layouts.detect(tmp_path / "other")
