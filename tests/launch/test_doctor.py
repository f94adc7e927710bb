"""The doctor says what a run needs, writes nothing, and fails where it cannot work."""

import collections
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from calsegx import features, sharding
from calsegx.training import cost
from launch import cache_features, components, doctor
from tests.training import toy

ROOT = pathlib.Path(__file__).parents[2]


def run(*arguments, devices=1):
    environment = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "launch.doctor", *map(str, arguments)]
    environment = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def arguments(config):
    data, model = config.data, config.model
    return [
        *(f"--config.data.{name}={getattr(data, name)}" for name in ("root", "channels", "classes", "source")),
        f"--config.model.weights={model.weights}",
        f"--config.method={config.method}",
    ]


def test_the_command_names_versions_devices_and_needs(config, tmp_path):
    done = run(*arguments(config), "--config.batch_size=8", f"--workdir={tmp_path / 'run'}", devices=4)
    assert done.returncode == 0, done.stderr
    assert re.search(r"Versions: Python \d.*jax \d.*tensorstore \d", done.stdout)
    assert "Devices: 4 x cpu" in done.stdout and "2 slices a device" in done.stdout
    assert re.search(r"Exchange between devices, a step: all-reduce of 0\.0\d+ MB; the gradients are", done.stdout)
    assert done.stdout.endswith("The run can start.\n")
    assert not (tmp_path / "run").exists()


def test_a_batch_that_does_not_divide_fails(config):
    done = run(*arguments(config), "--config.batch_size=6", devices=4)
    assert done.returncode == 1
    assert done.stderr == (
        "error: --config.batch_size=6 cannot be split evenly over 4 devices; make it a multiple of 4.\n"
    )
    assert "Feature cache" in done.stdout and "can start" not in done.stdout


@pytest.mark.parametrize(
    ("protocol", "resample"), [("gt_points", ""), ("gt_points", "5x32x32"), ("volume_points", ""), ("none", "5x32x32")]
)
def test_the_predicted_cache_is_the_one_that_is_written(config, tmp_path, protocol, resample):
    data = dataclasses.replace(config.data, cache=str(tmp_path / "cache"), resample=resample)
    config = dataclasses.replace(config, data=data, protocol=protocol)
    parts = components.build(config)
    groups = [(parts.select("train"), config.data.views), (parts.select("val"), 1)]
    slices, missing = doctor.count_slices(parts, tmp_path / "cache", groups)
    root = cache_features.cache_features(config, tmp_path)
    cache = features.FeatureCache.open(root, json.loads((root / "signature.json").read_text()))
    views = [
        len(cache.slices(case.case_id, f"view{v}")) for cases, count in groups for case in cases for v in range(count)
    ]
    assert missing == sum(views) > slices
    assert doctor.count_slices(parts, root, groups) == (slices, 0)


def test_a_disk_and_a_device_that_are_too_small_fail(config, tmp_path, monkeypatch):
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, cache=str(tmp_path / "new" / "cache")))
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage(10**9, 10**9, 1000))
    monkeypatch.setattr(doctor, "_limit", lambda device: 100_000)
    _, problems = doctor.describe_run(config, tmp_path)
    cache, encoder, step = problems
    assert "The feature cache needs" in cache and f"{tmp_path} has 0.000 GB free" in cache
    assert "set --config.model.encoder_batch=1" in encoder and "set --config.microbatch=1" in step


def test_says_that_a_gpu_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert "warning" not in "".join(doctor.describe_machine(tmp_path))
    (tmp_path / "nvidia0").touch()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    *_, warning = doctor.describe_machine(tmp_path)
    assert f"has an NVIDIA GPU ({tmp_path}/nvidia0); JAX_PLATFORMS=cpu asks for that" in warning
    monkeypatch.delenv("JAX_PLATFORMS")
    assert "pip install 'jax[cuda13]'" in doctor.describe_machine(tmp_path)[-1]


def test_costs_of_a_known_program():
    compiled = jax.jit(lambda a, b: a @ b).lower(*(np.zeros((64, 64), np.float32),) * 2).compile()
    found = cost.of(compiled)
    assert found.held == 3 * 64 * 64 * 4 and 2 * 64**3 <= found.flops < 2.1 * 64**3
    assert found.collectives == {}


def test_collectives_of_a_text():
    text = """
  %a = (f32[16,4]{1,0}, /*index=1*/bf16[8]{0}, f32[]) all-reduce(%x, %y, %z), channel_id=1
  %b = (f32[2]{0:T(128)}, f32[8]{0}) all-gather-start(%x), dimensions={0}
  ROOT %c = pred[3,5]{1,0} collective-permute(%p), source_target_pairs={{0,1}}
  %d = f32[9]{0} fusion(%a), calls=%all-reduce.fused
"""
    assert cost.collectives(text) == {"all-reduce": [276], "all-gather": [40], "collective-permute": [15]}


def test_the_step_costs_less_memory_in_smaller_parts():
    whole, one = (toy.config(batch_size=32, method="sam_ft", microbatch=size) for size in (0, 1))
    whole, one = (
        cost.of_train_step(each, toy.backbone(), toy.objective(each), sharding.device_mesh()) for each in (whole, one)
    )
    assert one.temporary < whole.temporary / 2


@pytest.fixture(autouse=True)
def _small_batches(config, monkeypatch):
    """One slice per encoder call: less to compile."""
    monkeypatch.setattr(config.model, "encoder_batch", 1)
