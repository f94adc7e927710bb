"""Folders of pictures and masks, and what is wrong with them."""

import numpy as np
import pytest
from PIL import Image

from calsegx import configs
from calsegx.data import cases, layouts
from calsegx.data.layouts import images_2d
from calsegx.interfaces import DataError
from tests.data.layouts.trees import pictures, touch


def test_colour_pictures(tmp_path):
    touch(pictures(tmp_path) / "images/Thumbs.db", tmp_path / "masks/.DS_Store")
    dataset = cases.load(configs.DataConfig(root=str(tmp_path)))
    assert dataset.channels == ("red", "green", "blue")
    assert dataset.labels == {"background": 0, "foreground": 255}
    case = dataset.cases[1]
    assert (case.case_id, case.subject_id, case.label) == ("eye 1", "eye 1", tmp_path / "masks/eye 1.png")
    assert case.images == dict.fromkeys(dataset.channels, tmp_path / "images/eye 1.png")
    assert case.volumes == {"red": 0, "green": 1, "blue": 2}


def test_grey_pictures_and_labels_for_masks(tmp_path):
    dataset = layouts.detect(pictures(tmp_path, "labels", colour=False, ids=(0, 1, 2, 4)))
    assert dataset.channels == ("grey",)
    assert dataset.labels == {"background": 0, "class_1": 1, "class_2": 2, "class_4": 4}
    assert dataset.cases[0].volumes == {}


def test_declared_labels(tmp_path):
    pictures(tmp_path, ids=(0, 7))
    (tmp_path / "labels.json").write_text('{"background": 0, "disc": 7, "cup": 9}')
    assert layouts.detect(tmp_path).labels == {"background": 0, "disc": 7, "cup": 9}
    (tmp_path / "labels.json").write_text('{"disc": "7"}')
    with pytest.raises(DataError, match=r"labels.json: label 'disc' is '7'; expected"):
        layouts.detect(tmp_path)


def test_a_sample_of_the_masks_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(images_2d, "SAMPLED_MASKS", 3)
    pictures(tmp_path, ids=(0,), count=5)
    for number, value in ((0, 10), (1, 11), (2, 12), (3, 13), (4, 14)):
        Image.fromarray(np.full((6, 8), value, np.uint8)).save(tmp_path / f"masks/eye {number}.png")
    assert sorted(layouts.detect(tmp_path).labels.values()) == [0, 10, 12, 14]  # first, middle, last


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ((0,), r"The 3 masks looked at in .*masks are empty; declare the ids in .*labels.json: \{"),
        (range(48), "hold 48 different values, as smoothed edges do; threshold the masks, or declare"),
    ],
)
def test_masks_without_usable_ids(tmp_path, ids, message):
    with pytest.raises(DataError, match=message):
        layouts.detect(pictures(tmp_path, ids=ids))


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ("images/other.png", r"other.png has no mask .*masks.other.png"),
        ("masks/other.png", r"other.png has no picture .*images.other.png"),
        ("images/other.JPG", r"other.JPG is not a PNG file; convert"),
        ("masks/eye 1.PNG", r"eye 1.PNG and|and .*eye 1.PNG have the same stem"),
        ("labels/eye 1.png", "has both masks and labels"),
    ],
)
def test_files_that_do_not_pair(tmp_path, added, message):
    touch(pictures(tmp_path) / added)
    with pytest.raises(DataError, match=message):
        layouts.detect(tmp_path)


def test_folders_without_png_files_are_of_another_layout(tmp_path):
    touch(tmp_path / "images/a.nii.gz", tmp_path / "labels/a.nii.gz", tmp_path / "images/._a.png")
    with pytest.raises(DataError, match="no known layout"):
        layouts.detect(tmp_path)


def test_a_damaged_first_picture_is_named(tmp_path):
    (pictures(tmp_path) / "images/eye 0.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"eye 0.png is empty"):
        layouts.detect(tmp_path)
