"""Prompts from reference masks and from a user's clicks."""

import itertools
from pathlib import Path

import nibabel
import numpy as np
import pytest

from calsegx.data import nifti, prompts
from calsegx.interfaces import Case, DataError

SPACING = (1.0, 1.0)


def one(mask, spacing=SPACING):
    points, labels = prompts.points_from_labels(mask[None], spacing)
    return points[0], labels[0].tolist()


def test_centroid_and_farthest_pixel():
    mask = np.zeros((20, 30), bool)
    mask[2:5, 4:8] = True
    points, labels = one(mask)
    assert labels == [1, 0]
    np.testing.assert_allclose(points, [[5.5, 3.0], [29, 19]])


def test_centroid_of_a_ring_snaps_into_it():
    rows, columns = np.mgrid[:41, :41]
    radius = np.hypot(rows - 20, columns - 20)
    mask = (radius > 8) & (radius < 11)
    points, labels = one(mask)
    x, y = points[0].astype(int)
    assert mask[y, x]
    assert labels == [1, 0]
    nearest = radius[mask].min()
    assert np.hypot(x - 20, y - 20) == pytest.approx(nearest)
    # The first of the nearest in row order.
    assert (y, x) == min((r, c) for r, c in np.argwhere(mask) if np.isclose(radius[r, c], nearest))


def test_background_ties_take_the_smallest_index():
    mask = np.zeros((21, 21), bool)
    mask[10, 10] = True
    points, _ = one(mask)
    assert points[1].tolist() == [0, 0]


def test_spacing_decides_what_is_far():
    mask = np.zeros((10, 10), bool)
    mask[0, 0] = True
    mask[0, 9] = True
    assert one(mask, (1.0, 1.0))[0][1].tolist() == [4, 9]
    mask[9, 0] = mask[9, 9] = True
    assert one(mask, (1.0, 3.0))[0][1].tolist() == [4, 4]
    mask[:] = False
    mask[0, :] = mask[:, 0] = True
    assert one(mask, (1.0, 5.0))[0][1].tolist() == [2, 9]


def test_full_and_empty_masks():
    points, labels = one(np.ones((5, 5), bool))
    assert labels == [1, -1]
    np.testing.assert_allclose(points, [[2, 2], [0, 0]])
    assert one(np.zeros((5, 5), bool))[1] == [-1, -1]


def test_boxes():
    mask = np.zeros((2, 10, 12), bool)
    mask[0, 2:5, 3:9] = True
    mask[1, 9, 11] = True
    assert prompts.boxes_from_labels(mask).tolist() == [[3, 2, 8, 4], [11, 9, 11, 9]]
    with pytest.raises(ValueError, match="foreground in every slice"):
        prompts.boxes_from_labels(np.zeros((1, 3, 3), bool))


def write_clicks(tmp_path, *lines, header="case_id i j k label"):
    path = tmp_path / "clicks.tsv"
    path.write_text("\n".join([header, *lines]).replace(" ", "\t") + "\n")
    return path


def volume_of(tmp_path, matrix=None, shape=(6, 7, 8)):
    data = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3) if matrix is None else matrix
    image = nibabel.Nifti1Image(data, affine)
    image.set_sform(affine, 1)
    (tmp_path / "v.nii").write_bytes(image.to_bytes())
    return nifti.read(tmp_path / "v.nii"), data


def test_clicks_follow_every_axis_order(tmp_path):
    clicks = prompts.read_clicks(write_clicks(tmp_path, "a 1 2 3 1"))
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            volume, data = volume_of(tmp_path, np.eye(3)[list(order)] * signs)
            slices, native = prompts.from_clicks(clicks["a"], "a", volume, "gt_points")
            x, y = native.points[0, 0].astype(int)
            assert volume.voxels[slices[0], y, x] == data[1, 2, 3]


