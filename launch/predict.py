"""Segment cases with a trained run: masks and probabilities as NIfTI, on the input's own grid.

python -m launch.predict --run=runs/x/calsam_seed42 --output=predictions --data=DATASET --prompts=clicks.tsv
python -m launch.predict --model=BUNDLE.zip --output=predictions --data=DATASET --prompts=clicks.tsv

``--prompts`` is a table ``case_id i j k label`` of voxels in the image files' own indices, counted from 0, or ``case_id
x y z label`` of millimetres, separated by tabs (``.csv``: commas), or a JSON file; label 1 is a foreground point, 0 a
background point, 2 and 3 are two opposite corners of a box.  Without it the prompts are placed on the reference labels
by the model's protocol, which is for benchmarks only; a model of the protocol ``none`` needs neither.  The calibrator
that ``launch.calibrate`` saved with the model is applied, unless ``--nocalibrate`` is given.  Writes ``CASE.nii.gz``
(uint8; a class made of several label ids gets its first), ``labels.json`` (what the ids mean) and
``CASE_prob-CLASS.nii.gz`` (float32); of PNG pictures ``CASE.png`` and ``CASE_prob-CLASS.png`` (16 bits: 65535 is 1).
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from calsegx import bundle, calibrators, files
from calsegx.data import classes, images, pipeline, preprocessing
from calsegx.data import clicks as click_tools
from calsegx.evaluation import predict as case_prediction
from calsegx.evaluation import study
from calsegx.interfaces import Case, DataError, InputError, Params, UsageError
from calsegx.training import caching, model_folder, progress
from launch import calibrate, common, components


def predict(
    run: Path,
    output: Path,
    root: str = "",
    clicks_file: Path | None = None,
    split: str = "",
    limit: int = 0,
    calibrated: bool = True,
) -> list[Path]:
    """Segment the cases of a split, or ``all``; returns the mask files.  Default: all of another dataset, or test.

    The model's saved calibrator, if it has one, is applied unless ``calibrated`` is False.  A case that fails does not
    stop the others; the failures are listed at the end.

    Raises:
        InputError: before the first case, for a calibrator that is damaged or another model's.
        DataError: after the last case, when any case failed.
    """
    run = bundle.resolve(run)
    params, record = model_folder.load(run)
    calibrator = calibrate.of_run(run, record) if calibrated else None
    parts = components.of_model(record, root)
    split = split or ("all" if root else "test")
    cases = parts.dataset.cases if split == "all" else parts.select(split)
    files.check_outside(output, parts.dataset.root, "--output")
    if limit:
        cases = cases[:limit]
    clicks = click_tools.read_clicks(clicks_file) if clicks_file else None
    if clicks is not None:
        click_tools.check_clicks(clicks, cases, parts.config.protocol)
    elif parts.config.protocol != "none":
        for case in cases:
            if case.label is None:
                raise UsageError(
                    f"Case {case.case_id!r} has no reference labels to place prompts on; give clicks with --prompts."
                )
        print("note: no --prompts, so prompts are placed on the reference labels (benchmarks only)", file=sys.stderr)
    print(f"note: probabilities are {_described(calibrator, calibrated)}", file=sys.stderr)
    output.mkdir(parents=True, exist_ok=True)
    mesh = components.encoder_mesh(parts.config)
    encode = caching.case_encoder(parts.backbone, parts.config.model.encoder_batch, mesh)
    decode = jax.jit(parts.backbone.decode)
    weights = jax.device_put((params, parts.backbone.frozen))  # once, not for every batch
    ids = {name: values[0] for name, values in zip(parts.class_map.names, parts.class_map.ids, strict=True)}
    files.write_atomically(output / "labels.json", json.dumps({"background": 0, **ids}, indent=2) + "\n")
    written, failed = [], []
    with progress.Progress("Predicting", len(cases), "cases") as bar:
        for done, case in enumerate(cases, start=1):
            try:
                prepared = parts.prepare(case, clicks=clicks)
                probabilities = _probabilities(parts, weights, prepared, encode, decode, calibrator)
            except InputError as error:
                failed.append(f"{case.case_id}: {error}")
                bar.say(f"failed: {failed[-1]}")
            else:
                if clicks is not None and (left := _between(prepared)):
                    bar.say(f"note: {case.case_id}: slices between clicked ones without a click: {left}, background")
                written.append(_write(output, case, probabilities, prepared.reference, parts.class_map))
            bar.update(done, case.case_id)
    if failed:
        raise DataError(f"{len(failed)} of {len(cases)} cases failed; the first: {failed[0]}")
    return written


def _probabilities(
    parts: components.Components,
    weights: tuple[Params, Params],
    prepared: preprocessing.PreparedCase,
    encode: Any,
    decode: Any,
    calibrator: tuple[str, Mapping[str, Any]] | None,
) -> np.ndarray:
    """Foreground probabilities ``[D, H, W, K]``; ``weights`` trained and frozen."""
    asked = pipeline.protocol_prompts(prepared.prompts, parts.config.protocol)
    low_res = case_prediction.predict_slices(decode, *weights, encode(prepared), asked, study.DECODER_BATCH)
    logits = case_prediction.case_logits(low_res, prepared.geometry)
    if calibrator is not None:
        name, params = calibrator
        logits = calibrators.get(name).apply(params, logits, study.calibrator_image(prepared))
    native = case_prediction.probabilities(logits)
    return case_prediction.to_native(native, prepared.slices, prepared.geometry)


def _between(prepared: preprocessing.PreparedCase) -> int:
    """How many slices of the working grid lie between prompted ones without a prompt."""
    slices = prepared.slices
    return int(slices[-1] - slices[0] + 1 - len(slices)) if len(slices) else 0


def _described(calibrator: tuple[str, Mapping[str, Any]] | None, wanted: bool) -> str:
    if calibrator is None:
        return "the decoder's own" + (": launch.calibrate has saved no calibrator with this model" if wanted else "")
    name, params = calibrator
    fitted = f"fitted on validation voxels, region {params['provenance']['region']}"
    return f"calibrated by {name}, {fitted}" + ("" if params["identifiable"] else " (not identifiable: no change)")


def _write(output: Path, case: Case, probabilities: np.ndarray, reference: Any, class_map: classes.ClassMap) -> Path:
    for index, name in enumerate(class_map.names):
        images.write(output / f"{case.case_id}_prob-{name}", probabilities[..., index], reference, np.float32)
    ids = classes.to_file_ids(class_map, case_prediction.segment(probabilities))
    return images.write(output / case.case_id, ids, reference, ids.dtype.type)


def define_flags() -> None:
    """``--run`` or ``--model``, ``--output``, ``--data``, ``--prompts``, ``--split``, ``--calibrate``."""
    flags.DEFINE_string("run", "", "Folder of a trained run.")
    flags.DEFINE_string("model", "", "A model bundle in its place: the folder or zip that launch.export wrote.")
    common.define_folder("output", "Folder to write masks and probabilities to.")
    flags.DEFINE_string("data", "", "Another dataset folder than the one trained on.")
    flags.DEFINE_string(
        "prompts", "", "Table or JSON of clicks; without it prompts are placed on the reference labels."
    )
    flags.DEFINE_enum("split", "", ["", "train", "val", "test", "all"], "Which cases; default: all of --data, or test.")
    flags.DEFINE_bool("calibrate", True, "Apply the calibrator that launch.calibrate saved with the model.")


def main() -> None:
    """Predict, and say where the masks are."""
    arguments = flags.FLAGS
    if bool(arguments.run) == bool(arguments.model):
        raise UsageError("Give the trained run with --run, or a model bundle with --model, one of the two.")
    run, output = Path(arguments.run or arguments.model), Path(arguments.output)
    if arguments.model and not bundle.is_bundle(run):
        raise InputError(f"--model={run} is no model bundle; give what launch.export wrote, or a run with --run.")
    clicks = Path(arguments.prompts) if arguments.prompts else None
    written = predict(run, output, arguments.data, clicks, arguments.split, calibrated=arguments.calibrate)
    print(f"Wrote {len(written)} masks with their probabilities to {arguments.output}")


if __name__ == "__main__":
    common.run(main, define_flags)
