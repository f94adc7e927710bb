"""Evaluate trained runs on the test cases of every domain; write tables and a report.

python -m launch.evaluate --runs=runs/x/calsam_seed42,runs/x/sam_ft_seed42 --workdir=runs/x/evaluation

Beside the runs it shows each of them with temperature scaling (fitted on the source domain's validation cases), SAM as
it came (binary problems), and two guesses made from the prompt alone.  Writes ``cases.csv`` (long format),
``summary.json`` (nnU-Net's keys), ``temperatures.json``, ``table.md``, ``table.tex`` (booktabs), ``report.html`` and,
last, ``SHA256SUMS``, which ``sha256sum --check`` reads.  With ``--prompt_jitter=0.01,0.02,0.05`` also
``prompt_jitter.csv``: DSC and ECE when every prompt is moved at random by up to that share of the encoder frame's side.
A model bundle can stand in place of a run, with ``--data``: it brings no training and validation cases, so no guesses
and no calibrators are fitted; it is shown with the calibrator that it brings.
``--calibrators=temperature,dirichlet`` shows every run with each of them (``calibrators.json``: those but temperature).
``--external=nnU-Net=FOLDER`` scores another tool's predictions of the test cases by the same code, as a baseline
(``calsegx/evaluation/external.py``: which files).
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

import calsegx
from calsegx import bundle, configs, files
from calsegx.data import cases as case_tools
from calsegx.data import images
from calsegx.data.corruptions import manifest
from calsegx.evaluation import evaluate as case_metrics
from calsegx.evaluation import external as external_files
from calsegx.evaluation import gallery, latex, methods, report, robustness, study, tables
from calsegx.interfaces import Case, UsageError
from calsegx.training import progress
from launch import common, components, exchange, trained_runs

PROTOCOL_NOTES = {
    "gt_points": "placed on the ground truth, one pair per slice with foreground",
    "random_points": "placed at random inside the ground truth, one pair per slice with foreground",
    "class_points": "placed on the ground truth, one point per class and slice with foreground",
    "gt_box": "placed on the ground truth, one box per slice with foreground",
    "volume_points": "placed on the ground truth, one pair per volume for all its slices",
    "none": "no prompt: a box round every slice",
}


def evaluate(
    folders: Sequence[Path],
    workdir: Path,
    root: str = "",
    protocol: str = "",
    prompt_jitter: Sequence[float] = (),
    prompt_draws: int = 3,
    calibrators: Sequence[str] = ("temperature",),
    names: Sequence[str] = (),
    external: Mapping[str, Path] | None = None,
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
        external: folders of other tools' predictions of the test cases, by what to call the tool.
    """
    trained_runs.check_calibrators(calibrators)
    external_files.check(external or {})
    folders = [bundle.resolve(folder) for folder in folders]
    runs, first = trained_runs.read_runs(folders, protocol, names), jax.process_index() == 0
    robustness.check(prompt_jitter, prompt_draws, runs.configs[0].protocol)
    away = components.of_model(runs.record, root)
    files.check_outside(workdir, away.dataset.root, "--workdir")
    bundled = not runs.record["config"]["data"]["root"]
    home = away if bundled or not root else components.of_model(runs.record, "")
    config = home.config
    train, val = ((), ()) if bundled else (home.select("train"), home.select("val"))
    test = tuple(case for case in (away.dataset.cases if root else home.select("test")) if case.label is not None)
    if not test:
        raise UsageError(f"The test cases of {away.dataset.root} have no labels, so there is nothing to compare with.")

    trained_runs.check_unseen(runs.record, test, same_dataset=not root)
    trained_runs.check_validation(runs.record, val)
    others = [
        external_files.Predictions(name, folder, home.class_map, config.data.slice_axis)
        for name, folder in (external or {}).items()
    ]
    surveys = [other.survey(test) for other in others]
    features = components.feature_cache(home, workdir if bundled else folders[0])
    components.encode(home, features, [(case, 1) for case in (*train, *val)])
    domain_column = config.data.domain if root or config.data.source else ""
    work = study.Study(features, home.backbone, home.class_map, config.protocol, domain_column, config.data)
    if bundled:
        fits: study.Fits = trained_runs.own_calibrators(folders, runs)
        guesses = {}
    else:
        image_of = _calibrator_image(home)
        fits = {
            (m.method, m.seed): {name: study.fit_calibrator(work, m, val, name, image=image_of) for name in calibrators}
            for m in runs.models
        }
        guesses = study.fit_guesses(work, train)
    if root:
        work = dataclasses.replace(work, cache=components.feature_cache(away, workdir))
    components.encode(away, work.cache, [(case, 1) for case in test])

    shown = gallery.shown_methods(runs.models)
    pictured = [*shown, *((other.method, study.NO_SEED) for other in others)]

    def score(case: Case) -> exchange.Scored:
        subject = study.load(work, case)
        # Every spatial calibrator of every model sees the same image.
        image = functools.cache(lambda: _calibrator_image(away)(case))
        again = robustness.score(work, subject, runs.models, fits, prompt_jitter, prompt_draws, image)
        scored = exchange.Scored([], {}, {}, gallery.snapshot(subject, work.domain(case)), again)
        theirs = ((other.method, study.NO_SEED, other.read(case), None) for other in others)
        ours = study.predictions(work, subject, runs.models, fits, guesses, image)
        for *found, logits in itertools.chain(ours, theirs):
            study.add_margins(work, subject, found[0], logits, scored.margins)
            scored.rows.extend(study.score(work, subject, *found, scored.statistics))
            gallery.add(scored.picture, *found, pictured)
        return scored

    rows: list[case_metrics.Row] = []
    moved: dict[float, list[case_metrics.Row]] = {amount: [] for amount in prompt_jitter}
    statistics: study.Statistics = {}
    margins: study.Margins = {}
    snapshots = []
    with progress.Progress("Evaluating", len(test), "cases", quiet=not first) as bar:
        for done, (case, scored) in enumerate(exchange.deal(test, score), start=1):
            rows += scored.rows
            for amount, found in scored.jittered.items():
                moved[amount] += found
            for slot, sums in scored.statistics.items():
                statistics[slot] = statistics[slot] + sums if slot in statistics else sums
            for kind, counts in scored.margins.items():
                margins[kind] = margins[kind] + counts if kind in margins else counts
            snapshots.append(scored.picture)
            bar.update(done, case.case_id)

    def read_slice(case: Case, index: int) -> np.ndarray:
        # The last channel: FLAIR in the phantoms, where oedema shows best.
        channel = away.channels[-1]
        return images.read(case.images[channel], case.volumes.get(channel), config.data.slice_axis).voxels[index]

    splits = {"training": train, "validation": val, "test": test}
    source = config.data.source
    if root:  # the copies that launch.corrupt left as they were; of any other dataset nothing was trained on
        source = manifest.CLEAN if (away.dataset.root / manifest.FILE_NAME).is_file() else ""
    names = [*methods.order(m.method for m in runs.models), *(other.method for other in others)]
    record = report.Record(
        title=f"{', '.join(map(methods.display, names))} on {away.dataset.root.name}",
        rows=rows,
        source=source,
        targets=sorted({row.domain for row in rows} - {source}),
        domain_kind=domain_column,
        description=_describe(home, away, runs, splits, fits, guesses, surveys),
        statistics=statistics,
        margins=margins,
        logs=runs.logs,
        gallery=gallery.pictures(snapshots, rows, shown[-1], domain_column, read_slice),
        reviews=gallery.reviews(snapshots, rows, shown[-1]),
        reviewed=f"{methods.display(shown[-1][0])}, seed {shown[-1][1]}",
        protocol=config.protocol,
        jittered=robustness.lines(rows, moved) if moved else [],
        external=[other.method for other in others],
    )
    if first:
        about = {
            "source": source,
            "dataset": away.dataset.root.name,
            "domain_kind": domain_column,
            "models": [{"method": m.method, "seed": m.seed, "decoder_sha256": m.decoder_sha256} for m in runs.models],
            **({"external": [dataclasses.asdict(survey) for survey in surveys]} if surveys else {}),
        }
        _write(workdir, record, home.class_map.names, shown[-1][0], fits, about)
    return record


