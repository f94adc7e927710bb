"""Evaluate trained runs on the test cases of every domain; write tables and a report.

python -m launch.evaluate --runs=runs/x/calsam_seed42,runs/x/sam_ft_seed42 --workdir=runs/x/evaluation

Beside the runs it shows each of them with temperature scaling (fitted on the source domain's validation cases), SAM as
it came (binary problems), and two guesses made from the prompt alone.  Writes ``cases.csv`` (long format),
``summary.json`` (nnU-Net's keys), ``temperatures.json``, ``table.md``, ``report.html`` and, last, ``SHA256SUMS``, which
``sha256sum --check`` reads.  With ``--prompt_jitter=0.01,0.02,0.05`` also ``prompt_jitter.csv``: DSC and ECE when every
prompt is moved at random by up to that share of the encoder frame's side.
``--calibrators=temperature,dirichlet`` shows every run with each of them (``calibrators.json``: those but temperature).
"""

import dataclasses
import functools
import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

import calsegx
from calsegx import calibrators as calibrator_registry
from calsegx import configs, files
from calsegx.data import cases as case_tools
from calsegx.data import images
from calsegx.evaluation import evaluate as case_metrics
from calsegx.evaluation import gallery, methods, report, robustness, study, tables
from calsegx.interfaces import Case, DataError, UsageError
from calsegx.training import metrics_log, model_folder, progress
from launch import common, components, exchange

# Settings in which compared runs may differ: what they are compared for, and what changes no number.
MAY_DIFFER = (
    *("method", "loss", "prompt_jitter", "seed", "fisher.", "cmp.", "crac."),
    *("log_every", "save_every", "validate_every"),
    *("data.root", "data.splits", "data.cache", "model.weights", "model.encoder_batch", "model.shards"),
    *("microbatch", "tensorboard"),
)


PROTOCOL_NOTES = {
    "gt_points": "placed on the ground truth, one pair per slice with foreground",
    "random_points": "placed at random inside the ground truth, one pair per slice with foreground",
    "class_points": "placed on the ground truth, one point per class and slice with foreground",
    "gt_box": "placed on the ground truth, one box per slice with foreground",
    "volume_points": "placed on the ground truth, one pair per volume for all its slices",
    "none": "no prompt: a box round every slice",
}


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
    names, weights = [configs.method_name(run) for run in runs], [_weights(run) for run in runs]
    found = []
    for name, own in zip(names, weights, strict=True):
        if any(other != own for same, other in zip(names, weights, strict=True) if same == name):
            name += ("; " if ":" in name else ":") + ", ".join(f"{term} {value:g}" for term, value in own.items())
        found.append(name)
    return found


def _weights(run: configs.TrainConfig) -> dict[str, float]:
    """The weights of the penalties that the run's method has."""
    method = configs.METHODS[run.method]
    weights = {"FIP": (method.fisher, run.fisher.weight), "CMP": (method.confidence, run.cmp.weight)}
    return {term: weight for term, (used, weight) in weights.items() if used}


def _check_alike(folder: Path, record: Mapping[str, Any], reference_folder: Path, reference: Mapping[str, Any]) -> None:
    changed = configs.differences(reference["config"], record["config"])
    changed |= {
        key: (reference[key], record[key])
        for key in ("backbone", "class_ids", "channels", "seen")
        if reference[key] != record[key]
    }
    for name, (theirs, mine) in changed.items():
        if not name.startswith(MAY_DIFFER):
            values = "" if name == "seen" else f" ({mine!r} and {theirs!r})"
            what = "training or validation cases" if name == "seen" else name
            raise UsageError(f"{folder} and {reference_folder} differ in {what}{values}; evaluate them separately.")


def check_calibrators(names: Sequence[str]) -> None:
    """Before any work.

    Raises:
        UsageError: for an unknown calibrator, with the nearest, or one that is named twice.
    """
    for name in names:
        calibrator_registry.get(name)
        if methods.suffix_of(name) not in methods.SUFFIXES or names.count(name) > 1:
            known = [each for each in calibrator_registry.names() if methods.suffix_of(each) in methods.SUFFIXES]
            raise UsageError(f"--calibrators={','.join(names)}: give some of {', '.join(known)}, each once.")


