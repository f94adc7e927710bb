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


def file_of(cache, case_id, view, array="features"):
    (path,) = (path for path in (cache.root / case_id / view / array / "c").rglob("*") if path.is_file())
    return path


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


def aside(cache, case_id, view):
    return cache.root / case_id / f"{view}.set-aside"


def test_one_file_per_array_and_a_slice_is_read_alone(cache):
    """Damage in one slice is no damage of the others; neither is what follows the slice in a file that was cut."""
    cache.write("a", "view1", **content(), fingerprint="f")
    path = file_of(cache, "a", "view1")
    data = bytearray(path.read_bytes())
    slice_bytes = 4 * 4 * 8 * 2 + 4  # with its crc32c
    assert len(data) == 3 * slice_bytes + 3 * 16 + 4  # and the index: offset and length of each, and a crc32c
    expected = cache.read_slices("a", "view1", [0, 2]).features
    data[slice_bytes + 17] ^= 4
    path.write_bytes(data)
    again = features.FeatureCache(cache.root)
    np.testing.assert_array_equal(again.read_slices("a", "view1", [0, 2]).features, expected)
    np.testing.assert_array_equal(again.read_slices("a", "view1", 2).features, expected[1])
    with pytest.raises(InputError, match="'a', view1 are damaged"):
        again.read_slices("a", "view1", 1)


@pytest.mark.parametrize("read", ["read_slices", "read_case", "verify"])
@pytest.mark.parametrize("damage", ["flip", "flip index", "cut", "remove", "empty"])
def test_damage_is_detected_and_set_aside(cache, damage, read):
    cache.write("a", "view1", **content(), fingerprint="f")
    cache.write("a", "view0", **content(), fingerprint="f")
    path = file_of(cache, "a", "view1")
    data = bytearray(path.read_bytes())
    if damage.startswith("flip"):
        data[17 if damage == "flip" else -20] ^= 4
        path.write_bytes(data)
    elif damage == "remove":
        path.unlink()
    else:
        path.write_bytes(data[:50] if damage == "cut" else b"")
    with pytest.raises(InputError, match=r"'a', view1 are damaged .* moved to .*view1.set-aside: run the same command"):
        getattr(cache, read)("a", "view1", *([[2, 0]] if read == "read_slices" else []))
    assert aside(cache, "a", "view1").is_dir() and not cache.has("a", "view1", "f")
    assert cache.has("a", "view0", "f")
    cache.write("a", "view1", **content(), fingerprint="f")
    np.testing.assert_array_equal(cache.read_case("a", "view1").features, cache.read_case("a", "view0").features)
    assert not aside(cache, "a", "view1").exists()


def test_what_was_checked_is_copied_and_verify_checks_it_again(cache):
    cache.write("a", "view0", **content(), fingerprint="f")
    checked = [cache.read_slices("a", "view0", 1), cache.read_case("a", "view0")]
    path = file_of(cache, "a", "view0")
    data = bytearray(path.read_bytes())
    data[17] ^= 4
    path.write_bytes(data)
    copied = cache.read_slices("a", "view0", np.array([1, 2])), cache.read_case("a", "view0")
    np.testing.assert_array_equal(copied[0].features[0], checked[0].features)
    np.testing.assert_array_equal(copied[1].features[1:], checked[1].features[1:])
    np.testing.assert_array_equal(copied[1].labels, checked[1].labels)
    copied[1].features[:] = 0  # the caller's own
    with pytest.raises(InputError, match="'a', view0 are damaged"):
        cache.verify("a", "view0")


def test_a_file_of_another_layout_is_not_copied_from(cache, monkeypatch):
    cache.write("a", "view0", **content(), fingerprint="f")
    monkeypatch.setattr(features.slice_files.SliceFile, "_copy", lambda file, index: np.zeros(1))
    written = content()["features"].astype(ml_dtypes.bfloat16)
    for _ in range(2):  # checked and read by TensorStore every time
        np.testing.assert_array_equal(cache.read_slices("a", "view0", 1).features, written[1])
        np.testing.assert_array_equal(cache.read_case("a", "view0").features, written)


def test_damage_that_cannot_be_set_aside(cache, monkeypatch):
    """A cache that belongs to somebody else."""
    cache.write("a", "view0", **content(), fingerprint="f")
    (cache.root / "a" / "view0" / "done.json").write_text("{}")

    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(features.Path, "rename", refuse)
    with pytest.raises(InputError, match=r"view0 cannot be moved .*\(Permission denied\); delete that folder"):
        cache.has("a", "view0", "f")


def test_another_process_was_faster(cache, monkeypatch):
    """Two write the same view without a claim: the second finds it there when it renames its own."""
    replace = features.os.replace

    def race(source, target):
        if str(target).endswith("view0"):
            monkeypatch.undo()
            features.FeatureCache(cache.root).write("a", "view0", **content(seed=1), fingerprint="f")
        replace(source, target)

    monkeypatch.setattr(features.os, "replace", race)
    cache.write("a", "view0", **content(seed=1), fingerprint="f")
    expected = content(seed=1)["features"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(cache.read_case("a", "view0").features, expected)
    assert [path.name for path in (cache.root / "a").iterdir()] == ["view0"]


def test_every_flipped_byte_of_every_array_is_detected(cache):
    cache.write("a", "view0", **content(), fingerprint="f")
    folder = cache.root / "a" / "view0"
    paths = [path for path in sorted(folder.glob("*/c/**/*")) if path.is_file()]
    assert len(paths) == 6
    for path in paths:
        data = bytearray(path.read_bytes())
        damaged = data.copy()
        damaged[len(data) // 2] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="damaged"):
            features.FeatureCache.open(cache.root, SIGNATURE).read_case("a", "view0")
        aside(cache, "a", "view0").rename(folder)
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

    monkeypatch.setattr(features.slice_files, "write", full)
    with pytest.raises(InputError, match="'a', view0 cannot be written .*No space left"):
        cache.write("a", "view0", **content(seed=1), fingerprint="new")
    assert cache.has("a", "view0", "old")
    assert [path.name for path in (cache.root / "a").iterdir()] == ["view0"]


def test_ctrl_c_leaves_nothing_hidden(cache, monkeypatch):
    cache.write("a", "view0", **content(seed=0), fingerprint="old")

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(features.slice_files, "write", interrupted)
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
