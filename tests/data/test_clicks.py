"""A user's prompts: what a table or a JSON file says, on which slices it lands, and what is refused."""

import itertools
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from calsegx.data import clicks, frames, nifti
from calsegx.interfaces import Case, DataError


def write_clicks(tmp_path, *lines, header="case_id i j k label"):
    path = tmp_path / "clicks.tsv"
    path.write_text("\n".join([header, *lines]).replace(" ", "\t") + "\n")
    return path


def volume_of(tmp_path, matrix=None, shape=(6, 7, 8), origin=(0, 0, 0)):
    data = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3) if matrix is None else matrix
    affine[:3, 3] = origin
    image = nibabel.Nifti1Image(data, affine)
    image.set_sform(affine, 1)
    (tmp_path / "v.nii").write_bytes(image.to_bytes())
    return nifti.read(tmp_path / "v.nii"), data


def test_clicks_follow_every_axis_order(tmp_path):
    found = clicks.read_clicks(write_clicks(tmp_path, "a 1 2 3 1"))
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            volume, data = volume_of(tmp_path, np.eye(3)[list(order)] * signs)
            slices, native = clicks.from_clicks(found["a"], "a", volume, "gt_points")
            x, y = native.points[0, 0].astype(int)
            assert volume.voxels[slices[0], y, x] == data[1, 2, 3]


def test_clicks_are_grouped_and_padded_by_slice(tmp_path):
    path = write_clicks(tmp_path, "a 1 1 5 1", "", "a 2 2 2 1", "a 3 3 5 0", "a 4 4 5 1", "b 0 0 0 1")
    found = clicks.read_clicks(path)
    volume, _ = volume_of(tmp_path)
    slices, native = clicks.from_clicks(found["a"], "a", volume, "gt_points")
    assert slices.tolist() == [2, 5]
    assert native.labels.tolist() == [[1, -1, -1], [1, 0, 1]]
    assert native.points.shape == (2, 3, 2)
    assert native.boxes is None
    single = clicks.from_clicks(found["b"], "b", volume, "gt_points")[1]
    assert single.labels.tolist() == [[1, -1]]


def test_box_corners_in_any_order(tmp_path):
    found = clicks.read_clicks(write_clicks(tmp_path, "a 4 1 2 3", "a 1 5 2 2"))
    volume, _ = volume_of(tmp_path)
    slices, native = clicks.from_clicks(found["a"], "a", volume, "gt_box")
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
        clicks.read_clicks(write_clicks(tmp_path, *lines))
    assert "clicks.tsv" in str(caught.value)


def test_bad_click_headers_and_missing_file(tmp_path):
    with pytest.raises(DataError, match="line 1: expected the tab-separated columns case_id, i, j, k, label"):
        clicks.read_clicks(write_clicks(tmp_path, "a 1 2 3 1", header="case_id x y label"))
    with pytest.raises(DataError, match=r"none.tsv cannot be read"):
        clicks.read_clicks(tmp_path / "none.tsv")


@pytest.mark.parametrize(
    ("lines", "protocol", "message"),
    [
        (
            ["a 1 1 1 1", "a 6 1 1 1"],
            "gt_points",
            r"line 3: the voxel \(6, 1, 1\) is outside .*case 'a' of 6 x 7 x 8 voxels",
        ),
        (["a 1 1 -2 1"], "gt_points", r"line 2: the voxel \(1, 1, -2\) is outside"),
        (["a 1 1 1 0"], "gt_points", "only background clicks"),
        (["a 1 1 1 1"], "gt_box", "trained with boxes .*expected the labels 2 and 3 in case 'a', got 1"),
        (["a 1 1 1 2", "a 2 2 1 3"], "gt_points", "trained with points .*got 2"),
        (["a 1 1 1 2"], "gt_box", "needs one corner of label 2"),
        (["a 1 1 1 2", "a 2 2 2 3"], "gt_box", "needs one corner of label 2"),
        (["a 1 1 1 2", "a 1 2 1 3"], "gt_box", "has no area"),
    ],
)
def test_clicks_that_do_not_fit(tmp_path, lines, protocol, message):
    found = clicks.read_clicks(write_clicks(tmp_path, *lines))
    volume, _ = volume_of(tmp_path)
    with pytest.raises(DataError, match=message):
        clicks.from_clicks(found["a"], "a", volume, protocol)


