"""Make a model bundle of a run: one folder or zip that predicts alone, says what it is, and is checked when it is used.

python -m launch.export --run=runs/x/calsam_seed42 --output=calsam.zip --license=apache-2.0 \
    --origin="SAM ViT-B (Meta, Apache-2.0), decoder trained by us"

``--license`` is what others may do with the model, ``--origin`` what it was derived from; both are required.  Paths and
the names of cases and subjects stay here (``calsegx/bundle``).  ``--evaluation`` is a folder of ``launch.evaluate``
that scored this very model: its results by domain come into the model card.  The calibrator that ``launch.calibrate``
saved goes along.  ``launch.predict --model=calsam.zip`` and ``launch.evaluate --runs=calsam.zip`` read the bundle.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

import calsegx
from calsegx import bundle, configs, files, models
from calsegx.calibrators import storage
from calsegx.evaluation import model_card, tables
from calsegx.interfaces import Backbone, DataError, Params, UsageError
from calsegx.models.sam import backbone as sam_backbone
from calsegx.training import model_folder
from launch import calibrate, common, components, evaluate

_LICENSE = """Licence of this model: {license}
Derived from: {derived_from}
Licence of the training data: {data_licence}

The terms of the named licence apply. Not a medical device; for research only. Provided as it is, without warranty.
"""


def export(
    run: Path,
    output: Path,
    license_name: str,
    origin: str,
    data_licence: str = "",
    evaluation: Path | None = None,
    encoder: str = bundle.INCLUDED,
) -> Path:
    """Write the bundle, and check it as it will be checked when it is used.

    Args:
        run: the run folder, or its ``model`` folder.
        output: a name that ends in ``.zip``, or else a folder; it must not exist, but may be an empty folder.
        license_name: of the model.
        origin: what the model was derived from.
        data_licence: of the training data, where it is known.
        evaluation: a folder of ``launch.evaluate``; None: the card says that nothing was evaluated.
        encoder: ``include`` its weights, or only name their fingerprint (``reference``).

    Raises:
        InputError: for what is missing or damaged, before anything is written.
    """
    for flag, text in (("license", license_name), ("origin", origin)):
        if not text.strip() or len(text.splitlines()) > 1:
            raise UsageError(f"--{flag} must say in one line what the model's {flag} is; a bundle is not made without.")
    bundle.check_output(output)
    if bundle.is_bundle(run):
        raise UsageError(f"--run={run} is a bundle already; copy it, or export the run that it came from.")
    params, record = model_folder.load(run)
    root = record["config"]["data"]["root"]
    if root:
        files.check_outside(output, Path(root), "--output")
    calibrator = calibrate.of_run(run, record)
    evaluated = _read_evaluation(evaluation, record["decoder_sha256"]) if evaluation else None
    backbone = _backbone(record, params)

    weights = record["config"]["model"]["weights"]
    place = bundle.ENCODER if weights or encoder == bundle.INCLUDED else ""
    public = bundle.public_record(record, place)
    manifest = {
        "format": bundle.FORMAT,
        "calsegx": calsegx.__version__,
        "license": license_name.strip(),
        "derived_from": origin.strip(),
        "data_licence": data_licence.strip(),
        "encoder": encoder,
        "calibrator": calibrator[0] if calibrator else None,
        "training": _training(record),
        "evaluation": evaluated,
    }
    content: dict[str, bytes | Path] = {}
    fitted = None
    if calibrator:
        fitted = bundle.public_calibrator(calibrator[1], public)
        content[bundle.CALIBRATOR] = _calibrator_file(calibrator[0], fitted)
    if encoder == bundle.INCLUDED:
        content |= _encoder_files(Path(weights) if weights else sam_backbone.tiny_weights())
    documents = bundle.describe(public)
    documents["preprocessing.json"] |= {
        "image_size": backbone.image_size,
        "pixel_mean": list(backbone.pixel_mean),
        "pixel_std": list(backbone.pixel_std),
    }
    documents["prompt_protocol.json"]["description"] = evaluate.PROTOCOL_NOTES[public["config"]["protocol"]]
    content |= {name: bundle.to_json(document) for name, document in documents.items()}
    content |= {
        bundle.MANIFEST: bundle.to_json(manifest),
        "model.json": files.seal(public).encode(),
        "decoder.safetensors": _model_file(run, "decoder.safetensors"),
        "LICENSE": _LICENSE.format(**{**manifest, "data_licence": data_licence.strip() or "not stated"}).encode(),
        "README.md": model_card.write(manifest, public, fitted).encode(),
    }
    bundle.write(output, content)
    return output


def _backbone(record: Mapping[str, Any], params: Params) -> Backbone:
    """The frozen network, once it is clear that the decoder belongs to it."""
    config = configs.from_dict(configs.ModelConfig, record["config"]["model"], "model.json")
    load = models.registry.get(config.backbone)
    backbone = load(Path(config.weights) if config.weights else None, len(record["class_names"]))
    components.check_backbone(record, backbone)
    if jax.tree.map(np.shape, params) != jax.tree.map(np.shape, backbone.trainable):
        raise DataError("The decoder's arrays are not those of the backbone's decoder; train the run again.")
    return backbone


def _training(record: Mapping[str, Any]) -> dict[str, Any]:
    """Where the model comes from, in numbers and names of domains."""
    config = record["config"]
    run = configs.from_dict(configs.TrainConfig, config, "model.json")
    return {
        "dataset": record["dataset"],
        "domain_kind": config["data"]["domain"],
        "source": config["data"]["source"],
        "cases": {split: len(cases) for split, cases in record["seen"].items()},
        "subjects": len({case["subject_id"] for cases in record["seen"].values() for case in cases}),
        "method": configs.method_name(run),
        "steps": run.steps,
        "seed": run.seed,
        "prompts": evaluate.PROTOCOL_NOTES[run.protocol],
    }


def _read_evaluation(folder: Path, decoder_sha256: str) -> dict[str, Any]:
    """The results of this model in an evaluation.

    Raises:
        DataError: when the evaluation is damaged, or is not of this model.
    """
    try:
        sums = dict(line.split("  ", 1)[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())
        for name in ("summary.json", "cases.csv"):
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != sums[name]:
                raise ValueError(f"{name} has another SHA-256 than in SHA256SUMS")
        about = json.loads((folder / "summary.json").read_bytes())["calsegx"]
        rows = tables.read_cases(folder / "cases.csv")
        found = [model for model in about["models"] if model["decoder_sha256"] == decoder_sha256]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"--evaluation={folder} is no evaluation, or damaged ({error}); evaluate again.") from error
    if not found:
        raise DataError(f"--evaluation={folder} did not score this model; evaluate it with launch.evaluate.")
    model = found[0]
    return {
        **{name: about[name] for name in ("dataset", "domain_kind", "source")},
        "results": model_card.results(rows, model["method"], model["seed"]),
    }


def _encoder_files(folder: Path) -> dict[str, bytes | Path]:
    return {
        f"{bundle.ENCODER}/{path.name}": path
        for path in folder.iterdir()
        if path.is_file() and not path.name.startswith(".")
    }


def _calibrator_file(name: str, params: Mapping[str, Any]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / bundle.CALIBRATOR
        storage.save(path, name, params)
        return path.read_bytes()


def _model_file(run: Path, name: str) -> Path:
    return calibrate.path_of(run).with_name(name)


def define_flags() -> None:
    """``--run``, ``--output``, ``--license``, ``--origin``, ``--data_licence``, ``--evaluation``, ``--encoder``."""
    flags.DEFINE_string("run", None, "Folder of a trained run.", required=True)
    common.define_folder("output", "The bundle to write: a name that ends in .zip, or else a folder.")
    flags.DEFINE_string("license", "", "Licence of the model, e.g. apache-2.0; required.")
    flags.DEFINE_string("origin", "", "What the model was derived from: the frozen SAM and whose training; required.")
    flags.DEFINE_string("data_licence", "", "Licence of the training data.")
    flags.DEFINE_string("evaluation", "", "Folder of launch.evaluate with this run, for the results in the card.")
    choices = [bundle.INCLUDED, bundle.REFERENCE]
    flags.DEFINE_enum("encoder", bundle.INCLUDED, choices, "Whether the frozen encoder's weights go along.")


def main() -> None:
    """Export, and say where the bundle is."""
    arguments = flags.FLAGS
    output = export(
        Path(arguments.run),
        Path(arguments.output),
        arguments.license,
        arguments.origin,
        arguments.data_licence,
        Path(arguments.evaluation) if arguments.evaluation else None,
        arguments.encoder,
    )
    print(f"The bundle is {output}; check it anywhere with launch.predict --model or sha256sum --check SHA256SUMS")


if __name__ == "__main__":
    common.run(main, define_flags)
