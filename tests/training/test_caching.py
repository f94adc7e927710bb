"""Filling the cache: every view once, resumable, independent of the batch size and of the other cases."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from calsegx import features, sharding
from calsegx.data import preprocessing
from calsegx.interfaces import Case, DataError, Prompts
from calsegx.training import caching
from tests.training import toy


@pytest.fixture(scope="module")
def mesh():
    return sharding.data_mesh(jax.devices()[:1])


@pytest.fixture
def cases(tmp_path):
    made = []
    for name in ("a", "b"):
        path = tmp_path / f"{name}.nii.gz"
        path.write_bytes(name.encode())
        made.append(Case(name, name, {"t1": path}, path, "train"))
    return made


class Preparation:
    """A case of three slices (two for case b) that remembers how often it was called."""

    def __init__(self):
        self.calls = []

    def __call__(self, case, rng):
        self.calls.append(case.case_id)
        count = 3 if case.case_id == "a" else 2
        images = np.random.default_rng(ord(case.case_id)).uniform(0, 255, (count, 24, 20, 3)).astype(np.float32)
        if rng is not None:
            images = images * np.float32(rng.uniform(0.8, 1.2))
        return types.SimpleNamespace(
            case=case,
            slices=np.arange(count),
            images=images,
            labels=(images[..., 0] > 128).astype(np.uint8),
            prompts=Prompts(points=np.ones((count, 2, 2)), labels=np.ones((count, 2))),
            geometry=preprocessing.frame_geometry((24, 20), (1.0, 1.0), toy.IMAGE_SIZE, toy.LOGITS),
            label_volume=None,
        )


def fill(cache, cases, prepare, mesh, **changes):
    options = {"views": 2, "seed": 5, "num_classes": 1, "batch_size": 2, "progress": False} | changes
    return caching.fill_cache(cache, cases, prepare, toy.backbone(), mesh=mesh, **options)


def test_fills_and_skips_what_is_there(tmp_path, cases, mesh, capsys):
    cache = features.FeatureCache.open(tmp_path / "cache", {})
    prepare = Preparation()
    assert fill(cache, cases, prepare, mesh, progress=True) == (4, 0, 10)
    assert "4 views of cases to compute (0 are there), about 3 slices each: about 0.00 GB" in " ".join(
        capsys.readouterr().out.split()
    )
    assert prepare.calls == ["a", "a", "b", "b"]
    assert fill(cache, cases, prepare, mesh) == (0, 4, 0)
    assert len(prepare.calls) == 4
    cases[1].label.write_bytes(b"changed")
    assert fill(cache, cases, prepare, mesh) == (2, 2, 4)
    assert prepare.calls[4:] == ["b", "b"]


def test_content(tmp_path, cases, mesh):
    cache = features.FeatureCache.open(tmp_path / "cache", {})
    fill(cache, cases, Preparation(), mesh)
    backbone = toy.backbone()
    prepared = Preparation()(cases[0], None)
    frames = preprocessing.to_frame(prepared.images, prepared.geometry, backbone.pixel_mean, backbone.pixel_std)
    read = cache.read_case("a", "view0")
    np.testing.assert_allclose(
        read.features.astype(np.float32), backbone.encode(backbone.frozen, frames), rtol=1e-2, atol=1e-2
    )
    assert read.labels.shape == (3, *toy.LOGITS)
    np.testing.assert_array_equal(read.slices, [0, 1, 2])
    assert np.any(cache.read_case("a", "view1").features != read.features)


def test_views_depend_on_seed_and_case_alone(tmp_path, cases, mesh):
    caches = [features.FeatureCache.open(tmp_path / name, {}) for name in ("one", "two", "three")]
    fill(caches[0], cases, Preparation(), mesh)
    fill(caches[1], cases[:0:-1], Preparation(), mesh, batch_size=3)  # case b alone, other batches
    fill(caches[2], cases, Preparation(), mesh, seed=6)
    one, two, three = (cache.read_case("b", "view1").features for cache in caches)
    np.testing.assert_array_equal(one, two)
    assert np.any(one != three)
    plain = [cache.read_case("b", "view0").features for cache in caches]
    np.testing.assert_array_equal(plain[0], plain[2])


def test_bad_case_keeps_what_was_done(tmp_path, cases, mesh):
    cache = features.FeatureCache.open(tmp_path / "cache", {})
    good = Preparation()

    def prepare(case, rng):
        if case.case_id == "b":
            raise DataError("b.nii.gz is truncated")
        return good(case, rng)

    with pytest.raises(DataError, match="b.nii.gz is truncated"):
        fill(cache, cases, prepare, mesh)
    assert fill(cache, cases, good, mesh) == (2, 2, 4)


def test_case_without_labels(tmp_path, cases, mesh):
    cache = features.FeatureCache.open(tmp_path / "cache", {})
    prepare = Preparation()

    def unlabelled(case, rng):
        prepared = prepare(case, rng)
        prepared.labels = None
        return prepared

    fill(cache, [dataclasses.replace(cases[0], label=None)], unlabelled, mesh, views=1)
    assert cache.read_case("a", "view0").labels is None
