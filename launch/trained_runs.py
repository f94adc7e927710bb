"""Trained runs as evaluation and calibration take them: what may be compared, and on which cases."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from calsegx import bundle, calibrators, configs
from calsegx.calibrators import storage
from calsegx.data import cases as case_tools
from calsegx.evaluation import methods, study
from calsegx.interfaces import Case, DataError, UsageError
from calsegx.training import metrics_log, model_folder

# Settings in which compared runs may differ: what they are compared for, and what changes no number.
MAY_DIFFER = (
    *("method", "loss", "prompt_jitter", "seed", "fisher.", "cmp.", "crac.", "steps", "export"),
    *("log_every", "save_every", "validate_every"),
    *("data.root", "data.splits", "data.cache", "data.workers", "model.weights", "model.encoder_batch", "model.shards"),
    *("microbatch", "tensorboard", "optimizer.weight_decay"),
)


@dataclass(frozen=True)
class Runs:
    """Trained decoders that share one dataset, backbone and prompt protocol."""

    models: Sequence[study.Model]
    record: Mapping[str, Any]  # of the first
    logs: Mapping[str, Sequence[Mapping[str, Any]]]
    configs: Sequence[configs.TrainConfig]  # of the models


def read_runs(folders: Sequence[Path], protocol: str, names: Sequence[str] = ()) -> Runs:
    """Load the models, and refuse to compare what was not trained alike; ``names`` are what to call their methods.

    Raises:
        UsageError: when the runs differ in cases, backbone, classes, prompt protocol or any setting of training
            beside those of ``MAY_DIFFER``, or ``protocol`` is another one than theirs.
    """
    if not folders:
        raise UsageError("--runs is empty; give the folders of trained runs, separated by commas.")
    loaded = [model_folder.load(folder) for folder in folders]
    first = loaded[0][1]
    for folder, (_, record) in zip(folders, loaded, strict=True):
        trained = record["config"]["protocol"]
        if protocol and protocol != trained:
            raise UsageError(
                f"{folder} was trained with the prompt protocol {trained!r}, not with --protocol={protocol!r}; "
                f"evaluate it with {trained!r} or train a run with {protocol!r}."
            )
        _check_alike(folder, record, folders[0], first)
    settings = [configs.from_dict(configs.TrainConfig, r["config"], "model.json") for _, r in loaded]
    models = [
        study.Model(name, config.seed, jax.device_put(params), record["decoder_sha256"])
        for name, config, (params, record) in zip(names or _names(settings), settings, loaded, strict=True)
    ]
    for folder, model in zip(folders, models, strict=True):
        if sum((m.method, m.seed) == (model.method, model.seed) for m in models) > 1:
            raise UsageError(
                f"{folder} repeats {model.method} with seed {model.seed}; runs are told apart by method, loss, weights "
                "of the penalties and seed: give every run once."
            )
    several = len({m.seed for m in models}) > 1
    logs = {}
    for folder, m, (_, record) in zip(folders, models, loaded, strict=True):
        name = m.method + (f" seed {m.seed}" if several else "")
        logs[name] = metrics_log.read(folder / "metrics.jsonl", record.get("log"))
    return Runs(models, first, logs, settings)


def _names(runs: Sequence[configs.TrainConfig]) -> list[str]:
    """What the runs are called: ``configs.method_name``, with the penalties' weights where only they differ."""
    names, weights = [configs.method_name(run) for run in runs], [penalty_weights(run) for run in runs]
    found = []
    for name, own in zip(names, weights, strict=True):
        if any(other != own for same, other in zip(names, weights, strict=True) if same == name):
            name += ("; " if ":" in name else ":") + ", ".join(f"{term} {value:g}" for term, value in own.items())
        found.append(name)
    return found


def penalty_weights(run: configs.TrainConfig) -> dict[str, float]:
    """The weights of the penalties that the run's method has."""
    method = configs.METHODS[run.method]
    weights = {"FIP": (method.fisher, run.fisher.weight), "CMP": (method.confidence, run.cmp.weight)}
    return {term: weight for term, (used, weight) in weights.items() if used}


def _check_alike(folder: Path, record: Mapping[str, Any], reference_folder: Path, reference: Mapping[str, Any]) -> None:
    changed = configs.differences(reference["config"], record["config"])
    changed |= {
        key: (reference[key], record[key])
        for key in ("backbone", "class_ids", "channels", "seen")
        if _comparable(reference, key) != _comparable(record, key)
    }
    for name, (theirs, mine) in changed.items():
        if not name.startswith(MAY_DIFFER):
            values = "" if name == "seen" else f" ({mine!r} and {theirs!r})"
            what = "training or validation cases" if name == "seen" else name
            raise UsageError(f"{folder} and {reference_folder} differ in {what}{values}; evaluate them separately.")


def _comparable(record: Mapping[str, Any], key: str) -> Any:
    """A bundle has no names of cases: their files tell whether they are the same."""
    if key != "seen":
        return record[key]
    return {split: sorted(case["fingerprint"] for case in cases) for split, cases in record[key].items()}


def own_calibrators(folders: Sequence[Path], runs: Runs) -> study.Fits:
    """The calibrators that bundles bring with them."""
    return {
        (model.method, model.seed): dict([storage.load(folder / bundle.CALIBRATOR)])
        for folder, model in zip(folders, runs.models, strict=True)
        if (folder / bundle.CALIBRATOR).exists()
    }


def check_calibrators(names: Sequence[str]) -> None:
    """Before any work.

    Raises:
        UsageError: for an unknown calibrator, with the nearest, or one that is named twice.
    """
    for name in names:
        calibrators.get(name)
        if methods.suffix_of(name) not in methods.SUFFIXES or names.count(name) > 1:
            known = [each for each in calibrators.names() if methods.suffix_of(each) in methods.SUFFIXES]
            raise UsageError(f"--calibrators={','.join(names)}: give some of {', '.join(known)}, each once.")


def check_unseen(record: Mapping[str, Any], test: Sequence[Case], same_dataset: bool) -> None:
    """No test case, and within a dataset no test subject, may have been trained, validated or calibrated on.

    Raises:
        DataError: naming the first that was.
    """
    seen = [entry for entries in record["seen"].values() for entry in entries]
    files_seen = {entry["fingerprint"]: entry["case_id"] for entry in seen}
    subjects = {entry["subject_id"] for entry in seen} if same_dataset else set()
    for case in test:
        known = files_seen.get(case_tools.fingerprint(case))
        if known or case.subject_id in subjects:
            what = f"holds the same files as case {known!r}" if known else f"is of subject {case.subject_id!r}"
            raise DataError(
                f"Test case {case.case_id!r} {what}, which the model was trained or validated on; evaluate on cases it "
                "has not seen, with the splits it was trained with."
            )


def check_validation(record: Mapping[str, Any], val: Sequence[Case]) -> None:
    """What a calibrator is fitted on must be what the run was validated on.

    Raises:
        DataError: naming the first case that is not.
    """
    validated = {entry["fingerprint"] for entry in record["seen"]["val"]}
    for case in val:
        if case_tools.fingerprint(case) not in validated:
            raise DataError(
                f"Validation case {case.case_id!r} is not among the {len(validated)} that the run was validated on; "
                "restore the dataset and its splits, or train again."
            )
