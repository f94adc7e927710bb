"""Data parallelism: one mesh axis ``data``; parameters are replicated, batches are split over it.

Axes are ``Auto``: the compiler derives the sharding of intermediate arrays and inserts the gradient's
all-reduce.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from calsegx.interfaces import UsageError


# Ignored: jax.Device comes from an extension module without stubs; pyright takes it for a variable.
def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:  # pyright: ignore[reportInvalidTypeForm]
    """A one-dimensional mesh ``("data",)`` over ``devices``; None: all devices of the process's backend."""
    devices = jax.devices() if devices is None else list(devices)
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose leading axis is split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Put a whole copy of every array of ``tree`` on every device."""
    return jax.device_put(tree, replicated(mesh))


def check_batch_size(mesh: Mesh, batch_size: int) -> None:
    """Check that a batch can be split evenly over the devices.

    Raises:
        UsageError: naming the flag and the number of devices.
    """
    if batch_size % mesh.size:
        raise UsageError(
            f"--config.batch_size={batch_size} cannot be split evenly over {mesh.size} devices; make it a "
            f"multiple of {mesh.size}."
        )


def shard_batch(mesh: Mesh, tree: Any) -> Any:
    """Split every array of ``tree`` along its leading axis over the devices.

    Raises:
        UsageError: when the batch size is no multiple of the number of devices.
    """
    for leaf in jax.tree.leaves(tree):
        check_batch_size(mesh, leaf.shape[0])
    return jax.device_put(tree, batch_sharded(mesh))
