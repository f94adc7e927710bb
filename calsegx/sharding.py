"""Devices and processes: a mesh with the axes ``data`` and ``model``, and where arrays lie on it.

Batches are split over all devices, whatever the axes; the decoder's parameters are whole on each.  The axis ``model``
splits the stored parameters of the frozen encoder (``caching.case_encoder``), so that a large one fits small devices.
Axes are ``Auto``: the compiler derives the sharding of intermediate arrays.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from calsegx.interfaces import InputError, UsageError

AXES = ("data", "model")


class Process(NamedTuple):
    """Which of how many processes this is; data is dealt out to them."""

    index: int = 0
    count: int = 1


def process() -> Process:
    """This process."""
    return Process(jax.process_index(), jax.process_count())


# Ignored: jax.Device comes from an extension module without stubs; pyright takes it for a variable.
def device_mesh(devices: Sequence[jax.Device] | None = None, model: int = 1) -> Mesh:  # pyright: ignore[reportInvalidTypeForm]
    """A mesh ``("data", "model")`` over ``devices`` (None: all devices of all processes), ``model`` wide.

    Raises:
        UsageError: when the devices cannot be divided into groups of ``model``.
    """
    devices = jax.devices() if devices is None else list(devices)
    if len(devices) % model:
        raise UsageError(
            f"--config.model.shards={model} cannot divide {len(devices)} devices evenly; make it a divisor of that."
        )
    # Not jax.make_mesh, which may reorder them: the rows of a batch lie in the order of the processes.
    grid = np.asarray(devices, object).reshape(-1, model)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 2)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose leading axis is split over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Put a whole copy of every array of ``tree`` on every device; all processes give the same."""
    return jax.device_put(tree, replicated(mesh))


def split_parameters(mesh: Mesh, tree: Any) -> Any:
    """The sharding of every array of ``tree`` that is stored in parts over the axis ``model``.

    Each is split along its largest axis that the width of ``model`` divides; an array without one, or of fewer than
    1024 numbers, is whole on every device.
    """
    width = mesh.shape["model"]

    def place(leaf: Any) -> NamedSharding:
        fitting = [axis for axis, size in enumerate(leaf.shape) if size % width == 0]
        if width == 1 or leaf.size < 1024 or not fitting:
            return replicated(mesh)
        axis = max(fitting, key=lambda candidate: leaf.shape[candidate])
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, "model"))

    return jax.tree.map(place, tree)


def gather(part: Any, placements: Any, after: Any) -> Any:
    """Inside ``jax.shard_map``: the whole arrays of ``part``, which lie as ``placements`` says; not before ``after``.

    Without something to wait for, the compiler would collect all parts of a model at its beginning.  What waits is the
    sum with a zero made of ``after``: some schedulers (XLA's of the CPU) do not know ``optimization_barrier``.
    """
    zero = 0 * after.ravel()[0]
    part = jax.tree.map(lambda leaf: leaf + zero.astype(leaf.dtype), part)

    def one(leaf: Any, place: NamedSharding) -> Any:
        axis = next((axis for axis, name in enumerate(place.spec) if name == "model"), None)
        return leaf if axis is None else jax.lax.all_gather(leaf, "model", axis=axis, tiled=True)

    return jax.tree.map(one, part, placements)


@contextlib.contextmanager
def out_of_memory(advice: Callable[[], str]) -> Iterator[None]:
    """Inside it, running out of device memory raises an InputError with ``advice()``: what does not fit, what to do."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(f"{advice()} (the device says: {str(error).splitlines()[0]})") from error


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
    """Split every array of ``tree``, this process's share of a batch, along its leading axis over its devices.

    Raises:
        UsageError: when the batch size is no multiple of the number of devices.
    """
    processes = len({device.process_index for device in mesh.devices.flat})
    for leaf in jax.tree.leaves(tree):
        check_batch_size(mesh, leaf.shape[0] * processes)
    place = batch_sharded(mesh)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(place, np.asarray(leaf)), tree)


def wait_for_all(name: str) -> None:
    """Return when all processes have come to the point called ``name``."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_process(flag: bool) -> bool:
    """Whether ``flag`` is set in any process; all of them must ask."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def gather_bytes(content: bytes) -> list[bytes]:
    """What every process gives, in their order; all of them must ask, at the same point."""
    if jax.process_count() == 1:
        return [content]
    sizes = multihost_utils.process_allgather(np.asarray(len(content)))
    # Of few different sizes: each is compiled.
    padded = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]
