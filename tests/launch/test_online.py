"""Training without a cache: the same loop, exact to resume, whatever the number of workers."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import nibabel
import numpy as np
import pytest

from calsegx import sharding
from calsegx.data import frames, online
from calsegx.interfaces import DataError, InputError, UsageError
from calsegx.training import interruption
from launch import components, train


@pytest.fixture(scope="module")
def made(config, tmp_path_factory):
    """Two volumes of two slices a step, every augmentation."""
    cache = str(tmp_path_factory.mktemp("validation"))  # not the other tests': the augmentation differs
    strong = {"gamma": 0.2, "noise": 0.02, "low_resolution": 2.0}
    data = dataclasses.replace(config.data, online=True, slices_per_volume=2, cache=cache, **strong)
    return dataclasses.replace(config, data=data)


@pytest.fixture(scope="module")
def parts(made):
    return components.build(made)


@pytest.fixture(scope="module")
def cases(parts):
    return parts.select("train")


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    """An uninterrupted run."""
    workdir = tmp_path_factory.mktemp("online")
    return workdir, train.train(made, workdir)


def weights(workdir):
    return (workdir / "model" / "decoder.safetensors").read_bytes()


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def take(data, count, start=0):
    batches = data.batches(start)
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def same(one, other):
    for batch, expected in zip(one, other, strict=True):
        for array, right in zip((*batch[:2], *batch.prompts), (*expected[:2], *expected.prompts), strict=True):
            np.testing.assert_array_equal(array, right)


@pytest.fixture(scope="module")
def data(parts, cases):
    return components.train_online(parts, cases, interruption.Stop())[0]


def test_trains_without_caching_training_cases(whole, made, cases):
    workdir, summary = whole
    assert summary["steps"] == 4 and np.isfinite(summary["loss"]) and sorted(losses(workdir)) == [1, 2, 3, 4]
    seen = json.loads((workdir / "model" / "model.json").read_text())["seen"]
    assert [entry["case_id"] for entry in seen["train"]] == [case.case_id for case in cases]
    assert all(len(entry["fingerprint"]) == 64 for entry in seen["train"])
    assert len(list(pathlib.Path(made.data.cache).glob("*/*/done.json"))) == 1  # the validation case


def test_batches_are_those_of_the_cached_path(data, parts, cases):
    """Features of what ``prepare`` gives for the same seed, one slice after the other."""
    batch, draws = take(data, 1)[0], data.places[0]
    assert batch.features.shape == (4, *parts.backbone.feature_shape) and batch.labels.dtype == np.int32
    by_id = {case.case_id: case for case in cases}
    prepared = [parts.prepare(by_id[d.case_id], np.random.default_rng(d.seed), count=2) for d in draws]
    b = parts.backbone
    framed = np.concatenate([frames.to_frame(p.images, p.geometry, b.pixel_mean, b.pixel_std) for p in prepared])
    expected = np.asarray(b.encode(b.encoder, framed), np.float32)
    np.testing.assert_allclose(batch.features.astype(np.float32), expected, rtol=2e-2, atol=2e-2)
    points = np.concatenate([p.prompts["gt_points"].points for p in prepared])
    np.testing.assert_array_equal(batch.prompts.points, points)
    assert batch.prompts.boxes is None and batch.labels.any(axis=(1, 2)).all()


def test_every_volume_once_per_epoch_and_drawn_anew(data):
    """Three cases, two to a batch: three batches are two epochs."""
    assert data.steps_per_epoch == 1
    draws = [draw for step in range(6) for draw in data.places[step]]
    for epoch in range(4):
        assert len({draw.case_id for draw in draws[3 * epoch : 3 * epoch + 3]}) == 3
    assert len({draw.seed for draw in draws}) == 12


def test_the_number_of_workers_changes_nothing(data):
    whole = take(data, 3)
    parallel = dataclasses.replace(data, workers=2)
    same(take(parallel, 3), whole)
    same(take(parallel, 2, start=1), whole[1:])


def test_shares_together_are_the_batches_of_one_process(data, parts, cases):
    ids = [case.case_id for case in cases]
    both = [online.order(ids, 2, parts.config.seed, (index, 2))[0] for index in range(2)]
    for step in range(4):
        assert [*both[0][step], *both[1][step]] == list(data.places[step])


def test_jitter_moves_prompts_alone_and_follows_the_draw(data, parts, cases):
    jittered = dataclasses.replace(parts, config=dataclasses.replace(parts.config, prompt_jitter=0.05))
    moved = components.train_online(jittered, cases, interruption.Stop())[0]
    plain, one, again = take(data, 1)[0], take(moved, 1)[0], take(dataclasses.replace(moved, workers=1), 1)[0]
    same([one], [again])
    np.testing.assert_array_equal(one.features, plain.features)
    distance = np.abs(one.prompts.points - plain.prompts.points)
    assert 0 < distance.max() <= 0.05 * parts.backbone.image_size


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_stop_and_resume_are_an_uninterrupted_run(whole, made, tmp_path, monkeypatch, workers):
    """SIGTERM after step 2; the same bytes at the end, also with another number of workers."""
    take_step, done = train.loop.sharding.shard_batch, []

    def stop_at_two(mesh, tree):
        if isinstance(tree, online.Batch):
            done.append(1)
            if len(done) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
        return take_step(mesh, tree)

    monkeypatch.setattr(sharding, "shard_batch", stop_at_two)
    with pytest.raises(interruption.Interrupted, match="step 2 of 4 is saved"):
        train.train(made, tmp_path)
    monkeypatch.undo()
    resumed = dataclasses.replace(made, data=dataclasses.replace(made.data, workers=workers))
    train.train(resumed, tmp_path, resume=True)
    assert weights(tmp_path) == weights(whole[0])
    assert losses(tmp_path) == losses(whole[0])


def test_other_training_data_is_refused(whole, made, dataset, tmp_path):
    other = tmp_path / "data"
    shutil.copytree(dataset, other)
    label = sorted((other / "labelsTr").glob("*_A*"))[0]
    image = nibabel.load(label)
    voxels = np.asarray(image.dataobj).astype(np.uint8)
    voxels[tuple(np.argwhere(voxels)[0])] = 0
    nibabel.save(nibabel.Nifti1Image(voxels, image.affine, image.header), label)
    run = tmp_path / "run"
    shutil.copytree(whole[0], run)
    changed = dataclasses.replace(made, steps=6, data=dataclasses.replace(made.data, root=str(other)))
    with pytest.raises(InputError, match="training data was"):
        train.train(changed, run, resume=True, allow_config_change=False)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_bad_file_ends_the_run_with_its_name(made, dataset, tmp_path, workers):
    broken = tmp_path / "data"
    shutil.copytree(dataset, broken)
    victim = sorted((broken / "imagesTr").glob("*_A*_0001.nii.gz"))[0]
    victim.write_bytes(victim.read_bytes()[:-200])
    changes = {"root": str(broken), "workers": workers, "cache": str(tmp_path / "cache")}
    with pytest.raises(DataError, match=victim.name):
        train.train(dataclasses.replace(made, data=dataclasses.replace(made.data, **changes)), tmp_path / "run")


def test_a_case_without_foreground_is_left_out_and_said(made, parts, cases, monkeypatch, capsys):
    read = components.preprocessing.read_label_volume

    def healthy(case, *arguments):
        volume = read(case, *arguments)
        empty = case.case_id == cases[1].case_id
        return dataclasses.replace(volume, voxels=np.zeros_like(volume.voxels)) if empty else volume

    monkeypatch.setattr(components.preprocessing, "read_label_volume", healthy)
    data, fingerprints = components.train_online(parts, cases, interruption.Stop())
    assert set(fingerprints) == {case.case_id for case in cases} - {cases[1].case_id}
    assert cases[1].case_id not in {draw.case_id for step in range(4) for draw in data.places[step]}
    assert f"Left out 1 cases without foreground: {cases[1].case_id}." in capsys.readouterr().out


@pytest.mark.slow
def test_a_worker_that_dies_is_a_sentence(data):
    parallel = dataclasses.replace(data, workers=1, read=dataclasses.replace(data.read, prepare=die))
    with pytest.raises(InputError, match="ended from outside, most likely for want of memory; lower --config.data.wor"):
        next(parallel.batches(0))


def die(*arguments, **options):
    os._exit(137)


KILLED = """
import multiprocessing, os, signal
from calsegx.data import online
from tests.launch import test_online

