"""NIfTI in and out: every axis order survives, every broken file is refused with its name."""

import gzip

import nibabel
import numpy as np
import pytest

from calsegx.data import nifti
from calsegx.interfaces import DataError, InputError

SHAPE = (4, 5, 6)


def make(path, data=None, affine=None, codes=(1, 1), header_edit=None, image_class=nibabel.Nifti1Image, extensions=()):
    data = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE) if data is None else data
    affine = np.diag([-0.9, -1.1, 2.5, 1.0]) if affine is None else affine
    image = image_class(data, affine)
    image.set_sform(affine, codes[0])
    image.set_qform(affine, codes[1])
    image.header.set_xyzt_units("mm", "sec")
    image.header.extensions.extend(extensions)
    content = image.to_bytes()
    if header_edit:  # in the bytes, since nibabel would repair it
        header = image_class.header_class(content[: image.header.sizeof_hdr], check=False)
        header_edit(header)
        content = header.binaryblock + content[len(header.binaryblock) :]
    path.write_bytes(gzip.compress(content, mtime=0) if path.name.endswith(".gz") else content)
    return path


def test_spacing_follows_the_axes(tmp_path):
    volume = nifti.read(make(tmp_path / "a.nii.gz", affine=np.diag([-0.9, -1.1, 2.5, 1.0])))
    assert volume.voxels.shape == (6, 5, 4)
    np.testing.assert_allclose(volume.spacing_mm, (2.5, 1.1, 0.9), rtol=1e-6)


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1), (4, 5, 6, 1), (4, 5, 6, 1, 1)])
def test_flat_files_and_trailing_axes(tmp_path, shape):
    data = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    path = make(tmp_path / "a.nii.gz", data)
    volume = nifti.read(path)
    assert volume.voxels.shape == (shape[2] if len(shape) > 2 else 1, 5, 4)
    nifti.write(tmp_path / "b.nii.gz", volume.voxels, volume, np.uint8)
    written = nibabel.load(tmp_path / "b.nii.gz")
    assert written.shape == shape
    np.testing.assert_array_equal(np.asarray(written.dataobj), data)


def test_nifti2_and_big_endian(tmp_path):
    data = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
    volume = nifti.read(make(tmp_path / "two.nii", data, image_class=nibabel.Nifti2Image))
    nifti.write(tmp_path / "out.nii", volume.voxels, volume, np.uint8)
    written = nibabel.load(tmp_path / "out.nii")
    assert isinstance(written, nibabel.Nifti2Image)
    np.testing.assert_array_equal(np.asarray(written.dataobj), data)

    header = nibabel.Nifti1Header(endianness=">")
    header.set_data_dtype(">i2")
    image = nibabel.Nifti1Image(data, np.eye(4), header)
    image.set_sform(np.eye(4), 1)
    (tmp_path / "big.nii").write_bytes(image.to_bytes())
    big = nifti.read(tmp_path / "big.nii")
    np.testing.assert_array_equal(big.voxels, data.transpose(2, 1, 0)[:, ::-1, ::-1])


def test_units_become_millimetres(tmp_path):
    path = make(tmp_path / "a.nii", header_edit=lambda header: header.set_xyzt_units("micron"))
    np.testing.assert_allclose(nifti.read(path).spacing_mm, (0.0025, 0.0011, 0.0009), rtol=1e-6)


def test_scaled_labels_are_integers_and_probability_maps_are_not(tmp_path):
    data = np.zeros(SHAPE)
    data[1, 1, 1], data[2, 2, 2] = 1.00000002, 3.9995
    labels = nifti.read_labels(make(tmp_path / "labels.nii.gz", data))
    assert labels.voxels.dtype == np.int32
    assert sorted(np.unique(labels.voxels)) == [0, 1, 4]
    data[1, 1, 1] = 0.37
    with pytest.raises(DataError, match=r"soft.nii.gz is not a label file: 1 voxels .*0\.37"):
        nifti.read_labels(make(tmp_path / "soft.nii.gz", data))
    data[1, 1, 1] = 1e12
    with pytest.raises(DataError, match="beyond 32 bits"):
        nifti.read_labels(make(tmp_path / "huge.nii.gz", data))


