"""Segment cases with a trained run: masks, probabilities and uncertainty on the input's own grid, NIfTI or PNG.

python -m launch.predict --run=runs/x/calsam_seed42 --output=predictions --data=FOLDER --prompts=clicks.tsv
python -m launch.predict --model=BUNDLE.zip --output=predictions --images=a.nii.gz,b.nii.gz --prompts=clicks.tsv

``--data`` is a dataset of any layout, or a folder of image files; ``--images`` names the files (``docs/prediction.md``
says how several channels are named).  ``--prompts`` is a table ``case_id i j k label`` of voxels in the image files'
own indices, counted from 0, or ``case_id x y z label`` of millimetres, separated by tabs (``.csv``: commas), or a JSON
file; label 1 is a foreground point, 0 a background point, 2 and 3 are two opposite corners of a box.  Without it the
prompts are placed on the reference labels by the model's protocol, which is for benchmarks only; a model of the
protocol ``none`` needs neither.  The calibrator that ``launch.calibrate`` saved with the model is applied, unless
``--nocalibrate`` is given.

Writes ``CASE.nii.gz`` (uint8; a class made of several label ids gets its first), ``CASE_prob-CLASS.nii.gz`` and
``CASE_uncertainty.nii.gz`` (float32), of PNG pictures ``.png`` (16 bits: 65535 is 1), ``CASE.json`` (how sure the model
is, and warnings), and ``labels.json`` (what the ids mean); with ``--bids`` a BIDS derivative.  The same command goes on
with a batch that was broken off: cases that are done, from the same files, prompts and model, are not repeated.
"""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from calsegx import bundle, files
from calsegx.data import clicks as click_tools
from calsegx.data import loose_files, preprocessing
from calsegx.evaluation import prediction_files
from calsegx.interfaces import Case, DataError, Dataset, InputError, UsageError
from calsegx.training import model_folder
from launch import calibrate, common, components, prediction


def predict(
    run: Path,
    output: Path,
    root: str = "",
    clicks_file: Path | None = None,
    split: str = "",
    limit: int = 0,
    calibrated: bool = True,
    listed: Sequence[Path] = (),
    bids: bool = False,
) -> list[Path]:
    """Segment cases; returns their mask files, also of those that were done before.

    Args:
        run: a trained run, or a bundle.
        output: the folder to write to.
        root: another dataset than the one trained on, or a folder of images.
        clicks_file: the prompts; None: on the reference labels.
        split: which cases, or ``all``; default: all of ``root`` and ``listed``, or test.
        limit: so many of them at most; 0: all.
        calibrated: whether to apply the model's saved calibrator, if it has one.
        listed: image files, in place of ``root``.
        bids: write a BIDS derivative.

    Raises:
        InputError: before the first case, for a calibrator that is damaged or another model's, cases or prompts that do
            not fit, and an output that holds another model's predictions.
        DataError: after the last case, when any case failed; one that fails does not stop the others.
    """
    run = bundle.resolve(run)
    params, record = model_folder.load(run)
    calibrator = calibrate.of_run(run, record) if calibrated else None
    parts = components.of_model(record, root, _dataset(record["channels"], root, listed))
    split = split or ("all" if root or listed else "test")
    cases = parts.dataset.cases if split == "all" else parts.select(split)
    cases = cases[:limit] if limit else cases
    _check_output(output, parts.dataset.root, listed)
    clicks = _prompts(clicks_file, parts, cases)
    model = {
        "decoder": record["decoder_sha256"],
        "backbone": record["backbone"],
        "preprocessing": preprocessing.VERSION,
        "calibrator": _digest(calibrator),
    }
    planned = prediction_files.plan(output, cases, parts.class_map.names, bids)
    prediction_files.claim(output, model, parts.class_map, bids, planned)
    print(f"note: probabilities are {_described(calibrator, calibrated)}", file=sys.stderr)
    if calibrator is not None and (lost := calibrate.segmentation_warning(*calibrator)) is not None:
        print(f"warning: {lost}", file=sys.stderr)

    domain = record.get("training_domain")
    batch = prediction.Batch(parts, params, calibrator, clicks, domain, model, output, planned)
    masks = prediction.done_before(batch, cases)
    if masks:
        print(f"{len(masks)} of {len(cases)} cases were done before, from the same files, prompts and model")
    left = [case for case in cases if case.case_id not in masks]
    predicted, failed = prediction.predict_cases(batch, left)
    masks |= predicted
    if failed:
        for case_id, error in failed.items():
            print(f"failed: {case_id}: {error}", file=sys.stderr)
        case_id, error = next(iter(failed.items()))
        raise DataError(f"{len(failed)} of {len(cases)} cases failed; the first: {case_id}: {error}")
    return [masks[case.case_id] for case in cases]


