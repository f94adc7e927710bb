"""Filling the cache: every view once, resumable, independent of the batch size and of the other cases."""

import dataclasses
import gc
import hashlib
import threading
import types
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calsegx import features, sharding
from calsegx.data import frames
from calsegx.interfaces import Case, DataError, InputError, Prompts
from calsegx.training import caching
from tests.training import toy


@pytest.fixture(scope="module")
def mesh():
    return sharding.device_mesh(jax.devices()[:1])


@pytest.fixture
def cases(tmp_path):
    return make_cases(tmp_path, ("a", "b"))


def make_cases(folder, names):
    made = []
    for name in names:
        path = folder / f"{name}.nii.gz"
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
            prompts={"gt_points": Prompts(points=np.ones((count, 2, 2)), labels=np.ones((count, 2)))},
            geometry=frames.frame_geometry((3, 24, 20), (1.0, 1.0, 1.0), toy.IMAGE_SIZE, toy.LOGITS),
            label_volume=None,
            intensities={},
        )


def fill(cache, cases, prepare, mesh, views=2, **changes):
    options = {"seed": 5, "num_classes": 1, "batch_size": 2, "progress": False} | changes
    cases = [(case, views) for case in cases]
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
    framed = frames.to_frame(prepared.images, prepared.geometry, backbone.pixel_mean, backbone.pixel_std)
    read = cache.read_case("a", "view0")
    np.testing.assert_allclose(
        read.features.astype(np.float32), backbone.encode(backbone.encoder, framed), rtol=1e-2, atol=1e-2
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


def test_a_bad_case_stops_no_other(tmp_path, cases, mesh):
    cache = features.FeatureCache.open(tmp_path / "cache", {})
    good = Preparation()

    def prepare(case, rng):
        if case.case_id == "a":
            raise DataError("a.nii.gz is truncated")
        return good(case, rng)

    with pytest.raises(DataError, match=r"1 of 2 cases cannot be used, .* the first is 'a': a.nii.gz is truncated"):
        fill(cache, cases, prepare, mesh)
    assert fill(cache, cases, good, mesh) == (2, 2, 6)


def test_case_without_labels(tmp_path, cases, mesh):
    cache = features.FeatureCache.open(tmp_path / "cache", {})
    prepare = Preparation()

    def unlabelled(case, rng):
        prepared = prepare(case, rng)
        prepared.labels = None
        return prepared

    fill(cache, [dataclasses.replace(cases[0], label=None)], unlabelled, mesh, views=1)
    assert cache.read_case("a", "view0").labels is None


TIMEOUT = 30  # of waiting for another thread, in seconds: reached only when the test fails


def at_encoder_calls(monkeypatch, *hooks):
    """Call the hooks, the first before the first encoder call and so on; returns the list of calls so far."""
    original, calls = sharding.shard_batch, []

    def hooked(mesh, frames):
        calls.append(len(frames))
        if len(calls) <= len(hooks):
            hooks[len(calls) - 1]()
        return original(mesh, frames)

    monkeypatch.setattr(sharding, "shard_batch", hooked)
    return calls


def wait(event):
    assert event.wait(TIMEOUT), "the other thread did not get on: nothing overlaps"


def hidden(root):
    return [path for path in root.rglob(".*") if path.name != ".claims"]


def digest(root):
    """SHA-256 of every file of a folder, by its name."""
    paths = sorted(path for path in root.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_same_bytes_as_a_plain_loop(tmp_path, cases, mesh):
    overlapped = features.FeatureCache.open(tmp_path / "overlapped", {})
    fill(overlapped, cases, Preparation(), mesh)
    plain = features.FeatureCache.open(tmp_path / "plain", {})
    backbone, prepare = toy.backbone(), Preparation()
    encode = jax.jit(lambda encoder, frames: backbone.encode(encoder, frames).astype(jnp.bfloat16))
    for case in cases:
        for index, view in enumerate(("view0", "view1")):
            rng = np.random.default_rng([5, index, zlib.crc32(case.case_id.encode())]) if index else None
            prepared = prepare(case, rng)
            g = prepared.geometry
            framed = frames.to_frame(prepared.images, g, backbone.pixel_mean, backbone.pixel_std)
            framed = np.concatenate([framed, np.zeros_like(framed)])  # batches of 2, as above
            batches = [encode(backbone.encoder, framed[i : i + 2]) for i in range(0, len(prepared.slices), 2)]
            plain.write(
                case.case_id,
                view,
                features=np.concatenate(batches)[: len(prepared.slices)],
                labels=frames.labels_to_low_res(prepared.labels, g, 1),
                slices=prepared.slices,
                prompts=prepared.prompts,
                fingerprint=overlapped.fingerprint(case.case_id, view),
                intensities={},
            )
    assert len(digest(plain.root)) == 1 + 4 * (1 + 5 * 2)  # a view: done.json, and of five arrays two files each
    assert digest(overlapped.root) == digest(plain.root)


def test_reading_encoding_and_writing_overlap(tmp_path, cases, mesh, monkeypatch):
    """Case b is read only while a is encoded, and a's features are written only while b is encoded."""
    cache = features.FeatureCache.open(tmp_path / "cache", {})
    encoding_a, encoding_b, b_is_read, a_is_written = (threading.Event() for _ in range(4))
    good, write = Preparation(), cache.write

    def prepare(case, rng):
        if case.case_id == "b":
            wait(encoding_a)
            b_is_read.set()
        return good(case, rng)

    def write_late(case_id, *arguments, **options):
        if case_id == "a":
            wait(encoding_b)
        write(case_id, *arguments, **options)
        a_is_written.set()

    def first():
        encoding_a.set()
        wait(b_is_read)

    def second():
        encoding_b.set()
        wait(a_is_written)

    at_encoder_calls(monkeypatch, first, second)
    monkeypatch.setattr(cache, "write", write_late)
    assert fill(cache, cases, prepare, mesh, views=1, batch_size=3) == (2, 0, 5)


def test_a_batch_starts_before_the_last_is_copied(tmp_path, cases, mesh, monkeypatch):
    order, copy = [], caching._copy
    original = sharding.shard_batch
    monkeypatch.setattr(sharding, "shard_batch", lambda *a: (order.append("start"), original(*a))[1])
    monkeypatch.setattr(caching, "_copy", lambda *a: (order.append("copy"), copy(*a))[1])
    fill(features.FeatureCache.open(tmp_path / "cache", {}), cases[:1], Preparation(), mesh, views=1, batch_size=1)
    assert order == ["start", "start", "copy", "start", "copy", "copy"]


def test_a_full_disk_stops_the_run_before_the_next_batch(tmp_path, cases, mesh, monkeypatch):
    cache = features.FeatureCache.open(tmp_path / "cache", {})
    encoding_again, failed = threading.Event(), threading.Event()

    def full(*arguments, **options):
        wait(encoding_again)
        raise OSError(28, "No space left on device")

    def third():
        encoding_again.set()
        wait(failed)

    class Writer(caching._Writer):
        def submit(self, *arguments, **options):
            super().submit(*arguments, **options)
            self._running.add_done_callback(lambda _: failed.set())

    monkeypatch.setattr(features.slice_files, "write", full)
    monkeypatch.setattr(caching, "_Writer", Writer)
    calls = at_encoder_calls(monkeypatch, lambda: None, lambda: None, third)
    with pytest.raises(InputError, match="'a', view0 cannot be written .*No space left"):
        fill(cache, cases, Preparation(), mesh, batch_size=2)
    assert calls == [2, 2, 2]  # both batches of view 0, and the one of view 1 during which the write failed
    assert not hidden(tmp_path) and not list(cache.root.rglob("done.json"))


def test_ctrl_c_keeps_what_is_whole_and_leaves_no_parts(tmp_path, cases, mesh, monkeypatch):
    cache = features.FeatureCache.open(tmp_path / "cache", {})
    writing, interrupted = threading.Event(), threading.Event()
    original = features.slice_files.write

    def slow(*arguments, **options):
        writing.set()
        wait(interrupted)
        original(*arguments, **options)

    def interrupt():
        wait(writing)
        interrupted.set()
        raise KeyboardInterrupt

    monkeypatch.setattr(features.slice_files, "write", slow)
    at_encoder_calls(monkeypatch, lambda: None, interrupt)
    with pytest.raises(KeyboardInterrupt):
        fill(cache, cases, Preparation(), mesh, batch_size=3)
    assert [path.parent.name for path in cache.root.rglob("done.json")] == ["view0"]
    assert not hidden(tmp_path)
    monkeypatch.undo()
    assert fill(cache, cases, Preparation(), mesh) == (3, 1, 7)


@pytest.mark.parametrize(
    ("asked", "grid", "platform", "devices", "expected"),
    [
        (0, 16, "cpu", 1, 16),  # the tiny SAM
        (0, 64, "cpu", 1, 1),  # SAM at 1024 pixels
        (0, 64, "cpu", 4, 4),
        (0, 64, "gpu", 1, 8),
        (0, 64, "gpu", 8, 64),
        (0, 16, "gpu", 1, 16),
        (0, 128, "cpu", 1, 1),
        (5, 64, "cpu", 1, 5),
        (5, 64, "cpu", 4, 8),
    ],
)
def test_encoder_batch(asked, grid, platform, devices, expected):
    """What one call encodes: a budget of tokens, a multiple of the devices."""
    device = types.SimpleNamespace(platform=platform)
    mesh = types.SimpleNamespace(devices=np.array([device] * devices), size=devices)
    assert caching.encoder_batch(asked, (grid, grid, 256), mesh) == expected


def test_the_encoder_leaves_the_device(tmp_path, cases, mesh):
    """Training on cached features must find the device free of it."""

    def encoders():
        gc.collect()
        return sum(array.shape == (7, 48, 8) for array in jax.live_arrays())

    plain = toy.backbone()
    kernel = np.tile(plain.encoder["kernel"], (7, 1, 1)) / 7  # another shape than any other test's
    backbone = dataclasses.replace(
        plain,
        encoder={"kernel": kernel},
        encode=lambda encoder, images: plain.encode({"kernel": encoder["kernel"].sum(0)}, images),
    )
    encode = caching.case_encoder(backbone, 2, mesh)
    assert encoders() == 1
    del encode
    options = {"seed": 5, "num_classes": 1, "batch_size": 2, "mesh": mesh, "progress": False}
    cache, asked = features.FeatureCache.open(tmp_path / "cache", {}), [(case, 1) for case in cases]
    caching.fill_cache(cache, asked, Preparation(), backbone, **options)
    assert encoders() == 0
