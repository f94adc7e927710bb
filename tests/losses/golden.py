"""The golden cases of the losses, with their arrays channels-last."""

import functools
import json
import pathlib
from typing import Any

import numpy as np

FOLDER = pathlib.Path(__file__).parents[1] / "golden"


@functools.cache
def cases() -> dict[str, dict[str, Any]]:
    return {case["id"]: case for case in json.loads((FOLDER / "losses.json").read_text())["cases"]}


@functools.cache
def arrays() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "losses.npz") as archive:
        return dict(archive)


def read(case_id: str) -> dict[str, np.ndarray]:
    """Role -> array, for inputs and outputs; logits and their gradients [B, *spatial, K]."""
    case = cases()[case_id]
    found = {role: arrays()[name] for role, name in (case["inputs"] | case["outputs"]).items()}
    return {
        role: np.moveaxis(array, 1, -1) if role in ("logits", "grad", "z", "g_z") else array
        for role, array in found.items()
    }
