"""The golden metric cases (tests/golden/README.md: metrics)."""

import functools
import json
import pathlib

import numpy as np
from scipy import special

FOLDER = pathlib.Path(__file__).parent.parent / "golden"


@functools.cache
def cases():
    """Case id -> (inputs, hparams, outputs) with arrays in place of their names."""
    arrays = dict(np.load(FOLDER / "metrics.npz"))
    listed = json.loads((FOLDER / "metrics.json").read_text())["cases"]
    return {
        case["id"]: (
            {role: arrays[name] for role, name in case["inputs"].items()},
            case["hparams"],
            {role: arrays[name] for role, name in case["outputs"].items()},
        )
        for case in listed
    }


def names(*suffixes):
    found = [name for name in cases() if name.endswith(suffixes)]
    assert found, f"no golden case ends with {suffixes}"
    return found


def multiclass(inputs, region="all"):
    """Channels-first logits and labels -> probabilities [V, K] and labels [V] of a region."""
    logits, labels = inputs["logits"], inputs["labels"].ravel()
    probabilities = special.softmax(np.moveaxis(logits, 1, -1).reshape(-1, logits.shape[1]), axis=-1)
    kept = labels > 0 if region == "fg" else np.ones(labels.shape, bool)
    return probabilities[kept], labels[kept]
