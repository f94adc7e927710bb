"""Arrays on disk whose slices are read alone, and checked: zarr3, one file, an inner chunk and a crc32c per slice.

The index at the end of the file has a crc32c too.  TensorStore writes, and reads what this process has not read before:
it finds a flipped byte, a file that was cut and one that is missing (``fill_missing_data_reads=False``).  It does so at
a fifth of the speed of memory, so what was checked once is copied from the mapped file from then on.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

Index = int | slice | np.ndarray
READ_AT_ONCE = 4  # slices of a whole array: more in flight are not read faster and take memory
# Where the chunks of a file lie is remembered, the chunks themselves are not.
_CONTEXT = tensorstore.Context({"cache_pool": {"total_bytes_limit": 1 << 20}})


def write(folder: Path, array: np.ndarray, *, per_slice: bool) -> None:
    """Write an array; ``per_slice``: a chunk for each position of the first axis, else one for all."""
    whole = [max(1, size) for size in array.shape]
    as_bytes = {"name": "bytes"} | ({"configuration": {"endian": "little"}} if array.dtype.itemsize > 1 else {})
    checksum = {"name": "crc32c"}
    sharding = {
        "chunk_shape": [1, *whole[1:]] if per_slice else whole,
        "codecs": [as_bytes, checksum],
        "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, checksum],
        "index_location": "end",
    }
    metadata = {
        "shape": list(array.shape),
        "data_type": array.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": whole}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    # A slice of zeros must leave a chunk, or it could not be told from a missing one.
    spec = {**_spec(folder), "metadata": metadata, "store_data_equal_to_fill_value": True}
    tensorstore.open(spec, create=True, context=_CONTEXT).result().write(array).result()


def metadata_digest(folder: Path) -> str:
    """SHA-256 of ``zarr.json``, which has no checksum of its own."""
    return hashlib.sha256((folder / "zarr.json").read_bytes()).hexdigest()


def read(folder: Path, shape: list[int]) -> np.ndarray:
    """An array that was written without ``per_slice``.

    Raises:
        OSError, ValueError: when it is damaged, or has another shape.
    """
    return _open(folder, shape).read().result()


class SliceFile:
    """An array that was written ``per_slice``.  Every method raises as ``read`` where what it reads is damaged."""

    def __init__(self, folder: Path, shape: list[int]):
        self._store = _open(folder, shape)
        self.shape, self.dtype = tuple(shape), self._store.dtype.numpy_dtype
        self._path = folder.joinpath("c", *["0"] * len(shape))
        self._checked = np.zeros(shape[0], bool)
        self._mapped: np.ndarray | None = None

    def read(self, index: Index) -> np.ndarray:
        """The slices at ``index``; an integer drops the first axis."""
        if self._mapped is not None and self._checked[index].all():
            return self._copy(index)
        read = self._store[index].read().result()
        self._remember(index, read)
        return read

    def read_all(self) -> np.ndarray:
        """All slices."""
        if self._mapped is not None and self._checked.all():
            return self._copy(slice(None))
        array = np.empty(self.shape, self.dtype)
        for part, slices in self._parts():
            array[part] = slices
            self._remember(part, slices)
        return array

    def check(self) -> None:
        """Read every byte from the disk, whatever was read before."""
        for _ in self._parts():
            pass

    def _parts(self) -> Iterator[tuple[slice, np.ndarray]]:
        for first in range(0, self.shape[0], READ_AT_ONCE):
            part = slice(first, min(first + READ_AT_ONCE, self.shape[0]))
            yield part, self._store[part].read().result()

    def _remember(self, index: Index, read: np.ndarray) -> None:
        """From now on ``index`` is copied, unless it lies elsewhere in the file than this reader expects."""
        as_written = not read.size or np.array_equal(self._copy(index).view(np.uint8), read.view(np.uint8))
        self._checked[index] = as_written

    def _copy(self, index: Index) -> np.ndarray:
        if self._mapped is None:
            size = int(np.prod(self.shape[1:])) * self.dtype.itemsize
            row = np.dtype([("slice", np.uint8, size), ("crc32c", np.uint32)])
            self._mapped = np.asarray(np.memmap(self._path, row, "r", shape=self.shape[:1])["slice"])
        rows = np.array(self._mapped[index])
        return rows.view(self.dtype).reshape(rows.shape[:-1] + self.shape[1:])


def _open(folder: Path, shape: list[int]) -> Any:
    store = tensorstore.open(_spec(folder), open=True, read=True, context=_CONTEXT).result()
    if list(store.shape) != shape:
        raise ValueError(f"{folder.name} has shape {list(store.shape)}, expected {shape}")
    return store


def _spec(folder: Path) -> dict[str, Any]:
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{folder.resolve()}/"},  # it refuses '..'
        "fill_missing_data_reads": False,
        # A file is never changed, only replaced together with its folder.
        "recheck_cached_data": "open",
    }
