"""Typed run configuration: every field is an absl flag (``--config.fisher.weight=0.3``), checked before any work.

A method is a choice of terms; the weights of the terms stand in their own groups::

    sam_ft  : the task loss alone          sam_cmp : + cmp.weight * CMP
    sam_fip : + fisher.weight * FIP        calsam  : + both
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from calsegx.interfaces import UsageError

METHODS: Mapping[str, tuple[bool, bool]] = {  # name -> (Fisher penalty, confidence penalty)
    "sam_ft": (False, False),
    "sam_fip": (True, False),
    "sam_cmp": (False, True),
    "calsam": (True, True),
}
PROTOCOLS = ("gt_points", "gt_box")
FISHER_CHOICES: Mapping[str, tuple[str, ...]] = {
    "mode": ("exact", "finite_difference", "stochastic", "every_k", "perturbed"),
    "reading": ("per_sample", "batch_mean", "elementwise_mean", "centered"),
    "normalisation": ("relative", "raw"),
    "labels": ("empirical", "sampled"),
}


@dataclass
class DataConfig:
    """Which cases, which channels and classes, and how a volume becomes encoder frames."""

    root: str = ""  # dataset folder
    layout: str = "auto"  # a registered layout, or auto
    channels: str = ""  # three (or one) channel names for the encoder's RGB; empty: the dataset's first three
    classes: str = ""  # "tumour=1+2+3" or "core=1,oedema=2": name=label ids; empty: every label of the dataset
    domain: str = "scanner"  # the column of the cases that names the domain: scanner or centre
    source: str = ""  # the domain to train and validate on; empty: all domains
    val_fraction: float = 0.15  # of the subjects, only where the dataset names no split
    test_fraction: float = 0.25  # of the subjects, only where the dataset names no split
    lower_percentile: float = 0.5  # of voxels > 0: mapped to 0
    upper_percentile: float = 99.5  # of voxels > 0: mapped to 255
    views: int = 2  # cached views per training slice: the first as it is, the others augmented
    rotation_degrees: float = 15.0  # augmented views: uniform in +-
    intensity_fraction: float = 0.2  # augmented views: contrast and brightness, uniform in +-
    cache: str = ""  # feature cache folder; empty: <workdir>/features


@dataclass
class ModelConfig:
    """The backbone and its weights."""

    backbone: str = "sam"
    weights: str = ""  # a weights folder; empty: the tiny SAM that ships with calsegx
    dtype: str = "float32"  # what the frozen encoder computes in: float32 or bfloat16
    encoder_batch: int = 0  # slices per encoder call; 0: by feature grid and device (caching.encoder_batch)


@dataclass
class FisherConfig:
    """The Fisher penalty on the encoder's features (METHODS: FIP)."""

    weight: float = 0.1
    mode: str = "exact"  # or finite_difference, stochastic, every_k, perturbed (not for SAM): see losses/fisher.py
    reading: str = "per_sample"  # or batch_mean, elementwise_mean, centered (over the positions of the batch's slices)
    labels: str = "empirical"  # the data's, or sampled from the model: the true Fisher
    fraction: float = 0.125  # stochastic (one device only): the penalised share of each batch, at least one slice
    every: int = 8  # every_k: only every this many steps, with this many times the weight
    remat: bool = False  # slice after slice: less memory, more time; on one device only
    normalisation: str = "relative"  # relative or raw
    warmup_fraction: float = 0.2  # the weight rises linearly over this fraction of the steps


@dataclass
class CmpConfig:
    """The confidence misalignment penalty (METHODS: CMP)."""

    weight: float = 0.5
    threshold: float = 0.6931471805599453  # tau, in nats: log 2 is the decision boundary of a binary problem
    temperature: float = 0.1  # gamma


@dataclass
class OptimizerConfig:
    """Adam with cosine decay to zero."""

    learning_rate: float = 1e-4
    b1: float = 0.9
    b2: float = 0.999
    clip_norm: float = 1.0  # global gradient norm; 0 switches clipping off


