"""From a file to the working orientation, through the encoder frame, and back: the voxels and the header it had."""

import itertools

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel import orientations
from scipy import ndimage, spatial

from calsegx import configs
from calsegx.data import classes, frames, nifti, preprocessing
from calsegx.evaluation import predict
from calsegx.interfaces import Case, DataError

SHAPE = (4, 5, 6)
CLASS_MAP = classes.parse("tumour=1,rim=2", {})
GEOMETRY_FIELDS = (
    *("dim", "pixdim", "xyzt_units", "qform_code", "sform_code", "srow_x", "srow_y", "srow_z"),
    *("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
)


def all_axis_orders():
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            matrix = np.zeros((3, 3))
            for axis, (target, sign) in enumerate(zip(order, signs, strict=True)):
                matrix[target, axis] = sign * (0.8, 1.3, 2.0)[axis]
            yield matrix


def special_orientations():
    turn = np.array([[0.8, -0.6, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0]])
    yield turn @ np.diag([-1.0, 1.0, 3.0])  # oblique
    yield np.array([[1.0, 0.2, 0.0], [0.0, 1.1, 0.1], [0.0, 0.0, 2.0]])  # sheared


MATRICES = [*all_axis_orders(), *special_orientations()]


def write(path, data, matrix, codes=(2, 1), units="mm"):
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = matrix, (11.0, -7.0, 3.0)
    if not np.allclose(matrix.T @ matrix, np.diag(np.diag(matrix.T @ matrix))):
        codes = (codes[0], 0)  # a qform cannot hold a shear
    image = nibabel.Nifti1Image(data, affine)
    image.set_sform(affine, codes[0])
    image.set_qform(affine if codes[1] else None, codes[1])
    image.header.set_xyzt_units(units, "sec")
    path.write_bytes(image.to_bytes())
    return path


def assert_same_geometry(written, original):
    """Shape, affine, sform, qform, their codes and units, of two files."""
    first, second = nibabel.load(written), nibabel.load(original)
    assert first.shape == second.shape
    np.testing.assert_array_equal(first.affine, second.affine)
    for name in GEOMETRY_FIELDS:
        np.testing.assert_array_equal(first.header[name], second.header[name], err_msg=name)
    return np.asarray(first.dataobj), np.asarray(second.dataobj)


@pytest.mark.parametrize("slice_axis", configs.SLICE_AXES)
@pytest.mark.parametrize("matrix", MATRICES, ids=[str(i) for i in range(len(MATRICES))])
def test_round_trip_and_working_orientation(tmp_path, matrix, slice_axis):
    path = write(tmp_path / "in.nii", np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE), matrix)
    volume = nifti.read(path, slice_axis=slice_axis)

    assert nibabel.aff2axcodes(volume.affine) == nifti.WORKING_AXES[slice_axis]
    assert volume.voxels.dtype == np.float32
    np.testing.assert_allclose(volume.spacing_mm, np.linalg.norm(volume.affine[:3, :3], axis=0))
    assert nifti.slice_distances(path)[slice_axis] == pytest.approx(volume.spacing_mm[0])
    original = nibabel.load(path)
    data = np.asarray(original.dataobj)
    for file_index in itertools.product(*((0, n - 1) for n in SHAPE)):
        millimetres = original.affine @ [*file_index, 1]
        working = np.linalg.solve(volume.affine, millimetres)[:3]
        np.testing.assert_allclose(working, np.rint(working), atol=1e-4)
        assert volume.voxels[tuple(np.rint(working).astype(int))] == data[file_index]

    nifti.write(tmp_path / "out.nii", volume.voxels, volume, np.float32)
    np.testing.assert_array_equal(*assert_same_geometry(tmp_path / "out.nii", path))