def test_check_clicks(tmp_path):
    found = clicks.read_clicks(write_clicks(tmp_path, "a 1 1 1 1", "b 1 1 1 1"))
    both = [Case(name, name, {"T1": Path("x")}, None, "test") for name in "ab"]
    clicks.check_clicks(found, both, "gt_points")
    with pytest.raises(DataError, match="no clicks for case 'c'"):
        clicks.check_clicks(found, [*both, Case("c", "c", {}, None, "test")], "gt_points")
    with pytest.raises(DataError, match="line 3: 'b' is not among the cases"):
        clicks.check_clicks(found, both[:1], "gt_points")
    with pytest.raises(DataError, match="trained with boxes"):
        clicks.check_clicks(found, both, "gt_box")


def write_json(tmp_path, content):
    path = tmp_path / "clicks.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


VOXELS = [{"i": 1, "j": 1, "k": 5, "label": 1}, {"i": 2, "j": 3, "k": 5, "label": 0}]


def test_the_same_clicks_in_every_format(tmp_path):
    volume, _ = volume_of(tmp_path, np.diag([-2.0, 3, 1.5]), origin=(10, -20, 30))
    tsv = write_clicks(tmp_path, "a 1 1 5 1", "a 2 3 5 0")
    csv = tmp_path / "clicks.CSV"
    csv.write_text("case_id,i,j,k,label\r\na,1,1,5,1\r\na,2,3,5,0\r\n")
    mm = tmp_path / "mm.csv"
    mm.write_text("case_id,x,y,z,label\na,8,-17.0,37.5,1\na, 6.2, -11.4, 36.8, 0\n")
    world = [{"x": 8, "y": -17, "z": 37.5, "label": 1}, {"label": 0, "z": 37.9, "y": -11, "x": 6}]
    mixed = [VOXELS[0], world[1]]
    written = [write_json(tmp_path, {"a": entries}) for entries in (VOXELS,)]
    files = [tsv, csv, mm, *written]
    expected = clicks.from_clicks(clicks.read_clicks(tsv)["a"], "a", volume, "gt_points")
    assert expected[0].tolist() == [5]
    for path in files:
        slices, native = clicks.from_clicks(clicks.read_clicks(path)["a"], "a", volume, "gt_points")
        np.testing.assert_array_equal(slices, expected[0])
        np.testing.assert_array_equal(native.points, expected[1].points)
        np.testing.assert_array_equal(native.labels, expected[1].labels)
    for entries in (world, mixed):
        table = clicks.read_clicks(write_json(tmp_path, {"a": entries}))["a"]
        np.testing.assert_array_equal(clicks.from_clicks(table, "a", volume, "gt_points")[1].points, expected[1].points)


def test_millimetres_follow_every_axis_order_and_oblique_affines(tmp_path):
    oblique = np.array([[0.9, -0.2, 0.1], [0.25, 1.1, -0.1], [0.0, 0.15, 2.0]])
    for order in itertools.permutations(range(3)):
        volume, data = volume_of(tmp_path, oblique[:, list(order)], origin=(5, -7, 11))
        x, y, z = oblique[:, list(order)] @ [1, 2, 3] + [5, -7, 11]
        table = clicks.read_clicks(write_json(tmp_path, {"a": [{"x": x, "y": y, "z": z, "label": 1}]}))["a"]
        (number,), native = clicks.from_clicks(table, "a", volume, "gt_points")
        column, row = native.points[0, 0].astype(int)
        assert volume.voxels[number, row, column] == data[1, 2, 3]


