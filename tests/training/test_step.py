"""The train step: its terms, its donation, and that methods differ by exactly the terms that they name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calsegx import losses, sharding
from calsegx.data import pipeline
from calsegx.training import state as train_state
from calsegx.training import step as train_step
from tests.training import toy


@pytest.fixture(scope="module")
def mesh():
    return sharding.data_mesh(jax.devices()[:1])


@pytest.fixture(scope="module")
def batch(tmp_path_factory, mesh):
    cache = toy.fill(tmp_path_factory.mktemp("cache"))
    (made, _), *_ = pipeline.evaluation_batches(cache, toy.CASES, 4, "gt_points", 1)
    return sharding.shard_batch(mesh, made)


def build(config, mesh):
    backbone = toy.backbone()
    optimizer = train_state.make_optimizer(config)
    take_step = train_step.make_train_step(
        backbone.decode, backbone.frozen, *toy.terms(config).values(), config, optimizer, mesh
    )
    return take_step, train_state.init_state(backbone.trainable, optimizer, mesh)


def test_learning_rate_and_warmup():
    config = toy.config(steps=100)
    schedule = train_state.learning_rate(config)
    np.testing.assert_allclose([schedule(0), schedule(50), schedule(100)], [1e-2, 5e-3, 0], atol=1e-9)
    shares = [float(train_step.warmup(config, jnp.asarray(t))) for t in (0, 10, 20, 99)]
    np.testing.assert_allclose(shares, [0, 0.5, 1, 1])
    config.fisher.warmup_fraction = 0.0
    assert train_step.warmup(config, jnp.asarray(0)) == 1


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("sam_ft", set()),
        ("sam_fip", {"penalty", "ratio", "feature_gradient_norm"}),
        ("sam_cmp", {"cmp"}),
        ("calsam", {"penalty", "ratio", "feature_gradient_norm", "cmp"}),
    ],
)
def test_methods_are_sums_of_terms(method, names, mesh, batch):
    config = toy.config(method=method)
    backbone = toy.backbone()
    take_step, state = build(config, mesh)
    state, values = take_step(state, batch)
    assert set(values) == names | {"loss", "task", "gradient_norm", "learning_rate"}

    features = batch.features.astype(jnp.float32)
    logits = backbone.decode(backbone.trainable, backbone.frozen, features, batch.prompts)
    task = float(losses.get("sam")(logits, batch.labels).mean())
    cmp = float(losses.get("cmp")(logits, batch.labels).mean())
    np.testing.assert_allclose(values["task"], task, rtol=1e-5)
    if "cmp" in names:
        np.testing.assert_allclose(values["cmp"], cmp, rtol=1e-5)
        task += config.cmp.weight * cmp
    np.testing.assert_allclose(values["loss"], task, rtol=1e-5)
    if "penalty" in names:
        np.testing.assert_allclose(
            values["ratio"], config.fisher.weight * values["penalty"] / values["loss"], rtol=1e-5
        )


def test_fisher_changes_the_step_only_after_the_warmup_began(mesh, batch):
    """At step 0 the weight is 0, so the parameters are those of the plain step; from step 1 on they differ."""
    results = {}
    for method in ("sam_ft", "sam_fip"):
        take_step, state = build(toy.config(method=method), mesh)
        state, _ = take_step(state, batch)
        first = jax.device_get(state.params)
        state, _ = take_step(state, batch)
        results[method] = first, jax.device_get(state.params)
    np.testing.assert_allclose(
        results["sam_ft"][0]["output"]["kernel"], results["sam_fip"][0]["output"]["kernel"], rtol=1e-4
    )
    assert np.any(results["sam_ft"][1]["output"]["kernel"] != results["sam_fip"][1]["output"]["kernel"])


def test_loss_falls(mesh, batch):
    take_step, state = build(toy.config(steps=60), mesh)
    values = []
    for _ in range(60):
        state, measurements = take_step(state, batch)
        values.append(float(measurements["loss"]))
    assert values[-1] < 0.7 * values[0]
    assert int(state.step) == 60


def test_state_is_donated_and_the_backbone_is_not(mesh, batch):
    config = toy.config()
    backbone = toy.backbone()
    optimizer = train_state.make_optimizer(config)
    take_step = train_step.make_train_step(
        backbone.decode, backbone.frozen, *toy.terms(config).values(), config, optimizer, mesh
    )
    old = train_state.init_state(backbone.trainable, optimizer, mesh)
    new, _ = take_step(old, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((old.params, old.opt_state)))
    kept = (backbone.trainable, backbone.frozen, new, batch)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(kept))


def test_clipping_can_be_switched_off(mesh, batch):
    clipped, plain = toy.config(), toy.config()
    clipped.optimizer.clip_norm, plain.optimizer.clip_norm = 1e-3, 0.0
    gradient = {"a": jnp.full(4, 5.0)}
    norms = []
    for config in (clipped, plain):
        optimizer = train_state.make_optimizer(config)
        _, state = optimizer.update(gradient, optimizer.init(gradient), gradient)
        norms.append(float(jnp.linalg.norm(jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, dict))[1]["a"])))
    np.testing.assert_allclose(norms, [0.1 * 1e-3, 0.1 * 10.0], rtol=1e-5)  # the first moment, 1 - b1 = 0.1


def test_evaluation_is_per_sample(mesh, batch):
    backbone = toy.backbone()
    evaluate = train_step.make_eval_step(backbone.decode, backbone.frozen, losses.get("sam"), mesh)
    features = batch.features.astype(jnp.float32)
    logits = backbone.decode(backbone.trainable, backbone.frozen, features, batch.prompts)
    expected = losses.get("sam")(logits, batch.labels)
    np.testing.assert_allclose(evaluate(backbone.trainable, batch), expected, rtol=1e-5)
