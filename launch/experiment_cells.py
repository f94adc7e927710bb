"""The runs of an experiment: which there are, where they lie, and whether they are finished."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calsegx import configs, files
from calsegx import experiment as plans
from calsegx.data import cases as case_tools
from calsegx.data import folds, splits
from calsegx.interfaces import DataError, Dataset, UsageError
from calsegx.training import model_folder
from launch import split, train


@dataclass(frozen=True)
class Cell:
    """One run."""

    method: str
    weights: Mapping[str, float]  # of the grid
    config: configs.TrainConfig
    folder: Path


@dataclass(frozen=True)
class Setting:
    """What the cells of one table share: a fold, how many subjects are trained on, and how prompts are placed."""

    name: str  # of the fold; empty: the dataset's own split
    number: int
    source: str  # the domain that is trained on; empty: all
    subjects: int  # 0: all
    file: Path | None  # of folds; None: the dataset's own split
    prompts: str  # a protocol; empty: that of the method

    @property
    def evaluation(self) -> str:
        """Part of the path of its evaluations, which has the protocol anyway."""
        return f"fold{self.number}" + (f"/subjects{self.subjects}" if self.subjects else "")

    @property
    def folder(self) -> str:
        """Part of the path of its runs."""
        return self.evaluation + (f"/{self.prompts}" if self.prompts else "")


def make_settings(plan: plans.Plan, dataset: Dataset, workdir: Path) -> list[Setting]:
    """The folds, written to ``splits.json`` and checked for leaks, and for few-shot training each size of them.

    Raises:
        UsageError: when ``workdir`` holds other folds, or a fold has fewer subjects than are asked for.
        DataError: for a leak.
    """
    data = plan.config.data
    if not plan.protocol:
        made, file = [_own_split(dataset, data)], None
    else:
        file = workdir / "splits.json"
        asked = {
            "data": str(dataset.root.resolve()),
            "protocol": plan.protocol,
            "classes": data.classes,
            **dataclasses.asdict(plan.options),
        }
        once(workdir / "folds.json", asked, lambda: _make_folds(plan, dataset, file), [file])
        made = splits.read(file)
    column = {case.case_id: case_tools.domain(case, data.domain) for case in dataset.cases}
    found = []
    for size in plan.few_shot or (0,):
        for seed in plan.seeds if size else ():
            reduced = [folds.with_fewer_subjects(dataset, fold, size, seed) for fold in made]
            splits.write(_few_shot_file(workdir, size, seed), reduced)
        for number, fold in enumerate(made):
            source = column[fold["train"][0]] if plan.protocol == "domain" else data.source
            found += [Setting(fold.get("name", ""), number, source, size, file, p) for p in plan.prompts or ("",)]
    return found


def _own_split(dataset: Dataset, data: configs.DataConfig) -> splits.Fold:
    return {
        part: [case.case_id for case in case_tools.select(dataset, data, part)]
        for part in splits.PARTS
        if part != "test" or any(case.split == part for case in dataset.cases)
    }


def _make_folds(plan: plans.Plan, dataset: Dataset, file: Path) -> None:
    data = plan.config.data
    print(split.split(dataset.root, plan.protocol, plan.options, file, layout=data.layout, spec=data.classes))


def _few_shot_file(workdir: Path, size: int, seed: int) -> Path:
    return workdir / "few_shot" / f"subjects{size}_seed{seed}.json"


def make_cell(
    plan: plans.Plan, setting: Setting, workdir: Path, method: str, weights: Mapping[str, float], seed: int
) -> Cell:
    """The run of a method, with a candidate of the grid and a seed."""
    config = plan.settings(method, weights)
    config = dataclasses.replace(config, protocol=setting.prompts or config.protocol)
    every = config.protocol in configs.EVERY_SLICE  # another cache: more slices are encoded
    cache = config.data.cache or str(workdir / ("features_every_slice" if every else "features"))
    cache += other_backbone(plan, config)
    file = _few_shot_file(workdir, setting.subjects, seed) if setting.subjects else setting.file
    data = dataclasses.replace(
        config.data, cache=cache, source=setting.source, splits=str(file or ""), fold=setting.number if file else 0
    )
    config = train.with_absolute_paths(dataclasses.replace(config, seed=seed, data=data))
    name = "_".join([method, *(f"{key}={value:g}" for key, value in weights.items()), f"seed{seed}"])
    return Cell(method, weights, config, workdir / "runs" / setting.folder / name)


def other_backbone(plan: plans.Plan, config: configs.TrainConfig) -> str:
    """What tells apart the cache and the evaluation of a method that brings a backbone of its own."""
    name = config.model.backbone
    return "" if name == plan.config.model.backbone else f"_{name}"


def make_cells(plan: plans.Plan, setting: Setting, workdir: Path) -> Iterable[Cell]:
    """All that may be trained: with a grid, more than will be."""
    for method in plan.methods:
        for weights in plan.candidates(method):
            for seed in plan.seeds:
                yield make_cell(plan, setting, workdir, method, weights, seed)


def count(plan: plans.Plan) -> int:
    """Cells of one setting: every candidate with the first seed, the chosen ones with the others."""
    return sum(len(plan.candidates(method)) + len(plan.seeds) - 1 for method in plan.methods)


def is_finished(cell: Cell) -> bool:
    """Whether the cell's model is there.

    Raises:
        UsageError: when it was trained with other settings.
    """
    if not (cell.folder / "model" / "model.json").exists():
        return False
    _, record = model_folder.load(cell.folder)
    trained = configs.from_dict(configs.TrainConfig, record["config"], "model.json")
    for name, (old, new) in configs.differences(configs.to_dict(trained), configs.to_dict(cell.config)).items():
        raise UsageError(
            f"{cell.folder} was trained with {name}={old!r}, and the experiment now asks for {new!r}; name another "
            "--workdir, or remove that run."
        )
    return True


def selection_file(setting: Setting, workdir: Path) -> Path:
    """Where what the grid's rule saw and chose is written."""
    return workdir / "selection" / f"{setting.folder.replace('/', '_')}.json"


def once(
    record: Path, asked: Mapping[str, Any], work: Callable[[], None], results: Sequence[Path], again: bool = False
) -> None:
    """Do ``work`` unless ``record`` says that it was done as ``asked`` and its ``results`` are still those.

    Raises:
        UsageError: when it was done for something else, unless it may be done ``again``.
        DataError: when ``record`` is damaged.
    """
    try:
        known = json.loads(record.read_text()) if record.exists() else None
    except ValueError as error:
        raise DataError(f"{record} is damaged ({error}); remove it, and what it stands for is made again.") from error
    if known and known["asked"] == asked and known["results"] == _hashes(results):
        return
    if known and known["asked"] != asked and not again:
        name, (old, new) = next(iter(configs.differences(known["asked"], asked).items()))
        raise UsageError(
            f"{results[0]} was made with {name}={old!r}, and the experiment now asks for {new!r}; name another "
            "--workdir."
        )
    work()
    content = {"asked": asked, "results": _hashes(results)}
    files.write_atomically(record, json.dumps(content, indent=2) + "\n")


def _hashes(paths: Iterable[Path]) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "" for path in paths]
