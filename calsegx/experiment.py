"""The plan of an experiment: a YAML or JSON file, read and checked before any work.

::

    methods: [sam_ft, calsam, mbls+dirichlet]   # names of METHODS, perhaps with calibrators of CALIBRATORS
    seeds: [42, 2024, 3407]
    folds: {protocol: domain}                   # launch.split's, with its options; left out: the dataset's own split
    config: {steps: 2000, data: {channels: "T1c,T2,FLAIR"}}   # any fields of TrainConfig
    prompts: [gt_points, random_points]         # protocols of prompts, each with runs of its own
    few_shot: [2, 4, 8]                         # training subjects, drawn by each seed
    corruptions: {names: [motion], levels: [1, 3, 5]}         # of launch.corrupt, on the test cases
    grid: {lambda1: [0.05, 0.1], lambda2: [0.5], margin: [5, 10], steps: [50, 100], rule: {lowest: ECE, region: p>0.01}}
    external: {nnU-Net: "predictions/fold{fold}"}   # other tools' predictions of the test cases, {fold} from 0

Only ``methods`` is required.  A grid is searched on the validation cases of the source alone, with the first seed.
"""

import contextlib
import dataclasses
import difflib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from calsegx import config_checks, configs
from calsegx.data import folds
from calsegx.interfaces import UsageError

# MedSAM (Ma et al., 2024): boxes moved by up to 20 of 1024 pixels, Dice + BCE, AdamW.  Learning rate, its decay,
# clipping and batch stay those of all methods; MedSAM has 1e-4, no decay, no clipping.
_MEDSAM = {
    "method": "sam_ft",
    "protocol": "gt_box",
    "prompt_jitter": 20 / 1024,
    "optimizer": {"weight_decay": 0.01},
}
METHODS: Mapping[str, Mapping[str, Any]] = {  # name -> fields of TrainConfig
    **{name: {"method": name} for name in configs.METHODS},
    "medsam": _MEDSAM,
    "medsam_whole": {**_MEDSAM, "model": {"backbone": "sam_whole"}},  # the encoder too, as MedSAM itself was trained
    "early_stopping": {"method": "sam_ft", "export": "best"},
    **{
        name: {"method": "sam_ft", "loss": name}
        for name in ("focal", "dice_plus_plus", "mbls", "nacl", "svls", "label_smoothing", "ecp")
    },
}
ALWAYS = ("prompt_only", "vanilla_sam")  # in every evaluation, nothing is trained for them
CALIBRATORS = {"ts": "temperature", "lts": "local_temperature", "dirichlet": "dirichlet"}
BASELINE = "sam_ft"
GRID = {"lambda1": float, "lambda2": float, "margin": float, "steps": int}  # what may be searched, and its values
KEYS = ("methods", "seeds", "folds", "config", "prompts", "few_shot", "corruptions", "grid", "external")
RULE_METRICS, RULE_REGIONS = ("ECE", "Brier", "NLL"), ("p>0.01", "dilated", "all")


@dataclass(frozen=True)
class Rule:
    """How a grid's candidate is chosen: on the source's validation cases, never on a test case.

    Of the candidates whose DSC is at most ``within_dsc_points`` below that of SAM-FT, the one with the ``lowest``
    metric in ``region``; if none is, the one with the highest DSC.
    """

    lowest: str = "ECE"
    region: str = "p>0.01"
    within_dsc_points: float = 1.0