def _calibrator_image(parts: components.Components) -> Callable[[Case], np.ndarray]:
    return lambda case: study.calibrator_image(parts.prepare(case))


def _describe(
    parts: components.Components,
    away: components.Components,
    runs: trained_runs.Runs,
    splits: Mapping[str, Sequence[Case]],
    fits: study.Fits,
    guesses: Mapping[str, Any],
    surveys: Sequence[external_files.Survey],
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
        counts.append(f"{split}: {listed or 'none, the model came as a bundle'}")
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
    weights = [trained_runs.penalty_weights(run) for run in runs.configs]
    fisher, confidence = (_listed(weights, term) for term in ("FIP", "CMP"))
    steps = " or ".join(str(value) for value in sorted({run.steps for run in runs.configs}))
    return {
        "Dataset": runs.record["dataset"],
        **({"Tested on": away.dataset.root.name} if away.dataset.root.name != runs.record["dataset"] else {}),
        "Cases": "; ".join(counts),
        "Classes (label ids)": classes,
        "Channels": ", ".join(parts.channels),
        "Prompt protocol": f"{config.protocol}: {PROTOCOL_NOTES[config.protocol]}",
        "Seeds": ", ".join(str(seed) for seed in sorted({m.seed for m in runs.models}))
        + " (order of the slices and choice of their views; every run starts from the same pretrained decoder)",
        "Training": f"{steps} steps of {config.batch_size} slices, "
        + ("augmented anew in every step" if data.online else f"{data.views} cached views a slice")
        + f", {optimizers(runs.configs)}"
        + (", encoder and decoder" if config.model.backbone in configs.WHOLE else ""),
        "Loss": f"{', '.join(tasks)}; FIP weight {fisher} ({config.fisher.mode}, {config.fisher.reading}, "
        f"{config.fisher.normalisation}, of {penalised}, {config.fisher.labels} labels, linear warm-up over "
        f"{config.fisher.warmup_fraction:.0%} of the steps), CMP weight {confidence}",
        "Temperatures (validation, NLL)": fitted or "none",
        **({"Other calibrators (validation, NLL)": ", ".join(others)} if others else {}),
        **_disc(guesses),
        **({"External predictions (all slices, as they are)": "; ".join(map(str, surveys))} if surveys else {}),
        "Versions": f"calsegx {calsegx.__version__}, jax {jax.__version__}, Python {platform.python_version()}, "
        f"{jax.device_count()} {jax.devices()[0].device_kind}",
    }


def optimizers(runs: Sequence[configs.TrainConfig]) -> str:
    """What the runs are trained with, for readers."""
    decays = sorted({run.optimizer.weight_decay for run in runs})
    names = " or ".join(f"AdamW (weight decay {decay:g})" if decay else "Adam" for decay in decays)
    same = runs[0].optimizer
    return f"{names} {same.learning_rate:g} with cosine decay, clip norm {same.clip_norm:g}"


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
    about: Mapping[str, Any],
) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    tables.write_cases(workdir / "cases.csv", record.rows)
    tables.write_summary(
        *(workdir / "summary.json", record.rows, class_names, method, record.source, record.targets),
        prompt_jitter=record.jittered,
        about=about,
    )
    notes = "".join(f"* {sentence}\n" for sentence in record.legend)
    parts = [tables.markdown(record.overview), tables.markdown(record.further, tables.MORE_COLUMNS), notes]
    files.write_atomically(workdir / "table.md", "\n".join(parts))
    parts = [latex.latex(record.overview, legend=record.legend)]
    parts += [latex.latex(record.further, tables.MORE_COLUMNS, record.legend)]
    files.write_atomically(workdir / "table.tex", "\n".join(parts))
    written = ["cases.csv", "summary.json", "table.md", "table.tex", "temperatures.json", "report.html"]
    fitted = [
        {"method": method, "seed": seed, "calibrator": name, **params}
        for (method, seed), own in fits.items()
        for name, params in own.items()
    ]
    temperatures = [line for line in fitted if line["calibrator"] == "temperature"]
    files.write_atomically(workdir / "temperatures.json", json.dumps(temperatures, indent=2) + "\n")
    if others := [line for line in fitted if line["calibrator"] != "temperature"]:
        files.write_atomically(workdir / "calibrators.json", json.dumps(others, indent=2) + "\n")
        written.append("calibrators.json")
    report.write_report(workdir / "report.html", record)
    if record.jittered:
        robustness.write(workdir / "prompt_jitter.csv", record.jittered)
        written.append("prompt_jitter.csv")
    sums = [f"{hashlib.sha256((workdir / name).read_bytes()).hexdigest()}  {name}\n" for name in written]
    files.write_atomically(workdir / "SHA256SUMS", "".join(sums))


