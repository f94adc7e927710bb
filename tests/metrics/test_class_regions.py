import numpy as np
import pytest

from calsegx.interfaces import InputError, UsageError
from calsegx.metrics import class_regions, overlap

# The same tumour by both conventions.
OLD = np.array([[0, 1, 2, 4], [4, 4, 0, 2]])
NEW = np.array([[0, 1, 2, 3], [3, 3, 0, 2]], np.uint8)


@pytest.mark.parametrize(("labels", "convention"), [(OLD, "1,2,4"), (NEW, "1,2,3")])
def test_brats_regions(labels, convention):
    masks = class_regions.brats_regions(labels, convention)
    assert list(masks) == ["WT", "TC", "ET"]
    assert all(mask.dtype == np.bool_ for mask in masks.values())
    np.testing.assert_array_equal(masks["WT"], [[0, 1, 1, 1], [1, 1, 0, 1]])
    np.testing.assert_array_equal(masks["TC"], [[0, 1, 0, 1], [1, 1, 0, 0]])
    np.testing.assert_array_equal(masks["ET"], [[0, 0, 0, 1], [1, 1, 0, 0]])


def test_the_wrong_convention_is_refused():
    with pytest.raises(InputError, match=r"holds the ids \[4\], expected 0 and 1,2,3; choose the other"):
        class_regions.brats_regions(OLD, "1,2,3")
    with pytest.raises(InputError, match=r"holds the ids \[3\]"):
        class_regions.brats_regions(NEW, "1,2,4")
    with pytest.raises(UsageError, match="convention='2021' is not one of 1,2,4, 1,2,3"):
        class_regions.brats_regions(NEW, "2021")


def test_own_regions_may_overlap_and_leave_ids_out():
    labels = np.array([0, 1, 2, 3, 7])
    masks = class_regions.region_masks(labels, {"a": (1, 2), "b": [2, 7]})
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        "a": [False, True, True, False, False],
        "b": [False, False, True, False, True],
    }


@pytest.mark.parametrize("convention", class_regions.BRATS)
def test_counts_from_the_confusion_matrix_equal_those_of_the_masks(convention):
    ids = [0, *class_regions.BRATS[convention]["WT"]]
    prediction, truth = np.random.default_rng(0).choice(ids, (2, 5, 6, 7))
    counts = class_regions.region_counts(overlap.confusion(prediction, truth, 5), class_regions.BRATS[convention])
    masks = [class_regions.brats_regions(labels, convention) for labels in (prediction, truth)]
    assert counts == {name: overlap.overlap_counts(masks[0][name], masks[1][name]) for name in ("WT", "TC", "ET")}


@pytest.mark.parametrize("ids", [(), (1, -1), (1.0,), ("1",), (True,)])
def test_bad_ids_are_refused(ids):
    with pytest.raises(UsageError, match="The region 'x' has the ids"):
        class_regions.region_masks(NEW, {"x": ids})


def test_other_bad_input_is_refused():
    with pytest.raises(UsageError, match="no regions"):
        class_regions.region_masks(NEW, {})
    for unusable in (NEW.astype(float), NEW > 0, NEW.tolist()):
        with pytest.raises(InputError, match="expected an array of integer labels"):
            class_regions.brats_regions(unusable, "1,2,3")
    with pytest.raises(InputError, match="not in a confusion matrix of 4 classes"):
        class_regions.region_counts(np.eye(4, dtype=int), class_regions.BRATS["1,2,4"])