def _calibrator_image(parts: components.Components) -> Callable[[Case], np.ndarray]:
    return lambda case: study.calibrator_image(parts.prepare(case))


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


def evaluate(
    folders: Sequence[Path],
    workdir: Path,
    root: str = "",
    protocol: str = "",
    prompt_jitter: Sequence[float] = (),
    prompt_draws: int = 3,
    calibrators: Sequence[str] = ("temperature",),
    names: Sequence[str] = (),
) -> report.Record:
    """Score every test case and write the evaluation folder; of several processes each scores its share.

    Args:
        folders: of trained runs.
        workdir: the evaluation folder.
        root: another dataset, all of whose labelled cases are scored; empty: the test cases of the training's.
        protocol: the prompt protocol to expect; empty: the models' own.
        prompt_jitter: amounts at which the cases are scored again with moved prompts (``robustness``).
        prompt_draws: how often for each amount.
        calibrators: to show every run with, each fitted on the validation cases with its defaults.
        names: what to call the runs' methods; empty: by method, loss and weights.
    """
    check_calibrators(calibrators)
    runs, first = read_runs(folders, protocol, names), jax.process_index() == 0
    robustness.check(prompt_jitter, prompt_draws, runs.configs[0].protocol)
    home = components.of_model(runs.record, "")
    away = components.of_model(runs.record, root) if root else home
    config = home.config
    train, val = home.select("train"), home.select("val")
    test = tuple(case for case in (away.dataset.cases if root else home.select("test")) if case.label is not None)
    if not test:
        raise UsageError(f"The test cases of {away.dataset.root} have no labels, so there is nothing to compare with.")

    check_unseen(runs.record, test, same_dataset=not root)
    check_validation(runs.record, val)
    features = components.feature_cache(home, folders[0])
    components.fill_cache(home, features, {"train": 1, "val": 1})
    domain_column = config.data.domain if root or config.data.source else ""
    work = study.Study(features, home.backbone, home.class_map, config.protocol, domain_column, config.data)
    fits = {
        (m.method, m.seed): {
            name: study.fit_calibrator(work, m, val, name, image=_calibrator_image(home)) for name in calibrators
        }
        for m in runs.models
    }
    guesses = study.fit_guesses(work, train)
    if root:
        work = dataclasses.replace(work, cache=components.feature_cache(away, workdir))
    components.encode(away, work.cache, [(case, 1) for case in test])

    shown = gallery.shown_methods(runs.models)

    def score(case: Case) -> exchange.Scored:
        subject = study.load(work, case)
        # Every spatial calibrator of every model sees the same image.
        image = functools.cache(lambda: _calibrator_image(away)(case))
        again = robustness.score(work, subject, runs.models, fits, prompt_jitter, prompt_draws, image)
        scored = exchange.Scored([], {}, gallery.snapshot(subject, work.domain(case)), again)
        for found in study.predictions(work, subject, runs.models, fits, guesses, image):
            scored.rows.extend(study.score(work, subject, *found, scored.statistics))
            gallery.add(scored.picture, *found, shown)
        return scored

    rows: list[case_metrics.Row] = []
    moved: dict[float, list[case_metrics.Row]] = {amount: [] for amount in prompt_jitter}
    statistics: study.Statistics = {}
    snapshots = []
    with progress.Progress("Evaluating", len(test), "cases", quiet=not first) as bar:
        for done, (case, scored) in enumerate(exchange.deal(test, score), start=1):
            rows += scored.rows
            for amount, found in scored.jittered.items():
                moved[amount] += found
            for slot, sums in scored.statistics.items():
                statistics[slot] = statistics[slot] + sums if slot in statistics else sums
            snapshots.append(scored.picture)
            bar.update(done, case.case_id)

    def read_slice(case: Case, index: int) -> np.ndarray:
        # The last channel: FLAIR in the phantoms, where oedema shows best.
        channel = away.channels[-1]
        return images.read(case.images[channel], case.volumes.get(channel), config.data.slice_axis).voxels[index]

    splits = {"training": train, "validation": val, "test": test}
    source = "" if root else config.data.source
    trained = ", ".join(methods.display(name) for name in methods.order(m.method for m in runs.models))
    record = report.Record(
        title=f"{trained} on {away.dataset.root.name}",
        rows=rows,
        source=source,
        targets=sorted({row.domain for row in rows} - {source}),
        domain_kind=domain_column,
        description=_describe(home, away, runs, splits, fits, guesses),
        statistics=statistics,
        logs=runs.logs,
        gallery=gallery.pictures(snapshots, rows, shown[-1], domain_column, read_slice),
        protocol=config.protocol,
        jittered=robustness.lines(rows, moved) if moved else [],
    )
    if first:
        _write(workdir, record, home.class_map.names, shown[-1][0], fits)
    return record


