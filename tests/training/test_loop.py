"""The whole loop on the toy: exact resume, what it writes, and how it refuses and stops."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calsegx import sharding
from calsegx.interfaces import InputError
from calsegx.training import checkpoints, loop
from tests.training import toy


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def mesh():
    return sharding.data_mesh(jax.devices()[:1])


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
    params, record = loop.load_model(whole[0])
    assert jax.tree.structure(params) == jax.tree.structure(toy.backbone().trainable)
    assert record["class_names"] == ["tumour"] and record["backbone"] == "toy"
    assert record["config"]["steps"] == 12
    again, _ = loop.load_model(whole[0] / "model")
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert np.any(params["output"]["kernel"] != toy.backbone().trainable["output"]["kernel"])


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
    resumed, _ = loop.load_model(tmp_path)
    uninterrupted, _ = loop.load_model(whole[0])
    jax.tree.map(np.testing.assert_array_equal, resumed, uninterrupted)  # bit for bit


def test_resuming_a_finished_run_writes_the_model_again(whole, cache, mesh, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(whole[0], workdir)
    shutil.rmtree(workdir / "model")
    summary = toy.train(toy.config(), cache, workdir, mesh, resume=True)
    assert summary["validation_loss"] == whole[1]["validation_loss"]
    jax.tree.map(np.testing.assert_array_equal, loop.load_model(workdir)[0], loop.load_model(whole[0])[0])


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


def test_damaged_checkpoint(whole, cache, mesh, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(whole[0], workdir)
    shutil.rmtree(workdir / "checkpoints" / "12" / "record")
    with pytest.raises(InputError, match=r"checkpoints/12 cannot be read .*move this folder away"):
        toy.train(toy.config(), cache, workdir, mesh, resume=True)
    shutil.rmtree(workdir / "checkpoints" / "12")
    toy.train(toy.config(), cache, workdir, mesh, resume=True)
    assert numbers(workdir) == numbers(whole[0])


def test_not_finite_stops_and_keeps_the_last_good_checkpoint(cache, mesh, tmp_path):
    config = toy.config(method="sam_ft", steps=12, log_every=5, save_every=3)
    config.optimizer.clip_norm = 0.0
    good = toy.terms(config)["task_loss"]

    def blows_up(logits, labels):
        # Adam moves every parameter by about the learning rate a step: after some steps the mean logit passes this.
        return good(logits, labels) + jnp.log(jnp.maximum(0.0, 0.15 + jnp.mean(logits, axis=(1, 2, 3))))

    with pytest.raises(InputError, match=r"Training stopped at step (\d+): the loss is .*step \d+ is kept") as caught:
        toy.train(config, cache, tmp_path, mesh, task_loss=blows_up)
    stopped = int(str(caught.value).split("step ")[1].split(":")[0])
    with checkpoints.Checkpoints(tmp_path / "checkpoints") as saved:
        assert saved.latest_step() == (stopped - 1) // 3 * 3
    assert not (tmp_path / "model").exists()


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


def test_every_k_without_a_penalty_yet_logs_none(cache, mesh, tmp_path, monkeypatch):
    """After a resume in the middle of ``every`` steps."""
    config = toy.config(method="sam_fip", steps=12)
    config.fisher.mode, config.fisher.every = "every_k", 6
    with monkeypatch.context() as patch:
        interrupt(patch, 8)
        with pytest.raises(Interrupted):
            toy.train(config, cache, tmp_path, mesh)
    toy.train(config, cache, tmp_path, mesh, resume=True)
    with_penalty = [line["step"] for line in lines(tmp_path) if "penalty" in line]
    with_loss = [line["step"] for line in lines(tmp_path) if "loss" in line]
    assert with_loss == list(range(1, 13)) and with_penalty == [1, 2, 3, 4, *range(7, 13)]


def test_a_penalty_of_zero_is_logged_as_zero(cache, mesh, tmp_path):
    """Logits that saturate: the gradient is 0, and so is the penalty that is logged, not an older one."""
    config = toy.config(method="sam_fip")
    waiting = [(step, {"loss": 1.0, "penalty": value}) for step, value in ((1, 2.0), (2, 0.0))]
    waiting = [(step, {**values, "ratio": 0.0, "feature_gradient_norm": 0.0}) for step, values in waiting]
    with checkpoints.Checkpoints(tmp_path / "checkpoints") as saved:
        assert loop._fetch_finite(config, waiting, saved, {})["penalty"] == 0


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
    monkeypatch.setattr(loop.fisher, "perturbed_error", lambda *arguments, **options: 0.0)  # let the start-up pass
    with pytest.raises(InputError, match=r"step 1: the features were shifted by .* no checkpoint was written"):
        toy.train(config, cache, tmp_path, mesh)
    assert not (tmp_path / "model").exists()


def test_no_validation_cases(cache, mesh, tmp_path):
    summary = loop.train(
        toy.config(steps=2, method="sam_ft"),
        toy.backbone(),
        cache,
        toy.CASES,
        [],
        tmp_path,
        **toy.terms(),
        mesh=mesh,
        resume=False,
        metadata={},
    )
    assert summary["validation_loss"] is None and summary["loss"] > 0


def test_damaged_model_is_refused(whole, tmp_path):
    with pytest.raises(InputError, match=r"holds no trained model \(model.json is missing\)"):
        loop.load_model(tmp_path)
    shutil.copytree(whole[0] / "model", tmp_path / "model")
    weights = tmp_path / "model" / "decoder.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    with pytest.raises(InputError, match="is damaged .*SHA-256"):
        loop.load_model(tmp_path)
