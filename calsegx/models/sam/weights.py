"""A weights folder: ``model.safetensors``, ``config.json``, ``SHA256SUMS`` and a model card.

Nothing is unpickled.  Loading verifies the checksums and, against the configuration, every name and shape.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors

from calsegx.interfaces import DataError, InputError, Params, UsageError
from calsegx.models.sam import model
from calsegx.models.sam.presets import SamConfig

FILES = ("model.safetensors", "config.json", "README.md")
SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}


def flatten(params: Params) -> dict[str, Any]:
    """``{"a": {"b": x}}`` as ``{"a.b": x}``."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {".".join(key.key for key in path): leaf for path, leaf in leaves}


def unflatten(template: Params, flat: Mapping[str, Any], where: str) -> Params:
    """Put ``flat`` into the structure of ``template``, strictly.

    Raises:
        DataError: when a name is missing or left over, or a shape differs; the message lists them.
    """
    expected = flatten(template)
    missing = sorted(expected.keys() - flat.keys())
    extra = sorted(flat.keys() - expected.keys())
    wrong = sorted(
        f"{name} {tuple(flat[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected.keys() & flat.keys()
        if tuple(flat[name].shape) != tuple(expected[name].shape)
    )
    if missing or extra or wrong:
        raise DataError(
            f"The weights in {where} do not fit the configuration beside them: missing {some(missing)}; "
            f"not used {some(extra)}; wrong shape {some(wrong)}."
        )
    order = [flat[name] for name in expected]
    return jax.tree.unflatten(jax.tree.structure(template), order)


def save(folder: Path, config: SamConfig, params: Params, card: str, dtype: Any = np.float32) -> None:
    """Write a weights folder; it appears complete or not at all.

    ``dtype`` is the storage type (``jnp.bfloat16`` halves the size); parameters are float32 again after loading.
    """
    flat = flatten(params)
    write(folder, config, {name: leaf.shape for name, leaf in flat.items()}, flat.__getitem__, card, dtype)


def write(
    folder: Path,
    config: SamConfig,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Any],
    card: str,
    dtype: Any = np.float32,
    approve: Callable[[Path], None] | None = None,
) -> None:
    """``save`` for arrays that come one at a time: ``read(name)`` is called once per name, and nothing is kept.

    ``approve`` sees the finished folder under a temporary name; when it raises, nothing is left.

    Raises:
        UsageError: when ``folder`` exists, or its parent cannot be written.
        InputError: when the disk refuses in the middle.
    """
    folder = Path(folder)
    refuse_existing(folder)
    made = [parent for parent in folder.parents if not parent.exists()]  # innermost first
    temporary = None
    try:
        temporary = _make_beside(folder)
        _write_arrays(temporary / "model.safetensors", shapes, read, np.dtype(dtype))
        (temporary / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
        (temporary / "README.md").write_text(card)
        sums = "".join(f"{sha256(temporary / name)}  {name}\n" for name in FILES)
        (temporary / "SHA256SUMS").write_text(sums)
        temporary.chmod(0o755)
        if approve is not None:
            approve(temporary)
        os.replace(temporary, folder)
    except BaseException as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):  # never made, or something else is in it by now
                parent.rmdir()
        if isinstance(error, OSError):
            raise InputError(
                f"The weights folder {folder} cannot be written ({error.strerror or error}); check the folder and the "
                "free space, then run again."
            ) from error
        raise


def refuse_existing(folder: Path) -> None:
    """Raise a UsageError when there is something at ``folder`` already."""
    if os.path.lexists(folder):
        raise UsageError(f"The weights folder {folder} exists already; choose another one or delete it first.")


def _make_beside(folder: Path) -> Path:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise UsageError(
            f"The weights folder {folder} cannot be made ({error.strerror}); choose a place you can write to."
        ) from error


def _write_arrays(
    path: Path, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Any], dtype: np.dtype
) -> None:
    """A safetensors file, one array after the other; the library's own writer wants all of them in memory."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype.name], "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the arrays begin at a multiple of eight
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, shape in shapes.items():
            array = np.ascontiguousarray(read(name), dtype)
            if array.shape != tuple(shape):
                raise ValueError(f"{name} has shape {array.shape}, declared was {tuple(shape)}")
            file.write(array.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def load(folder: Path | str) -> tuple[SamConfig, Params]:
    """Read a weights folder: configuration and float32 parameters, numpy arrays, each held once.

    Of a bundle of ``launch.export``, folder or zip, the trained SAM: ``bundle.load_sam``.

    Raises:
        DataError: when the folder is incomplete, a checksum differs, a file is not what its name says, or names and
            shapes do not fit.
    """
    folder = Path(folder)
    if zipfile.is_zipfile(folder) or (folder / "bundle.json").is_file():
        from calsegx import bundle  # which stands on this module

        return bundle.load_sam(folder)
    for name in (*FILES[:2], "SHA256SUMS"):
        if not (folder / name).is_file():
            raise DataError(
                f"{folder} is not a weights folder: {name} is missing; give a folder that holds "
                f"{', '.join(FILES)} and SHA256SUMS, or a bundle of launch.export "
                "(weights_conversion.convert_sam makes the folder from a checkpoint)."
            )
    verify(folder)
    try:
        config = _read_config(folder / "config.json")
    except (ValueError, TypeError) as error:
        raise DataError(f"{folder / 'config.json'} is no SAM configuration ({error}); get the folder again.") from error
    path = folder / "model.safetensors"
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            names = list(file.keys())
        flat = {name: read_array(path, name).astype(np.float32, copy=False) for name in names}
    except safetensors.SafetensorError as error:
        raise DataError(f"{path} is no whole safetensors file ({error}); get the folder again.") from error
    return config, unflatten(template(config), flat, str(path))


def read_array(path: Path, name: str) -> np.ndarray:
    """One array of a safetensors file.  The file is mapped for this one only, so that its pages are given back."""
    with safetensors.safe_open(path, framework="numpy") as file:
        return file.get_tensor(name)


@functools.lru_cache(maxsize=8)  # tracing the largest takes a second
def template(config: SamConfig) -> Params:
    """The parameters of a configuration as shapes, without numbers."""
    return jax.eval_shape(lambda: model.init(config, jax.random.key(0)))


def _read_config(path: Path) -> SamConfig:
    read: Any = json.loads(path.read_text())
    if not isinstance(read, dict):
        raise ValueError(f"it holds a {type(read).__name__} instead of an object")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in read.items()}
    return SamConfig(**values)


def verify(folder: Path) -> None:
    """Compare every file of ``SHA256SUMS`` with its checksum.

    Raises:
        DataError: naming the first file that differs or is missing.
    """
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    sums = {name: checksum for checksum, _, name in (line.partition("  ") for line in lines)}
    for name in {*sums, *FILES[:2]}:
        path = folder / name
        if not path.is_file() or sha256(path) != sums.get(name):
            raise DataError(f"{path} does not have the checksum in {folder / 'SHA256SUMS'}: get the folder again.")


def fingerprint(folder: Path) -> str:
    """SHA-256 of a weights folder's list of checksums: equal exactly when weights and configuration are."""
    lines = sorted((folder / "SHA256SUMS").read_text().splitlines())
    relevant = [line for line in lines if not line.endswith("README.md")]
    return hashlib.sha256("\n".join(relevant).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Checksum of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def some(names: list[str], most: int = 5) -> str:
    """The first names of a list, for an error message."""
    if not names:
        return "none"
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
