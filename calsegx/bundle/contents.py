"""What a bundle says: the model's record for others, and in plain JSON what that record makes the program do."""

import json
from collections.abc import Mapping
from typing import Any

from calsegx.data import preprocessing
from calsegx.interfaces import UsageError

FORMAT = 1  # raise it when an older program would misread a newer bundle
MANIFEST, SUMS, CALIBRATOR, ENCODER = "bundle.json", "SHA256SUMS", "calibrator.json", "encoder"
DESCRIPTIONS = ("preprocessing.json", "labels.json", "prompt_protocol.json")
REQUIRED = (*DESCRIPTIONS, MANIFEST, "decoder.safetensors", "model.json", "README.md", "LICENSE")
INCLUDED, REFERENCE = "include", "reference"  # what becomes of the encoder

_RECORD = (
    *("format", "calsegx", "decoder_sha256", "backbone", "class_names", "class_ids", "known_ids", "channels"),
    *("dataset", "device_kind", "exported_step", "training_domain"),
)
_FRAMES = (
    *("intensity", "lower_percentile", "upper_percentile", "window_centre", "window_width"),
    *("slice_axis", "resample", "adjacent_slices"),
)


def public_record(record: Mapping[str, Any], encoder: str) -> dict[str, Any]:
    """``model.json`` for others: no path, no name of a case or subject, and the weights at ``encoder`` in the bundle.

    Cases and subjects get numbers in the order of the cases' fingerprints (SHA-256 over a case's files), which stay:
    whoever holds the very files can tell that the model has seen them, and nobody else can tell anything.  A salted
    hash of names would not do: a hospital's numbers are few enough to try them all.

    Raises:
        UsageError: for a run that needs code from outside calsegx to predict.
    """
    config = json.loads(json.dumps(record["config"]))
    for group, name in (("model", "backbone"), ("data", "intensity")):
        if ":" in config[group].get(name, ""):
            raise UsageError(
                f"The run needs code from outside calsegx (--config.{group}.{name}={config[group][name]}), which a "
                "bundle cannot hold; register it in calsegx, or share the run with that code."
            )
    config["data"] |= {"root": "", "cache": "", "splits": "", "layout": "auto"}
    config["model"]["weights"] = encoder
    for values in (config, config["fisher"]):  # prediction needs no loss, so code from outside is not asked for
        values["loss"] = "" if ":" in values["loss"] else values["loss"]
    public = {name: record[name] for name in _RECORD if name in record} | {"config": config}
    public["seen"], subjects = {}, {}
    for split, cases in record["seen"].items():
        public["seen"][split] = [
            {
                "case_id": f"{split} case {number}",
                "subject_id": subjects.setdefault(case["subject_id"], f"subject {len(subjects) + 1}"),
                "fingerprint": case["fingerprint"],
            }
            for number, case in enumerate(sorted(cases, key=lambda case: case["fingerprint"]), start=1)
        ]
    return public | {"cases": [case["case_id"] for case in public["seen"]["train"]]}


def public_calibrator(params: Mapping[str, Any], public: Mapping[str, Any]) -> dict[str, Any]:
    """A calibrator's params with the names of cases and subjects that the ``public`` record gives them."""
    named = {case["fingerprint"]: case for cases in public["seen"].values() for case in cases}
    origin = params["provenance"]
    cases = sorted((named[case["fingerprint"]] for case in origin["cases"]), key=lambda case: case["fingerprint"])
    return {**params, "provenance": {**origin, "cases": cases}}


def describe(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What ``model.json`` makes the program do, by the file that says it; export may add to these."""
    data = record["config"]["data"]
    labels = zip(record["class_names"], record["class_ids"], strict=True)
    return {
        "preprocessing.json": {
            "version": preprocessing.VERSION,
            "channels": record["channels"],  # red, green, blue
            "encoder_dtype": record["config"]["model"]["dtype"],
            **{name: data[name] for name in _FRAMES if name in data},
        },
        "labels.json": {
            "background": 0,
            "classes": [{"index": i, "name": name, "file_ids": ids} for i, (name, ids) in enumerate(labels, start=1)],
            "known_file_ids": record["known_ids"],
        },
        "prompt_protocol.json": {
            "protocol": record["config"]["protocol"],
            "training_jitter": record["config"].get("prompt_jitter", 0.0),
        },
    }


def to_json(content: Mapping[str, Any]) -> bytes:
    """A file of a bundle as bytes."""
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()
