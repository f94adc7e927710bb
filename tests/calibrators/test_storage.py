"""Saved calibrators: what comes back, every flipped byte, and the test split."""

import json
from pathlib import Path

import numpy as np
import pytest

from calsegx import calibrators
from calsegx.calibrators import storage
from calsegx.interfaces import InputError, UsageError

PARAMS = {"weight": [0.1, 1 / 3], "bias": [1e-17, -2.0], "identifiable": True, "provenance": {"région": "all", "n": 2}}


def test_names():
    every = "dirichlet image_temperature local_temperature matrix platt temperature vector"
    assert calibrators.names() == every.split()
    with pytest.raises(UsageError, match="no calibrator named 'vectr'.*Did you mean 'vector'"):
        calibrators.get("vectr")


def test_what_is_saved_comes_back(tmp_path: Path):
    path = tmp_path / "new" / "calibrator.json"
    storage.save(path, "vector", PARAMS)
    assert storage.load(path) == ("vector", PARAMS)
    first = path.read_bytes()
    storage.save(path, *storage.load(path))
    assert path.read_bytes() == first
    storage.save(path, "vector", {**PARAMS, "provenance": {10: "a", 9: "b"}})  # keys become text
    assert storage.load(path)[1]["provenance"] == {"10": "a", "9": "b"}


def test_every_flipped_byte_is_noticed(tmp_path: Path):
    path = tmp_path / "calibrator.json"
    storage.save(path, "vector", PARAMS)
    content = path.read_bytes()
    for position in range(len(content)):
        for bit in (0, 5):  # the smallest change, and that of a letter's case
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(InputError, match=r"calibrator\.json"):
                storage.load(path)
    for damaged in (b"", content[:-1], content + b" ", b"[]", b"[" * 100_000):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="damaged"):
            storage.load(path)


def test_unknown_or_missing(tmp_path: Path):
    path = tmp_path / "calibrator.json"
    with pytest.raises(InputError, match="cannot be read"):
        storage.load(path)
    storage.save(path, "vector", PARAMS)
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "version": 2}))
    with pytest.raises(InputError, match="is of version 2, expected 1; fit it again"):
        storage.load(path)
    path.write_text(storage._encode("spline", PARAMS))
    with pytest.raises(InputError, match="no calibrator named 'spline'"):
        storage.load(path)
    with pytest.raises(UsageError, match="no calibrator named 'spline'"):
        storage.save(path, "spline", PARAMS)
    for bad in ({"bias": np.zeros(2)}, {"bias": float("nan")}):
        with pytest.raises(UsageError, match="cannot be saved"):
            storage.save(path, "vector", bad)


def test_the_test_split_is_refused():
    storage.check_split("val", ["a", "b"], ["c"])
    with pytest.raises(UsageError, match="split 'test'"):
        storage.check_split("test", ["a"], [])
    with pytest.raises(UsageError, match="subjects of the test split: b, c, d and 1 more are in both"):
        storage.check_split("val", iter("abcde"), iter("edcb"))


def test_arrays_and_chunks_of_them_are_fitted_alike():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(2, 6, 7, 3)) * 2, rng.integers(0, 3, (2, 6, 7))
    for name in calibrators.names():
        fit = calibrators.get(name).fit
        if name == "platt":
            logits_of, labels_of = logits[..., :1], np.minimum(labels, 1)
        else:
            logits_of, labels_of = logits, labels
        if calibrators.get(name).spatial:
            options = {"epochs": 1}
            chunks = [(logits_of, labels_of, None, np.ones(labels.shape, bool))]
            whole, streamed = fit(logits_of, labels_of, **options), fit(chunks, use_image=False, **options)
        else:
            rows = logits_of.reshape(-1, logits_of.shape[-1])
            whole, streamed = fit(logits_of, labels_of), fit([(rows, labels_of.ravel())])
        assert whole == streamed and whole["voxels"] == labels.size
