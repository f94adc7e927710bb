"""Checkpoint files of other frameworks, told apart by their content and opened without reading the arrays.

A ``.pth`` goes through ``torch.load(weights_only=True, mmap=True)``, which runs no code of the file; torch is imported
there and nowhere else.  A safetensors file needs no torch.
"""

import importlib.util
import pickle
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from calsegx.interfaces import DataError, UsageError
from calsegx.models.sam import weights

FLOATS = {"float16", "bfloat16", "float32", "float64"}
_SAFETENSORS_FLOATS = {code: name for name, code in weights.SAFETENSORS_DTYPES.items()}
_AGAIN = "download it again"


@dataclass(frozen=True)
class Source:
    """An open checkpoint: names and shapes are known, arrays are read one at a time."""

    path: Path
    container: str  # in words
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    read: Callable[[str], np.ndarray]  # name -> float32, possibly a read-only view of the file
    ignored: Mapping[str, str]  # what lies beside the state dict -> why it is not converted
    is_training_checkpoint: bool  # {"model": state dict, ...}, as MedSAM's training writes it


def open_source(path: Path) -> Source:
    """Open a checkpoint.

    Raises:
        UsageError: when there is no such file, or PyTorch is needed and not installed.
        DataError: when the file is empty, cut short, damaged, a web page, holds foreign code, or is something else.
    """
    if path.is_dir():
        raise UsageError(
            f"--source={path} is a folder; give the checkpoint file itself, such as its model.safetensors."
        )
    if not path.exists():
        raise UsageError(f"--source={path} does not exist; give a .pth or model.safetensors file (docs/weights.md).")
    with path.open("rb") as file:
        head = file.read(512)
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        raise DataError(f"{path} is empty (0 bytes); {_AGAIN}.")
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--")):
        raise DataError(f"{path} is a web page, not a checkpoint: the download was answered with HTML; {_AGAIN}.")
    if start.startswith(b"version https://git-lfs"):
        raise DataError(f"{path} is a Git LFS pointer, not the checkpoint it points to; {_AGAIN}, with git lfs pull.")
    if head[8:9] == b"{":  # after eight bytes of length, which may be any: this comes first
        return _open_safetensors(path)
    if head.startswith(b"PK\x03\x04"):
        _check_archive(path)
        return _open_torch(path, mmap=True)
    if head.startswith(b"\x80"):  # torch.save before PyTorch 1.6: a bare pickle, which cannot be mapped
        return _open_torch(path, mmap=False)
    raise DataError(
        f"{path} is neither a PyTorch checkpoint nor a safetensors file; see docs/weights.md for where to get one."
    )


def _check_archive(path: Path) -> None:
    """The zip archive that ``torch.save`` writes: whole, and with the checksums it carries."""
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path} is cut short: its end, the table of contents, is missing; {_AGAIN}.")
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.rpartition("/")[2] for name in archive.namelist()}
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, zlib.error, RuntimeError) as error:  # RuntimeError: method or encryption
        raise DataError(f"{path} is damaged ({_first_line(error)}); {_AGAIN}.") from error
    if damaged is not None:
        raise DataError(f"{path} is damaged: {damaged} in it does not have its checksum; {_AGAIN}.")
    if "constants.pkl" in members:
        raise DataError(
            f"{path} is a TorchScript program, not a state dict; get the plain checkpoint (docs/weights.md)."
        )
    if "data.pkl" not in members:
        raise DataError(f"{path} is a zip archive but no PyTorch checkpoint; unpack it and give the checkpoint in it.")


def _open_torch(path: Path, mmap: bool) -> Source:
    if importlib.util.find_spec("torch") is None:
        raise UsageError(
            f"{path} is a PyTorch checkpoint, and PyTorch is not installed: pip install '.[torch]' in calsegx's "
            "folder, or give transformers' model.safetensors of the same model, which needs none."
        )
    import torch  # the only place

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (OSError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise DataError(_refused(path, str(error))) from error
    except Exception as error:  # a damaged pickle may end in anything
        raise DataError(f"{path} is cut short or damaged ({_first_line(error)}); {_AGAIN}.") from error
    state, ignored = _state_dict(path, loaded)
    is_tensor = {name: isinstance(value, torch.Tensor) for name, value in state.items()}

    def read(name: str) -> np.ndarray:
        return state[name].detach().to(torch.float32).numpy()

    return Source(
        path=path,
        container="PyTorch checkpoint",
        shapes={name: tuple(value.shape) if is_tensor[name] else () for name, value in state.items()},
        dtypes={
            name: str(value.dtype).removeprefix("torch.") if is_tensor[name] else type(value).__name__
            for name, value in state.items()
        },
        read=read,
        ignored=ignored,
        is_training_checkpoint=state is not loaded,
    )


def _state_dict(path: Path, loaded: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """The state dict, and what lies beside it."""
    if not isinstance(loaded, dict):
        raise DataError(
            f"{path} holds a {type(loaded).__name__}, not a state dict; see docs/weights.md for what converts."
        )
    state, ignored = loaded, {}
    if isinstance(loaded.get("model"), dict):
        state = loaded["model"]
        ignored = {str(name): "training state beside the weights" for name in loaded if name != "model"}
    strange = [name for name in state if not isinstance(name, str)]
    if strange or not state:
        what = f"an entry that is named {strange[0]!r}" if strange else "no entries"
        raise DataError(f"{path} holds {what}, hence no state dict; see docs/weights.md for what converts.")
    return state, ignored


def _refused(path: Path, message: str) -> str:
    match = re.search(r"GLOBAL (\S+)", message)
    if match:
        return (
            f"{path} is a pickle that asks for {match[1]}, which is code, not weights, and was not run; get the plain "
            "state dict (docs/weights.md), or save it anew with torch.save(model.state_dict(), FILE)."
        )
    return f"{path} is cut short, damaged, or no plain state dict ({_first_line(message)}); {_AGAIN}."


def _first_line(error: object) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _open_safetensors(path: Path) -> Source:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in list(file.keys())}
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            codes = {name: part.get_dtype() for name, part in slices.items()}
    except safetensors.SafetensorError as error:
        raise DataError(
            f"{path} is a safetensors file that is cut short or damaged ({_first_line(error)}); {_AGAIN}."
        ) from error

    def read(name: str) -> np.ndarray:
        with np.errstate(over="ignore"):  # float64 beyond float32 becomes inf, which is refused later
            return weights.read_array(path, name).astype(np.float32, copy=False)

    return Source(
        path=path,
        container="safetensors",
        shapes=shapes,
        dtypes={name: _SAFETENSORS_FLOATS.get(code, code) for name, code in codes.items()},
        read=read,
        ignored={},
        is_training_checkpoint=False,
    )
