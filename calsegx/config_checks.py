"""What can be checked of a run's configuration before any work: every refusal names the flag and what is allowed."""

import difflib
import math
from typing import Any

from calsegx import configs
from calsegx.interfaces import UsageError


def validate(config: configs.TrainConfig) -> None:
    """Check every value that can be checked without reading data.

    Raises:
        UsageError: naming the flag, its value and what is allowed.
    """
    _one_of("method", config.method, configs.METHODS)
    _one_of("protocol", config.protocol, configs.PROTOCOLS)
    _one_of("data.domain", config.data.domain, ("scanner", "centre"))
    _one_of("data.slice_axis", config.data.slice_axis, configs.SLICE_AXES)
    _one_of("model.dtype", config.model.dtype, ("float32", "bfloat16"))
    _one_of("export", config.export, ("last", "best"))
    _validate_fisher(config)
    _validate_crac(config)
    _validate_data(config)
    _validate_whole(config)
    for name in ("steps", "batch_size", "log_every", "validate_every", "save_every", "model.shards"):
        _at_least(config, name, 1)
    for name in ("model.encoder_batch", "microbatch"):
        _at_least(config, name, 0)
    if config.seed >= 2**32:
        raise UsageError(f"--config.seed={config.seed} must be below 2**32.")
    for name in ("seed", "fisher.weight", "cmp.weight", "optimizer.weight_decay", "optimizer.clip_norm"):
        _at_least(config, name, 0)
    for name in ("optimizer.learning_rate", "cmp.temperature"):
        if not 0 < _value(config, name) < math.inf:
            raise UsageError(f"--config.{name}={_value(config, name)} must be a number greater than 0.")
    for name in ("optimizer.b1", "optimizer.b2", "prompt_jitter"):
        _below_one(config, name)
    if config.prompt_jitter and config.protocol == "none":
        raise UsageError(
            f"--config.prompt_jitter={config.prompt_jitter} needs prompts to move, and --config.protocol=none has "
            "none; leave one out."
        )
    if config.data.online and config.batch_size % config.data.slices_per_volume:
        raise UsageError(
            f"--config.batch_size={config.batch_size} must be a multiple of --config.data.slices_per_volume="
            f"{config.data.slices_per_volume}."
        )


def _validate_data(config: configs.TrainConfig) -> None:
    data = config.data
    for name in ("data.views", "data.low_resolution", "data.slices_per_volume"):
        _at_least(config, name, 1)
    for name in ("data.rotation_degrees", "data.gamma", "data.workers", "data.fold"):
        _at_least(config, name, 0)
    for name in ("data.intensity_fraction", "data.val_fraction", "data.test_fraction", "data.noise"):
        _below_one(config, name)
    for name, most in (("data.gamma", 3), ("data.low_resolution", 32)):
        if _value(config, name) > most:
            raise UsageError(f"--config.{name}={_value(config, name)} must be at most {most}: nothing else is left.")
    if data.workers and not data.online:
        raise UsageError("--config.data.workers reads for --config.data.online alone; leave it out, or set both.")
    if not 0 <= data.lower_percentile < data.upper_percentile <= 100:
        raise UsageError(
            f"--config.data.lower_percentile={data.lower_percentile} and --config.data.upper_percentile="
            f"{data.upper_percentile} must satisfy 0 <= lower < upper <= 100."
        )
    if not 0 < data.window_width < math.inf or not math.isfinite(data.window_centre):
        raise UsageError(
            f"--config.data.window_width={data.window_width} must be a number above 0, and --config.data.window_centre="
            f"{data.window_centre} a number."
        )
    if not 0 <= data.val_fraction + data.test_fraction < 1:
        raise UsageError(
            "--config.data.val_fraction and --config.data.test_fraction must leave training subjects: "
            f"their sum is {data.val_fraction + data.test_fraction}, it must be below 1."
        )
    configs.resampled(data)


def _validate_fisher(config: configs.TrainConfig) -> None:
    fisher = config.fisher
    for name, allowed in configs.FISHER_CHOICES.items():
        _one_of(f"fisher.{name}", getattr(fisher, name), allowed)
    if not 0 < fisher.fraction <= 1:
        raise UsageError(f"--config.fisher.fraction={fisher.fraction} must be above 0 and at most 1.")
    _at_least(config, "fisher.every", 1)
    if not 0 <= fisher.warmup_fraction <= 1:
        raise UsageError(f"--config.fisher.warmup_fraction={fisher.warmup_fraction} must be from 0 to 1.")
    if configs.METHODS[config.method].fisher and config.microbatch and fisher.reading == "centered":
        raise UsageError(
            "--config.microbatch takes the batch apart, but --config.fisher.reading='centered' needs the mean over "
            "all of it; leave one out."
        )
    if fisher.labels == "sampled" and fisher.mode in ("finite_difference", "perturbed"):
        raise UsageError(
            f"--config.fisher.labels='sampled' would draw other labels at the shifted features of "
            f"--config.fisher.mode={fisher.mode!r}; use exact, stochastic or every_k."
        )


def _validate_crac(config: configs.TrainConfig) -> None:
    crac = config.crac
    for name, allowed in configs.CRAC_CHOICES.items():
        _one_of(f"crac.{name}", getattr(crac, name), allowed)
    for name in ("crac.rho_step", "crac.growth"):
        _at_least(config, name, 1)
    for name in ("crac.margin", "crac.improvement"):
        _at_least(config, name, 0)
    if crac.size < 3 or crac.size % 2 == 0:
        raise UsageError(f"--config.crac.size={crac.size} must be an odd number of at least 3.")
    for name, lowest, highest in (
        ("multiplier", crac.multiplier, crac.highest_multiplier),
        ("rho", crac.rho, crac.highest_rho),
    ):
        if not 0 < lowest <= highest < math.inf:
            raise UsageError(
                f"--config.crac.{name}={lowest} must be above 0 and at most --config.crac.highest_{name}={highest}."
            )


def _validate_whole(config: configs.TrainConfig) -> None:
    name = config.model.backbone
    if name in configs.WHOLE and configs.METHODS[config.method].fisher:
        raise UsageError(
            f"--config.method={config.method} penalises the frozen encoder's features, and --config.model.backbone="
            f"{name} trains the encoder; train the decoder alone (--config.model.backbone=sam), or take a method "
            "without the Fisher penalty."
        )
    if name in configs.WHOLE and config.model.shards > 1:
        raise UsageError(
            f"--config.model.shards={config.model.shards} takes a frozen encoder apart, and --config.model.backbone="
            f"{name} trains it; set --config.model.shards=1."
        )


def _value(config: configs.TrainConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _one_of(name: str, value: str, allowed: Any) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(value, allowed, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"--config.{name}={value!r} is not one of {', '.join(allowed)}.{hint}")


def _below_one(config: configs.TrainConfig, name: str) -> None:
    if not 0 <= _value(config, name) < 1:
        raise UsageError(f"--config.{name}={_value(config, name)} must be at least 0 and below 1.")


def _at_least(config: configs.TrainConfig, name: str, lowest: float) -> None:
    if not lowest <= _value(config, name) < math.inf:
        raise UsageError(f"--config.{name}={_value(config, name)} must be a number of at least {lowest}.")