def define_flags() -> None:
    """``--runs``, ``--workdir``, ``--data``, ``--external``, ``--prompt_*`` ... and those of several processes."""
    common.define_processes()
    flags.DEFINE_list("runs", None, "Folders of trained runs, separated by commas.", required=True)
    common.define_folder("workdir", "Folder to write the evaluation to.")
    flags.DEFINE_string("data", "", "Another dataset folder: score all its labelled cases.")
    flags.DEFINE_string("protocol", "", "The prompt protocol to expect; another one than the models' is refused.")
    flags.DEFINE_list("prompt_jitter", [], "Also score with moved prompts: shares of the frame's side, e.g. 0.01,0.05.")
    flags.DEFINE_list("calibrators", ["temperature"], "Of temperature, local_temperature, dirichlet: for every run.")
    flags.DEFINE_list("external", [], "NAME=FOLDER,...: score other tools' predictions of the test cases, as NAME.")
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
    external = external_files.parse(arguments.external)
    record = evaluate(
        *(runs, workdir, arguments.data, arguments.protocol, *jitter, arguments.calibrators), external=external
    )
    if jax.process_index():
        return
    print(report.headline(record))
    print(f"The report is {workdir / 'report.html'}")


if __name__ == "__main__":
    common.run(main, define_flags)
