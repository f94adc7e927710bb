"""The feature cache: what is written comes back, and damage of any kind is noticed."""

import json

import ml_dtypes
import numpy as np
import pytest

from calsegx import features
from calsegx.interfaces import InputError, Prompts

SIGNATURE = {"weights": "abc", "data": {"views": 2, "lower_percentile": 0.5}}


def content(count=3, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "features": rng.normal(size=(count, 4, 4, 8)),
        "labels": rng.integers(0, 2, (count, 16, 16), dtype=np.uint8),
        "slices": np.arange(20, 20 + count),
        "prompts": {
            "gt_points": Prompts(
                points=rng.uniform(size=(count, 2, 2)).astype(np.float32),
                labels=np.tile(np.array([1, 0], np.int32), (count, 1)),
            ),
            "gt_box": Prompts(boxes=rng.uniform(size=(count, 4)).astype(np.float32)),
        },
    }


@pytest.fixture
def cache(tmp_path):
    return features.FeatureCache.open(tmp_path / "cache", SIGNATURE)


def chunk(cache, case_id, view, position):
    return cache.root / case_id / view / "features" / "c" / str(position) / "0" / "0" / "0"


@pytest.mark.parametrize("case_id", ["plain", "mit Leerzeichen & Ümläuten", "a.b+c=d#%20", "日本"])
def test_round_trip(cache, case_id):
    written = content()
    cache.write(case_id, "view0", **written, fingerprint="f")
    read = cache.read_case(case_id, "view0")
    assert read.features.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(read.features, written["features"].astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(read.labels, written["labels"])
    np.testing.assert_array_equal(read.slices, written["slices"])
    assert read.prompts.keys() == written["prompts"].keys()
    for protocol, prompts in written["prompts"].items():
        for array, expected in zip(read.prompts[protocol], prompts, strict=True):
            np.testing.assert_array_equal(array, expected)


def test_read_slices(cache):
    cache.write("a", "view0", **content(), fingerprint="f")
    whole = cache.read_case("a", "view0")
    some = cache.read_slices("a", "view0", [2, 0])
    one = cache.read_slices("a", "view0", 1)
    np.testing.assert_array_equal(some.features, whole.features[[2, 0]])
    np.testing.assert_array_equal(some.prompts["gt_box"].boxes, whole.prompts["gt_box"].boxes[[2, 0]])
    np.testing.assert_array_equal(one.features, whole.features[1])
    assert one.slices == 21


def test_optional_arrays_and_no_slices(cache):
    written = {**content(0), "labels": None, "prompts": {"gt_box": Prompts(boxes=np.zeros((0, 4)))}}
    cache.write("empty", "view0", **written, fingerprint="f")
    read = cache.read_case("empty", "view0")
    assert read.features.shape == (0, 4, 4, 8)
    assert read.labels is None and read.prompts.keys() == {"gt_box"}


def test_slice_of_zeros_is_not_a_missing_slice(cache):
    cache.write("a", "view0", **{**content(), "features": np.zeros((3, 4, 4, 8))}, fingerprint="f")
    assert not np.any(cache.read_case("a", "view0").features)


@pytest.mark.parametrize("position", [0, 2])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "empty"])
def test_damage_is_detected(cache, damage, position):
    cache.write("a", "view1", **content(), fingerprint="f")
    path = chunk(cache, "a", "view1", position)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[17] ^= 4
        path.write_bytes(data)
    elif damage == "truncate":
        path.write_bytes(data[:50])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    with pytest.raises(InputError, match=r"'a', view1 are damaged .* delete the folder .*view1 and compute"):
        cache.read_slices("a", "view1", position)
    cache.read_slices("a", "view1", 1)  # the others are still good


def test_every_flipped_byte_of_small_arrays_is_detected(cache):
    cache.write("a", "view0", **content(), fingerprint="f")
    for path in sorted((cache.root / "a" / "view0").glob("*/c/**/*")):
        if path.is_dir():
            continue
        data = bytearray(path.read_bytes())
        damaged = data.copy()
        damaged[len(data) // 2] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="damaged"):
            features.FeatureCache.open(cache.root, SIGNATURE).read_case("a", "view0")
        path.write_bytes(data)
    features.FeatureCache.open(cache.root, SIGNATURE).read_case("a", "view0")


def test_view_without_done_is_not_there(cache):
    cache.write("a", "view0", **content(), fingerprint="f")
    assert cache.has("a", "view0", "f")
    assert not cache.has("a", "view1", "f")
    (cache.root / "a" / "view0" / "done.json").unlink()
    assert not cache.has("a", "view0", "f")
    with pytest.raises(InputError, match="'a' has no view0"):
        features.FeatureCache(cache.root).read_case("a", "view0")


def test_changed_files_replace_the_view(cache):
    cache.write("a", "view0", **content(seed=0), fingerprint="old")
    old = cache.read_case("a", "view0")
    assert not cache.has("a", "view0", "new")
    cache.write("a", "view0", **content(seed=1), fingerprint="new")
    assert cache.has("a", "view0", "new") and cache.fingerprint("a", "view0") == "new"
    assert np.any(cache.read_case("a", "view0").features != old.features)
    assert [path.name for path in (cache.root / "a").iterdir()] == ["view0"]  # nothing temporary is left


def test_failed_write_leaves_the_old_view(cache, monkeypatch):
    cache.write("a", "view0", **content(seed=0), fingerprint="old")

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features, "_write_array", full)
    with pytest.raises(InputError, match="'a', view0 cannot be written .*No space left"):
        cache.write("a", "view0", **content(seed=1), fingerprint="new")
    assert cache.has("a", "view0", "old")
    assert [path.name for path in (cache.root / "a").iterdir()] == ["view0"]


def test_ctrl_c_leaves_nothing_hidden(cache, monkeypatch):
    cache.write("a", "view0", **content(seed=0), fingerprint="old")

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(features, "_write_array", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.write("a", "view0", **content(seed=1), fingerprint="new")
    assert cache.has("a", "view0", "old")
    assert [path.name for path in (cache.root / "a").iterdir()] == ["view0"]


def test_signature_must_match(cache):
    features.FeatureCache.open(cache.root, json.loads(json.dumps(SIGNATURE)))
    other = {"weights": "abd", "data": {"views": 2, "lower_percentile": 1.0}, "new": 1}
    with pytest.raises(InputError) as caught:
        features.FeatureCache.open(cache.root, other)
    message = str(caught.value)
    assert "weights is 'abc', this run has 'abd'" in message
    assert "data.lower_percentile is 0.5, this run has 1.0" in message
    assert "new is None, this run has 1" in message
    assert "data.views" not in message and "--config.data.cache" in message


def test_foreign_folder_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("not to be touched")
    with pytest.raises(InputError, match="no feature cache"):
        features.FeatureCache.open(tmp_path, SIGNATURE)


def test_case_id_must_be_a_folder_name(cache):
    for case_id in ("../x", "a/b", "", ".."):
        with pytest.raises(InputError, match="no valid folder name"):
            cache.has(case_id, "view0", "f")


def test_size_bytes():
    assert features.size_bytes(10, (64, 64, 256)) == 10 * 64 * 64 * 256 * 2
