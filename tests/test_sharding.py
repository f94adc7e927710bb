"""The mesh and the two shardings.  More than one device: tests/training/test_devices.py."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from calsegx import sharding
from calsegx.interfaces import UsageError


def test_mesh_has_two_auto_axes():
    mesh = sharding.device_mesh()
    assert mesh.axis_names == ("data", "model")
    assert mesh.axis_types == (AxisType.Auto,) * 2
    assert mesh.size == len(jax.devices())
    assert sharding.device_mesh(jax.devices()[:1]).size == 1


def test_shardings_of_trees():
    mesh = sharding.device_mesh(jax.devices()[:1])
    tree = {"a": np.ones((4, 3)), "b": None}
    whole, split = sharding.replicate(mesh, tree), sharding.shard_batch(mesh, tree)
    assert whole["a"].sharding.spec == PartitionSpec()
    assert split["a"].sharding.spec == PartitionSpec(("data", "model"))
    assert split["b"] is None


def test_batch_must_divide():
    class ThreeDevices:
        size = 3

    with pytest.raises(UsageError, match=r"--config.batch_size=16 cannot be split evenly over 3 devices"):
        sharding.check_batch_size(ThreeDevices(), 16)
