"""The training loop."""

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from calsegx import configs, files, sharding
from calsegx import features as feature_cache
from calsegx.data import online as online_data
from calsegx.data import pipeline, prompts
from calsegx.interfaces import Backbone, Batch, InputError, UsageError
from calsegx.losses import augmented_lagrangian, fisher
from calsegx.training import cache_jobs, checkpoints, checks, interruption, metrics_log, model_folder, progress
from calsegx.training import state as train_state
from calsegx.training import step as train_step

VALIDATION_BATCHES = 16  # at most; always the same ones
FAILED_BATCH = "failed_batch.json"
TrainingData = pipeline.TrainingData | online_data.OnlineData


@dataclass
class Memory:
    """What the loop remembers beside the state; saved with it, so that a resumed run logs what a whole one would."""

    losses: metrics_log.SpikeWatch = field(default_factory=metrics_log.SpikeWatch)
    of_penalty: dict[str, float] = field(default_factory=dict)  # the last ones that the mode ``every_k`` computed

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {"losses": list(self.losses.recent), "of_penalty": self.of_penalty}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Memory":
        """The inverse of ``to_json``."""
        memory = cls(of_penalty=dict(values["of_penalty"]))
        memory.losses.recent.extend(values["losses"])
        return memory


def train(
    config: configs.TrainConfig,
    backbone: Backbone,
    cache: feature_cache.FeatureCache,
    train_case_ids: Sequence[str],
    val_case_ids: Sequence[str],
    workdir: Path,
    *,
    objective: train_step.Objective,
    mesh: Mesh,
    resume: bool,
    metadata: Mapping[str, Any],
    stop: interruption.Stop | None = None,
    allow_config_change: bool = False,
    online: online_data.OnlineData | None = None,
) -> dict[str, Any]:
    """Train the decoder on cached features; write checkpoints, ``metrics.jsonl`` and ``model/``.

    An interrupted run that goes on with ``resume`` gives the same numbers, bit for bit, as one that was not
    interrupted (on the same devices).  With several processes every one of them calls this; each reads its own share
    of the batches, and the first writes.

    Args:
        config: of the run.
        backbone: gives the initial decoder, the frozen parameters and ``decode``.
        cache: holds ``config.data.views`` views of the training cases and ``view0`` of the validation cases.
        train_case_ids: cases to train on, in a fixed order.
        val_case_ids: cases of the validation loss; may be empty, except for CRaC.
        workdir: the run folder; the caller holds its lock (``locks.exclusive``).
        objective: what is minimised; the confidence term may be None where the method has none.
        mesh: devices to train on.
        resume: go on from the newest whole checkpoint in ``workdir``.
        metadata: JSON values that go into ``model/model.json``: class names, channels, geometry, ...
        stop: asked after every step; when it is requested the step is saved and ``interruption.Interrupted`` raised.
        allow_config_change: go on although configuration or data have changed; the changes are said.
        online: what to train on in place of cached views of the training cases.

    Returns:
        ``steps``, ``loss`` (of the last step; None when nothing was left to do), ``validation_loss`` (None
        without validation cases), ``seconds``, ``model`` (the folder) and ``exported_step``.

    Raises:
        UsageError: for a batch size that does not fit the devices or the number of slices.
        InputError: when the run folder and ``resume`` do not fit, the settings changed, the cache is damaged,
            or the loss is no longer finite; when the Fisher penalty does not work with this backbone and loss; when
            the disk or the device's memory is full.
        interruption.Interrupted: see ``stop``.
    """
    workdir, first, stop = Path(workdir), jax.process_index() == 0, stop or interruption.Stop()
    folder = workdir / "checkpoints"
    start = checkpoints.check_start(folder, resume)
    with (
        progress.Progress(f"Training {configs.method_name(config)}", config.steps, "steps", quiet=not first) as bar,
        checkpoints.Checkpoints(folder, bar.say) as saved,
        contextlib.ExitStack() as resources,
    ):
        # ------------------------------------------------------------------------------------------ data
        sharding.check_batch_size(mesh, config.batch_size)
        views, share = cache_jobs.view_names(config.data.views), sharding.process()
        data = online or pipeline.training_data(
            cache,
            train_case_ids,
            views,
            config.batch_size,
            config.seed,
            config.protocol,
            share=share,
            paired=getattr(objective.task, "paired", False),
            jitter=prompts.jitter_of(config.prompt_jitter, backbone.image_size),
        )
        validation = pipeline.evaluation_batches(
            cache, val_case_ids, config.batch_size, config.protocol, VALIDATION_BATCHES, share
        )
        with_lagrangian = configs.METHODS[config.method].lagrangian
        if with_lagrangian and not validation:
            raise UsageError(
                "--config.method=crac sets its multipliers on validation cases, and there are none; set "
                "--config.data.val_fraction above 0, or assign cases to the split val."
            )

        # ----------------------------------------------------------------------------------------- state
        optimizer = train_state.make_optimizer(config)
        lagrangian = train_state.init_lagrangian(config, backbone, validation[0][0]) if with_lagrangian else None
        state = train_state.init_state(backbone.trainable, optimizer, mesh, lagrangian)

        # ------------------------------------------------------------------------------------------ step
        network = backbone.decode, backbone.frozen
        take_step = train_step.make_train_step(*network, objective, config, optimizer, mesh)
        evaluate = train_step.make_eval_step(*network, objective.task, mesh)
        constrain = train_step.make_constraint_step(*network, config, mesh)
        cached = cache, train_case_ids, 2, config.protocol, 1
        probe = online.probe if online else lambda: pipeline.evaluation_batches(*cached)[0][0]
        note = checks.check_second_derivative(config, backbone, probe, objective)

        # ---------------------------------------------------------------------------------------- resume
        record = {
            "config": configs.to_dict(config),
            "backbone": backbone.fingerprint,
            "training data": online.fingerprint if online else _data_fingerprint(cache, train_case_ids, views),
            "validation data": _data_fingerprint(cache, val_case_ids, views[:1]),
            "devices": mesh.size,
        }
        memory, position = Memory(), None
        for line in saved.skipped:
            bar.say(line)
        if resume:
            state, remembered, changes = saved.restore(
                start, train_state.abstract_state(state), record, allow_config_change=allow_config_change
            )
            memory, position = Memory.from_json(remembered), remembered["log"]
            note += f" Going on with a change: {'; '.join(changes)}." if changes else ""
        mirror = metrics_log.tensorboard(workdir / "tensorboard") if config.tensorboard and first else None
        log = metrics_log.MetricsLog(workdir / "metrics.jsonl" if first else None, position, mirror, bar.say)
        watch = _Watch(workdir / FAILED_BATCH, data, saved)

        # ------------------------------------------------------------------------------------------ loop
        waiting: list[tuple[int, Mapping[str, jax.Array]]] = []
        text, loss, validation_loss = "", None, None
        bar.say(_start_line(config, train_case_ids, validation, mesh, start) + note)
        batches = resources.enter_context(contextlib.closing(iter(data.batches(start))))
        for step in range(start + 1, config.steps + 1):
            with watch.memory_of_device(step):
                state, measurements = take_step(state, sharding.shard_batch(mesh, next(batches)))
                waiting.append((step, measurements))
                if len(waiting) > 2:  # do not run ahead of the device: every step in flight holds a batch
                    waiting[-3][1]["loss"].block_until_ready()
            last = step == config.steps
            # Several processes agree on when to stop, which costs an exchange: not at every step.
            asks = share.count == 1 or step % config.log_every == 0
            stops = asks and stop.requested_anywhere()
            logs = last or stops or step % config.log_every == 0
            saves = last or stops or step % config.save_every == 0
            updates = with_lagrangian and step % data.steps_per_epoch == 0
            validates = bool(validation) and (
                last or step % config.validate_every == 0 or (saves and config.export == "best")
            )
            if logs or saves or updates:
                values = watch.fetch_finite(
                    config,
                    waiting,
                    memory,
                    log,
                    bar.say,
                    functools.partial(_save_last_good, saved, mesh, state, record, memory, log),
                )
                waiting.clear()
            if logs:
                loss = values["loss"]
                text = f"loss {loss:.4f}"
                if step % config.log_every == 0 or last:
                    log.write(step, values)
            if updates:
                state = _update_lagrangian(config, constrain, state, validation, mesh)
                log.write(step, augmented_lagrangian.summary(state.lagrangian))
            if validates:
                validation_loss = _validation_loss(evaluate, state.params, validation, mesh)
                log.write(step, {"validation_loss": validation_loss})
                bar.say(f"step {step}: validation loss {validation_loss:.4f}")
            if saves:
                remembered = memory.to_json() | {"log": log.position()}
                saved.save(step, state, record, remembered, validation_loss if validates else None)
            bar.update(step, text)
            if stops and not last:
                saved.wait()
                raise stop.interrupted(f"step {step} of {config.steps} is saved in {folder}; go on with --resume.")
        if validation and validation_loss is None:
            validation_loss = _validation_loss(evaluate, state.params, validation, mesh)

        # ---------------------------------------------------------------------------------------- export
        saved.wait()
        best = saved.best_step() if config.export == "best" and validation else None
        exported = config.steps if best is None else best
        if exported != config.steps:
            state, _, _ = saved.restore(exported, train_state.abstract_state(state), record, allow_config_change=True)
    if first:
        described = {**metadata, **record, "cases": list(train_case_ids), "exported_step": exported}
        described["log"] = log.position()
        model_folder.save(workdir, state.params, described)
    sharding.wait_for_all("model saved")
    return {
        "steps": config.steps,
        "loss": loss,
        "validation_loss": validation_loss,
        "seconds": log.seconds(),
        "model": str(workdir / "model"),
        "exported_step": exported,
    }


