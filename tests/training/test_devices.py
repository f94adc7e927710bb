"""One, two and four devices and two processes give the same training; what crosses devices; the encoder in parts.

In subprocesses: devices are made at start-up.  They are emulated, four on one CPU.
"""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 20
CONFIGS = {
    "calsam": {"method": "calsam", "microbatch": 2},
    "sam_ft": {"method": "sam_ft"},
    "crac": {"method": "crac"},  # an epoch is one step here, so that the multipliers change after every step
}


def start(module, *arguments, devices=4):
    environment = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", module, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*processes):
    outputs = [process.communicate(timeout=280) for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    return [output for output, _ in outputs]


def in_two_processes(module, *arguments):
    """Two processes with two devices each, which meet on a free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        coordinator = f"localhost:{probe.getsockname()[1]}"
    return finish(*(start(module, *arguments, coordinator, 2, index, devices=2) for index in range(2)))


def run(name, devices, *, resume=False, until=0, **config):
    changes = {"batch_size": 8, "steps": STEPS, "save_every": STEPS, "validate_every": 5, **config}
    return {"name": name, "devices": devices, "config": changes, "resume": resume, "until": until}


def log(folder):
    """``[(step, measurement), ...], values`` of a run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    entries = [(line["step"], name, value) for line in lines for name, value in line.items() if name != "seconds"]
    return [entry[:2] for entry in entries], np.array([entry[2] for entry in entries])


def assert_same_numbers(folder, *names):
    known, expected = log(folder / names[0])
    assert {step for step, _ in known} == set(range(1, STEPS + 1))
    for name in names[1:]:
        entries, values = log(folder / name)
        assert entries == known
        np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("devices")


def test_two_devices_a_restore_on_fewer_and_two_processes(folder):
    """CRaC, whose multipliers are set on the validation slices: everything that crosses devices happens."""
    runs = [
        run("one", 1, method="crac"),
        run("two", 2, method="crac"),
        run("moved", 4, method="crac", until=7),
        run("moved", 1, method="crac", resume=True, until=5),
        run("moved", 2, method="crac", resume=True),
    ]
    [output] = finish(start("tests.training.device_program", folder, json.dumps(runs)))
    assert f"step 7 of {STEPS} is saved" in output and f"step 12 of {STEPS} is saved" in output
    assert "devices was 4 and is 1" in output and "devices was 1 and is 2" in output
    first, second = in_two_processes(
        "tests.training.device_program", folder, json.dumps([run("processes", 4, method="crac")])
    )
    assert f"saved step {STEPS}" in first and "saved" not in second
    assert_same_numbers(folder, "one", "two", "moved", "processes")


@pytest.mark.slow
def test_every_method_on_one_two_four_devices_and_two_processes(folder):
    several = [run(f"{name}{devices}", devices, **config) for name, config in CONFIGS.items() for devices in (1, 2, 4)]
    finish(start("tests.training.device_program", folder, json.dumps(several)))
    runs = [run(f"{name}_processes", 4, **config) for name, config in CONFIGS.items()]
    in_two_processes("tests.training.device_program", folder, json.dumps(runs))
    for name in CONFIGS:
        assert_same_numbers(folder, f"{name}1", f"{name}2", f"{name}4", f"{name}_processes")


COLLECTIVES = """
import json, pathlib, sys
import jax, numpy as np
from calsegx import sharding
from calsegx.data import pipeline
from calsegx.interfaces import UsageError
from calsegx.training import cost, state as train_state, step as train_step
from tests.training import toy

cache = toy.fill(pathlib.Path(sys.argv[1]))
backbone, mesh = toy.backbone(), sharding.device_mesh()
[(batch, _)] = pipeline.evaluation_batches(cache, toy.CASES, 8, "gt_points", 1)
batch = sharding.shard_batch(mesh, batch)
assert [shard.data.shape[0] for shard in batch.features.addressable_shards] == [2, 2, 2, 2]
found = {}
for name, mode, options in (
    ("calsam", "exact", {}), ("calsam", "stochastic", {}), ("calsam", "every_k", {"microbatch": 1}), ("sam_ft", "", {}),
    ("crac", "", {}),
):
    config = toy.config(method=name, batch_size=8, **options)
    config.fisher.mode, config.fisher.labels = mode or "exact", "sampled"
    optimizer = train_state.make_optimizer(config)
    lagrangian = train_state.init_lagrangian(config, backbone, batch) if name == "crac" else None
    state = train_state.init_state(backbone.trainable, optimizer, mesh, lagrangian)
    step = train_step.make_train_step(
        backbone.decode, backbone.frozen, toy.objective(config), config, optimizer, mesh)
    found[f"{name} {mode}"] = cost.of(step.lower(state, batch).compile()).collectives
    state, values = step(state, batch)
    assert state.params["hidden"]["kernel"].is_fully_replicated and np.isfinite(values["loss"])
try:
    sharding.shard_batch(mesh, np.zeros((6, 2)))
except UsageError as error:
    assert "--config.batch_size=6 cannot be split evenly over 4 devices" in str(error)
else:
    raise AssertionError("a batch of 6 was split over 4 devices")
try:
    config = toy.config(method="sam_ft", batch_size=4)
    objective = toy.objective(config, task="bwcr")
    train_step.make_train_step(backbone.decode, backbone.frozen, objective, config, optimizer, mesh)
except UsageError as error:
    assert "make --config.batch_size=4 a multiple of 8" in str(error)
else:
    raise AssertionError("pairs were split over 4 devices")
print(json.dumps([sum(leaf.nbytes for leaf in jax.tree.leaves(backbone.trainable)), found]))
"""

# What is averaged beside the gradients: loss and task, the terms cmp and crac, penalty and feature_gradient_norm.
SCALARS = {"calsam exact": 5, "calsam stochastic": 5, "calsam every_k": 5, "sam_ft ": 2, "crac ": 3}


def in_program(script, *arguments):
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_only_gradients_and_measurements_cross_devices(tmp_path):
    gradient_bytes, found = in_program(COLLECTIVES, tmp_path / "cache")
    assert found.keys() == SCALARS.keys()
    for name, collectives in found.items():
        assert collectives.keys() == {"all-reduce"}, name
        assert 0 <= sum(collectives["all-reduce"]) - gradient_bytes <= 4 * SCALARS[name], name


ENCODER = """
import dataclasses, json, pathlib, sys, types
import jax, numpy as np
from calsegx import features, sharding
from calsegx.data import frames, preprocessing
from calsegx.models import sam
from calsegx.models.sam import presets
from calsegx.training import caching, cost
from tests import random_sam

small = dataclasses.replace(presets.TINY, image_size=64, embed_dim=128, depth=4, num_heads=2, out_chans=16,
                            window_size=4, decoder_mlp_dim=16)
folder = pathlib.Path(sys.argv[1])
random_sam.save(folder, small)
prepared = types.SimpleNamespace(
    slices=np.arange(11),
    images=np.random.default_rng(0).uniform(0, 255, (11, 24, 20, 3)).astype(np.float32),
    geometry=frames.frame_geometry((3, 24, 20), (1.0, 1.0, 1.0), 64, (32, 32)))
network = sam.backbone.load_backbone(folder, 1)
# Batches of three on one device, of four on four devices (one slice each).
one, four = (caching.case_encoder(network, 3, sharding.device_mesh(jax.devices()[:count]))(prepared)
             for count in (1, 4))
assert one.shape == four.shape == (11, *network.feature_shape) and one.dtype == four.dtype == features.BFLOAT16
assert np.abs(one.astype(np.float32)).mean() > 0.1
np.testing.assert_allclose(four.astype(np.float32), one.astype(np.float32), rtol=2**-7, atol=1e-5)
assert np.mean(one == four) > 0.99  # the others are float32 sums that were at a rounding border of bfloat16

frames = np.random.default_rng(1).normal(size=(4, 64, 64, 3)).astype(np.float32)
size = lambda place, leaf: 4 * int(np.prod(place.shard_shape(leaf.shape)))
report, outputs = {"whole": sum(leaf.nbytes for leaf in jax.tree.leaves(network.encoder))}, []
for model in (1, 2, 4):
    mesh = sharding.device_mesh(model=model)
    place, encode = caching.batch_encoder(network, mesh)
    compiled = encode.lower(network.encoder, frames).compile()
    outputs.append(np.asarray(compiled(jax.device_put(network.encoder, place), sharding.shard_batch(mesh, frames))))
    stored, found = sum(map(size, *map(jax.tree.leaves, (place, network.encoder)))), cost.of(compiled)
    report[model] = [stored, found.temporary, sorted(found.collectives)]
assert np.array_equal(outputs[1], outputs[0]) and np.array_equal(outputs[2], outputs[0])
print(json.dumps(report))
"""


def test_encoder_on_several_devices_and_in_parts(tmp_path):
    found = in_program(ENCODER, tmp_path / "sam")
    whole = found["whole"]
    _, needed, exchanged = found["1"]
    assert exchanged == []
    for model in (2, 4):
        stored, temporary, exchanged = found[str(model)]
        assert stored < 1.1 * whole / model
        assert exchanged == ["all-gather"]
        assert temporary < needed + whole / 2  # two of four blocks at a time, not all of them
