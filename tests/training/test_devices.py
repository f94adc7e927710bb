"""One device and four emulated ones give the same features and the same training step.

In a subprocess: devices are made at start-up.
"""

import os
import pathlib
import subprocess
import sys

SCRIPT = """
import dataclasses, sys, pathlib, types
import jax, numpy as np
from calsegx import features, sharding
from calsegx.data import pipeline, preprocessing
from calsegx.interfaces import UsageError
from calsegx.models import sam
from calsegx.models.sam import presets
from calsegx.training import caching, state as train_state, step as train_step
from tests.training import toy

assert len(jax.devices()) == 4
cache = toy.fill(pathlib.Path(sys.argv[1]))
backbone, config = toy.backbone(), toy.config(batch_size=8)
config.fisher.warmup_fraction = 0.0
batches = [b for b, _ in pipeline.evaluation_batches(cache, toy.CASES, 8, "gt_points", 2)]
results = []
for count in (1, 4):
    mesh = sharding.device_mesh(jax.devices()[:count])
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

config.fisher.mode = "stochastic"
try:
    train_step.make_train_step(
        backbone.decode, backbone.frozen, *toy.terms(config).values(), config, optimizer, mesh)
except UsageError as error:
    assert "each of 4 devices would compute all of it; use --config.fisher.mode=every_k" in str(error)
else:
    raise AssertionError("a random share of a split batch was taken")

# Eleven slices through a small SAM: batches of three on one device, of four on four devices (one slice each).
small = dataclasses.replace(presets.TINY, image_size=64, embed_dim=16, depth=2, num_heads=2, out_chans=16,
                            window_size=4, decoder_mlp_dim=16)
folder = pathlib.Path(sys.argv[1]).parent / "sam"
sam.save(folder, small, sam.init(small, jax.random.key(0)), "card")
prepared = types.SimpleNamespace(
    slices=np.arange(11),
    images=np.random.default_rng(0).uniform(0, 255, (11, 24, 20, 3)).astype(np.float32),
    geometry=preprocessing.frame_geometry((24, 20), (1.0, 1.0), 64, (32, 32)))
network = sam.backbone.load_backbone(folder, 1)
one, four = (caching.case_encoder(network, 3, sharding.device_mesh(jax.devices()[:count]))(prepared)
             for count in (1, 4))
assert one.shape == four.shape == (11, *network.feature_shape) and one.dtype == four.dtype == features.BFLOAT16
assert np.abs(one.astype(np.float32)).mean() > 0.1
np.testing.assert_allclose(four.astype(np.float32), one.astype(np.float32), rtol=2**-7, atol=1e-5)
assert np.mean(one == four) > 0.99  # the others are float32 sums that were at a rounding border of bfloat16
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