def _data_fingerprint(cache: feature_cache.FeatureCache, case_ids: Sequence[str], views: Sequence[str]) -> str:
    """Of the cases' files, in their order: a run must not go on with other data."""
    entries = [(case_id, view, cache.fingerprint(case_id, view)) for case_id in case_ids for view in views]
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


class _Watch:
    """What is said, and written to ``failed_batch.json``, when a step cannot be trained on."""

    def __init__(self, path: Path, data: TrainingData, saved: checkpoints.Checkpoints):
        self._path, self._data, self._saved = path, data, saved

    def memory_of_device(self, step: int) -> contextlib.AbstractContextManager[None]:
        """A context in which running out of device memory becomes a sentence."""
        return sharding.out_of_memory(
            lambda: (
                f"The device's memory does not hold step {step}, and {self._kept()}; take fewer slices at once with "
                "--config.microbatch=1 or more, which changes no result but by rounding, and go on with --resume."
            )
        )

    def fetch_finite(
        self,
        config: configs.TrainConfig,
        waiting: Sequence[tuple[int, Mapping[str, jax.Array]]],
        memory: Memory,
        log: metrics_log.MetricsLog,
        say: Callable[[str], None],
        keep: Callable[[int], None],
    ) -> dict[str, float]:
        """The measurements of the last step; one copy from the device for all steps since the last time.

        Before a step that cannot be trained on stops the run, ``keep`` is given the number of the last good one.

        The Fisher mode ``every_k`` leaves steps out: there those of the penalty are of the last step that computed it.
        """
        advice = (
            f"this step was not trained on; the slices of its batch are listed in {self._path}; "
            "look at them, or train again in another --workdir with a lower --config.optimizer.learning_rate or "
            "--config.fisher.weight, or another --config.fisher.mode"
        )
        every = config.fisher.every if config.fisher.mode == "every_k" else 1
        values: dict[str, float] = {}
        with self.memory_of_device(waiting[-1][0]):
            fetched = jax.device_get(list(waiting))
        for step, measurements in fetched:
            values = {name: float(value) for name, value in measurements.items()}
            try:
                fisher.check_measurements(values, step, advice)
            except InputError as error:
                keep(step - 1)
                reason = f"{str(error).rstrip('.')}; {self._kept()}."
                self._write(step, reason)
                raise InputError(reason) from error
            if (step - 1) % every == 0:  # the step's own number is from 0
                memory.of_penalty.update({n: values[n] for n in fisher.PENALTY_MEASUREMENTS if n in values})
            median = memory.losses.sees(values["loss"])
            if median is not None:
                log.write(step, {"spike": values["loss"], "recent_median": median, "slices": self._slices(step)})
                say(f"step {step}: the loss jumped to {values['loss']:.4g} from about {median:.4g}")
        return {n: v for n, v in values.items() if n not in fisher.PENALTY_MEASUREMENTS} | memory.of_penalty

    def _kept(self) -> str:
        latest = self._saved.latest_step()
        kept = f"the checkpoint of step {latest} is kept" if latest else "no checkpoint was written yet"
        return f"{kept} in {self._saved.folder}"

    def _slices(self, step: int) -> list[dict[str, Any]]:
        return [place._asdict() for place in self._data.places[step - 1]]

    def _write(self, step: int, reason: str) -> None:
        path = self._path
        if jax.process_count() > 1:
            path = path.with_stem(f"{path.stem}_process{jax.process_index()}")
        content = {"step": step, "reason": reason, "slices": self._slices(step)}
        files.write_atomically(path, json.dumps(content, indent=2) + "\n")