@dataclass(frozen=True)
class Plan:
    """What is trained and evaluated."""

    methods: tuple[str, ...]  # of METHODS
    calibrators: tuple[str, ...]  # registered names; temperature is always the first
    seeds: tuple[int, ...]
    protocol: str  # of folds.PROTOCOLS; empty: the dataset's own split
    options: folds.Options
    config: configs.TrainConfig
    prompts: tuple[str, ...] = ()  # of configs.PROTOCOLS; empty: the one of the config
    few_shot: tuple[int, ...] = ()
    corruptions: tuple[str, ...] = ()
    levels: tuple[str, ...] = ()
    grid: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)  # lambda1, lambda2, margin, steps
    rule: Rule = Rule()
    external: Mapping[str, str] = dataclasses.field(default_factory=dict)  # name -> folder, with {fold} for its number

    def settings(self, method: str, weights: Mapping[str, float]) -> configs.TrainConfig:
        """The training of a method, with a candidate of the grid."""
        config = configs.replace(self.config, METHODS[method])
        if "lambda1" in weights:
            config = configs.replace(config, {"fisher": {"weight": weights["lambda1"]}})
        if "lambda2" in weights:
            config = configs.replace(config, {"cmp": {"weight": weights["lambda2"]}})
        if "margin" in weights:
            config = dataclasses.replace(config, loss=f"mbls(margin={weights['margin']:g})")
        if "steps" in weights:
            config = dataclasses.replace(config, steps=int(weights["steps"]))
        return config

    def candidates(self, method: str) -> list[dict[str, float]]:
        """The grid's values that the method has, in every combination; one empty candidate where there are none."""
        names = [name for name in self.grid if name in _searched(method)]
        return [dict(zip(names, values, strict=True)) for values in itertools.product(*(self.grid[n] for n in names))]


class _UniqueKeys(yaml.SafeLoader):
    """A key that stands twice is refused; YAML would keep the last and say nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        found = super().construct_mapping(node, deep)
        if len(found) < len(node.value):
            keys = [self.construct_object(key, True) for key, _ in node.value]
            raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} stands there twice")
        return found


def _printed(weights: Mapping[str, float]) -> dict[str, str]:
    """As in the name of a run's folder."""
    return {name: f"{value:g}" for name, value in weights.items()}


def _check_overrides(config: configs.TrainConfig, method: str, path: Path) -> None:
    """A setting of the plan that the method replaces by its own; where its prompts differ is what the method is."""
    plain = configs.replace(configs.TrainConfig(), METHODS[method])
    given = configs.differences(configs.to_dict(configs.TrainConfig()), configs.to_dict(config))
    own = configs.differences(configs.to_dict(configs.TrainConfig()), configs.to_dict(plain))
    for name in given.keys() & own.keys() - {"protocol"}:
        if given[name] != own[name]:
            raise UsageError(
                f"{path}: config.{name}={given[name][1]!r} and {method}, which has {own[name][1]!r}, cannot both be; "
                "leave one out."
            )


def _searched(method: str) -> list[str]:
    """What of ``GRID`` a method has."""
    terms = configs.METHODS[METHODS[method]["method"]]
    own = {
        "lambda1": terms.fisher,
        "lambda2": terms.confidence,
        "margin": method == "mbls",
        "steps": method == "early_stopping",
    }
    return [name for name, has in own.items() if has]