def test_written_labels_are_unscaled_and_deterministic(tmp_path):
    def edit(header):
        header.set_slope_inter(0.5, 3.0)
        header["cal_max"] = 900

    data = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
    comment = nibabel.nifti1.Nifti1Extension("comment", b"Jane Doe")
    path = make(tmp_path / "in.nii.gz", data, header_edit=edit, extensions=[comment])
    assert b"Jane" in gzip.decompress(path.read_bytes())
    volume = nifti.read(path)
    labels = (volume.voxels > volume.voxels.mean()).astype(np.int64) * 4
    nifti.write(tmp_path / "a.nii.gz", labels, volume, np.uint8)
    nifti.write(tmp_path / "b.nii.gz", labels, volume, np.uint8)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    header = nibabel.load(tmp_path / "a.nii.gz").header
    content = gzip.decompress((tmp_path / "a.nii.gz").read_bytes())
    raw = nibabel.Nifti1Header(content[:348])
    assert (raw["scl_slope"], raw["scl_inter"]) == (1, 0)
    assert header.get_data_dtype() == np.uint8
    assert header["cal_max"] == 0
    assert b"Jane" not in content
    np.testing.assert_array_equal(nifti.read_labels(tmp_path / "a.nii.gz").voxels, labels)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.nii.gz", "b.nii.gz", "in.nii.gz"]


def test_write_refuses_what_does_not_fit(tmp_path):
    volume = nifti.read(make(tmp_path / "in.nii.gz"))
    with pytest.raises(ValueError, match="do not fit uint8"):
        nifti.write(tmp_path / "a.nii.gz", volume.voxels * 10, volume, np.uint8)
    with pytest.raises(ValueError, match="the grid"):
        nifti.write(tmp_path / "a.nii.gz", volume.voxels[1:], volume, np.float32)
    with pytest.raises(ValueError, match=r"\.nii"):
        nifti.write(tmp_path / "a.mha", volume.voxels, volume, np.float32)
    with pytest.raises(InputError, match="cannot be written"):
        nifti.write(tmp_path / "in.nii.gz" / "a.nii.gz", volume.voxels, volume, np.float32)
    assert [p.name for p in tmp_path.iterdir()] == ["in.nii.gz"]


@pytest.mark.parametrize("cut", [0.1, 0.6, 0.98])
def test_truncated_files(tmp_path, cut):
    data = np.random.default_rng(0).normal(size=(20, 20, 20)).astype(np.float32)
    for name in ("cut.nii.gz", "cut.nii"):
        path = make(tmp_path / name, data)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * cut)])
        with pytest.raises(DataError, match=rf"{name} is truncated"):
            nifti.read(path)


