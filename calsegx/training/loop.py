"""The training loop, and the model folder that it leaves behind."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from jax.sharding import Mesh

import calsegx
from calsegx import configs, files, sharding
from calsegx import features as feature_cache
from calsegx.data import pipeline
from calsegx.interfaces import Backbone, Batch, InputError, Loss, Params
from calsegx.losses import fisher
from calsegx.training import caching, checkpoints, metrics_log, progress
from calsegx.training import state as train_state
from calsegx.training import step as train_step

VALIDATION_BATCHES = 16  # at most; always the same ones
LARGEST_PERTURBED_ERROR = 0.1  # of the gradient of the penalty, in the Fisher mode ``perturbed``

_MODEL_CARD = """# A calsegx segmentation decoder

- Classes: {classes}
- Channels: {channels}
- Prompts: {protocol}
- Training domain: {domain} ({cases} cases)
- Method: {method}, {steps} steps, seed {seed}
- Encoder: frozen, fingerprint `{fingerprint}`; not in this folder
- Written by calsegx {version}; licence of these weights: Apache-2.0

**Not a medical device.** For research only; not for diagnosis or treatment. Its probabilities were fitted on
the training domain: on images of another scanner, hospital or population check its calibration before relying
on it.

`decoder.safetensors` holds the weights, `model.json` all that is needed to use them.
"""


def train(
    config: configs.TrainConfig,
    backbone: Backbone,
    cache: feature_cache.FeatureCache,
    train_case_ids: Sequence[str],
    val_case_ids: Sequence[str],
    workdir: Path,
    *,
    task_loss: Loss,
    penalised_loss: Loss,
    confidence_loss: Loss | None,
    mesh: Mesh,
    resume: bool,
    metadata: Mapping[str, Any],
) -> dict[str, Any]:
    """Train the decoder on cached features; write checkpoints, ``metrics.jsonl`` and ``model/``.

    An interrupted run that goes on with ``resume`` gives the same numbers, bit for bit, as one that was not
    interrupted (on the same devices).

    Args:
        config: of the run.
        backbone: gives the initial decoder, the frozen parameters and ``decode``.
        cache: holds ``config.data.views`` views of the training cases and ``view0`` of the validation cases.
        train_case_ids: cases to train on, in a fixed order.
        val_case_ids: cases of the validation loss; may be empty.
        workdir: the run folder.
        task_loss: what is minimised.
        penalised_loss: whose feature gradient the Fisher penalty measures.
        confidence_loss: the confidence penalty with its options bound; may be None where the method has none.
        mesh: devices to train on.
        resume: go on from the newest checkpoint in ``workdir``.
        metadata: JSON values that go into ``model/model.json``: class names, channels, geometry, ...

    Returns:
        ``steps``, ``loss`` (of the last step; None when nothing was left to do), ``validation_loss`` (None
        without validation cases), ``seconds`` and ``model`` (the folder).

    Raises:
        UsageError: for a batch size that does not fit the devices or the number of slices.
        InputError: when the run folder and ``resume`` do not fit, the settings changed, the cache is damaged,
            or the loss is no longer finite; when the Fisher penalty does not work with this backbone and loss.
    """
    workdir = Path(workdir)
    with checkpoints.Checkpoints(workdir / "checkpoints") as saved:
        start = saved.check_start(resume)

        # ------------------------------------------------------------------------------------------ data
        sharding.check_batch_size(mesh, config.batch_size)
        views = caching.view_names(config.data.views)
        batches = iter(
            pipeline.training_batches(cache, train_case_ids, views, config.batch_size, config.seed, config.protocol)
        )
        validation = pipeline.evaluation_batches(
            cache, val_case_ids, config.batch_size, config.protocol, VALIDATION_BATCHES
        )

        # ----------------------------------------------------------------------------------------- state
        optimizer = train_state.make_optimizer(config)
        state = train_state.init_state(backbone.trainable, optimizer, mesh)

        # ------------------------------------------------------------------------------------------ step
        terms = task_loss, penalised_loss, confidence_loss
        take_step = train_step.make_train_step(backbone.decode, backbone.frozen, *terms, config, optimizer, mesh)
        evaluate = train_step.make_eval_step(backbone.decode, backbone.frozen, task_loss, mesh)
        note = _check_second_derivative(config, backbone, cache, train_case_ids, *terms)

        # ---------------------------------------------------------------------------------------- resume
        record = {
            "config": configs.to_dict(config),
            "backbone": backbone.fingerprint,
            "training data": _data_fingerprint(cache, train_case_ids, views),
            "devices": mesh.size,
        }
        if resume:
            state, before = saved.restore(start, train_state.abstract_state(state), batches, record)
            if before["devices"] != mesh.size:
                note += f" Saved on {before['devices']} devices: sums round differently on another number."
        log = metrics_log.MetricsLog(workdir / "metrics.jsonl", start)

        # ------------------------------------------------------------------------------------------ loop
        waiting: list[tuple[int, Mapping[str, jax.Array]]] = []
        of_penalty: dict[str, float] = {}
        text, loss, validation_loss = "", None, None
        with progress.Progress(f"Training {config.method}", config.steps, "steps") as bar:
            bar.say(_start_line(config, train_case_ids, validation, mesh, start) + note)
            for step in range(start + 1, config.steps + 1):
                state, measurements = take_step(state, sharding.shard_batch(mesh, next(batches)))
                waiting.append((step, measurements))
                if len(waiting) > 2:  # do not run ahead of the device: every step in flight holds a batch
                    waiting[-3][1]["loss"].block_until_ready()
                last = step == config.steps
                logs, saves = last or step % config.log_every == 0, last or step % config.save_every == 0
                if logs or saves:
                    values = _fetch_finite(config, waiting, saved, of_penalty)
                    waiting.clear()
                if logs:
                    loss = values["loss"]
                    text = f"loss {loss:.4f}"
                    log.write(step, values)
                if validation and (last or step % config.validate_every == 0):
                    validation_loss = _validation_loss(evaluate, state.params, validation, mesh)
                    log.write(step, {"validation_loss": validation_loss})
                    bar.say(f"step {step}: validation loss {validation_loss:.4f}")
                if saves:
                    saved.save(step, state, batches, record)
                bar.update(step, text)
        if validation and validation_loss is None:
            validation_loss = _validation_loss(evaluate, state.params, validation, mesh)

    save_model(workdir, state.params, {**metadata, **record, "cases": list(train_case_ids)})
    return {
        "steps": config.steps,
        "loss": loss,
        "validation_loss": validation_loss,
        "seconds": log.seconds(),
        "model": str(workdir / "model"),
    }


def save_model(workdir: Path, params: Params, record: Mapping[str, Any]) -> None:
    """Write ``<workdir>/model``: ``decoder.safetensors``, ``README.md`` and, last, ``model.json``.

    Each file appears whole or not at all; ``model.json`` holds the weights' SHA-256, so that no mixture is
    ever loaded. Names of weights are the paths in ``params``, joined by slashes.
    """
    folder = Path(workdir) / "model"
    folder.mkdir(parents=True, exist_ok=True)
    weights = safetensors.numpy.save(_flatten(jax.device_get(params)))
    record = {
        "format": 1,
        "calsegx": calsegx.__version__,
        "decoder_sha256": hashlib.sha256(weights).hexdigest(),
        **record,
    }
    files.write_atomically(folder / "decoder.safetensors", weights)
    files.write_atomically(folder / "README.md", _model_card(record))
    files.write_atomically(folder / "model.json", json.dumps(record, indent=2) + "\n")


def load_model(workdir: Path) -> tuple[Params, dict[str, Any]]:
    """Read what ``save_model`` wrote.

    Args:
        workdir: the run folder, or its ``model`` folder.

    Returns:
        The decoder's parameters as numpy arrays, and ``model.json``.

    Raises:
        InputError: when a file is missing or damaged.
    """
    workdir = Path(workdir)
    folder = workdir if (workdir / "model.json").exists() else workdir / "model"
    try:
        record = json.loads((folder / "model.json").read_text())
        weights = (folder / "decoder.safetensors").read_bytes()
        if hashlib.sha256(weights).hexdigest() != record["decoder_sha256"]:
            raise ValueError("the SHA-256 of decoder.safetensors is not the one in model.json")
        return _unflatten(safetensors.numpy.load(weights)), record
    except FileNotFoundError as error:
        raise InputError(
            f"{folder} holds no trained model ({Path(error.filename).name} is missing); name the --workdir "
            "of a run that has ended, or finish it with --resume."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as error:
        raise InputError(
            f"The model in {folder} is damaged ({error}); write it again by running its training with --resume."
        ) from error


def _check_second_derivative(
    config: configs.TrainConfig,
    backbone: Backbone,
    cache: feature_cache.FeatureCache,
    case_ids: Sequence[str],
    task_loss: Loss,
    penalised_loss: Loss,
    confidence_loss: Loss | None,
) -> str:
    """Without a second derivative the penalty would silently be wrong; find out on two slices.

    The mode ``perturbed`` is compared with the exact one there, at the full weight.

    Returns:
        What to tell the user where the mode needs no such check, or nothing.
    """
    with_fisher, _ = configs.METHODS[config.method]
    if not with_fisher or config.fisher.weight == 0:
        return ""
    if config.fisher.mode == "finite_difference":
        return " The Fisher mode 'finite_difference' needs no second derivative, so none is checked."
    # With the data's labels: one drawn from the model might flip between the steps of the difference.
    config = dataclasses.replace(config, fisher=dataclasses.replace(config.fisher, labels="empirical"))
    loss_fn = train_step.make_loss_fn(backbone.decode, task_loss, penalised_loss, confidence_loss, config)
    batch, _ = pipeline.evaluation_batches(cache, case_ids, 2, config.protocol, 1)[0]
    arguments = backbone.trainable, batch.features, backbone.frozen, batch.labels, batch.prompts
    try:
        fisher.second_derivative_check(loss_fn, *arguments)
    except ValueError as error:
        raise InputError(
            f"The Fisher penalty does not work with this backbone and loss: {error} Choose another "
            "--config.loss or --config.model.backbone, --config.fisher.mode=finite_difference, or a --config.method "
            "without the Fisher penalty."
        ) from error
    if config.fisher.mode == "perturbed":
        options = {"reading": config.fisher.reading, "normalisation": config.fisher.normalisation}
        error = fisher.perturbed_error(
            loss_fn, *arguments, weight=config.fisher.weight, batch=config.batch_size, **options
        )
        if not error <= LARGEST_PERTURBED_ERROR:
            raise InputError(
                "With this backbone, loss and weight the penalty's gradient by --config.fisher.mode=perturbed is wrong "
                f"by {error:.2g} of the exact one on two training slices, more than {LARGEST_PERTURBED_ERROR}; use "
                "--config.fisher.mode=exact, or a lower --config.fisher.weight."
            )
    return ""


def _data_fingerprint(cache: feature_cache.FeatureCache, case_ids: Sequence[str], views: Sequence[str]) -> str:
    """Of the training cases' files, in their order: a run must not go on with other data."""
    entries = [(case_id, view, cache.fingerprint(case_id, view)) for case_id in case_ids for view in views]
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def _fetch_finite(
    config: configs.TrainConfig,
    waiting: Sequence[tuple[int, Mapping[str, jax.Array]]],
    saved: checkpoints.Checkpoints,
    of_penalty: dict[str, float],
) -> dict[str, float]:
    """The measurements of the last step; one copy from the device for all steps since the last time.

    The Fisher mode ``every_k`` leaves steps out: there those of the penalty are of the last step that computed it,
    kept in ``of_penalty`` from call to call, and absent where this process has not computed it yet.
    """
    latest = saved.latest_step()
    kept = f"the checkpoint of step {latest} is kept" if latest else "no checkpoint was written yet"
    advice = (
        f"this step was not trained on, and {kept} in {saved.folder}; train again in another --workdir with a lower "
        "--config.optimizer.learning_rate or --config.fisher.weight, or another --config.fisher.mode"
    )
    every = config.fisher.every if config.fisher.mode == "every_k" else 1
    for step, measurements in jax.device_get(list(waiting)):
        values = {name: float(value) for name, value in measurements.items()}
        fisher.check_measurements(values, step, advice)
        if (step - 1) % every == 0:  # the step's own number is from 0
            of_penalty.update({name: values[name] for name in fisher.PENALTY_MEASUREMENTS if name in values})
    return {name: value for name, value in values.items() if name not in fisher.PENALTY_MEASUREMENTS} | of_penalty


