"""The files that predictions are written to: their names, also as BIDS derivatives, and which of them are whole.

Of every case: ``CASE`` (label ids), ``CASE_prob-CLASS``, ``CASE_uncertainty`` and, written last, ``CASE.json``, which
says what the others were made from.  A case whose JSON is whole and says the same as would be written now, and whose
files are there, need not be predicted again.  ``predictions.json`` says whose predictions a folder holds.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import calsegx
from calsegx import files
from calsegx.data import classes, clicks, images, pictures
from calsegx.evaluation import predict
from calsegx.interfaces import Case, DataError, UsageError, Volume
from calsegx.uncertainty import scores

OWNER, LABELS = "predictions.json", "labels.json"
UNCERTAINTY = "entropy of background and classes / log(K + 1), from 0 (certain) to 1; slices without a prompt are 0"
BIDS_VERSION = "1.10.0"
_SEGMENTATION = "space-orig_seg-calsegx"
_SUBJECT = re.compile(r"sub-[0-9A-Za-z]+(_ses-[0-9A-Za-z]+)?")
_NOT_ALPHANUMERIC = re.compile(r"[^0-9A-Za-z]")


@dataclass(frozen=True)
class CaseFiles:
    """Where a case's predictions go; all but ``record`` without an ending, which is that of the input."""

    mask: Path
    probabilities: Mapping[str, Path]  # by class
    uncertainty: Path
    record: Path


def plan(output: Path, cases: Sequence[Case], names: Sequence[str], bids: bool) -> dict[str, CaseFiles]:
    """The files of every case.

    Args:
        output: the folder.
        cases: to predict.
        names: of the classes.
        bids: BIDS derivatives: ``sub-X/[ses-Y/]anat/sub-X[_ses-Y]_space-orig_seg-calsegx[_label-CLASS]_{dseg,probseg,
            uncertainty}``.  A case that is not called ``sub-X[_ses-Y]`` becomes ``sub-`` and its letters and digits.

    Raises:
        UsageError: when two files get the same name, or a name is none that BIDS allows, or a case is a picture.
    """
    found = {}
    owners = {str(output / Path(name).stem).casefold(): f"the folder's {name}" for name in (OWNER, LABELS)}
    for case in cases:
        planned = _bids(output, case, names) if bids else _plain(output, case.case_id, names)
        for stem in (planned.mask, *planned.probabilities.values(), planned.uncertainty):  # the JSON's is the mask's
            other, this = owners.get(str(stem).casefold()), f"case {case.case_id!r}"
            if other:
                raise UsageError(
                    f"{other} and {this} would both be written to {stem}; rename a case or a class"
                    + (", or leave --bids out, which keeps letters and digits alone." if bids else ".")
                )
            owners[str(stem).casefold()] = this
        found[case.case_id] = planned
    return found


def claim(
    output: Path,
    model: Mapping[str, Any],
    class_map: classes.ClassMap,
    bids: bool,
    planned: Mapping[str, CaseFiles],
) -> None:
    """Make the folder this model's: refuse another's, and write what holds for all of its cases.

    Args:
        output: the folder; created if it is not there.
        model: what tells the model: hashes of its weights and of its calibrator.
        class_map: of the model.
        bids: whether the names are BIDS'.
        planned: of ``plan``.

    Raises:
        UsageError: when it holds predictions of another model or calibrator, or by other names, or files of its own
            that would be replaced.
    """
    owner = output / OWNER
    content = {"model": dict(model), "bids": bids}
    if owner.is_file():
        try:
            found = files.unseal(owner.read_bytes())
        except ValueError as error:
            raise DataError(f"{owner} is damaged ({error}); name another folder with --output.") from error
        if found != content:
            differing = ", ".join(
                [name for name in content["model"] if found["model"].get(name) != content["model"][name]]
                + ["file names (--bids)"] * (found["bids"] != bids)
            )
            raise UsageError(
                f"--output={output} holds predictions of another model, calibrator or form (differing: {differing}); "
                "name another folder."
            )
    ids = {name: values[0] for name, values in zip(class_map.names, class_map.ids, strict=True)}
    texts = _bids_texts(ids) if bids else {LABELS: json.dumps({"background": 0, **ids}, indent=2) + "\n"}
    if not owner.is_file():
        _check_nothing_is_replaced(output, texts, planned)
    for name, text in texts.items():
        files.write_atomically(output / name, text)
    files.write_atomically(owner, files.seal(content))


def _check_nothing_is_replaced(output: Path, names: Iterable[str], planned: Mapping[str, CaseFiles]) -> None:
    stems = [s for one in planned.values() for s in (one.mask, *one.probabilities.values(), one.uncertainty)]
    wanted = [output / name for name in names]
    wanted += [stem.with_name(stem.name + ending) for stem in stems for ending in (*images.ENDINGS, ".json")]
    for path in wanted:
        if path.exists() or path.is_symlink():
            raise UsageError(
                f"{path} is there and was not written by a prediction into this folder; name another folder with "
                "--output."
            )