@st.composite
def matrices(draw):
    """Voxel axes in any direction, 0.5 to 6 mm, oblique and a little sheared."""
    seed = draw(st.integers(0, 2**16))
    turn = spatial.transform.Rotation.random(random_state=seed).as_matrix()
    shear = np.eye(3)
    shear[np.triu_indices(3, 1)] = np.random.default_rng(seed).uniform(-0.2, 0.2, 3)
    return turn @ shear @ np.diag(draw(st.tuples(*[st.floats(0.5, 6)] * 3)))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    matrices(),
    st.tuples(*[st.integers(1, 9)] * 3),
    st.sampled_from(configs.SLICE_AXES),
    st.sampled_from([(1, 1), (2, 0), (0, 1), (4, 3)]),
    st.sampled_from(["mm", "micron", "meter", "unknown"]),
)
def test_oblique_sheared_thick_and_odd(tmp_path_factory, matrix, shape, slice_axis, codes, units):
    folder = tmp_path_factory.mktemp("trip")
    if not codes[0]:  # a qform alone holds no shear
        matrix = np.linalg.qr(matrix)[0] * np.linalg.norm(matrix, axis=0)
    data = np.random.default_rng(0).integers(0, 200, shape).astype(np.uint8)
    path = write(folder / "in.nii", data, matrix, codes, units)
    volume = nifti.read(path, slice_axis=slice_axis)
    assert nibabel.aff2axcodes(volume.affine) == nifti.WORKING_AXES[slice_axis]
    nifti.write(folder / "out.nii", volume.voxels, volume, np.uint8)
    np.testing.assert_array_equal(*assert_same_geometry(folder / "out.nii", path))


@pytest.mark.parametrize("slice_axis", configs.SLICE_AXES)
def test_one_volume_of_several(tmp_path, slice_axis):
    data = np.arange(np.prod(SHAPE) * 3, dtype=np.int16).reshape(*SHAPE, 3)
    path = write(tmp_path / "in.nii", data, MATRICES[17])
    for index in range(3):
        volume = nifti.read(path, index, slice_axis)
        nifti.write(tmp_path / "out.nii", volume.voxels, volume, np.uint16)
        single = write(tmp_path / "single.nii", data[..., index], MATRICES[17])
        np.testing.assert_array_equal(*assert_same_geometry(tmp_path / "out.nii", single))
    for wrong in (-1, 3):
        with pytest.raises(DataError, match=rf"in.nii holds 3 volume\(s\) .* volume {wrong} is asked for"):
            nifti.read(path, wrong, slice_axis)


@pytest.mark.parametrize("slice_axis", configs.SLICE_AXES)
@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1), (1, 5, 6), (4, 1, 6), (4, 5, 6, 1), (4, 5, 6, 1, 1)])
def test_one_slice_and_trailing_axes(tmp_path, shape, slice_axis):
    path = write(tmp_path / "in.nii", np.arange(np.prod(shape), dtype=np.int16).reshape(shape), MATRICES[-2])
    volume = nifti.read(path, slice_axis=slice_axis)
    nifti.write(tmp_path / "out.nii", volume.voxels, volume, np.uint16)
    np.testing.assert_array_equal(*assert_same_geometry(tmp_path / "out.nii", path))


# ------------------------------------------------------------------------------------------- whole cases
def blob(shape):
    """Classes 1 and 2 with smooth borders, in the middle of the volume."""
    noise = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=shape), [min(3, n / 6) for n in shape])
    centre = np.sqrt(sum(((grid + 0.5) / n - 0.5) ** 2 for grid, n in zip(np.indices(shape), shape, strict=True)))
    inside = 0.33 - centre + 0.05 * noise / noise.std() > 0
    halves = np.indices(shape)[np.argmax(shape)] > max(shape) / 2
    return (inside * (1 + halves)).astype(np.uint8)


def stored(folder, data, label, matrix):
    images = {"T1": write(folder / "T1.nii", data, matrix)}
    return Case("p1", "p1", images, write(folder / "label.nii", label, matrix), "train")


