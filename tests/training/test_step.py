"""The train step: its terms, its donation, and that methods differ by exactly the terms that they name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from calsegx import config_checks, configs, losses, sharding
from calsegx.data import pipeline
from calsegx.interfaces import InputError, Prompts, UsageError
from calsegx.losses import fisher
from calsegx.training import state as train_state
from calsegx.training import step as train_step
from tests.training import toy


@pytest.fixture(scope="module")
def mesh():
    return sharding.device_mesh(jax.devices()[:1])


@pytest.fixture(scope="module")
def batch(tmp_path_factory, mesh):
    cache = toy.fill(tmp_path_factory.mktemp("cache"))
    (made, _), *_ = pipeline.evaluation_batches(cache, toy.CASES, 4, "gt_points", 1)
    return sharding.shard_batch(mesh, made)


def build(config, mesh):
    backbone = toy.backbone()
    optimizer = train_state.make_optimizer(config)
    take_step = train_step.make_train_step(
        backbone.decode, backbone.frozen, toy.objective(config), config, optimizer, mesh
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


def test_the_optimizer_is_adam_or_with_weight_decay_adamw():
    params = {"kernel": jnp.asarray([1.0, -2.0]), "unused": jnp.asarray([3.0])}
    grads = {"kernel": jnp.asarray([0.3, 0.1]), "unused": jnp.zeros(1)}

    def after(**options):
        config = toy.config(steps=10)
        config.optimizer = configs.OptimizerConfig(learning_rate=1e-2, **options)
        optimizer = train_state.make_optimizer(config)
        state, found = optimizer.init(params), params
        for _ in range(3):
            updates, state = optimizer.update(grads, state, found)
            found = optax.apply_updates(found, updates)
        return found, state

    (plain, state), (decayed, _) = after(), after(weight_decay=0.1)
    schedule = train_state.learning_rate(toy.config(steps=10))
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b1=0.9, b2=0.999))
    assert jax.tree.structure(state) == jax.tree.structure(adam.init(params))  # older checkpoints fit
    rates = 1e-2 * (1 + np.cos(np.pi * np.arange(3) / 10)) / 2
    np.testing.assert_array_equal(plain["unused"], params["unused"])
    np.testing.assert_allclose(decayed["unused"], 3 * np.prod(1 - 0.1 * rates), rtol=1e-6)
    kernel = np.asarray(params["kernel"], np.float64)  # Adam's share of a step does not depend on the parameters
    shares = np.asarray([1.0, 1.0]) * -rates[:, None]
    for rate, share in zip(rates, shares, strict=True):
        kernel += share - rate * 0.1 * kernel
    np.testing.assert_allclose(decayed["kernel"], kernel, rtol=1e-5)


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
        np.testing.assert_allclose(values["ratio"], values["penalty"] / values["loss"], rtol=1e-5)


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
        backbone.decode, backbone.frozen, toy.objective(config), config, optimizer, mesh
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
    evaluate = train_step.make_eval_step(backbone.decode, backbone.frozen, toy.objective().task, mesh)
    features = batch.features.astype(jnp.float32)
    logits = backbone.decode(backbone.trainable, backbone.frozen, features, batch.prompts)
    expected = losses.get("sam")(logits, batch.labels)
    np.testing.assert_allclose(evaluate(backbone.trainable, batch), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "finite_difference"},
        {"mode": "stochastic", "fraction": 0.5},
        {"mode": "every_k", "every": 2},
        {"mode": "perturbed", "weight": 1e-3},
        {"labels": "sampled"},
        {"reading": "centered", "mode": "stochastic"},
    ],
)
def test_fisher_options_reach_the_step(changes, mesh, batch):
    config = toy.config(method="sam_fip", fisher=configs.FisherConfig(warmup_fraction=0.0, **changes))
    config_checks.validate(config)
    reference = toy.config(method="sam_fip", fisher=configs.FisherConfig(warmup_fraction=0.0))
    exact, expected = run(reference, mesh, batch)
    state, values = run(config, mesh, batch)
    names = set(expected) | ({"shift"} if config.fisher.mode == "perturbed" else set())
    assert set(values) == names
    np.testing.assert_allclose(values["loss"], expected["loss"], rtol=1e-5)
    same = {"mode": "finite_difference"}, {"mode": "every_k", "every": 2}
    if changes in same:
        np.testing.assert_allclose(values["penalty"], expected["penalty"], rtol=1e-5)
    else:
        assert values["penalty"] > 0
    assert (abs(values["penalty"] / expected["penalty"] - 1) > 1e-3) == (
        changes not in same and config.fisher.mode != "perturbed"
    )
    if changes != {"mode": "every_k", "every": 2}:
        differs = jax.tree.map(lambda a, b: np.any(a != b), state.params, exact.params)
        assert any(jax.tree.leaves(differs))  # the option was not ignored
    if changes == {"mode": "finite_difference"}:
        first, second = (jax.tree.leaves(s.opt_state) for s in (state, exact))  # Adam's moments: the gradients
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0.02, atol=0.02 * np.abs(b).max()), first, second
        )
    again, _ = run(config, mesh, batch)
    jax.tree.map(np.testing.assert_array_equal, state, again)  # its randomness is that of seed and step


def test_every_k_penalises_every_second_step_twice(mesh, batch):
    fisher_config = configs.FisherConfig(warmup_fraction=0.0, mode="every_k", every=2)
    take_step, state = build(toy.config(method="sam_fip", fisher=fisher_config), mesh)
    twice = toy.config(method="sam_fip", fisher=configs.FisherConfig(warmup_fraction=0.0, weight=0.2))
    expected_state, expected = run(twice, mesh, batch)
    state, values = take_step(state, batch)
    np.testing.assert_allclose(values["gradient_norm"], expected["gradient_norm"], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), state, expected_state)
    plain, _ = build(toy.config(method="sam_ft"), mesh)
    copy = jax.tree.map(jnp.copy, state)
    _, values = take_step(state, batch)
    _, expected = plain(copy, batch)
    assert values["penalty"] == 0
    np.testing.assert_allclose(values["gradient_norm"], expected["gradient_norm"], rtol=1e-5)


@pytest.mark.parametrize("method", ["sam_ft", "calsam"])
def test_microbatches_change_nothing_but_what_the_decoder_sees_at_once(method, mesh, batch):
    seen, results = set(), []

    def decode(params, frozen, z, prompts):
        seen.add(z.shape[0])
        return toy.decode(params, frozen, z, prompts)

    for microbatch, expected in ((0, {4}), (1, {1}), (3, {3, 1})):
        seen.clear()
        config = toy.config(method=method, microbatch=microbatch)
        config.fisher.warmup_fraction = 0.0
        optimizer, made = train_state.make_optimizer(config), toy.backbone()
        take_step = train_step.make_train_step(decode, made.frozen, toy.objective(config), config, optimizer, mesh)
        state, values = take_step(train_state.init_state(made.trainable, optimizer, mesh), batch)
        assert seen == expected
        results.append((jax.device_get(state.opt_state), jax.device_get(values)))  # Adam's moments: the gradients
    for other in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), other, results[0])


def run(config, mesh, batch):
    take_step, state = build(config, mesh)
    return jax.device_get(take_step(state, batch))


@pytest.mark.parametrize("quantity", ["loss", "penalty", "shift"])
def test_a_bad_step_leaves_the_state_as_it_was(quantity, mesh, batch):
    config = toy.config(method="sam_fip")
    config.fisher.warmup_fraction = 0.0
    if quantity == "shift":
        config.fisher.mode, config.fisher.weight = "perturbed", 1e3
    if quantity == "penalty":
        batch = batch._replace(features=batch.features.astype(jnp.float32) * 1e25)  # |z|^2 overflows, the loss does not
    if quantity == "loss":
        batch = batch._replace(features=batch.features.at[0, 0, 0, 0].set(jnp.nan))
    take_step, state = build(config, mesh)
    before = jax.device_get(state)
    after, values = take_step(state, batch)
    assert (quantity == "loss") == bool(np.isnan(values["loss"]))
    jax.tree.map(np.testing.assert_array_equal, before[1:], jax.device_get(after)[1:])
    assert after.step == -1
    with pytest.raises(InputError, match="stopped at step 5"):
        fisher.check_measurements(values, 5)


def test_no_step_trains_after_a_bad_one(mesh, batch):
    take_step, state = build(toy.config(method="sam_fip"), mesh)
    before = jax.device_get(state)
    bad = batch._replace(features=batch.features.at[0, 0, 0, 0].set(jnp.nan))
    state, _ = take_step(state, bad)
    for _ in range(2):
        state, values = take_step(state, batch)
        assert fisher.usable(values) and state.step == -1
    jax.tree.map(np.testing.assert_array_equal, before[1:], jax.device_get(state)[1:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "stochastics"}, "fisher.mode='stochastics' is not one of .* Did you mean 'stochastic'?"),
        ({"reading": "global"}, "fisher.reading='global' is not one of per_sample"),
        ({"labels": "true"}, "fisher.labels='true' is not one of empirical, sampled"),
        ({"fraction": 0.0}, "fisher.fraction=0.0 must be above 0 and at most 1"),
        ({"fraction": 1.1}, "fisher.fraction=1.1 must"),
        ({"every": 0}, "fisher.every=0 must be a number of at least 1"),
        ({"warmup_fraction": 1.1}, "fisher.warmup_fraction=1.1 must be from 0 to 1"),
        ({"labels": "sampled", "mode": "perturbed"}, "fisher.labels='sampled' would draw other labels"),
    ],
)
def test_bad_fisher_options_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        config_checks.validate(toy.config(fisher=configs.FisherConfig(**changes)))


def test_centered_cannot_be_taken_apart():
    with pytest.raises(UsageError, match="--config.microbatch takes the batch apart, but .*centered"):
        config_checks.validate(toy.config(microbatch=2, fisher=configs.FisherConfig(reading="centered")))


def test_sampled_labels_need_keys():
    config = toy.config()
    config.fisher.labels = "sampled"
    loss_fn = train_step.make_loss_fn(toy.decode, toy.objective(config), config)
    made = toy.backbone()
    features = jnp.ones((1, *made.feature_shape))
    prompts = Prompts(points=jnp.ones((1, 1, 2)), labels=jnp.ones((1, 1)))
    with pytest.raises(UsageError, match="need the argument keys, one per sample"):
        loss_fn(made.trainable, features, made.frozen, jnp.ones((1, *made.logit_shape), int), prompts)