def _describe(
    parts: components.Components,
    away: components.Components,
    runs: Runs,
    splits: Mapping[str, Sequence[Case]],
    fits: study.Fits,
    guesses: Mapping[str, Any],
) -> dict[str, str]:
    """What was run, for the head of the report."""
    config, data = parts.config, parts.config.data
    counts = []
    for split, members in splits.items():
        by_domain: dict[str, int] = {}
        for case in members:
            name = case_tools.domain(case, data.domain)
            by_domain[name] = by_domain.get(name, 0) + 1
        listed = ", ".join(f"{count} {data.domain} {name}" for name, count in sorted(by_domain.items()))
        counts.append(f"{split}: {listed}")
    fitted = ", ".join(
        f"{methods.display(method)} seed {seed}: {own['temperature']['temperature']:.2f}"
        + ("" if own["temperature"]["identifiable"] else " (not identifiable)")
        for (method, seed), own in fits.items()
        if "temperature" in own
    )
    others = dict.fromkeys(name for own in fits.values() for name in own if name != "temperature")
    classes = ", ".join(
        f"{name} = {'+'.join(map(str, ids))}"
        for name, ids in zip(parts.class_map.names, parts.class_map.ids, strict=True)
    )
    count = len(parts.class_map.names)
    tasks = dict.fromkeys(configs.loss_expressions(run, count)[0] for run in runs.configs)
    penalised = configs.loss_expressions(config, count)[1]
    fisher, confidence = (_listed([_weights(run) for run in runs.configs], term) for term in ("FIP", "CMP"))
    return {
        "Dataset": parts.dataset.root.name,
        **({"Tested on": away.dataset.root.name} if away is not parts else {}),
        "Cases": "; ".join(counts),
        "Classes (label ids)": classes,
        "Channels": ", ".join(parts.channels),
        "Prompt protocol": f"{config.protocol}: {PROTOCOL_NOTES[config.protocol]}",
        "Seeds": ", ".join(str(seed) for seed in sorted({m.seed for m in runs.models}))
        + " (order of the slices and choice of their views; every run starts from the same pretrained decoder)",
        "Training": f"{config.steps} steps of {config.batch_size} slices, {data.views} cached views a slice, Adam "
        f"{config.optimizer.learning_rate:g} with cosine decay, clip norm {config.optimizer.clip_norm:g}",
        "Loss": f"{', '.join(tasks)}; FIP weight {fisher} ({config.fisher.mode}, {config.fisher.reading}, "
        f"{config.fisher.normalisation}, of {penalised}, {config.fisher.labels} labels, linear warm-up over "
        f"{config.fisher.warmup_fraction:.0%} of the steps), CMP weight {confidence}",
        **({"Temperatures (validation, NLL)": fitted} if fitted else {}),
        **({"Other calibrators (validation, NLL)": ", ".join(others)} if others else {}),
        **_disc(guesses),
        "Versions": f"calsegx {calsegx.__version__}, jax {jax.__version__}, Python {platform.python_version()}, "
        f"{jax.device_count()} {jax.devices()[0].device_kind}",
    }


