"""Several processes fill one cache: nothing twice, nothing missing; damage is found, named and computed again."""

import json
import pathlib
import subprocess
import sys
import threading
import time

import jax
import pytest

from calsegx import features, locks, sharding
from calsegx.training import cache_jobs, caching
from tests.training import test_caching, toy

CASES = ("a", "b", "c", "d", "e", "f")
FILL = """
import json, pathlib, sys, time
from calsegx import features
from tests.training import test_cache_jobs
root, name = pathlib.Path(sys.argv[1]), sys.argv[2]

def meet():
    (root / f"process {name}").touch()
    deadline = time.monotonic() + 120
    while not all((root / f"process {number}").exists() for number in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.01)

counts, calls = test_cache_jobs.fill(features.FeatureCache.open(root / "cache", {}), root, meet=meet)
print(json.dumps([counts, calls]))
"""


@pytest.fixture(scope="module")
def mesh():
    return sharding.device_mesh(jax.devices()[:1])


def fill(cache, folder, progress=False, pause=0.05, mesh=None, meet=lambda: None):
    """Fill one view of every case, which takes a moment each; the counts, and the cases that were prepared.

    ``meet`` is called while the first of them is prepared.
    """
    preparation = test_caching.Preparation()

    def prepare(case, rng):
        time.sleep(pause)
        if not preparation.calls:
            meet()
        return preparation(case, rng)

    options = {"seed": 5, "num_classes": 1, "batch_size": 3, "progress": progress}
    cases = [(case, 1) for case in test_caching.make_cases(folder, CASES)]
    mesh = mesh or sharding.device_mesh(jax.devices()[:1])
    return caching.fill_cache(cache, cases, prepare, toy.backbone(), mesh=mesh, **options), preparation.calls


def test_two_processes_compute_nothing_twice(tmp_path):
    test_caching.make_cases(tmp_path, CASES)
    command = [sys.executable, "-c", FILL, str(tmp_path)]
    options = {"cwd": pathlib.Path(__file__).parents[2], "text": True, "stdout": -1}
    processes = [subprocess.Popen([*command, str(number)], **options) for number in range(2)]
    ended = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    counts, calls = zip(*(json.loads(said) for said in ended), strict=True)
    assert sorted(calls[0] + calls[1]) == list(CASES)  # each by one of them
    assert all(calls)  # and both took part
    assert [computed + present for computed, present, _ in counts] == [6, 6]
    assert [computed for computed, _, _ in counts] == [len(of_process) for of_process in calls]
    assert {path.parent.parent.name for path in (tmp_path / "cache").rglob("done.json")} == set(CASES)


def test_what_another_computes_is_waited_for_and_left_alone(tmp_path, mesh, capsys):
    cache = features.FeatureCache.open(tmp_path / "cache", {})
    other = locks.claim(cache.claim_path("b", "view0"))
    fill(features.FeatureCache.open(tmp_path / "elsewhere", {}), tmp_path, mesh=mesh)
    ended = []

    def compute():
        others = [cache.root / name / "view0" / "done.json" for name in CASES if name != "b"]
        while not all(path.exists() for path in others):  # rglob fails where a folder is renamed meanwhile
            time.sleep(0.01)
        (tmp_path / "elsewhere" / "b").rename(cache.root / "b")
        ended.append(time.monotonic())
        other.release()

    thread = threading.Thread(target=compute)
    thread.start()
    counts, calls = fill(cache, tmp_path, progress=True, mesh=mesh)
    thread.join()
    assert counts[:2] == (5, 1) and calls == ["a", "c", "d", "e", "f"]
    assert ended and "Waiting for 1 views that other processes compute." in capsys.readouterr().out


def test_a_claim_that_is_given_up_is_taken_over(tmp_path, mesh, capsys):
    """The other process died or could not use the case; and the file that a dead process leaves does not count."""
    cache = features.FeatureCache.open(tmp_path / "cache", {})
    locks.claim(cache.claim_path("a", "view0")).release()
    assert cache.claim_path("a", "view0").exists()
    other = locks.claim(cache.claim_path("b", "view0"))
    timer = threading.Timer(1, other.release)
    timer.start()
    counts, calls = fill(cache, tmp_path, progress=True, mesh=mesh)
    assert counts[:2] == (6, 0) and calls == ["a", "c", "d", "e", "f", "b"]
    said = " ".join(capsys.readouterr().out.split())
    assert "6 views of cases to compute (0 are there)" in said
    assert "A view takes about" in said and "the 4 that are left about 0:00:0" in said


def test_no_claim_is_kept_after_an_error(tmp_path, mesh, monkeypatch):
    cache = features.FeatureCache.open(tmp_path / "cache", {})
    test_caching.at_encoder_calls(monkeypatch, lambda: None, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fill(cache, tmp_path, mesh=mesh)
    monkeypatch.undo()
    assert fill(cache, tmp_path, mesh=mesh)[0][:2] == (5, 1)


def test_damage_is_found_named_and_computed_again(tmp_path, mesh, capsys):
    cache = features.FeatureCache.open(tmp_path / "cache", {})
    fill(cache, tmp_path, mesh=mesh)
    before = test_caching.digest(cache.root)
    (path,) = (path for path in (cache.root / "c" / "view0" / "features" / "c").rglob("*") if path.is_file())
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    (cache.root / "e" / "view0" / "done.json").write_text("{}")
    cases = [(case, 2) for case in test_caching.make_cases(tmp_path, CASES)]
    again = features.FeatureCache.open(cache.root, {})
    assert cache_jobs.verify(again, cases) == [("c", "view0"), ("e", "view0")]
    said = capsys.readouterr().out
    assert "features of case 'c', view0 are damaged" in said and "6/6 views" in said
    assert cache_jobs.verify(again, cases, progress=False) == []
    counts, calls = fill(again, tmp_path, mesh=mesh)
    assert counts[:2] == (2, 4) and calls == ["c", "e"]
    assert test_caching.digest(cache.root) == before  # bit for bit, and nothing is left aside


def test_verification_can_be_stopped(tmp_path, mesh):
    cache = features.FeatureCache.open(tmp_path / "cache", {})
    fill(cache, tmp_path, mesh=mesh)

    def stop():
        raise KeyboardInterrupt

    cases = [(case, 1) for case in test_caching.make_cases(tmp_path, CASES)]
    with pytest.raises(KeyboardInterrupt):
        cache_jobs.verify(cache, cases, progress=False, between=stop)
