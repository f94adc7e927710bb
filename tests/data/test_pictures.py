"""PNG pictures in and out, and the choice between them and NIfTI."""

import io
import struct
import zlib

import nibabel
import numpy as np
import pytest
from PIL import Image

from calsegx.data import images, nifti, pictures
from calsegx.interfaces import DataError, UsageError

RNG = np.random.default_rng(5)
GREY = RNG.integers(0, 255, (5, 7), dtype=np.uint8)
COLOUR = RNG.integers(0, 255, (5, 7, 3), dtype=np.uint8)


def save(path, array, **options):
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(path, "PNG", **options)
    return path


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(bits, colour_type, rows):
    """A PNG of 8 columns, byte by byte: Pillow writes neither few grey bits nor 16-bit colours."""
    header = struct.pack(">IIBBBBB", 8, len(rows), bits, colour_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_grey_and_colour(tmp_path):
    grey, colour = save(tmp_path / "g.png", GREY), save(tmp_path / "c.PNG", COLOUR)
    assert pictures.channels(grey) == ("grey",)
    assert pictures.channels(colour) == ("red", "green", "blue")
    volume = images.read(grey)
    assert volume.voxels.dtype == np.float32
    np.testing.assert_array_equal(volume.voxels, GREY[None])
    for index in range(3):
        np.testing.assert_array_equal(images.read(colour, index).voxels, COLOUR[None, ..., index])
    deep = save(tmp_path / "deep.png", GREY.astype(np.uint16) * 257)
    np.testing.assert_array_equal(images.read(deep).voxels, GREY[None] * 257.0)


def test_row_0_is_on_top_as_in_a_nifti_slice(tmp_path):
    """A picture lies as the NIfTI slice does whose file axes are column, row, slice, to the left and posterior."""
    volume = images.read(save(tmp_path / "g.png", GREY))
    affine = np.diag([-1.0, -1, 1, 1])
    nibabel.save(nibabel.Nifti1Image(GREY.T[..., None], affine), tmp_path / "g.nii.gz")
    same = images.read(tmp_path / "g.nii.gz")
    nifti.same_grid(volume, tmp_path / "g.png", same, tmp_path / "g.nii.gz")
    np.testing.assert_array_equal(volume.voxels, same.voxels)
    np.testing.assert_array_equal(volume.orientation, same.orientation)
    assert volume.spacing_mm == same.spacing_mm == (1, 1, 1)


def test_labels_come_back(tmp_path):
    like = images.read(save(tmp_path / "g.png", GREY))
    ids = RNG.integers(0, 5, (1, 5, 7))
    for dtype, factor in ((np.uint8, 1), (np.uint16, 1000)):
        path = images.write(tmp_path / "case.v1", ids * factor, like, dtype)
        assert path == tmp_path / "case.v1.png"
        back = images.read_labels(path)
        assert back.voxels.dtype == np.int32
        np.testing.assert_array_equal(back.voxels, ids * factor)
    first = path.read_bytes()
    assert images.write(tmp_path / "again", ids * 1000, like, np.uint16).read_bytes() == first


def test_probabilities_are_stored_in_16_bits(tmp_path):
    like = images.read(save(tmp_path / "g.png", GREY))
    probabilities = RNG.random((1, 5, 7)).astype(np.float32)
    probabilities[0, 0, :2] = 0, 1
    back = images.read(images.write(tmp_path / "p", probabilities, like, np.float32)).voxels / 65535
    np.testing.assert_allclose(back, probabilities, rtol=0, atol=0.5 / 65535 + 1e-7)
    assert back[0, 0, :2].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("array", "dtype", "message"),
    [
        (np.zeros((1, 7, 5)), np.uint8, "has the shape"),
        (np.full((1, 5, 7), 256), np.uint8, "do not fit uint8; they reach 256"),
        (np.full((1, 5, 7), 1.5), np.float32, r"must be in 0..1"),
        (np.full((1, 5, 7), np.nan), np.float32, r"must be in 0..1"),
        (np.zeros((1, 5, 7)), np.uint32, "got uint32"),
    ],
)
def test_what_cannot_be_written(tmp_path, array, dtype, message):
    like = images.read(save(tmp_path / "g.png", GREY))
    with pytest.raises(ValueError, match=message):
        images.write(tmp_path / "out", array, like, dtype)
    with pytest.raises(ValueError, match="must end in .png"):
        pictures.write(tmp_path / "out.nii.gz", array, like, dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["g.png"]


def test_nifti_goes_to_nifti(tmp_path):
    data = RNG.random((4, 5, 6, 2)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), tmp_path / "x.nii.gz")
    coronal = images.read(tmp_path / "x.nii.gz", 1, "coronal")
    assert coronal.voxels.shape[0] == 5
    path = images.write(tmp_path / "case.v1", np.ones(coronal.voxels.shape), coronal, np.uint8)
    assert path == tmp_path / "case.v1.nii.gz"
    assert images.read_labels(path, "sagittal").voxels.shape[0] == 4