@dataclass
class TrainConfig:
    """Everything that defines a training run."""

    method: str = "calsam"
    loss: str = "sam"  # the task loss, a registered name
    protocol: str = "gt_points"  # prompts: gt_points or gt_box
    seed: int = 42
    steps: int = 2000
    batch_size: int = 16
    log_every: int = 10
    validate_every: int = 500
    save_every: int = 500
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    fisher: FisherConfig = field(default_factory=FisherConfig)
    cmp: CmpConfig = field(default_factory=CmpConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


def validate(config: TrainConfig) -> None:
    """Check every value that can be checked without reading data.

    Raises:
        UsageError: naming the flag, its value and what is allowed.
    """
    _one_of("method", config.method, METHODS)
    _one_of("protocol", config.protocol, PROTOCOLS)
    _one_of("data.domain", config.data.domain, ("scanner", "centre"))
    _one_of("model.dtype", config.model.dtype, ("float32", "bfloat16"))
    _validate_fisher(config)
    for name in ("steps", "batch_size", "log_every", "validate_every", "save_every", "data.views"):
        _at_least(config, name, 1)
    _at_least(config, "model.encoder_batch", 0)
    for name in ("seed", "fisher.weight", "cmp.weight", "optimizer.clip_norm", "data.rotation_degrees"):
        _at_least(config, name, 0)
    for name in ("optimizer.learning_rate", "cmp.temperature"):
        if not 0 < _value(config, name) < math.inf:
            raise UsageError(f"--config.{name}={_value(config, name)} must be a number greater than 0.")
    below_one = ("optimizer.b1", "optimizer.b2", "data.intensity_fraction", "data.val_fraction", "data.test_fraction")
    for name in below_one:
        if not 0 <= _value(config, name) < 1:
            raise UsageError(f"--config.{name}={_value(config, name)} must be at least 0 and below 1.")
    low, high = config.data.lower_percentile, config.data.upper_percentile
    if not 0 <= low < high <= 100:
        raise UsageError(
            f"--config.data.lower_percentile={low} and --config.data.upper_percentile={high} must satisfy "
            "0 <= lower < upper <= 100."
        )
    if not 0 <= config.data.val_fraction + config.data.test_fraction < 1:
        raise UsageError(
            "--config.data.val_fraction and --config.data.test_fraction must leave training subjects: "
            f"their sum is {config.data.val_fraction + config.data.test_fraction}, it must be below 1."
        )


def _validate_fisher(config: TrainConfig) -> None:
    fisher = config.fisher
    for name, allowed in FISHER_CHOICES.items():
        _one_of(f"fisher.{name}", getattr(fisher, name), allowed)
    if not 0 < fisher.fraction <= 1:
        raise UsageError(f"--config.fisher.fraction={fisher.fraction} must be above 0 and at most 1.")
    _at_least(config, "fisher.every", 1)
    if not 0 <= fisher.warmup_fraction <= 1:
        raise UsageError(f"--config.fisher.warmup_fraction={fisher.warmup_fraction} must be from 0 to 1.")
    if fisher.remat and fisher.reading == "centered":
        raise UsageError(
            "--config.fisher.remat takes slice after slice, but --config.fisher.reading='centered' needs the mean over "
            "all of them; leave one out."
        )
    if fisher.labels == "sampled" and fisher.mode in ("finite_difference", "perturbed"):
        raise UsageError(
            f"--config.fisher.labels='sampled' would draw other labels at the shifted features of "
            f"--config.fisher.mode={fisher.mode!r}; use exact, stochastic or every_k."
        )


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values."""
    return dataclasses.asdict(config)


def from_dict(cls: type, values: Mapping[str, Any], where: str = "config") -> Any:
    """The inverse of ``to_dict``; an unknown key is an error, a missing one keeps its default.

    Raises:
        UsageError: for a key that ``cls`` does not have.
    """
    known = {f.name: f for f in dataclasses.fields(cls)}
    arguments = {}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"{where} has no field {key!r}.{hint}")
        nested = known[key].default_factory
        if isinstance(nested, type) and dataclasses.is_dataclass(nested):
            value = from_dict(nested, value, f"{where}.{key}")
        arguments[key] = value
    return cls(**arguments)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Where two nested dicts differ: ``{"data.views": (old value, new value)}``; a missing value is None."""
    flat_old, flat_new = _flatten(old), _flatten(new)
    keys = sorted(flat_old.keys() | flat_new.keys())
    return {k: (flat_old.get(k), flat_new.get(k)) for k in keys if flat_old.get(k) != flat_new.get(k)}


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _value(config: TrainConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _one_of(name: str, value: str, allowed: Any) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(value, allowed, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"--config.{name}={value!r} is not one of {', '.join(allowed)}.{hint}")


def _at_least(config: TrainConfig, name: str, lowest: float) -> None:
    if not lowest <= _value(config, name) < math.inf:
        raise UsageError(f"--config.{name}={_value(config, name)} must be a number of at least {lowest}.")