def _disc(guesses: Mapping[str, Any]) -> dict[str, str]:
    if not guesses:
        return {}
    radius = guesses["prompt_only_disc"].radius_mm
    return {"Prompt-only disc": f"radius {radius:.1f} mm, the best on the training labels"}


def _listed(weights: Sequence[Mapping[str, float]], term: str) -> str:
    return ", ".join(f"{value:g}" for value in sorted({w[term] for w in weights if term in w})) or "not used"


def _write(
    workdir: Path,
    record: report.Record,
    class_names: Sequence[str],
    method: str,
    fits: study.Fits,
) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    tables.write_cases(workdir / "cases.csv", record.rows)
    tables.write_summary(
        *(workdir / "summary.json", record.rows, class_names, method, record.source, record.targets),
        prompt_jitter=record.jittered,
    )
    blocks = tables.overview(record.rows, record.source, record.targets, record.domain_kind)
    columns = tables.MORE_COLUMNS
    more = tables.overview(record.rows, record.source, record.targets, record.domain_kind, columns)
    files.write_atomically(workdir / "table.md", tables.markdown(blocks) + "\n" + tables.markdown(more, columns))
    written = ["cases.csv", "summary.json", "table.md", "temperatures.json", "report.html"]
    temperatures = [
        {"method": method, "seed": seed, **own["temperature"]}
        for (method, seed), own in fits.items()
        if "temperature" in own
    ]
    files.write_atomically(workdir / "temperatures.json", json.dumps(temperatures, indent=2) + "\n")
    others = [
        {"method": method, "seed": seed, "calibrator": name, **params}
        for (method, seed), own in fits.items()
        for name, params in own.items()
        if name != "temperature"
    ]
    if others:
        files.write_atomically(workdir / "calibrators.json", json.dumps(others, indent=2) + "\n")
        written.append("calibrators.json")
    report.write_report(workdir / "report.html", record)
    if record.jittered:
        robustness.write(workdir / "prompt_jitter.csv", record.jittered)
        written.append("prompt_jitter.csv")
    sums = [f"{hashlib.sha256((workdir / name).read_bytes()).hexdigest()}  {name}\n" for name in written]
    files.write_atomically(workdir / "SHA256SUMS", "".join(sums))


def define_flags() -> None:
    """``--runs``, ``--workdir``, ``--data``, ``--protocol``, ``--prompt_*`` and those of several processes."""
    common.define_processes()
    flags.DEFINE_list("runs", None, "Folders of trained runs, separated by commas.", required=True)
    common.define_folder("workdir", "Folder to write the evaluation to.")
    flags.DEFINE_string("data", "", "Another dataset folder: score all its labelled cases.")
    flags.DEFINE_string("protocol", "", "The prompt protocol to expect; another one than the models' is refused.")
    flags.DEFINE_list("prompt_jitter", [], "Also score with moved prompts: shares of the frame's side, e.g. 0.01,0.05.")
    flags.DEFINE_list("calibrators", ["temperature"], "Of temperature, local_temperature, dirichlet: for every run.")
    flags.DEFINE_integer("prompt_draws", 3, "How often prompts are moved for each amount.", lower_bound=1)


def main() -> None:
    """Evaluate, and say the main result."""
    arguments = flags.FLAGS
    workdir, runs = Path(arguments.workdir), [Path(run) for run in arguments.runs if run]
    try:
        amounts = [float(amount) for amount in arguments.prompt_jitter]
    except ValueError as error:
        given = ",".join(arguments.prompt_jitter)
        raise UsageError(f"--prompt_jitter={given} must be numbers, separated by commas.") from error
    jitter = amounts, arguments.prompt_draws
    record = evaluate(runs, workdir, arguments.data, arguments.protocol, *jitter, arguments.calibrators)
    if jax.process_index():
        return
    print(report.headline(record))
    print(f"The report is {workdir / 'report.html'}")


if __name__ == "__main__":
    common.run(main, define_flags)
