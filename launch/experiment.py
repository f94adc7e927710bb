"""Methods x seeds x folds from one file, to the tables; what is finished is not done again.

python -m launch.experiment --config=configs/scanner_split.yaml --data=DATASET --workdir=runs/scanner_split

The file names methods, seeds, folds and settings (docs/experiments.md).  Every cell is a run folder of its own under
``runs/``, as ``launch.train`` writes it; a broken experiment goes on with the same command.  The features are encoded
once for all cells.  ``evaluation/`` holds a report per fold; ``report.html``, ``cases.csv``, ``summary.json``,
``table.md``, ``table.tex`` and ``tables/`` (in the papers' layouts) are of all folds together.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from calsegx import configs, files, locks
from calsegx import experiment as plans
from calsegx.data import cases as case_tools
from calsegx.data import classes
from calsegx.data.corruptions import manifest
from calsegx.evaluation import experiment_files, experiment_report, external, methods, pooled, tables
from calsegx.training import checkpoints, interruption, model_folder, progress
from launch import common, components, corrupt, evaluate, experiment_cells, grid_search, train
from launch.experiment_cells import Cell, Setting


class Trainer:
    """Trains what is not trained yet, and says how far it is."""

    def __init__(self, total: int, finished: Collection[Path]):
        self._total, self._finished, self._left = total, finished, total - len(finished)
        self._number, self._seconds = 0, []

    def train(self, cell: Cell) -> None:
        """Train a cell, go on with it, or leave it as it is when it is finished."""
        self._number += 1
        if cell.folder in self._finished:
            return
        left = ""
        if self._seconds:
            mean = sum(self._seconds) / len(self._seconds)
            left = f", about {progress.duration(mean * self._left)} of training left"
        print(f"[{self._number} of {self._total}] {cell.folder}{left}", flush=True)
        start = time.monotonic()
        try:
            train.train(cell.config, cell.folder, bool(checkpoints.whole_steps(cell.folder / "checkpoints")))
        except interruption.Interrupted as stopped:
            kept = f"Stopped in {cell.folder}: what was finished or saved by then is kept; the same command goes on."
            raise interruption.Interrupted(kept, stopped.exit_code) from stopped
        self._seconds.append(time.monotonic() - start)
        self._left -= 1


def experiment(path: Path, workdir: Path, root: str = "") -> Path:
    """All of a plan; returns the path of ``report.html``.

    Args:
        path: the plan, see ``calsegx.experiment``.
        workdir: for all that is written.
        root: the dataset's folder, in place of the plan's.

    Raises:
        InputError: for a plan or dataset that cannot be used, or a run in ``workdir`` with other settings.
    """
    plan, workdir = plans.read(path, root), workdir.resolve()
    names = corrupt.read_names(plan.corruptions) if plan.corruptions else []
    levels = corrupt.read_levels(plan.levels) if plan.corruptions else []
    parts = components.build(plan.settings(plan.methods[0], plan.candidates(plan.methods[0])[0]))
    dataset = parts.dataset
    for method in plan.methods:
        for weights in plan.candidates(method):
            components.objective(plan.settings(method, weights), len(parts.class_map.names))
    files.check_outside(workdir, dataset.root, "--workdir")

    def shift(data: configs.DataConfig, folder: Path) -> None:
        corrupt.corrupt(data, names, levels, folder)

    with locks.exclusive(workdir):
        settings = experiment_cells.make_settings(plan, dataset, workdir)
        known = [cell for setting in settings for cell in experiment_cells.make_cells(plan, setting, workdir)]
        finished = {cell.folder for cell in known if experiment_cells.is_finished(cell)}
        folds_of = {setting.number: setting for setting in settings} if plan.external else {}
        others = {number: _others(plan, s, workdir, parts.class_map) for number, s in folds_of.items()}
        trainer = Trainer(experiment_cells.count(plan) * len(settings), finished)
        found = []
        for setting in settings:
            cells = _trained(plan, setting, workdir, trainer)
            found += _evaluated(plan, setting, cells, workdir, others=others.get(setting.number, ()))
            if names:
                found += _evaluated(plan, setting, cells, workdir, shift)
        record = experiment_report.Experiment(
            title=f"{path.stem} on {dataset.root.name}",
            parts=pooled.joined(found),
            kind=plan.config.data.domain,
            planned=plan.methods,
            description=_describe(plan, parts, others),
            selections=_selections(settings, workdir) if plan.grid else {},
            external=tuple(plan.external),
        )
        experiment_files.write(workdir, record, parts.class_map.names)
    return workdir / "report.html"


def _describe(
    plan: plans.Plan,
    parts: components.Components,
    others: Mapping[int, Sequence[tuple[Path, external.Survey]]],
) -> dict[str, str]:
    config = plan.config
    tried = [plan.settings(method, weights) for method in plan.methods for weights in plan.candidates(method)]
    steps = " or ".join(str(value) for value in sorted({one.steps for one in tried}))
    return {
        "Dataset": f"{parts.dataset.root.name}, {len(parts.dataset.cases)} cases",
        "Classes": ", ".join(parts.class_map.names),
        "Channels": ", ".join(parts.channels),
        "Methods": ", ".join(map(methods.display, [*plan.methods, *plan.external])),
        "Calibrators": ", ".join(plan.calibrators),
        "Seeds": ", ".join(map(str, plan.seeds)),
        "Folds": plan.protocol or "the dataset's own split",
        **{
            f"External predictions, fold {number} (all slices, as they are)": "; ".join(str(s) for _, s in surveys)
            for number, surveys in others.items()
        },
        "Training": f"{steps} steps of {config.batch_size} slices, {evaluate.optimizers(tried)}",
    }


def _selections(settings: Iterable[Setting], workdir: Path) -> dict[str, Any]:
    """What the grid's rule saw in each setting, by the setting's name."""
    found = {}
    for setting in settings:
        name = setting.folder.replace("/", ", ") + (f" ({setting.name})" if setting.name else "")
        found[name] = json.loads(experiment_cells.selection_file(setting, workdir).read_text())
    return found


def _trained(plan: plans.Plan, setting: Setting, workdir: Path, trainer: Trainer) -> list[Cell]:
    """The cells that are evaluated, trained; with a grid the candidates first."""
    first, *others = plan.seeds
    tried = {
        method: [
            experiment_cells.make_cell(plan, setting, workdir, method, weights, first)
            for weights in plan.candidates(method)
        ]
        for method in plan.methods
    }
    for cells in tried.values():
        for cell in cells:
            trainer.train(cell)
    chosen = _chosen(plan, setting, tried, workdir) if plan.grid else {name: cells[0] for name, cells in tried.items()}
    found = []
    for seed in plan.seeds:
        for method, cell in chosen.items():
            own = (
                cell
                if seed == first
                else experiment_cells.make_cell(plan, setting, workdir, method, cell.weights, seed)
            )
            if seed in others:
                trainer.train(own)
            found.append(own)
    return found


def _chosen(
    plan: plans.Plan,
    setting: Setting,
    tried: Mapping[str, Sequence[Cell]],
    workdir: Path,
) -> dict[str, Cell]:
    """The cell of every method that the rule chooses; what it saw is written to ``selection/``."""
    scores = {
        method: [grid_search.score(cell.folder, cell.weights, plan.rule) for cell in cells]
        for method, cells in tried.items()
        if len(cells) > 1 or method == plans.BASELINE
    }
    baseline = scores[plans.BASELINE][0].dsc
    chosen = {method: cells[0] for method, cells in tried.items()}
    content: dict[str, Any] = {"rule": dataclasses.asdict(plan.rule), "seed": plan.seeds[0], "split": "val"}
    content["methods"] = {}
    for method, candidates in scores.items():
        best = grid_search.choose(candidates, baseline, plan.rule)
        chosen[method] = tried[method][candidates.index(best)]
        content["methods"][method] = {
            "chosen": dict(best.weights),
            "candidates": [dataclasses.asdict(candidate) for candidate in candidates],
        }
    text = json.dumps(tables.without_nan(content), indent=2, allow_nan=False) + "\n"
    files.write_atomically(experiment_cells.selection_file(setting, workdir), text)
    return chosen


def _others(
    plan: plans.Plan, setting: Setting, workdir: Path, class_map: classes.ClassMap
) -> list[tuple[Path, external.Survey]]:
    """Other tools' predictions of a fold's test cases, all read before anything is trained."""
    folders = {name: Path(folder.replace("{fold}", str(setting.number))) for name, folder in plan.external.items()}
    external.check(folders)
    data = experiment_cells.make_cell(plan, setting, workdir, plan.methods[0], {}, plan.seeds[0]).config.data
    test = [case for case in case_tools.select(case_tools.load(data), data, "test") if case.label is not None]
    found = [external.Predictions(name, folder, class_map, data.slice_axis) for name, folder in folders.items()]
    return [(one.folder, one.survey(test)) for one in found]


def _evaluated(
    plan: plans.Plan,
    setting: Setting,
    cells: Sequence[Cell],
    workdir: Path,
    make_shift: Callable[[configs.DataConfig, Path], object] | None = None,
    others: Sequence[tuple[Path, external.Survey]] = (),
) -> list[pooled.Part]:
    """Evaluations of the cells, one for each prompt protocol, backbone and, where seeds train on other subjects, seed.

    ``make_shift`` writes the shifted test cases of a fold into a folder, which are evaluated in place of the fold's.
    ``others`` are folders of other tools' predictions.
    """
    groups: dict[tuple[str, str, int | None], list[Cell]] = {}
    for cell in cells:
        seed = cell.config.seed if setting.subjects else None
        groups.setdefault((cell.config.protocol, experiment_cells.other_backbone(plan, cell.config), seed), []).append(
            cell
        )
    found = []
    for (protocol, other, seed), members in groups.items():
        name = protocol + other + ("" if seed is None else f"_seed{seed}")
        folder = workdir / ("corrupted_evaluation" if make_shift else "evaluation") / setting.evaluation / name
        shifted = workdir / "corrupted" / f"fold{setting.number}" if make_shift else None
        asked = {
            "runs": [
                [cell.method, cell.config.seed, model_folder.load(cell.folder)[1]["decoder_sha256"]] for cell in members
            ],
            "calibrators": list(plan.calibrators),
            "corruptions": [list(plan.corruptions), list(plan.levels)] if make_shift else [],
            **({"external": [[survey.method, survey.sha256] for _, survey in others]} if others else {}),
        }

        def work(members=members, folder=folder, shifted=shifted) -> None:
            print(f"Evaluating {len(members)} runs for {folder}", flush=True)
            if make_shift and shifted:
                make_shift(members[0].config.data, shifted)
            evaluate.evaluate(
                [cell.folder for cell in members],
                folder,
                str(shifted or ""),
                calibrators=plan.calibrators,
                names=[cell.method for cell in members],
                external={survey.method: folder for folder, survey in others},
            )

        experiment_cells.once(folder / "asked.json", asked, work, [folder / "cases.csv"], again=True)
        rows = tables.read_cases(folder / "cases.csv")
        if seed is not None:  # the guesses were fitted on this seed's subjects
            rows = [dataclasses.replace(r, seed=seed) if r.method in methods.UNTRAINED else r for r in rows]
        if other and (protocol, "", seed) in groups:  # the same ones stand beside the plan's own backbone
            shared = {*methods.UNTRAINED, *(survey.method for _, survey in others)}
            rows = [row for row in rows if row.method not in shared]
        images = pooled.CORRUPTED if make_shift else pooled.AS_THEY_ARE
        source = manifest.CLEAN if make_shift else setting.source
        page = (folder / "report.html").relative_to(workdir).as_posix()
        found.append(pooled.Part(setting.name, setting.subjects, protocol, images, source, rows, (page,)))
    return found


def define_flags() -> None:
    """``--config``, ``--data`` and ``--workdir``."""
    flags.DEFINE_string("config", None, "The experiment, a YAML or JSON file.", required=True)
    flags.DEFINE_string("data", "", "The dataset's folder; default: config.data.root of the file.")
    common.define_folder("workdir", "Folder for everything that is written.")


def main() -> None:
    """Run it, and say where the report is."""
    start = time.monotonic()
    page = experiment(Path(flags.FLAGS.config), Path(flags.FLAGS.workdir), flags.FLAGS.data)
    minutes = (time.monotonic() - start) / 60
    print(f"Done in {minutes:.1f} minutes; the report is {page}, the numbers are {page.with_name('cases.csv')}.")


if __name__ == "__main__":
    common.run(main, define_flags)