def test_millimetres_up_to_half_a_voxel_outside(tmp_path):
    volume, _ = volume_of(tmp_path, np.diag([2.0, 2, 2]))
    for x, inside in ((-1.0, True), (11.0, True), (-1.2, False), (11.2, False)):
        table = clicks.read_clicks(write_json(tmp_path, {"a": [{"x": x, "y": 0, "z": 0, "label": 1}]}))["a"]
        if inside:
            _, native = clicks.from_clicks(table, "a", volume, "gt_points")
            assert native.points[0, 0, 0] in (0, 5)
        else:
            with pytest.raises(DataError, match=r"clicks.json, a\[0\]: .*outside the image of case 'a' of 6 x 7 x 8"):
                clicks.from_clicks(table, "a", volume, "gt_points")


def test_units_that_were_mistaken_for_each_other_are_told_apart(tmp_path):
    volume, _ = volume_of(tmp_path, np.diag([1.0, 1, 1]), origin=(-100, 50, 20))
    asked = {
        "i j k": ("-98 52 23", "would be inside as millimetres, which are named x, y, z"),
        "x y z": ("1 2 3", "would be inside as voxel indices, which are named i, j, k"),
    }
    for columns, (numbers, message) in asked.items():
        path = write_clicks(tmp_path, f"a {numbers} 1", header=f"case_id {columns} label")
        with pytest.raises(DataError, match=f"clicks.tsv, line 2: .*{message}"):
            clicks.from_clicks(clicks.read_clicks(path)["a"], "a", volume, "gt_points")
    path = write_clicks(tmp_path, "a 700 512 3 1")  # of SAM's 1024 pixels
    with pytest.raises(DataError, match="positions in the image file itself, not in a resized picture"):
        clicks.from_clicks(clicks.read_clicks(path)["a"], "a", volume, "gt_points")


def test_json_boxes(tmp_path):
    volume, _ = volume_of(tmp_path)
    path = write_json(tmp_path, {"a": [{"box": [4, 1, 2, 1, 5, 2]}, {"box": [0, 0, 3, 1, 1, 3]}]})
    slices, native = clicks.from_clicks(clicks.read_clicks(path)["a"], "a", volume, "gt_box")
    assert slices.tolist() == [2, 3]
    assert native.boxes.tolist() == [[1, 1, 4, 5], [4, 5, 5, 6]]


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([1, 1, 2, 1, 5, 2], r"clicks.json, a\[0\]: the box in case 'a' has no area"),
        ([1, 1, 2, 4, 7, 2], r"a\[0\]: the voxel \(4, 7, 2\) is outside"),
        ([1, 1, 2, 4, 5, 3], r"a\[0\]: a slice of case 'a' needs one corner .* give every slice its own box"),
    ],
)
def test_json_boxes_that_do_not_fit(tmp_path, box, message):
    volume, _ = volume_of(tmp_path)
    table = clicks.read_clicks(write_json(tmp_path, {"a": [{"box": box}]}))["a"]
    with pytest.raises(DataError, match=message):
        clicks.from_clicks(table, "a", volume, "gt_box")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "clicks.json is not valid JSON"),
        ('{"a": [], "a": []}', "'a' stands there twice"),
        ([], "expected an object with a list of clicks for every case id"),
        ({}, "holds no clicks"),
        ({"a": {}}, "clicks.json, a: expected a list of clicks"),
        ({"a": [3]}, r"a\[0\]: expected .*got 3"),
        ({"a": [{"i": 1, "j": 1, "k": 1}]}, r"a\[0\]: expected"),
        ({"a": [{"box": [1, 2, 3]}]}, r"a\[0\]: expected"),
        ({"a": [VOXELS[0], VOXELS[0] | {"i": 1.5}]}, r"a\[1\], i: 1.5 is not an integer"),
        ({"a": [VOXELS[0] | {"i": True}]}, r"a\[0\], i: True is not an integer"),
        ({"a": [VOXELS[0] | {"label": 4}]}, r"a\[0\], label: 4; expected 1 .foreground."),
        ({"a": [VOXELS[0] | {"label": "1"}]}, r"a\[0\], label: '1' is not an integer"),
        ('{"a": [{"x": NaN, "y": 1, "z": 1, "label": 1}]}', r"a\[0\], x: nan is not a number"),
        ({"a": [{"box": [1, 2, 3, 4, 5, 6.5]}]}, r"a\[0\], box: 6.5 is not an integer"),
    ],
)
def test_bad_json(tmp_path, content, message):
    with pytest.raises(DataError, match=message) as caught:
        clicks.read_clicks(write_json(tmp_path, content))
    assert "clicks.json" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case_id;i;j;k;label\na;1;1;1;1\n", "line 1: expected the comma-separated columns"),
        ("case_id,x,y,z,label\na,1,inf,1,1\n", "line 2, column y: inf is not a number; expected RAS. millimetres"),
        ("case_id,x,y,z,label\na,1,b,1,1\n", "line 2, column y: 'b' is not a number"),
        ('case_id,x,y,z,label\na,"1,5",1,1,1\n', "line 2, column x: '1,5' is not a number"),
        ("case_id,i,j,k,label\na,1,1,1e3,1\n", "line 2, column k: '1e3' is not an integer"),
        ("", "line 1: expected the comma-separated columns .*got nothing"),
    ],
)
def test_bad_csv(tmp_path, text, message):
    path = tmp_path / "clicks.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        clicks.read_clicks(path)