def made_from(model: Mapping[str, Any], fingerprint: str, table: clicks.Clicks | None) -> dict[str, Any]:
    """What a case's predictions depend on; equal when they need not be made again.

    Args:
        model: as of ``claim``.
        fingerprint: of the case's files.
        table: its clicks; None: prompts are placed on its labels, or there are none.
    """
    prompts = None
    if table is not None:
        digest = hashlib.sha256()
        for values, kind in ((table.coordinates, float), (table.world, np.uint8), (table.labels, np.int64)):
            digest.update(np.ascontiguousarray(values, kind).tobytes())
        prompts = digest.hexdigest()
    return {"calsegx": calsegx.__version__, "model": dict(model), "input": fingerprint, "prompts": prompts}


def whole(output: Path, planned: CaseFiles, wanted: Mapping[str, Any]) -> Path | None:
    """The mask of a case that is done: its JSON is whole, made from ``wanted``, and its files are its; else None."""
    try:
        record = files.unseal(planned.record.read_bytes())
        if record.get("made_from") != wanted or _digests(output, record["files"]) != record["digests"]:
            return None
    except (OSError, ValueError):  # not there, or cut off: predicted again
        return None
    return output / record["files"]["mask"]


def _digests(output: Path, names: Mapping[str, Any]) -> list[str]:
    """SHA-256 of the mask, the probabilities and the uncertainty."""
    written = [names["mask"], *names["probabilities"].values(), names["uncertainty"]]
    return [hashlib.sha256((output / name).read_bytes()).hexdigest() for name in written]


def write(
    output: Path,
    planned: CaseFiles,
    probabilities: np.ndarray,
    reference: Volume,
    class_map: classes.ClassMap,
    record: Mapping[str, Any],
) -> Path:
    """Write a case: probabilities, uncertainty and mask on the input's grid, then the JSON; returns the mask's path.

    Args:
        output: the folder.
        planned: of ``plan``.
        probabilities: ``[D, H, W, K]`` of the classes.
        reference: the input's grid.
        class_map: of the model.
        record: what the JSON says beside the names of the files; with ``made_from``.
    """
    planned.record.unlink(missing_ok=True)  # from here on the files are not what it says
    of_classes = {
        name: images.write(planned.probabilities[name], probabilities[..., index], reference, np.float32)
        for index, name in enumerate(class_map.names)
    }
    uncertainty = images.write(planned.uncertainty, scores.predictive_entropy(probabilities), reference, np.float32)
    ids = classes.to_file_ids(class_map, predict.segment(probabilities))
    mask = images.write(planned.mask, ids, reference, ids.dtype.type)
    names = {
        "mask": mask.relative_to(output).as_posix(),
        "probabilities": {name: path.relative_to(output).as_posix() for name, path in of_classes.items()},
        "uncertainty": uncertainty.relative_to(output).as_posix(),
    }
    files.write_atomically(planned.record, files.seal({**record, "files": names, "digests": _digests(output, names)}))
    return mask


def _plain(output: Path, case_id: str, names: Sequence[str]) -> CaseFiles:
    return CaseFiles(
        output / case_id,
        {name: output / f"{case_id}_prob-{name}" for name in names},
        output / f"{case_id}_uncertainty",
        output / f"{case_id}.json",
    )


def _bids(output: Path, case: Case, names: Sequence[str]) -> CaseFiles:
    path = next(iter(case.images.values()))
    if path.suffix.lower() == pictures.ENDING:
        raise UsageError(f"--bids takes NIfTI volumes, and {path} is a picture; leave --bids out.")
    named = case.case_id
    if not _SUBJECT.fullmatch(named):
        named = f"sub-{_NOT_ALPHANUMERIC.sub('', named)}"
    labels = {name: _NOT_ALPHANUMERIC.sub("", name) for name in names}
    for what, kept in {f"The case {case.case_id!r}": named.removeprefix("sub-"), **labels}.items():
        if not kept:
            raise UsageError(f"{what} has no letter a-z or digit that a BIDS name could keep; rename it.")
    folder = output.joinpath(*named.split("_"), "anat")
    stem = f"{named}_{_SEGMENTATION}"
    return CaseFiles(
        folder / f"{stem}_dseg",
        {name: folder / f"{stem}_label-{label}_probseg" for name, label in labels.items()},
        folder / f"{stem}_uncertainty",
        folder / f"{stem}_dseg.json",
    )


def _bids_texts(ids: Mapping[str, int]) -> dict[str, str]:
    """The files at the top of a BIDS derivative, which hold for every case."""
    description = {
        "Name": "calsegx predictions",
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "calsegx", "Version": calsegx.__version__}],
    }
    common = {"SpatialReference": "orig", "Manual": False}
    rows = [("index", "name"), (0, "background"), *((index, name) for name, index in ids.items())]
    return {
        "dataset_description.json": json.dumps(description, indent=2) + "\n",
        "seg-calsegx_dseg.tsv": "".join(f"{index}\t{name}\n" for index, name in rows),
        "seg-calsegx_dseg.json": json.dumps(common, indent=2) + "\n",
        "seg-calsegx_probseg.json": json.dumps(common, indent=2) + "\n",
        ".bidsignore": f"{OWNER}\n*_uncertainty.nii.gz\n",  # no suffix of BIDS
    }