def read(path: Path, root: str = "") -> Plan:
    """Read a plan and check all of it that can be checked without the dataset.

    Args:
        path: the file.
        root: the dataset's folder, in place of ``config.data.root``.

    Raises:
        UsageError: for a file that cannot be read, an unknown key or name (with the nearest), or an unusable value.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), _UniqueKeys)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"The experiment {path} cannot be read ({reason}); give a YAML or JSON file.") from error
    top = _mapping(content, str(path), KEYS)
    methods, calibrators = _methods(_list(top, "methods", str(path), str), path)
    default = configs.TrainConfig()
    config = configs.from_dict(
        configs.TrainConfig, _typed(top.get("config") or {}, configs.to_dict(default), f"{path}: config"), "config"
    )
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, root=root or config.data.root))
    for name in ("method", "loss", "seed"):
        if getattr(config, name) != getattr(default, name):
            where = {"seed": "seeds"}.get(name, "methods")
            raise UsageError(f"{path}: config.{name} is what the experiment varies; give it under {where}.")
    if config.data.splits or config.data.fold:
        raise UsageError(f"{path}: config.data.splits and config.data.fold are the experiment's own; use folds.")
    if not config.data.root:
        raise UsageError(f"{path} names no dataset; set config.data.root there, or give --data.")
    protocol, options = _folds(top.get("folds"), config, path)
    prompts = _prompts(top, methods, config, path)
    shift = _mapping(top.get("corruptions") or {}, f"{path}: corruptions", ("names", "levels"))
    grid, rule = _grid(top.get("grid"), methods, path)
    seeds = _list(top, "seeds", str(path), int, (config.seed,))
    few_shot = _list(top, "few_shot", str(path), int, ())
    for name, values, lowest in (("seeds", seeds, 0), ("few_shot", few_shot, 1)):
        if any(not lowest <= value < 2**32 for value in values):
            raise UsageError(f"{path}: {name} must be numbers of at least {lowest}, got {_listed(values)}.")
    names = _list(shift, "names", f"{path}: corruptions", str) if shift else ()
    levels = _list(shift, "levels", f"{path}: corruptions", int, (1, 2, 3, 4, 5)) if shift else ()
    plan = Plan(
        *(methods, calibrators, seeds, protocol, options, config),
        *(prompts, few_shot, names, tuple(map(str, levels)), grid, rule, _external(top, path)),
    )
    for method in methods:
        _check_overrides(config, method, path)
        candidates = plan.candidates(method)
        for weights in candidates:
            config_checks.validate(plan.settings(method, weights))
        if len({str(_printed(weights)) for weights in candidates}) < len(candidates):
            raise UsageError(f"{path}: grid has values of {method} that are the same to six digits; give each once.")
    return plan


def _methods(given: Sequence[str], path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    methods, calibrators = [], ["temperature"]
    for text in given:
        name, *suffixes = text.split("+")
        if text in ALWAYS:
            continue
        _known(name, METHODS, f"{path}: methods")
        methods.append(name)
        for suffix in suffixes:
            _known(suffix, CALIBRATORS, f"{path}: methods, after the + of {text!r}")
            calibrators.append(CALIBRATORS[suffix])
    if not methods:
        raise UsageError(f"{path}: methods has nothing to train; add {BASELINE}, for example.")
    return tuple(dict.fromkeys(methods)), tuple(dict.fromkeys(calibrators))


def _folds(given: Any, config: configs.TrainConfig, path: Path) -> tuple[str, folds.Options]:
    if given is None:
        return "", folds.Options(domain=config.data.domain)
    where = f"{path}: folds"
    if config.data.source:
        raise UsageError(f"{path}: config.data.source is set by the folds; use folds.source with the protocol domain.")
    defaults = dataclasses.asdict(folds.Options(domain=config.data.domain))
    values = dict(_mapping(given, where, ("protocol", *defaults)))
    protocol = values.pop("protocol", "")
    _known(protocol, folds.PROTOCOLS, f"{where}.protocol")
    options = folds.Options(**{**defaults, **_typed(values, defaults, where)})
    if options.domain != config.data.domain:
        raise UsageError(f"{where}.domain is that of the training; set config.data.domain={options.domain} instead.")
    return protocol, options


def _prompts(
    top: Mapping[str, Any], methods: Iterable[str], config: configs.TrainConfig, path: Path
) -> tuple[str, ...]:
    if "prompts" not in top:
        return ()
    found = _list(top, "prompts", str(path), str)
    for name in found:
        _known(name, configs.PROTOCOLS, f"{path}: prompts")
    if config.protocol != configs.TrainConfig().protocol:
        raise UsageError(f"{path}: prompts and config.protocol both say how prompts are placed; leave one out.")
    for method in methods:
        if "protocol" in METHODS[method]:
            raise UsageError(f"{path}: {method} has its own prompts; leave it out, or leave prompts out.")
    return found


def _grid(given: Any, methods: Iterable[str], path: Path) -> tuple[dict[str, tuple[float, ...]], Rule]:
    if given is None:
        return {}, Rule()
    where = f"{path}: grid"
    values = dict(_mapping(given, where, (*GRID, "rule")))
    if "rule" not in values:
        raise UsageError(f"{where} has no rule; write how to choose, e.g. rule: {{lowest: ECE, region: p>0.01}}.")
    defaults = dataclasses.asdict(Rule())
    rule = Rule(**_typed(_mapping(values.pop("rule"), f"{where}.rule", defaults), defaults, f"{where}.rule"))
    _known(rule.lowest, RULE_METRICS, f"{where}.rule.lowest")
    _known(rule.region, RULE_REGIONS, f"{where}.rule.region")
    if not 0 <= rule.within_dsc_points <= 100:
        raise UsageError(f"{where}.rule.within_dsc_points={rule.within_dsc_points:g} must be from 0 to 100.")
    if BASELINE not in methods:
        raise UsageError(f"{where}: the rule compares with {BASELINE}; add it to methods.")
    found = {name: _list(values, name, where, GRID[name]) for name in values}
    for name in set(found) - {name for method in methods for name in _searched(method)}:
        raise UsageError(f"{where}: {name} belongs to none of the methods; leave it out, or add one that has it.")
    return found, rule


def _external(top: Mapping[str, Any], path: Path) -> dict[str, str]:
    given = top.get("external") or {}
    if not isinstance(given, Mapping) or not all(isinstance(v, str) for pair in given.items() for v in pair):
        raise UsageError(f"{path}: external must be names and folders, e.g. {{nnU-Net: FOLDER}}; it is {given!r:.60}.")
    for other in ("few_shot", "corruptions"):
        if given and top.get(other):
            raise UsageError(
                f"{path}: external predictions are of the test cases as they are, by one training; evaluate them in a "
                f"plan without {other}."
            )
    return dict(given)


def _mapping(given: Any, where: str, known: Iterable[str]) -> Mapping[str, Any]:
    known = list(known)
    if not isinstance(given, Mapping):
        raise UsageError(f"{where} must be keys and values, of {', '.join(known)}; it is {given!r:.60}.")
    for key in given:
        _known(key, known, where)
    return given


def _known(name: Any, known: Iterable[str], where: str) -> None:
    known = list(known)
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"{where}: {name!r} is not one of {', '.join(known)}.{hint}")


def _list(values: Mapping[str, Any], key: str, where: str, kind: type, default: tuple[Any, ...] | None = None) -> Any:
    """A list of values of one kind, each once; ``default`` where the key is absent."""
    if key not in values and default is not None:
        return default
    given = values.get(key)
    given = [given] if isinstance(given, (str, int, float)) else given
    if not isinstance(given, list) or not given:
        raise UsageError(f"{where}: {key} must be a list with at least one entry, got {given!r:.60}.")
    found = tuple(_value(value, kind(), f"{where}: {key}") for value in given)
    if len(set(found)) < len(found):
        raise UsageError(f"{where}: {key} repeats an entry ({_listed(found)}); give each once.")
    return found


def _typed(given: Any, defaults: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Nested values with the types of the defaults; YAML reads ``1e-4`` as text, for example."""
    return {
        key: _typed(value, defaults[key], f"{where}.{key}")
        if isinstance(defaults[key], Mapping)
        else _value(value, defaults[key], f"{where}.{key}")
        for key, value in _mapping(given, where, defaults).items()
    }


def _value(value: Any, default: Any, where: str) -> Any:
    kind = type(default)
    if kind is float and not isinstance(value, bool):
        with contextlib.suppress(TypeError, ValueError):  # refused below, like every other value of another type
            return float(value)
    if type(value) is not kind:
        names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
        raise UsageError(f"{where} must be {names[kind]}, got {value!r:.60}.")
    return value


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))