def test_clicks_are_grouped_and_padded_by_slice(tmp_path):
    path = write_clicks(tmp_path, "a 1 1 5 1", "", "a 2 2 2 1", "a 3 3 5 0", "a 4 4 5 1", "b 0 0 0 1")
    clicks = prompts.read_clicks(path)
    volume, _ = volume_of(tmp_path)
    slices, native = prompts.from_clicks(clicks["a"], "a", volume, "gt_points")
    assert slices.tolist() == [2, 5]
    assert native.labels.tolist() == [[1, -1, -1], [1, 0, 1]]
    assert native.points.shape == (2, 3, 2)
    assert native.boxes is None
    single = prompts.from_clicks(clicks["b"], "b", volume, "gt_points")[1]
    assert single.labels.tolist() == [[1, -1]]


def test_box_corners_in_any_order(tmp_path):
    clicks = prompts.read_clicks(write_clicks(tmp_path, "a 4 1 2 3", "a 1 5 2 2"))
    volume, _ = volume_of(tmp_path)
    slices, native = prompts.from_clicks(clicks["a"], "a", volume, "gt_box")
    assert slices.tolist() == [2]
    assert native.boxes.tolist() == [[5 - 4, 6 - 5, 5 - 1, 6 - 1]]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a 1 2 3 4"], "line 2, column label: 4"),
        (["a 1 2 3 -1"], "line 2, column label: -1"),
        (["a 1 2 3 1", "a 1.5 2 3 1"], "line 3, column i: '1.5' is not an integer"),
        (["a 1 2 3 fg"], "line 2, column label: 'fg'"),
        (["a 1 2 1"], "line 2: expected 5 fields"),
        ([], "holds no clicks"),
    ],
)
def test_bad_clicks_files(tmp_path, lines, message):
    with pytest.raises(DataError, match=message) as caught:
        prompts.read_clicks(write_clicks(tmp_path, *lines))
    assert "clicks.tsv" in str(caught.value)


def test_bad_click_headers_and_missing_file(tmp_path):
    with pytest.raises(DataError, match="line 1: expected the tab-separated columns case_id, i, j, k, label"):
        prompts.read_clicks(write_clicks(tmp_path, "a 1 2 3 1", header="case_id x y z label"))
    with pytest.raises(DataError, match=r"none.tsv cannot be read"):
        prompts.read_clicks(tmp_path / "none.tsv")


@pytest.mark.parametrize(
    ("lines", "protocol", "message"),
    [
        (["a 1 1 1 1", "a 6 1 1 1"], "gt_points", "line 3, column i: 6 is outside .*case 'a'.* 0 to 5"),
        (["a 1 1 -2 1"], "gt_points", "line 2, column k: -2 is outside"),
        (["a 1 1 1 0"], "gt_points", "only background clicks"),
        (["a 1 1 1 1"], "gt_box", "trained with boxes .*expected the labels 2 and 3 in case 'a', got 1"),
        (["a 1 1 1 2", "a 2 2 1 3"], "gt_points", "trained with points .*got 2"),
        (["a 1 1 1 2"], "gt_box", "needs one corner of label 2"),
        (["a 1 1 1 2", "a 2 2 2 3"], "gt_box", "needs one corner of label 2"),
        (["a 1 1 1 2", "a 1 2 1 3"], "gt_box", "has no area"),
    ],
)
def test_clicks_that_do_not_fit(tmp_path, lines, protocol, message):
    clicks = prompts.read_clicks(write_clicks(tmp_path, *lines))
    volume, _ = volume_of(tmp_path)
    with pytest.raises(DataError, match=message):
        prompts.from_clicks(clicks["a"], "a", volume, protocol)


def test_check_clicks(tmp_path):
    clicks = prompts.read_clicks(write_clicks(tmp_path, "a 1 1 1 1", "b 1 1 1 1"))
    both = [Case(name, name, {"T1": Path("x")}, None, "test") for name in "ab"]
    prompts.check_clicks(clicks, both, "gt_points")
    with pytest.raises(DataError, match="no clicks for case 'c'"):
        prompts.check_clicks(clicks, [*both, Case("c", "c", {}, None, "test")], "gt_points")
    with pytest.raises(DataError, match="line 3: 'b' is not among the cases"):
        prompts.check_clicks(clicks, both[:1], "gt_points")
    with pytest.raises(DataError, match="trained with boxes"):
        prompts.check_clicks(clicks, both, "gt_box")