def _save_last_good(
    saved: checkpoints.Checkpoints,
    mesh: Mesh,
    state: train_state.TrainState,
    record: Mapping[str, Any],
    memory: Memory,
    log: metrics_log.MetricsLog,
    step: int,
) -> None:
    """Save the state that a refused step left as it was, under the number of the step before it."""
    saved.wait()
    if step > (saved.latest_step() or 0):
        good = state._replace(step=sharding.replicate(mesh, np.int32(step)))
        saved.save(step, good, record, memory.to_json() | {"log": log.position()})
        saved.wait()


def _update_lagrangian(
    config: configs.TrainConfig,
    constrain: Callable[..., Any],
    state: train_state.TrainState,
    batches: Sequence[tuple[Batch, int]],
    mesh: Mesh,
) -> train_state.TrainState:
    """CRaC's update after an epoch, on the validation slices."""
    sums = []
    for batch, count in batches:
        counts = pipeline.own_rows((np.arange(config.batch_size) < count).astype(np.float32), sharding.process())
        sums.append(constrain(state, sharding.shard_batch(mesh, (batch, counts))))
    updated = train_state.update_lagrangian(config, state.lagrangian, augmented_lagrangian.merge(*sums))
    return state._replace(lagrangian=sharding.replicate(mesh, updated))


def _validation_loss(evaluate: Any, params: Any, batches: Sequence[tuple[Batch, int]], mesh: Mesh) -> float:
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
    kind = mesh.devices.flat[0].device_kind
    name = configs.method_name(config)
    return f"Training {name} on {len(case_ids)} cases, devices: {mesh.size} ({kind}), {where}; {checked}."