def there_and_back(case, config, protocol="gt_points", image_size=128, logit_shape=(64, 64)):
    """The reference labels on the decoder's grid, as certain probabilities, on the file's again."""
    prepared = preprocessing.prepare_case(
        case, ("T1", "T1", "T1"), CLASS_MAP, config, protocol, image_size, logit_shape
    )
    low = frames.labels_to_low_res(prepared.labels, prepared.geometry, 2)
    shares = predict.case_logits(np.eye(3, dtype=np.float32)[low], prepared.geometry)
    return prepared, predict.segment(predict.to_native(shares, prepared.slices, prepared.geometry))


def dice(one, other):
    return 2 * np.count_nonzero(one & other) / (np.count_nonzero(one) + np.count_nonzero(other))


@pytest.mark.parametrize("slice_axis", configs.SLICE_AXES)
def test_a_case_does_not_depend_on_how_its_file_stores_the_axes(tmp_path, slice_axis):
    rng = np.random.default_rng(1)
    data, label = rng.uniform(1, 900, (13, 17, 11)).astype(np.float32), blob((13, 17, 11))
    config = configs.DataConfig(slice_axis=slice_axis)
    reference, _ = there_and_back(stored(tmp_path, data, label, np.diag([0.8, 1.3, 2.0])), config)
    affine = nibabel.load(tmp_path / "T1.nii").affine
    for order, signs in itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)):
        transform = np.array(list(zip(order, signs, strict=True)))
        turned = affine @ orientations.inv_ornt_aff(transform, data.shape)
        for name, content in (("T1", data), ("label", label)):
            image = nibabel.Nifti1Image(orientations.apply_orientation(content, transform), turned)
            (tmp_path / f"{name}.nii").write_bytes(image.to_bytes())
        case = Case("p1", "p1", {"T1": tmp_path / "T1.nii"}, tmp_path / "label.nii", "train")
        prepared, mask = there_and_back(case, config)
        np.testing.assert_array_equal(prepared.images, reference.images)
        np.testing.assert_array_equal(prepared.labels, reference.labels)
        np.testing.assert_array_equal(prepared.prompts["gt_points"].points, reference.prompts["gt_points"].points)
        nifti.write(tmp_path / "out.nii", mask, prepared.reference, np.uint8)
        written, truth = assert_same_geometry(tmp_path / "out.nii", tmp_path / "label.nii")
        assert dice(written > 0, truth > 0) > 0.95


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    st.tuples(st.integers(15, 41), st.integers(15, 41), st.integers(7, 31)),
    st.tuples(st.floats(0.7, 1.5), st.floats(0.7, 1.5), st.floats(1, 6)),
    st.sampled_from(configs.SLICE_AXES),
    st.sampled_from(["", "40x44", "32x32x32", "48x40x40"]),
)
def test_a_mask_survives_the_way_there_and_back(tmp_path_factory, shape, spacing, slice_axis, resample):
    folder = tmp_path_factory.mktemp("case")
    turn = spatial.transform.Rotation.from_euler("xyz", [12, -9, 17], degrees=True).as_matrix()
    label = blob(shape)
    case = stored(folder, np.ones(shape, np.float32) + np.arange(shape[2]), label, turn @ np.diag(spacing))
    prepared, mask = there_and_back(case, configs.DataConfig(slice_axis=slice_axis, resample=resample))
    np.testing.assert_array_equal(prepared.label_volume, nifti.read_labels(case.label, slice_axis).voxels)
    nifti.write(folder / "out.nii", mask, prepared.reference, np.uint8)
    written, truth = assert_same_geometry(folder / "out.nii", case.label)
    # The decoder's grid is finer than the file's; a coarser working grid costs voxels at the border.
    for chosen in (written > 0, truth > 0), (written == 2, truth == 2):
        assert dice(*chosen) > (0.65 if resample else 0.95)
    assert dice(written > 0, truth > 0) > 0.85
