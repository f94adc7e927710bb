"""A weights folder: ``model.safetensors``, ``config.json``, ``SHA256SUMS`` and a model card.

Nothing is unpickled.  Loading verifies the checksums and, against the configuration, every name and shape.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from calsegx.interfaces import DataError, Params, UsageError
from calsegx.models.sam import model
from calsegx.models.sam.presets import SamConfig

FILES = ("model.safetensors", "config.json", "README.md")


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
            f"The weights in {where} do not fit the configuration beside them: missing {_some(missing)}; "
            f"not used {_some(extra)}; wrong shape {_some(wrong)}."
        )
    order = [flat[name] for name in expected]
    return jax.tree.unflatten(jax.tree.structure(template), order)


def save(folder: Path, config: SamConfig, params: Params, card: str, dtype: Any = np.float32) -> None:
    """Write a weights folder; it appears complete or not at all.

    ``dtype`` is the storage type (``jnp.bfloat16`` halves the size); parameters are float32 again after loading.
    """
    folder = Path(folder)
    if folder.exists():
        raise UsageError(f"The weights folder {folder} exists already; choose another one or delete it first.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        arrays = {name: np.asarray(leaf).astype(dtype) for name, leaf in flatten(params).items()}
        safetensors.numpy.save_file(arrays, temporary / "model.safetensors")
        (temporary / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
        (temporary / "README.md").write_text(card)
        sums = "".join(f"{_sha256(temporary / name)}  {name}\n" for name in FILES)
        (temporary / "SHA256SUMS").write_text(sums)
        temporary.chmod(0o755)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def load(folder: Path | str) -> tuple[SamConfig, Params]:
    """Read a weights folder: configuration and float32 parameters.

    Raises:
        DataError: when the folder is incomplete, a checksum differs, or names and shapes do not fit.
    """
    folder = Path(folder)
    for name in (*FILES[:2], "SHA256SUMS"):
        if not (folder / name).is_file():
            raise DataError(
                f"{folder} is not a weights folder: {name} is missing; give a folder that holds "
                f"{', '.join(FILES)} and SHA256SUMS."
            )
    verify(folder)
    try:
        config = _read_config(folder / "config.json")
    except (ValueError, TypeError) as error:
        raise DataError(f"{folder / 'config.json'} is no SAM configuration ({error}); get the folder again.") from error
    flat = safetensors.numpy.load_file(folder / "model.safetensors")
    flat = {name: array.astype(np.float32) for name, array in flat.items()}
    template = jax.eval_shape(lambda: model.init(config, jax.random.key(0)))
    return config, unflatten(template, flat, str(folder / "model.safetensors"))


def _read_config(path: Path) -> SamConfig:
    read: dict[str, Any] = json.loads(path.read_text())
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
        if not path.is_file() or _sha256(path) != sums.get(name):
            raise DataError(f"{path} does not have the checksum in {folder / 'SHA256SUMS'}: get the folder again.")


def fingerprint(folder: Path) -> str:
    """SHA-256 of a weights folder's list of checksums: equal exactly when weights and configuration are."""
    lines = sorted((folder / "SHA256SUMS").read_text().splitlines())
    relevant = [line for line in lines if not line.endswith("README.md")]
    return hashlib.sha256("\n".join(relevant).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _some(names: list[str], most: int = 5) -> str:
    if not names:
        return "none"
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
