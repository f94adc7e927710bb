"""One device and four emulated ones give the same training step.  In a subprocess: devices are made at start-up."""

import os
import pathlib
import subprocess
import sys

SCRIPT = """
import sys, pathlib
import jax, numpy as np
from calsegx import sharding
from calsegx.data import pipeline
from calsegx.interfaces import UsageError
from calsegx.training import state as train_state, step as train_step
from tests.training import toy

assert len(jax.devices()) == 4
cache = toy.fill(pathlib.Path(sys.argv[1]))
backbone, config = toy.backbone(), toy.config(batch_size=8)
config.fisher.warmup_fraction = 0.0
batches = [b for b, _ in pipeline.evaluation_batches(cache, toy.CASES, 8, "gt_points", 2)]
results = []
for count in (1, 4):
    mesh = sharding.data_mesh(jax.devices()[:count])
    optimizer = train_state.make_optimizer(config)
    state = train_state.init_state(backbone.trainable, optimizer, mesh)
    step = train_step.make_train_step(
        backbone.decode, backbone.frozen, *toy.terms(config).values(), config, optimizer, mesh)
    for batch in batches:
        split = sharding.shard_batch(mesh, batch)
        assert len(split.features.addressable_shards) == count
        assert split.features.addressable_shards[0].data.shape[0] == 8 // count
        state, values = step(state, split)
    assert len(state.params["hidden"]["kernel"].addressable_shards) == count
    assert state.params["hidden"]["kernel"].is_fully_replicated
    results.append((jax.device_get(state), jax.device_get(values)))
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), *results)
try:
    sharding.shard_batch(mesh, np.zeros((6, 2)))
except UsageError as error:
    assert "--config.batch_size=6 cannot be split evenly over 4 devices" in str(error)
else:
    raise AssertionError("a batch of 6 was split over 4 devices")
print("same on 1 and 4")
"""


def test_one_and_four_devices_agree(tmp_path):
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, str(tmp_path / "cache")],
        cwd=pathlib.Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "same on 1 and 4" in done.stdout