def test_a_model_without_prompts_takes_no_clicks(tmp_path):
    found = clicks.read_clicks(write_clicks(tmp_path, "a 1 1 1 1"))
    with pytest.raises(DataError, match="clicks.tsv, line 2: the model was trained without prompts"):
        clicks.check_clicks(found, [Case("a", "a", {}, None, "test")], "none")


def test_clicks_of_a_volume_go_to_every_slice(tmp_path):
    volume, _ = volume_of(tmp_path)
    found = clicks.read_clicks(write_clicks(tmp_path, "a 1 2 3 1", "a 5 5 5 0", "b 1 1 1 0"))
    halved = frames.frame_geometry((8, 7, 6), (1.0, 1.0, 1.0), 64, (16, 16), (4, 7, 6))
    slices, native = clicks.from_clicks(found["a"], "a", volume, "volume_points", halved)
    assert slices.tolist() == [0, 1, 2, 3]
    assert native.points.tolist() == [[[4, 4], [0, 1]]] * 4 and native.labels.tolist() == [[1, 0]] * 4
    with pytest.raises(DataError, match="the volume in case 'b' has only background clicks"):
        clicks.from_clicks(found["b"], "b", volume, "volume_points")


def test_clicks_of_slices_that_become_one_are_put_together(tmp_path):
    volume, _ = volume_of(tmp_path)
    table = clicks.read_clicks(write_clicks(tmp_path, "a 1 1 2 1", "a 2 2 3 1", "a 3 3 3 0"))["a"]
    halved = frames.frame_geometry((8, 7, 6), (1.0, 1.0, 1.0), 64, (16, 16), (4, 7, 6))
    slices, native = clicks.from_clicks(table, "a", volume, "gt_points", halved)
    row = slices.tolist().index(1)
    assert sorted(native.labels[row].tolist()) == [0, 1, 1]
    corners = ["a 1 1 2 2", "a 2 3 2 3", "a 4 4 3 2", "a 2 2 3 3"]
    table = clicks.read_clicks(write_clicks(tmp_path, *corners))["a"]
    slices, native = clicks.from_clicks(table, "a", volume, "gt_box", halved)
    assert native.boxes[slices.tolist().index(1)].tolist() == [1, 2, 4, 5]
