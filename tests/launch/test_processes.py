"""Several processes as the launch scripts start them: the evaluation is that of one."""

import dataclasses
import os
import pathlib
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from calsegx import locks
from calsegx.evaluation import evaluate as case_metrics
from calsegx.evaluation import figures, gallery
from calsegx.interfaces import Case
from calsegx.metrics import calibration
from calsegx.training import checkpoints
from launch import evaluate, exchange, train

ROOT = pathlib.Path(__file__).parents[2]


def start_two(module, *arguments):
    """Two processes that find each other, two devices each."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        meeting = [f"--coordinator=localhost:{probe.getsockname()[1]}", "--num_processes=2"]
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments), *meeting, f"--process_id={index}"],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]


def in_two_processes(module, *arguments):
    """Exit codes, outputs and errors of two processes that end."""
    started = start_two(module, *arguments)
    outputs = [process.communicate(timeout=280) for process in started]
    return [(process.returncode, *output) for process, output in zip(started, outputs, strict=True)]


def test_what_is_exchanged_comes_back_exactly():
    rng = np.random.default_rng(0)
    case = Case("a", "s", {}, None, "test")
    key = case_metrics.CaseKey("calsam", 3, "a", "s", "A", "test")
    probabilities = rng.uniform(size=(3, 8, 8, 1)).astype(np.float32)
    truth = rng.integers(0, 2, (3, 8, 8))
    rows, sums = case_metrics.evaluate_case(probabilities, truth, (1.0, 1.0, 2.0), ["tumour"], key)
    statistics = {("calsam", "A", region): value for region, value in sums.items()}
    overlay = figures.Overlay(truth[0] > 0, probabilities[0, ..., 0])
    picture = gallery.Snapshot(case, "A", 1, truth[1] > 0, (1.0, 2.0), {"calsam": overlay})
    counts = {("calsam", "A"): rng.integers(0, 2**40, (2, 7))}
    scored = exchange.Scored(rows, statistics, counts, picture, {0.05: rows})
    back = exchange.from_bytes(exchange.to_bytes(scored), case)
    assert repr(back.rows) == repr(back.jittered[0.05]) == repr(rows)  # NaN is not equal to itself
    assert back.statistics.keys() == statistics.keys()
    for slot, value in statistics.items():
        assert repr(back.statistics[slot]) == repr(value)
        assert isinstance(back.statistics[slot], calibration.CalibrationStatistics)
        assert (back.statistics[slot] + value).voxels == 2 * value.voxels
    assert back.margins.keys() == counts.keys()
    assert np.array_equal(back.margins["calsam", "A"], counts["calsam", "A"])
    assert repr(back.picture) == repr(picture)
    assert back.picture.results["calsam"].probability.dtype == np.float32


@pytest.mark.slow
def test_two_processes_encode_train_and_evaluate_like_one(config, tmp_path):
    data = config.data
    arguments = [f"--config.data.{name}={getattr(data, name)}" for name in ("root", "channels", "classes", "source")]
    arguments += [f"--config.model.weights={config.model.weights}", "--config.method=sam_ft", "--config.batch_size=4"]
    arguments += [
        "--config.steps=4",
        "--config.log_every=1",
        "--config.model.shards=2",
        f"--workdir={tmp_path / 'run'}",
    ]
    first, second = in_two_processes("launch.train", *arguments)
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert "Trained sam_ft for 4 steps" in first[1] and "Trained" not in second[1]

    alone = dataclasses.replace(config, steps=4, validate_every=500, save_every=500)
    alone = dataclasses.replace(alone, data=dataclasses.replace(data, cache=str(tmp_path / "cache")))
    summary = train.train(alone, tmp_path / "alone")
    assert f"validation loss {summary['validation_loss']:.4f}" in first[1]

    evaluate.evaluate([tmp_path / "run"], tmp_path / "one")
    first, second = in_two_processes("launch.evaluate", f"--runs={tmp_path / 'run'}", f"--workdir={tmp_path / 'two'}")
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert "The report is" in first[1] and "The report is" not in second[1]
    for name in ("cases.csv", "summary.json", "table.md", "temperatures.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name


@pytest.mark.slow
def test_the_others_of_a_process_that_refuses_end_too(config, tmp_path):
    """Of two with two devices each, the flag of both is wrong: both say so, none hangs."""
    outcome = in_two_processes(
        "launch.train",
        f"--config.data.root={config.data.root}",
        f"--config.model.weights={config.model.weights}",
        f"--config.data.channels={config.data.channels}",
        "--config.batch_size=6",
        f"--workdir={tmp_path}",
    )
    assert [code for code, _, _ in outcome] == [2, 2]
    assert all("--config.batch_size=6 cannot be split evenly over 4 devices" in errors for _, _, errors in outcome)


@pytest.mark.slow
def test_the_other_of_a_killed_process_ends(config, tmp_path):
    """It waits for nobody who is gone, and the run goes on from what was saved."""
    arguments = [
        f"--config.data.{name}={getattr(config.data, name)}" for name in ("root", "channels", "classes", "source")
    ]
    arguments += [f"--config.model.weights={config.model.weights}", "--config.method=sam_ft", "--config.batch_size=4"]
    arguments += ["--config.steps=100000", "--config.save_every=5", f"--workdir={tmp_path / 'run'}"]
    started = start_two("launch.train", *arguments)
    first, second = started
    for line in first.stdout:
        if "saved step" in line:
            break
    second.kill()
    _, errors = first.communicate(timeout=200)  # the heartbeats are missed after 100 s
    second.communicate()
    if first.returncode == 1:
        assert "This process lost the others" in errors
    else:  # aborted by the coordination service
        assert first.returncode == -signal.SIGABRT and "heartbeat" in errors
    assert checkpoints.whole_steps(tmp_path / "run" / "checkpoints")
    with locks.exclusive(tmp_path / "run"):
        pass  # it is free again