@pytest.mark.parametrize("position", [-1, -6])  # length, CRC
def test_broken_gzip_trailer(tmp_path, position):
    data = np.random.default_rng(0).normal(size=(20, 20, 20)).astype(np.float32)
    path = make(tmp_path / "crc.nii.gz", data)
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    assert np.asarray(nibabel.load(path).dataobj).shape == data.shape  # nibabel does not notice
    with pytest.raises(DataError, match=r"crc.nii.gz is truncated or damaged"):
        nifti.read(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.nii.gz", b"", "is empty"),
        ("a.nii.gz", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer"),
        ("a.nii.gz", b"../.git/annex/objects/xx/SHA256E-s1.nii.gz\n", "is a pointer"),
        ("a.nii", gzip.compress(b"x" * 400, mtime=0), "is gzip-compressed, against its name"),
        ("a.nii.gz", b"x" * 400, "is not gzip-compressed, against its name"),
        ("a.nii", b"<!DOCTYPE html>" * 40, "is not a NIfTI file"),
        ("a.nii", b"\x5c\x01", "is not a NIfTI file"),
        ("a.nii", b"\x5c\x01\x00\x00" + b"\xff" * 400, "damaged NIfTI header"),
        ("a.dcm", b"x", "does not end in"),
    ],
)
def test_bad_content(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        nifti.read(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def set_zoom(value):
    def edit(header):
        header["pixdim"][2] = value

    return edit


def set_row(value):
    def edit(header):
        header["srow_y"] = value

    return edit


def set_quaternion(header):
    header["quatern_b"] = header["quatern_c"] = 5.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": np.ones((3, 3, 3, 2), np.float32)}, "holds 2 volumes"),
        ({"data": np.ones((3, 3, 3, 1, 3), np.float32)}, "holds 3 volumes"),
        ({"data": np.ones(7, np.float32)}, "has the shape"),
        ({"data": np.ones(SHAPE, np.complex64)}, "colour or complex"),
        ({"data": np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])}, "colour or complex"),
        ({"codes": (0, 0)}, "has no affine"),
        ({"header_edit": set_zoom(0.0)}, "voxel size"),
        ({"header_edit": set_zoom(-1.0)}, "voxel size"),
        ({"header_edit": set_zoom(np.nan)}, "voxel size"),
        ({"header_edit": set_row(np.nan)}, "unusable affine"),
        ({"header_edit": set_row(0.0)}, "unusable affine"),
        ({"codes": (0, 1), "header_edit": set_quaternion}, "unusable qform"),
        ({"header_edit": lambda h: h.set_qform(np.eye(4), 1)}, "sform LPS, qform RAS"),
        ({"data": np.full(SHAPE, np.nan, np.float32)}, "120 NaN or infinite voxels of 120"),
        ({"data": np.full(SHAPE, np.inf, np.float32)}, "120 NaN or infinite"),
        ({"data": np.full(SHAPE, 1e300)}, "120 NaN or infinite"),
    ],
)
def test_bad_volumes(tmp_path, arguments, message):
    with np.errstate(all="ignore"):
        path = make(tmp_path / "bad name ü.nii.gz", **arguments)
    with pytest.raises(DataError, match=message) as caught:
        nifti.read(path)
    assert str(path) in str(caught.value)


def test_header_file_of_a_pair(tmp_path):
    def edit(header):
        header["magic"] = b"ni1"

    with pytest.raises(DataError, match="half of a"):
        nifti.read(make(tmp_path / "a.nii", header_edit=edit))


def test_missing_file_names_the_nearest(tmp_path):
    make(tmp_path / "patient01.nii.gz")
    with pytest.raises(DataError, match=r"patient_01.nii.gz does not exist.*'patient01.nii.gz'"):
        nifti.read(tmp_path / "patient_01.nii.gz")
    with pytest.raises(DataError, match=r"\(case p1, label\) does not exist, nor does its folder"):
        nifti.require_file(tmp_path / "labels" / "p.nii.gz", "case p1, label")
    with pytest.raises(DataError, match="is a folder"):
        nifti.read(tmp_path)


def test_same_grid(tmp_path):
    affine = np.diag([-0.9, -1.1, 2.5, 1.0])
    image = nifti.read(make(tmp_path / "image.nii.gz", affine=affine))
    noisy = affine.copy()
    noisy[0, 3] += 1e-3
    near = nifti.read(make(tmp_path / "near.nii.gz", affine=noisy))
    nifti.same_grid(image, tmp_path / "image.nii.gz", near, tmp_path / "near.nii.gz")

    # The same voxels, stored the other way round, are the same grid.
    flipped = affine @ np.array([[-1, 0, 0, SHAPE[0] - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    data = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)[::-1]
    other = nifti.read(make(tmp_path / "flipped.nii.gz", data, flipped))
    nifti.same_grid(image, tmp_path / "image.nii.gz", other, tmp_path / "flipped.nii.gz")
    np.testing.assert_array_equal(image.voxels, other.voxels)

    noisy[0, 3] += 0.2
    far = nifti.read(make(tmp_path / "far.nii.gz", affine=noisy))
    with pytest.raises(DataError, match=r"image.nii.gz and .*far.nii.gz lie up to 0.201 mm apart.*resample"):
        nifti.same_grid(image, tmp_path / "image.nii.gz", far, tmp_path / "far.nii.gz")
    small = nifti.read(make(tmp_path / "small.nii.gz", np.ones((4, 5, 5), np.float32)))
    with pytest.raises(DataError, match=r"\(6, 5, 4\) and \(5, 5, 4\); resample small.nii.gz"):
        nifti.same_grid(image, tmp_path / "image.nii.gz", small, tmp_path / "small.nii.gz")