def main():
    data = online.OnlineData(online.order(["a"], 1, 0, (0, 1))[0], test_online.plain, len, 1, 1, "")
    batches = data.batches(0)
    next(batches)
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    main()
"""


def plain(draw):
    return online.Slices(np.zeros(1), None, np.zeros(1), online.Prompts())


@pytest.mark.slow
def test_workers_end_with_a_training_process_that_is_killed(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text("from absl import flags\nflags.FLAGS.mark_as_parsed()\n" + KILLED)
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    (worker,) = map(int, ended.stdout.split())
    deadline = time.monotonic() + 10
    while pathlib.Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not pathlib.Path(f"/proc/{worker}").exists()


def test_workers_hold_no_device(data):
    """What goes to a worker is plain; and a worker that has read has not started JAX."""
    parallel = dataclasses.replace(data, workers=1, read=dataclasses.replace(data.read, prepare=backends))
    with pytest.raises(DataError, match="no backend"):
        next(parallel.batches(0))


def backends(*arguments, **options):
    from jax._src import xla_bridge

    raise DataError(f"{len(xla_bridge._backends) or 'no'} backend")


def test_batches_that_do_not_fit(parts, made):
    with pytest.raises(UsageError, match="slices of 4 volumes .* there are 3 training cases"):
        online.order(["a", "b", "c"], 4, 0, (0, 1))
    with pytest.raises(UsageError, match="3 volumes of a batch cannot be dealt out evenly to 2 processes"):
        online.order(["a", "b", "c"], 3, 0, (0, 2))
    paired = dataclasses.replace(made, loss="sam + 0.1*bwcr")
    with pytest.raises(UsageError, match="which only a feature cache holds"):
        components.objective(paired, 1)
