"""Weights folders, and the tiny SAM that ships with calsegx."""

import dataclasses
import errno
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from calsegx.interfaces import DataError, InputError, Prompts, UsageError
from calsegx.models import sam
from calsegx.models.sam import backbone, presets, weights
from tests import random_sam

SMALL = dataclasses.replace(presets.TINY, embed_dim=16, depth=2, out_chans=16, decoder_mlp_dim=16, image_size=64)


@pytest.fixture(scope="module")
def params():
    return random_sam.params(SMALL)


def test_round_trip(tmp_path, params):
    sam.save(tmp_path / "w", SMALL, params, "card")
    config, loaded = sam.load(tmp_path / "w")
    assert config == SMALL
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_bfloat16_halves_the_file(tmp_path, params):
    for name, dtype in (("full", np.float32), ("half", jnp.bfloat16)):
        sam.save(tmp_path / name, SMALL, params, "card", dtype)
    full, half = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "half"))
    assert half < 0.7 * full  # the header is the same
    loaded = sam.load(tmp_path / "half")[1]
    assert {x.dtype for x in jax.tree.leaves(loaded)} == {np.dtype(np.float32)}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8), loaded, params)


def test_an_existing_folder_is_not_overwritten(tmp_path, params):
    (tmp_path / "w").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        sam.save(tmp_path / "w", SMALL, params, "card")


def test_nothing_is_left_behind_when_writing_fails(tmp_path, params):
    with pytest.raises(TypeError):
        sam.save(tmp_path / "w", SMALL, params, card=3)
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_what_the_library_reads(tmp_path, params):
    sam.save(tmp_path / "w", SMALL, params, "card")
    read = safetensors.numpy.load_file(tmp_path / "w" / "model.safetensors")
    flat = weights.flatten(params)
    assert read.keys() == flat.keys()
    for name, array in flat.items():
        np.testing.assert_array_equal(read[name], array)


def test_arrays_are_read_one_at_a_time_in_any_layout(tmp_path, params):
    flat = {name: np.asarray(leaf) for name, leaf in weights.flatten(params).items()}
    asked = []

    def read(name):
        asked.append(name)
        return np.asfortranarray(flat[name])

    weights.write(tmp_path / "w", SMALL, {name: x.shape for name, x in flat.items()}, read, "card")
    assert sorted(asked) == sorted(flat)
    jax.tree.map(np.testing.assert_array_equal, sam.load(tmp_path / "w")[1], params)


def refuse(*_):
    raise DataError("no")


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("read", "approve", "error", "match"),
    [
        (refuse, None, DataError, "^no$"),
        (full, None, InputError, "cannot be written .No space left on device.; check the folder and the free space"),
        (np.zeros, refuse, DataError, "^no$"),
        (lambda _: np.zeros(3), None, ValueError, "declared was"),
    ],
)
def test_a_failure_in_the_middle_leaves_not_even_the_parent_folders(tmp_path, read, approve, error, match):
    shapes = {"a": (2,), "b": (2,)}
    one = (lambda name: read(shapes[name])) if read is np.zeros else read
    with pytest.raises(error, match=match):
        weights.write(tmp_path / "new" / "folders" / "w", SMALL, shapes, one, "card", approve=approve)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path, params):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file/w cannot be made .*; choose a place you can write to"):
        sam.save(tmp_path / "file" / "w", SMALL, params, "card")


def test_loading_holds_every_array_once(tmp_path, params):
    sam.save(tmp_path / "w", SMALL, params, "card")
    leaves = jax.tree.leaves(sam.load(tmp_path / "w")[1])
    assert all(isinstance(x, np.ndarray) and x.dtype == np.float32 for x in leaves)
    bases = {id(x.base if x.base is not None else x) for x in leaves}
    assert len(bases) == len(leaves)  # no array is a view of one larger buffer


def test_a_flipped_byte_is_found(tmp_path, params):
    sam.save(tmp_path / "w", SMALL, params, "card")
    path = tmp_path / "w" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="model.safetensors does not have the checksum"):
        sam.load(tmp_path / "w")


def replaced(folder, params, name, data):
    sam.save(folder, SMALL, params, "card")
    (folder / name).write_bytes(data)
    sums = "".join(f"{weights.sha256(folder / file)}  {file}\n" for file in weights.FILES)
    (folder / "SHA256SUMS").write_text(sums)


@pytest.mark.parametrize("data", [b"[]", b"3", b"null", b"{", b"\xff", b'{"unknown": 1}'])
def test_a_configuration_that_is_none_is_named(tmp_path, params, data):
    replaced(tmp_path / "w", params, "config.json", data)
    with pytest.raises(DataError, match=r"config.json is no SAM configuration \(.*\); get the folder again"):
        sam.load(tmp_path / "w")


HEADER = json.dumps({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}).encode()


@pytest.mark.parametrize("data", [b"", b"x", b"\xff" * 64, len(HEADER).to_bytes(8, "little") + HEADER])
def test_weights_without_a_header_or_end_are_named(tmp_path, params, data):
    replaced(tmp_path / "w", params, "model.safetensors", data)
    with pytest.raises(DataError, match=r"model.safetensors is no whole safetensors file \(.*\); get the folder again"):
        sam.load(tmp_path / "w")


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(DataError, match="is not a weights folder: model.safetensors is missing"):
        sam.load(tmp_path)


def test_names_and_shapes_are_checked_both_ways(params):
    flat = weights.flatten(params)
    name = next(iter(flat))
    flat["extra"] = flat.pop(name)
    with pytest.raises(DataError) as error:
        weights.unflatten(params, flat, "here")
    assert f"missing {name}" in str(error.value) and "not used extra" in str(error.value)
    flat = dict(weights.flatten(params), **{name: np.zeros((1, 2, 3))})
    with pytest.raises(DataError, match=r"wrong shape .*\(1, 2, 3\) instead of"):
        weights.unflatten(params, flat, "here")


def test_the_tiny_sam_is_small_and_whole():
    folder = backbone.tiny_weights()
    assert sum(path.stat().st_size for path in folder.iterdir()) < 6e6
    assert "Not a medical device" in (folder / "README.md").read_text()
    config, _ = sam.load(folder)
    assert config == presets.TINY


@pytest.mark.parametrize("classes", [1, 3])
def test_class_decoder(classes):
    tiny = backbone.load_backbone(None, classes)
    z = jax.random.normal(jax.random.key(0), (2, *tiny.feature_shape))
    prompts = Prompts(points=jnp.full((2, 2, 2), 40.0), labels=jnp.array([[1, 0], [1, -1]]))
    logits = jax.jit(tiny.decode)(tiny.trainable, tiny.frozen, z, prompts)
    assert logits.shape == (2, *tiny.logit_shape, 1 if classes == 1 else classes + 1)
    if classes > 1:
        assert not logits[..., 0].any()  # the background is the reference
        # Classes start alike, and training tells them apart: every one has its own token and hypernetwork.
        np.testing.assert_allclose(logits[..., 1], logits[..., 2], atol=1e-4)
        first = jax.grad(lambda p: tiny.decode(p, tiny.frozen, z, prompts)[..., 1].sum())
        grads = jax.jit(first)(tiny.trainable)
        assert jnp.abs(grads["output_hypernetworks_mlps.0"]["layers.0"]["kernel"]).max() > 0
        assert not grads["output_hypernetworks_mlps.1"]["layers.0"]["kernel"].any()
