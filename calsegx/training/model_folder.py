"""The model folder that a run leaves behind: the decoder's weights and all that is needed to use them."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

import calsegx
from calsegx import files
from calsegx.interfaces import InputError, Params

_MODEL_CARD = """# A calsegx segmentation decoder

- Classes: {classes}
- Channels: {channels}
- Prompts: {protocol}
- Training domain: {domain} ({cases} cases)
- Method: {method}, {steps} steps, seed {seed}
- Backbone: {backbone}, fingerprint `{fingerprint}`; what is frozen of it is not in this folder
- Written by calsegx {version}; licence of these weights: Apache-2.0

**Not a medical device.** For research only; not for diagnosis or treatment. Its probabilities were fitted on
the training domain: on images of another scanner, hospital or population check its calibration before relying
on it.

`decoder.safetensors` holds the weights, `model.json` all that is needed to use them.
"""


def save(workdir: Path, params: Params, record: Mapping[str, Any]) -> None:
    """Write ``<workdir>/model``: ``decoder.safetensors``, ``README.md`` and, last, ``model.json``.

    Each file appears whole or not at all; ``model.json`` holds the SHA-256 of the weights and of itself, so that no
    mixture is ever loaded. Names of weights are the paths in ``params``, joined by slashes.
    """
    folder = Path(workdir) / "model"
    folder.mkdir(parents=True, exist_ok=True)
    weights = safetensors.numpy.save(_flatten(jax.device_get(params)))
    record = {
        "format": 1,
        "calsegx": calsegx.__version__,
        **record,
        "decoder_sha256": hashlib.sha256(weights).hexdigest(),
    }
    files.write_atomically(folder / "decoder.safetensors", weights)
    files.write_atomically(folder / "README.md", _model_card(record))
    files.write_atomically(folder / "model.json", files.seal(record))


def load(workdir: Path) -> tuple[Params, dict[str, Any]]:
    """Read what ``save`` wrote.

    Args:
        workdir: the run folder, or its ``model`` folder.

    Returns:
        The decoder's parameters as numpy arrays, and ``model.json``.

    Raises:
        InputError: when a file is missing or damaged.
    """
    workdir = Path(workdir)
    folder = workdir if (workdir / "model.json").exists() else workdir / "model"
    try:
        record = files.unseal((folder / "model.json").read_bytes())
        weights = (folder / "decoder.safetensors").read_bytes()
        if hashlib.sha256(weights).hexdigest() != record["decoder_sha256"]:
            raise ValueError("the SHA-256 of decoder.safetensors is not the one in model.json")
        model = record.get("config", {}).get("model", {})
        if model.get("weights"):  # a run names them from the root, a bundle from its own folder
            model["weights"] = str(folder / model["weights"])
        return _unflatten(safetensors.numpy.load(weights)), record
    except FileNotFoundError as error:
        raise InputError(
            f"{folder} holds no trained model ({Path(error.filename).name} is missing); name the --workdir "
            "of a run that has ended, or finish it with --resume."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as error:
        raise InputError(
            f"The model in {folder} is damaged ({error}); write it again by running its training with --resume."
        ) from error


def _model_card(record: Mapping[str, Any]) -> str:
    config = record["config"]
    return _MODEL_CARD.format(
        classes=", ".join(record.get("class_names", ())) or "see model.json",
        channels=", ".join(record.get("channels", ())) or "see model.json",
        protocol=config["protocol"],
        domain=config["data"]["source"] or "all domains of the dataset",
        cases=len(record["cases"]),
        method=config["method"],
        steps=config["steps"],
        seed=config["seed"],
        backbone=config["model"]["backbone"],
        fingerprint=record["backbone"],
        version=record["calsegx"],
    )


def _flatten(params: Params, prefix: str = "") -> dict[str, np.ndarray]:
    flat: dict[str, np.ndarray] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}/")
        else:
            flat[f"{prefix}{name}"] = np.ascontiguousarray(value)
    return flat


def _unflatten(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    params: dict[str, Any] = {}
    for name, value in flat.items():
        *path, leaf = name.split("/")
        level = params
        for part in path:
            level = level.setdefault(part, {})
        level[leaf] = value
    return params
