"""Typed run configuration: every field is an absl flag (``--config.fisher.weight=0.3``).  Rules: ``config_checks``.

A method is a choice of terms; the weights of the terms stand in their own groups::

    sam_ft  : the task loss alone          sam_cmp : + cmp.weight * CMP
    sam_fip : + fisher.weight * FIP        calsam  : + both
    crac    : + CRaC's augmented Lagrangian, with cross-entropy as the task loss unless another is asked for
"""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from calsegx.interfaces import UsageError


class Method(NamedTuple):
    """Which terms a method adds to its task loss."""

    fisher: bool = False
    confidence: bool = False
    lagrangian: bool = False


METHODS: Mapping[str, Method] = {
    "sam_ft": Method(),
    "sam_fip": Method(fisher=True),
    "sam_cmp": Method(confidence=True),
    "calsam": Method(fisher=True, confidence=True),
    "crac": Method(lagrangian=True),
}
WHOLE = ("sam_whole",)  # backbones whose encoder is trained too
PROTOCOLS = ("gt_points", "random_points", "class_points", "gt_box", "volume_points", "none")
EVERY_SLICE = ("volume_points", "none")  # protocols that do not know which slices hold foreground
SLICE_AXES = ("axial", "coronal", "sagittal")
FISHER_CHOICES: Mapping[str, tuple[str, ...]] = {
    "mode": ("exact", "finite_difference", "stochastic", "every_k", "perturbed"),
    "reading": ("per_sample", "batch_mean", "elementwise_mean", "centered"),
    "normalisation": ("relative", "raw"),
    "labels": ("empirical", "sampled"),
}
CRAC_CHOICES: Mapping[str, tuple[str, ...]] = {
    "function": ("phr", "p2", "p3"),
    "constraint": ("absolute", "signed"),
    "average": ("voxels", "region", "all"),
    "border": ("replicate", "background", "inside", "zero"),
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
    splits: str = ""  # a file of folds, as launch.split writes it or nnU-Net's splits_final.json
    fold: int = 0  # which of its folds
    val_fraction: float = 0.15  # of the subjects, only where the dataset names no split
    test_fraction: float = 0.25  # of the subjects, only where the dataset names no split
    intensity: str = "percentile"  # a registered intensity normalisation (data/intensity.py)
    lower_percentile: float = 0.5  # percentile: of voxels > 0, mapped to 0
    upper_percentile: float = 99.5  # percentile: of voxels > 0, mapped to 255
    window_centre: float = 40.0  # medsam_ct: in Hounsfield units, mapped to 127.5
    window_width: float = 400.0  # medsam_ct: in Hounsfield units
    slice_axis: str = "axial"  # or coronal, sagittal
    resample: str = ""  # "256x256" (rows x columns) or "128x128x128" (slices first); empty: the native grid
    adjacent_slices: bool = False  # one channel only: the slices below, at and above as the encoder's three inputs
    views: int = 2  # cached views per training slice: the first as it is, the others augmented
    rotation_degrees: float = 15.0  # augmented slices: uniform in +-
    intensity_fraction: float = 0.2  # augmented slices: contrast and brightness, uniform in +-
    gamma: float = 0.0  # augmented slices: the exponent is exp(U(-gamma, gamma))
    noise: float = 0.0  # augmented slices: standard deviation U(0, noise) of 255
    low_resolution: float = 1.0  # augmented slices: sampled U(1, low_resolution) times as coarse, and back
    online: bool = False  # no feature cache: training slices are read, augmented and encoded in every step
    slices_per_volume: int = 4  # online: slices of one batch that come from one reading of a volume
    workers: int = 0  # online: processes that read ahead; 0: the training process itself
    cache: str = ""  # feature cache folder; empty: <workdir>/features


@dataclass
class ModelConfig:
    """The backbone and its weights."""

    backbone: str = "sam"  # or sam_whole: the encoder is trained with the decoder
    weights: str = ""  # a weights folder; empty: the tiny SAM that ships with calsegx
    dtype: str = "float32"  # what the encoder computes in: float32 or bfloat16
    encoder_batch: int = 0  # slices per encoder call; 0: by feature grid and device (caching.encoder_batch)
    shards: int = 1  # devices that share one copy of the encoder's parameters, for an encoder too large for one


@dataclass
class FisherConfig:
    """The Fisher penalty on the encoder's features (METHODS: FIP)."""

    weight: float = 0.1
    mode: str = "exact"  # or finite_difference, stochastic, every_k, perturbed (not for SAM): see losses/fisher.py
    reading: str = "per_sample"  # or batch_mean, elementwise_mean, centered (over the positions of the batch's slices)
    labels: str = "empirical"  # the data's, or sampled from the model: the true Fisher
    loss: str = ""  # the penalised loss, as TrainConfig.loss; empty: voxel-mean cross-entropy
    fraction: float = 0.125  # stochastic: the penalised share of each device's batch, at least one slice
    every: int = 8  # every_k: only every this many steps, with this many times the weight
    normalisation: str = "relative"  # relative or raw
    warmup_fraction: float = 0.2  # the weight rises linearly over this fraction of the steps


@dataclass
class CmpConfig:
    """The confidence misalignment penalty (METHODS: CMP)."""

    weight: float = 0.5
    threshold: float = 0.6931471805599453  # tau, in nats: log 2 is the decision boundary of a binary problem
    temperature: float = 0.1  # gamma


@dataclass
class CracConfig:
    """CRaC's augmented Lagrangian (METHODS: CRaC); see losses/augmented_lagrangian.py."""

    function: str = "phr"  # or p2, p3 (start those with multiplier 0.01 or more)
    constraint: str = "absolute"  # or signed, the paper's
    average: str = "voxels"  # of the update; or region (each region's own voxels), all (one multiplier)
    margin: float = 5.0  # of the inner region's target logits
    size: int = 3  # voxels per axis of a patch
    border: str = "replicate"  # what lies outside the image
    multiplier: float = 1e-6  # initial lambda, also its lowest value
    highest_multiplier: float = 1e6
    rho: float = 0.1  # initial rho, also its lowest value
    highest_rho: float = 10.0
    growth: float = 1.2  # gamma: rho's growth where the violation did not fall enough
    improvement: float = 0.9  # mu: to which share of the last epoch's it should fall
    rho_step: int = 10  # epochs between two updates of rho


@dataclass
class OptimizerConfig:
    """Adam, or with a weight decay AdamW, with cosine decay to zero."""

    learning_rate: float = 1e-4
    b1: float = 0.9
    b2: float = 0.999
    weight_decay: float = 0.0  # decoupled (AdamW), of all trained parameters; MedSAM: 0.01
    clip_norm: float = 1.0  # global gradient norm; 0 switches clipping off


@dataclass
class TrainConfig:
    """Everything that defines a training run."""

    method: str = "calsam"
    loss: str = ""  # the task loss, e.g. "sam + 0.1*mbls_penalty(margin=5)" (losses/expression.py); empty: sam
    protocol: str = "gt_points"  # how prompts are placed (data/protocols.py)
    prompt_jitter: float = 0.0  # of training prompts, as a fraction of the encoder frame's side (MedSAM: 20 / 1024)
    seed: int = 42
    steps: int = 2000
    batch_size: int = 16  # slices per step, over all devices
    microbatch: int = 0  # slices that a device takes at once, for less memory; 0: all of its share
    log_every: int = 10
    validate_every: int = 500
    save_every: int = 500
    export: str = "last"  # which parameters become the model: last, or best (lowest validation loss that was saved)
    tensorboard: bool = False  # also write the log for TensorBoard (pip install 'calsegx[tensorboard]')
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    fisher: FisherConfig = field(default_factory=FisherConfig)
    cmp: CmpConfig = field(default_factory=CmpConfig)
    crac: CracConfig = field(default_factory=CracConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


def resampled(data: DataConfig) -> tuple[int, ...]:
    """``data.resample`` as numbers: (), (rows, columns) or (slices, rows, columns).

    Raises:
        UsageError: for anything else.
    """
    if not data.resample:
        return ()
    parts = data.resample.lower().split("x")
    if len(parts) not in (2, 3) or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(
            f"--config.data.resample={data.resample!r} must be rows x columns, such as 256x256, or slices x rows x "
            "columns, such as 128x128x128."
        )
    return tuple(int(part) for part in parts)


def lagrangian_options(config: TrainConfig) -> dict[str, Any]:
    """The keyword arguments that ``augmented_lagrangian.crac`` and ``sums`` share."""
    return {name: getattr(config.crac, name) for name in ("function", "constraint", "margin", "size", "border")}


def loss_expressions(config: TrainConfig, num_classes: int) -> tuple[str, str]:
    """The task loss and the penalised loss of a run, with the defaults in place of what is empty."""
    task = config.loss or ("ce" if METHODS[config.method].lagrangian else "sam")
    return task, config.fisher.loss or ("bce" if num_classes == 1 else "ce")


def method_name(config: TrainConfig) -> str:
    """What a run is called in tables: its method, and after a colon its task loss where it is not the method's own."""
    return f"{config.method}:{config.loss}" if config.loss else config.method


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


def replace(config: Any, values: Mapping[str, Any]) -> Any:
    """``dataclasses.replace``, where a group's value may be a mapping of some of its fields."""
    whole = {k: replace(getattr(config, k), v) if isinstance(v, Mapping) else v for k, v in values.items()}
    return dataclasses.replace(config, **whole)


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