def _validation_loss(evaluate: Any, params: Params, batches: Sequence[tuple[Batch, int]], mesh: Mesh) -> float:
    losses = [np.asarray(evaluate(params, sharding.shard_batch(mesh, batch)))[:n] for batch, n in batches]
    return float(np.mean(np.concatenate(losses)))


def _start_line(
    config: configs.TrainConfig,
    case_ids: Sequence[str],
    validation: Sequence[tuple[Batch, int]],
    mesh: Mesh,
    start: int,
) -> str:
    where = f"from step {start} to {config.steps}" if start else f"{config.steps} steps"
    slices = sum(count for _, count in validation)
    checked = f"validation loss on {slices} slices" if slices else "no validation cases, so no validation loss"
    return f"Training {config.method} on {len(case_ids)} cases, devices: {mesh.size}, {where}; {checked}."


def _model_card(record: Mapping[str, Any]) -> str:
    config = record["config"]
    return _MODEL_CARD.format(
        classes=", ".join(record.get("class_names", ())) or "see model.json",
        channels=", ".join(record.get("channels", ())) or "see model.json",
        protocol=config["protocol"],
        domain=config["data"]["source"] or "all domains of the dataset",
        cases=len(record["cases"]),
        method=config["method"],
        steps=config["steps"],
        seed=config["seed"],
        fingerprint=record["backbone"],
        version=record["calsegx"],
    )


def _flatten(params: Params, prefix: str = "") -> dict[str, np.ndarray]:
    flat: dict[str, np.ndarray] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}/")
        else:
            flat[f"{prefix}{name}"] = np.ascontiguousarray(value)
    return flat


def _unflatten(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    params: dict[str, Any] = {}
    for name, value in flat.items():
        *path, leaf = name.split("/")
        level = params
        for part in path:
            level = level.setdefault(part, {})
        level[leaf] = value
    return params
