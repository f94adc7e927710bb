"""The whole loop on the toy: exact resume, what it writes, and how it refuses and stops."""

import dataclasses
import json
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calsegx import losses, sharding
from calsegx.interfaces import InputError, UsageError
from calsegx.training import checkpoints, checks, interruption, loop, metrics_log, model_folder
from calsegx.training import state as train_state
from tests.training import toy


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def mesh():
    return sharding.device_mesh(jax.devices()[:1])


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return toy.fill(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def whole(cache, mesh, tmp_path_factory):
    """An uninterrupted run: its folder and its summary.  Read only."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, toy.train(toy.config(), cache, workdir, mesh)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def numbers(workdir):
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines(workdir)]


def interrupt(monkeypatch, step):
    """Every run breaks off when it has logged ``step``, and with it what came after its last checkpoint."""
    original = loop.metrics_log.MetricsLog.write

    def write(log, at, values):
        original(log, at, values)
        if at == step:
            raise Interrupted

    monkeypatch.setattr(loop.metrics_log.MetricsLog, "write", write)


def test_outputs(whole):
    workdir, summary = whole
    steps = [line for line in lines(workdir) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert {"task", "cmp", "penalty", "ratio", "gradient_norm", "learning_rate", "seconds"} <= set(steps[0])
    assert [line["step"] for line in lines(workdir) if "validation_loss" in line] == [6, 12]
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert summary["loss"] == steps[-1]["loss"] and summary["validation_loss"] > 0
    assert sorted(path.name for path in (workdir / "model").iterdir()) == [
        "README.md",
        "decoder.safetensors",
        "model.json",
    ]
    card = (workdir / "model" / "README.md").read_text()
    assert "Not a medical device" in card and "Apache-2.0" in card and "tumour" in card


def test_model_comes_back(whole):
    params, record = model_folder.load(whole[0])
    assert jax.tree.structure(params) == jax.tree.structure(toy.backbone().trainable)
    assert record["class_names"] == ["tumour"] and record["backbone"] == "toy"
    assert record["config"]["steps"] == 12
    again, _ = model_folder.load(whole[0] / "model")
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert np.any(params["output"]["kernel"] != toy.backbone().trainable["output"]["kernel"])


def train_in_two_parts(config, cache, mesh, folder, monkeypatch, step):
    """Interrupted at ``step``, then resumed to the end."""
    with monkeypatch.context() as patch:
        interrupt(patch, step)
        with pytest.raises(Interrupted):
            toy.train(config, cache, folder, mesh)
    toy.train(config, cache, folder, mesh, resume=True)


@pytest.mark.parametrize("step", [5, 8, 11])
def test_interrupted_and_resumed_equals_uninterrupted(step, whole, cache, mesh, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, step)
        with pytest.raises(Interrupted):
            toy.train(toy.config(), cache, tmp_path, mesh)
    assert not (tmp_path / "model").exists()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')  # the line that was being written
    toy.train(toy.config(), cache, tmp_path, mesh, resume=True)
    assert numbers(tmp_path) == numbers(whole[0])
    seconds = [line["seconds"] for line in lines(tmp_path)]
    assert seconds == sorted(seconds)
    resumed, _ = model_folder.load(tmp_path)
    uninterrupted, _ = model_folder.load(whole[0])
    jax.tree.map(np.testing.assert_array_equal, resumed, uninterrupted)  # bit for bit


def test_jittered_prompts_come_back_when_resumed_and_are_for_training_alone(cache, mesh, tmp_path, monkeypatch):
    config = toy.config(prompt_jitter=0.2)
    toy.train(config, cache, tmp_path / "whole", mesh)
    train_in_two_parts(config, cache, mesh, tmp_path / "parts", monkeypatch, 7)
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")
    for jitter in (0.0, 0.2):
        still = toy.config(prompt_jitter=jitter, steps=2)
        still.optimizer.learning_rate = 1e-12
        toy.train(still, cache, tmp_path / f"still {jitter}", mesh)
    plain, moved = (lines(tmp_path / f"still {jitter}") for jitter in (0.0, 0.2))
    assert plain[0]["task"] != pytest.approx(moved[0]["task"], rel=1e-4)
    assert plain[-1]["validation_loss"] == pytest.approx(moved[-1]["validation_loss"], rel=1e-6)


def test_resuming_a_finished_run_writes_the_model_again(whole, cache, mesh, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(whole[0], workdir)
    shutil.rmtree(workdir / "model")
    summary = toy.train(toy.config(), cache, workdir, mesh, resume=True)
    assert summary["validation_loss"] == whole[1]["validation_loss"]
    jax.tree.map(np.testing.assert_array_equal, model_folder.load(workdir)[0], model_folder.load(whole[0])[0])


def test_resume_without_checkpoint(cache, mesh, tmp_path):
    with pytest.raises(InputError, match=rf"--resume found no checkpoint in {tmp_path}/checkpoints"):
        toy.train(toy.config(), cache, tmp_path, mesh, resume=True)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_new_run_into_a_used_folder(whole, cache, mesh):
    before = numbers(whole[0])
    with pytest.raises(InputError, match="already holds a run, saved at step 12; go on with it with --resume"):
        toy.train(toy.config(), cache, whole[0], mesh)
    assert numbers(whole[0]) == before


def test_resume_with_other_settings(whole, cache, mesh):
    changed = toy.config(seed=4, log_every=2)
    changed.fisher.weight = 0.3
    with pytest.raises(InputError) as caught:
        toy.train(changed, cache, whole[0], mesh, resume=True)
    message = str(caught.value)
    assert "config.fisher.weight was 0.1 and is 0.3" in message
    assert "config.seed was 3 and is 4" in message
    assert "log_every" not in message


def test_resume_with_other_data(whole, mesh, tmp_path):
    other = toy.fill(tmp_path / "cache")
    content = toy.records(5, 99)
    other.write("case a", "view1", **content, fingerprint="the files changed")
    with pytest.raises(InputError, match="training data was"):
        toy.train(toy.config(), other, whole[0], mesh, resume=True)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "manifest", "stray"])
def test_a_damaged_checkpoint_is_skipped_with_a_word(damage, whole, cache, mesh, tmp_path, capsys):
    workdir = tmp_path / "copy"
    shutil.copytree(whole[0], workdir)
    newest = workdir / "checkpoints" / "12"
    if damage == "stray":  # Orbax alone would take it for the latest step
        (workdir / "checkpoints" / "99").mkdir()
    else:
        path = newest / "manifest.json" if damage == "manifest" else max(newest.rglob("d/*"), key=lambda p: p.name)
        content = path.read_bytes()
        path.unlink()
        if damage != "missing":
            middle = len(content) // 2
            flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            path.write_bytes(content[:middle] if damage == "truncated" else flipped)
    toy.train(toy.config(), cache, workdir, mesh, resume=True)
    said = capsys.readouterr().out
    step = "99" if damage == "stray" else "12"
    assert f"Step {step} was skipped: its" in said and f"moved to {step}.set-aside" in said
    assert ("from step 8 to 12" in said) == (damage != "stray")
    assert numbers(workdir) == numbers(whole[0])
    resumed, _ = model_folder.load(workdir)
    jax.tree.map(np.testing.assert_array_equal, resumed, model_folder.load(whole[0])[0])


def test_nothing_but_damaged_checkpoints(whole, cache, mesh, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(whole[0], workdir)
    for manifest in workdir.glob("checkpoints/*/manifest.json"):
        manifest.write_text("{}")
    with pytest.raises(
        InputError, match=r"--resume found no whole checkpoint in .*step 12: its manifest.json cannot be"
    ):
        toy.train(toy.config(), cache, workdir, mesh, resume=True)


class StopAt(interruption.Stop):
    """Asked to stop before the ``step``-th question."""

    def __init__(self, step, number=signal.SIGTERM):
        super().__init__()
        self.left, self.number = step, number

    def requested_anywhere(self):
        self.left -= 1
        if self.left == 0:
            self._signal = self.number
        return super().requested_anywhere()


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 143)])
def test_a_signal_finishes_the_step_and_saves(number, code, whole, cache, mesh, tmp_path):
    stop = StopAt(7, getattr(signal, number))
    with pytest.raises(interruption.Interrupted, match=f"Stopped by {number}: step 7 of 12 is saved in") as caught:
        toy.train(toy.config(), cache, tmp_path, mesh, stop=stop)
    assert caught.value.exit_code == code
    assert checkpoints.whole_steps(tmp_path / "checkpoints") == [4, 7]
    toy.train(toy.config(), cache, tmp_path, mesh, resume=True)
    assert numbers(tmp_path) == numbers(whole[0])
    jax.tree.map(np.testing.assert_array_equal, model_folder.load(tmp_path)[0], model_folder.load(whole[0])[0])


def test_changed_settings_can_be_allowed(whole, cache, mesh, tmp_path, capsys):
    workdir = tmp_path / "copy"
    shutil.copytree(whole[0], workdir)
    changed = toy.config(steps=14)
    changed.fisher.weight = 0.3
    toy.train(changed, cache, workdir, mesh, resume=True, allow_config_change=True)
    said = capsys.readouterr().out
    assert "Going on with a change: config.fisher.weight was 0.1 and is 0.3; config.steps was 12 and is 14." in said
    assert max(line["step"] for line in lines(workdir)) == 14


def test_the_best_checkpoint_is_kept_and_can_be_the_model(cache, mesh, tmp_path):
    """With a learning rate that destroys: the validation loss is lowest early, and that step outlives later ones."""
    config = toy.config(method="sam_ft", steps=20, save_every=2, validate_every=2, export="best")
    config.optimizer.learning_rate, config.optimizer.clip_norm = 0.5, 0.0
    summary = toy.train(config, cache, tmp_path, mesh)
    losses_of = {line["step"]: line["validation_loss"] for line in lines(tmp_path) if "validation_loss" in line}
    best = min(losses_of, key=losses_of.get)
    assert best < 18 and summary["exported_step"] == best
    assert checkpoints.whole_steps(tmp_path / "checkpoints") == [best, 18, 20]
    params, record = model_folder.load(tmp_path)
    assert record["exported_step"] == best
    last = toy.train(dataclasses.replace(config, export="last"), cache, tmp_path, mesh, resume=True)
    assert last["exported_step"] == 20
    assert np.any(model_folder.load(tmp_path)[0]["output"]["kernel"] != params["output"]["kernel"])


def test_two_runs_are_identical(whole, cache, mesh, tmp_path):
    toy.train(toy.config(), cache, tmp_path, mesh)
    assert numbers(tmp_path) == numbers(whole[0])
    states = []
    for workdir in (tmp_path, whole[0]):
        optimizer = train_state.make_optimizer(toy.config())
        state = train_state.init_state(toy.backbone().trainable, optimizer, mesh)
        shutil.copytree(workdir / "checkpoints", copy := tmp_path / f"copy{len(states)}")
        with checkpoints.Checkpoints(copy) as saved:
            states.append(saved.restore(12, train_state.abstract_state(state), {}, allow_config_change=True)[0])
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_crac_multipliers_are_saved_and_resumed(cache, mesh, tmp_path, monkeypatch):
    """Multipliers change after every epoch (here two steps) and are part of the state."""
    config = toy.config(method="crac")
    config.crac.rho_step = 1
    toy.train(config, cache, tmp_path / "whole", mesh)
    logged = [line["largest_multiplier"] for line in lines(tmp_path / "whole") if "largest_multiplier" in line]
    assert len(logged) == 6 and logged == sorted(logged) and logged[0] > 1e-6
    train_in_two_parts(config, cache, mesh, tmp_path / "parts", monkeypatch, 7)
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")


def test_crac_wants_validation_cases(cache, mesh, tmp_path):
    with pytest.raises(UsageError, match="--config.method=crac sets its multipliers on validation cases"):
        toy.train(toy.config(method="crac"), cache, tmp_path, mesh, validation=())


def test_a_spike_is_logged_with_its_slices():
    watch = metrics_log.SpikeWatch(window=10)
    assert [watch.sees(loss) for loss in [1.0, 1.1, 0.9, 1.05, 1.0, 1.02, 1.5, 0.98]] == [None] * 8
    assert watch.sees(4.0) == pytest.approx(1.0, abs=0.05)


def test_out_of_device_memory_names_the_flag(cache, mesh, tmp_path):
    def no_memory(logits, labels, progress):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 99 bytes.")

    objective = toy.objective()._replace(task=no_memory)
    with pytest.raises(InputError, match=r"does not hold step 1, and no checkpoint .*--config.microbatch=1 .*99 bytes"):
        toy.train(toy.config(method="sam_ft"), cache, tmp_path, mesh, objective=objective)


def test_tensorboard_that_fails_stops_nothing(cache, mesh, tmp_path, capsys):
    def unreachable(step, values):
        raise ConnectionError("no route to host")

    log = metrics_log.MetricsLog(tmp_path / "metrics.jsonl", mirror=unreachable)
    log.write(1, {"loss": 1.0})
    log.write(2, {"loss": 0.5})
    assert [entry["loss"] for entry in metrics_log.read(tmp_path / "metrics.jsonl")] == [1.0, 0.5]
    assert capsys.readouterr().out.count("no route to host") == 1


def test_not_finite_stops_and_keeps_the_last_good_checkpoint(cache, mesh, tmp_path):
    config = toy.config(method="sam_ft", steps=12, log_every=5, save_every=3)
    config.optimizer.clip_norm = 0.0
    good = losses.get("sam")

    def blows_up(logits, labels, progress):
        # Adam moves every parameter by about the learning rate a step: after some steps the mean logit passes this.
        return good(logits, labels) + jnp.log(jnp.maximum(0.0, 0.15 + jnp.mean(logits, axis=(1, 2, 3))))

    with pytest.raises(InputError, match=r"Training stopped at step (\d+): the loss is .*step \d+ is kept") as caught:
        toy.train(config, cache, tmp_path, mesh, objective=toy.objective(config)._replace(task=blows_up))
    stopped = int(str(caught.value).split("step ")[1].split(":")[0])
    assert max(checkpoints.whole_steps(tmp_path / "checkpoints"), default=0) == stopped - 1
    failed = json.loads((tmp_path / "failed_batch.json").read_text())
    assert failed["step"] == stopped and "the loss is" in failed["reason"]
    assert len(failed["slices"]) == 4 and {place["case_id"] for place in failed["slices"]} <= set(toy.CASES[:2])
    assert not (tmp_path / "model").exists()
    # The last good step is a checkpoint like others: with a loss that does not blow up the run goes on from it.
    summary = toy.train(config, cache, tmp_path, mesh, resume=True)
    assert summary["steps"] == 12 and [line["step"] for line in lines(tmp_path) if "loss" in line][-1] == 12


def test_penalty_without_second_derivative_is_refused(cache, mesh, tmp_path):
    @jax.custom_vjp
    def fused(x):
        return jnp.tanh(x)

    fused.defvjp(lambda x: (jnp.tanh(x), jax.lax.stop_gradient(x)), lambda x, g: (g * (1 - jnp.tanh(x) ** 2),))
    toy_backbone = toy.backbone()

    def decode(params, frozen, z, prompts):
        return fused(toy.decode(params, frozen, z, prompts))

    broken = dataclasses.replace(toy_backbone, decode=decode)
    with pytest.raises(InputError, match="The Fisher penalty does not work with this backbone and loss"):
        toy.train(toy.config(), cache, tmp_path, mesh, backbone=broken)


def test_a_mode_without_second_derivative_is_not_checked(cache, mesh, tmp_path, capsys):
    """The backward rule of this decoder cannot be differentiated; finite differences do not need it."""

    @jax.custom_vjp
    def fused(x):
        return jnp.tanh(x)

    fused.defvjp(lambda x: (jnp.tanh(x), jax.lax.stop_gradient(x)), lambda x, g: (g * (1 - jnp.tanh(x) ** 2),))
    config = toy.config(method="sam_fip", steps=2)
    config.fisher.mode = "finite_difference"
    decode = toy.backbone().decode
    broken = dataclasses.replace(toy.backbone(), decode=lambda *arguments: fused(decode(*arguments)))
    toy.train(config, cache, tmp_path, mesh, backbone=broken)
    assert "'finite_difference' needs no second derivative, so none is checked" in "".join(capsys.readouterr())


def test_every_k_logs_the_last_penalty_that_was_computed(cache, mesh, tmp_path):
    config = toy.config(method="sam_fip", steps=8, log_every=2)
    config.fisher.mode, config.fisher.every = "every_k", 4
    toy.train(config, cache, tmp_path, mesh)
    logged = [line for line in lines(tmp_path) if "loss" in line]
    assert [line["step"] for line in logged] == [2, 4, 6, 8]
    for name in ("penalty", "ratio", "feature_gradient_norm"):  # computed in steps 1 and 5
        values = [line[name] for line in logged]
        assert values[0] == values[1] != values[2] == values[3] and min(values) > 0


def test_every_k_remembers_the_penalty_over_a_resume(cache, mesh, tmp_path, monkeypatch):
    """After a resume in the middle of ``every`` steps the log goes on as that of a whole run."""
    config = toy.config(method="sam_fip", steps=12)
    config.fisher.mode, config.fisher.every = "every_k", 6
    toy.train(config, cache, tmp_path / "whole", mesh)
    train_in_two_parts(config, cache, mesh, tmp_path / "parts", monkeypatch, 8)
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")


def test_a_penalty_of_zero_is_logged_as_zero(tmp_path):
    """Logits that saturate: the gradient is 0, and so is the penalty that is logged, not an older one."""
    config = toy.config(method="sam_fip")
    waiting = [(step, {"loss": 1.0, "penalty": value}) for step, value in ((1, 2.0), (2, 0.0))]
    waiting = [(step, {**values, "ratio": 0.0, "feature_gradient_norm": 0.0}) for step, values in waiting]
    log = metrics_log.MetricsLog(tmp_path / "metrics.jsonl")
    with checkpoints.Checkpoints(tmp_path / "checkpoints") as saved:
        watch = loop._Watch(tmp_path / "failed.json", None, saved)
        assert watch.fetch_finite(config, waiting, loop.Memory(), log, print, print)["penalty"] == 0


def test_perturbed_is_compared_with_exact_at_start_up(cache, mesh, tmp_path):
    config = toy.config(method="sam_fip", steps=1)
    config.fisher.mode, config.fisher.weight = "perturbed", 1e3
    with pytest.raises(
        InputError, match=r"by --config.fisher.mode=perturbed is wrong by .* use --config.fisher.mode=e"
    ):
        toy.train(config, cache, tmp_path / "bad", mesh)
    assert not (tmp_path / "bad" / "metrics.jsonl").exists()
    config.fisher.weight = 1e-3
    toy.train(config, cache, tmp_path / "good", mesh)


def test_a_shift_that_is_too_large_stops_the_run(cache, mesh, tmp_path, monkeypatch):
    config = toy.config(method="sam_fip")
    config.fisher.mode, config.fisher.weight, config.fisher.warmup_fraction = "perturbed", 1e3, 0.0
    monkeypatch.setattr(checks.fisher, "perturbed_error", lambda *arguments, **options: 0.0)  # let the start-up pass
    with pytest.raises(InputError, match=r"step 1: the features were shifted by .* no checkpoint was written"):
        toy.train(config, cache, tmp_path, mesh)
    assert not (tmp_path / "model").exists()


def test_no_validation_cases(cache, mesh, tmp_path):
    summary = toy.train(toy.config(steps=2, method="sam_ft"), cache, tmp_path, mesh, validation=())
    assert summary["validation_loss"] is None and summary["loss"] > 0


def test_damaged_model_is_refused(whole, tmp_path):
    with pytest.raises(InputError, match=r"holds no trained model \(model.json is missing\)"):
        model_folder.load(tmp_path)
    shutil.copytree(whole[0] / "model", tmp_path / "model")
    weights = tmp_path / "model" / "decoder.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    with pytest.raises(InputError, match="is damaged .*SHA-256"):
        model_folder.load(tmp_path)