def _dataset(channels: Sequence[str], root: str, listed: Sequence[Path]) -> Dataset | None:
    """Files that are in no dataset; None: a dataset, ``root`` or the one that the model was trained on."""
    names = tuple(dict.fromkeys(channels))
    if listed and root:
        raise UsageError("Give a folder with --data, or files with --images, one of the two.")
    if listed:
        return loose_files.of_files(listed, names, listed[0].parent)
    return loose_files.of_folder(Path(root), names) if root else None


def _check_output(output: Path, root: Path, listed: Sequence[Path]) -> None:
    """Nothing goes into the dataset, nor beside an image that it might replace."""
    if not listed:
        files.check_outside(output, root, "--output")
    for path in listed:
        if output.resolve() in (path.parent.resolve(), path.resolve().parent):
            raise UsageError(f"--output={output} is the folder of {path}, which must not be replaced; name another.")


def _prompts(
    path: Path | None, parts: components.Components, cases: Sequence[Case]
) -> dict[str, click_tools.Clicks] | None:
    """The user's clicks, which fit every case; None where there are none and none are needed."""
    protocol = parts.config.protocol
    if path is not None:
        clicks = click_tools.read_clicks(path)
        click_tools.check_clicks(clicks, cases, protocol)
        click_tools.check_places(clicks, cases, protocol, parts.channels[0], parts.config.data.slice_axis)
        return clicks
    if protocol != "none":
        for case in cases:
            if case.label is None:
                raise UsageError(
                    f"Case {case.case_id!r} has no reference labels to place prompts on; give "
                    f"{click_tools.asked(protocol)} with --prompts."
                )
        print("note: no --prompts, so prompts are placed on the reference labels (benchmarks only)", file=sys.stderr)
    return None


def _digest(calibrator: tuple[str, Mapping[str, Any]] | None) -> str | None:
    """SHA-256 of what a calibrator does; where it comes from is told otherwise in a run and in its bundle."""
    if calibrator is None:
        return None
    name, params = calibrator
    does = {key: value for key, value in params.items() if key != "provenance"}
    return hashlib.sha256(json.dumps([name, does], sort_keys=True).encode()).hexdigest()


def _described(calibrator: tuple[str, Mapping[str, Any]] | None, wanted: bool) -> str:
    if calibrator is None:
        return "the decoder's own" + (": launch.calibrate has saved no calibrator with this model" if wanted else "")
    name, params = calibrator
    fitted = f"fitted on validation voxels, region {params['provenance']['region']}"
    return f"calibrated by {name}, {fitted}" + ("" if params["identifiable"] else " (not identifiable: no change)")


def define_flags() -> None:
    """``--run`` or ``--model``, ``--output``, ``--data`` or ``--images``, ``--prompts`` and how it is done."""
    flags.DEFINE_string("run", "", "Folder of a trained run.")
    flags.DEFINE_string("model", "", "A model bundle in its place: the folder or zip that launch.export wrote.")
    common.define_folder("output", "Folder to write masks and probabilities to.")
    flags.DEFINE_string("data", "", "Another dataset than the one trained on, or a folder of image files.")
    flags.DEFINE_list("images", [], "Image files in its place, separated by commas.")
    flags.DEFINE_string(
        "prompts", "", "Table or JSON of clicks; without it prompts are placed on the reference labels."
    )
    flags.DEFINE_enum("split", "", ["", "train", "val", "test", "all"], "Which cases; default: all of --data, or test.")
    flags.DEFINE_bool("calibrate", True, "Apply the calibrator that launch.calibrate saved with the model.")
    flags.DEFINE_bool("bids", False, "Write a BIDS derivative.")


def main() -> None:
    """Predict, and say where the masks are."""
    arguments = flags.FLAGS
    if bool(arguments.run) == bool(arguments.model):
        raise UsageError("Give the trained run with --run, or a model bundle with --model, one of the two.")
    run, output = Path(arguments.run or arguments.model), Path(arguments.output)
    if arguments.model and not bundle.is_bundle(run):
        raise InputError(f"--model={run} is no model bundle; give what launch.export wrote, or a run with --run.")
    clicks = Path(arguments.prompts) if arguments.prompts else None
    written = predict(
        run,
        output,
        arguments.data,
        clicks,
        arguments.split,
        calibrated=arguments.calibrate,
        listed=[Path(name) for name in arguments.images],
        bids=arguments.bids,
    )
    print(f"{len(written)} masks with their probabilities are in {arguments.output}")


if __name__ == "__main__":
    common.run(main, define_flags)