def test_other_planes_of_a_picture(tmp_path):
    path = save(tmp_path / "g.png", GREY)
    for read in (images.read, images.read_labels):
        with pytest.raises(UsageError, match=r"slice_axis=coronal does not suit .*g.png"):
            read(path, slice_axis="coronal")


def test_grey_where_colours_are_expected_and_vice_versa(tmp_path):
    grey, colour = save(tmp_path / "g.png", GREY), save(tmp_path / "c.png", COLOUR)
    with pytest.raises(DataError, match=r"c.png is a colour picture; expected a grey one"):
        images.read(colour)
    with pytest.raises(DataError, match=r"g.png is a grey picture; expected a colour one"):
        images.read(grey, 0)
    with pytest.raises(DataError, match=r"c.png has the colours 0 red, 1 green and 2 blue; got the volume 3"):
        images.read(colour, 3)
    with pytest.raises(DataError, match=r"c.png is a colour picture; expected a mask"):
        images.read_labels(colour)


def palette():
    return Image.fromarray(GREY).convert("P")


def transparent():
    return Image.fromarray(np.dstack([COLOUR, GREY]))


@pytest.mark.parametrize(
    ("picture", "options", "message"),
    [
        (palette, {}, "has a palette"),
        (transparent, {}, "has an alpha channel"),
        (lambda: Image.fromarray(GREY), {"transparency": 3}, "has an alpha channel"),
        (lambda: Image.fromarray(GREY > 9), {}, r"has 1 bit\(s\) per pixel; save it with 8"),
        (
            lambda: Image.fromarray(GREY),
            {"save_all": True, "append_images": [Image.fromarray(GREY[::-1])]},
            r"is animated \(2 frames\)",
        ),
    ],
)
def test_kinds_that_are_refused(tmp_path, picture, options, message):
    path = save(tmp_path / "x.png", picture(), **options)
    for read in (images.read, images.read_labels):
        with pytest.raises(DataError, match=rf"x.png {message}"):
            read(path)


@pytest.mark.parametrize(
    ("bits", "colour_type", "row", "message"),
    [
        (2, 0, b"\x1b\x1b", r"has 2 bit\(s\)"),
        (4, 0, bytes(4), r"has 4 bit\(s\)"),
        (16, 2, bytes(48), "has 16 bits per"),
    ],
)
def test_depths_that_pillow_would_change(tmp_path, bits, colour_type, row, message):
    content = png(bits, colour_type, [row] * 4)
    Image.open(io.BytesIO(content)).load()  # a valid file
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(DataError, match=rf"x.png {message}"):
        images.read(tmp_path / "x.png")


def flip(content):
    at = content.index(b"IDAT") + 10
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: b"", r"is empty \(0 bytes\)"),
        (lambda content: content[:20], "is truncated or damaged"),
        (lambda content: content[: len(content) // 2], "is truncated or damaged"),
        (lambda content: content[:-12], "is truncated or damaged"),  # only the end mark
        (flip, "is truncated or damaged"),
        (lambda content: b"\xff\xd8\xff" + content, "is not a PNG file, whatever its name says"),
        (lambda content: b"version https://git-lfs.github.com/spec/v1\n", "is not a PNG file"),
    ],
)
def test_damaged_files(tmp_path, damage, message):
    path = save(tmp_path / "x.png", RNG.integers(0, 255, (60, 70), dtype=np.uint8))
    path.write_bytes(damage(path.read_bytes()))
    for read in (images.read, images.read_labels, pictures.channels):
        with pytest.raises(DataError, match=rf"x.png {message}"):
            read(path)


def test_missing_files_and_folders(tmp_path):
    save(tmp_path / "eye_1.png", GREY)
    with pytest.raises(DataError, match=r"eye_2.png does not exist; the nearest name in that folder is 'eye_1.png'"):
        images.read(tmp_path / "eye_2.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(DataError, match=r"folder.png is a folder"):
        images.read(tmp_path / "folder.png")
