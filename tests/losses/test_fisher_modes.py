"""Modes of the penalty against the exact one: gradient errors, unbiasedness, precision, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calsegx import losses
from calsegx.interfaces import Prompts, UsageError
from calsegx.losses import cross_entropy, fisher
from calsegx.models.sam import backbone
from tests.losses.fisher_toy import assert_close, bce, compiled, flat, pair, problem, relative_error


def exact(loss_fn=pair, **options):
    params, z, labels = problem()
    return compiled(loss_fn, **options)(params, z, labels)


def penalty_gradient(grads, loss_fn=pair):
    """What the penalty adds to the plain gradient."""
    params, z, labels = problem()
    return flat(grads) - flat(compiled(loss_fn, weight=0)(params, z, labels)[1])


@pytest.mark.parametrize("loss_fn", [pair, bce])
@pytest.mark.parametrize("reading", fisher.READINGS)
def test_finite_difference(reading, loss_fn):
    params, z, labels = problem()
    (total, measurements), grads = compiled(loss_fn, mode="finite_difference", reading=reading)(params, z, labels)
    (expected_total, expected), expected_grads = exact(loss_fn, reading=reading)
    assert_close(total, expected_total)
    assert_close(measurements | {"gradient_norm": 0}, expected | {"gradient_norm": 0})
    error = relative_error(penalty_gradient(grads, loss_fn), penalty_gradient(expected_grads, loss_fn))
    assert error < 0.002  # measured: 0.0013


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_finite_difference_with_half_precision_parameters(dtype):
    """Right to the rounding of the result: the difference itself is taken in float32."""
    params, z, labels = problem()
    halves = jax.tree.map(lambda p: p.astype(dtype), params)
    grads = compiled(pair, mode="finite_difference", weight=1.0)(halves, z, labels)[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(dtype)}
    single = jax.tree.map(lambda p: p.astype(jnp.float32), halves)
    assert relative_error(grads, compiled(pair, weight=1.0)(single, z, labels)[1]) < 2**-8


def test_finite_difference_needs_no_second_derivative():
    """A backward rule that refuses to be differentiated, as those of fused kernels do."""

    @jax.custom_vjp
    def opaque(x):
        return x

    @jax.custom_vjp
    def refuse(g):
        return g

    def refused(*_):
        raise NotImplementedError("no second derivative")

    refuse.defvjp(refused, refused)
    opaque.defvjp(lambda x: (jnp.tanh(x), jnp.tanh(x)), lambda y, g: (refuse(g) * (1 - y**2),))

    def fused(params, z, labels):
        logits = opaque(z @ params["W1"].T + params["b1"]) @ params["W2"].T + params["b2"]
        return cross_entropy.ce(logits, labels)

    params, z, labels = problem()
    with pytest.raises(NotImplementedError):
        jax.eval_shape(fisher.value_and_grad(fused), params, z, labels)
    for mode in fisher.FIRST_ORDER_MODES:
        grads = jax.jit(fisher.value_and_grad(fused, mode=mode))(params, z, labels)[1]
        assert_close(grads, compiled(bce, mode=mode)(params, z, labels)[1], rtol=1e-4)


def test_finite_difference_of_features_and_gradients_that_are_zero():
    params, z, labels = problem()
    grads = compiled(bce, mode="finite_difference", normalisation="raw")(params, z.at[0].set(0), labels)[1]
    expected = compiled(bce, normalisation="raw")(params, z.at[0].set(0), labels)[1]
    assert_close(grads, expected, rtol=1e-2)
    flat_params = params | {"W1": jnp.zeros_like(params["W1"])}
    (_, measurements), grads = compiled(bce, mode="finite_difference")(flat_params, z, labels)
    assert measurements["penalty"] == 0 and fisher.usable(measurements)
    assert_close(grads, compiled(bce, weight=0)(flat_params, z, labels)[1])


@pytest.mark.parametrize("loss_fn", [pair, bce])
@pytest.mark.parametrize("reading", ["per_sample", "centered"])
def test_perturbed_is_right_while_the_shift_is_small(reading, loss_fn):
    params, z, labels = problem()
    step, exactly = (compiled(loss_fn, mode=mode, reading=reading) for mode in ("perturbed", "exact"))
    errors, shifts = [], []
    for scale in (0.3, 0.03):
        (_, measurements), grads = step(params, z, labels, weight_scale=scale)
        expected = penalty_gradient(exactly(params, z, labels, weight_scale=scale)[1], loss_fn)
        errors.append(relative_error(penalty_gradient(grads, loss_fn), expected))
        shifts.append(float(measurements["shift"]))
    np.testing.assert_allclose(shifts[0], 10 * shifts[1], rtol=1e-4)
    assert errors[0] < 6 * shifts[0] and errors[1] < 6 * shifts[1]  # first order
    if reading == "per_sample":
        gradient = jax.grad(lambda z: jnp.sum(bce(params, z, labels)))(z)
        z_norms, norms = (np.sqrt(np.sum(np.square(a), axis=(1, 2, 3))) for a in (z, gradient))
        np.testing.assert_allclose(shifts[0], 0.03 * np.max(z_norms * norms), rtol=1e-4)


def test_perturbed_reports_a_shift_that_makes_it_wrong():
    params, z, labels = problem()
    (_, measurements), grads = compiled(pair, mode="perturbed", weight=1.0)(params, z, labels)
    error = relative_error(penalty_gradient(grads), penalty_gradient(exact(weight=1.0)[1]))
    assert error > 0.5 and not fisher.usable(measurements)


def distinct(outcomes):
    """The different penalties among many draws, with one gradient of each."""
    (_, measurements), grads = outcomes
    penalties = np.asarray(measurements["penalty"])
    _, first, counts = np.unique(penalties.round(4), return_index=True, return_counts=True)
    return first, counts, penalties, grads


@pytest.mark.parametrize("reading", ["per_sample", "batch_mean", "elementwise_mean"])
def test_stochastic_over_all_choices_is_exact(reading):
    """One of three samples: the mean over the three possible steps is the exact step."""
    params, z, labels = problem()
    step = fisher.value_and_grad(pair, mode="stochastic", reading=reading, fraction=1 / 3, weight=1.0)
    drawn = jax.jit(jax.vmap(lambda key: step(params, z, labels, rng=key)))(jax.random.split(jax.random.key(0), 60))
    first, counts, penalties, grads = distinct(drawn)
    assert len(first) == 3 and counts.min() > 8
    (_, expected), expected_grads = exact(reading=reading, weight=1.0)
    assert_close(penalties[first].mean(), expected["penalty"])
    assert_close(jax.tree.map(lambda g: g[first].mean(axis=0), grads), expected_grads, rtol=1e-4)
    assert_close(drawn[0][1]["loss"], jnp.full(60, expected["loss"]))


def test_stochastic_over_patches_is_exact_on_average():
    """One of six patches; the mean gradient is that of all."""
    params, z, labels = problem()
    options = {"reading": "centered", "patch": (4, 5), "weight": 1.0}
    z = jnp.concatenate([z, z[::-1] * 0.5], axis=2)
    labels = jnp.concatenate([labels, labels[::-1]], axis=2)
    step = fisher.value_and_grad(pair, mode="stochastic", fraction=1 / 6, **options)
    drawn = jax.jit(jax.vmap(lambda key: step(params, z, labels, rng=key)))(jax.random.split(jax.random.key(0), 90))
    first, _, penalties, grads = distinct(drawn)
    assert len(first) == 6
    (_, expected), expected_grads = jax.jit(fisher.value_and_grad(pair, **options))(params, z, labels)
    assert_close(penalties[first].mean(), expected["penalty"])
    assert_close(jax.tree.map(lambda g: g[first].mean(axis=0), grads), expected_grads, rtol=1e-4)


def test_stochastic_costs_the_share_that_it_penalises():
    def flops(**options):
        step = jax.jit(fisher.value_and_grad(bce, **options))
        batch = jnp.ones((16, 32, 32, 5)), jnp.ones((16, 32, 32), jnp.int32)
        analysis = step.lower(problem()[0], *batch, rng=jax.random.key(0)).compile().cost_analysis()
        return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]

    plain, full, eighth = flops(weight=0), flops(), flops(mode="stochastic")
    assert eighth - plain < 0.25 * (full - plain)


def test_every_k():
    params, z, labels = problem()
    step = compiled(pair, mode="every_k", every=4)
    plain = compiled(pair, weight=0)(params, z, labels)
    expected = compiled(pair, weight=0.4)(params, z, labels)
    for number in (0, 4, 8):
        (total, measurements), grads = step(params, z, labels, step=jnp.int32(number))
        assert_close((total, grads), (expected[0][0], expected[1]))
        assert_close(measurements["penalty"], expected[0][1]["penalty"])
        assert_close(measurements["ratio"], expected[0][1]["ratio"])
    for number in (1, 2, 3):
        (total, measurements), grads = step(params, z, labels, step=jnp.int32(number))
        assert_close((total, grads), (plain[0][0], plain[1]))
        assert all(measurements[name] == 0 for name in fisher.PENALTY_MEASUREMENTS)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reading": "batch_mean"},
        {"mode": "finite_difference"},
        {"mode": "stochastic", "fraction": 0.6},
        {"mode": "every_k"},
        {"mode": "perturbed", "weight": 0.01},
    ],
)
def test_microbatches_change_nothing_but_the_memory(options):
    params, z, labels = problem()
    more = {"rng": jax.random.key(3), "step": 0}
    whole, *parts = (compiled(pair, microbatch=size, **options)(params, z, labels, **more) for size in (0, 1, 3))
    for part in parts:
        assert_close(part, whole, rtol=1e-4)


def test_microbatches_need_less_memory():
    def memory(**options):
        step = jax.jit(fisher.value_and_grad(bce, **options))
        batch = jnp.ones((8, 64, 64, 5)), jnp.ones((8, 64, 64), jnp.int32)
        return step.lower(problem()[0], *batch).compile().memory_analysis().temp_size_in_bytes

    assert memory(microbatch=1) < 1.3 * memory(weight=0) < memory()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("microbatch", [0, 1])
def test_half_precision_and_tiny_gradients(dtype, microbatch):
    """Feature gradients near 1e-6: their squares are zero in float16, and sums of them coarse in bfloat16."""
    params, z, labels = problem()
    params = jax.tree.map(lambda p: p.astype(dtype), params)

    def small(params, z, labels):
        return 1e-4 * bce(params, z, labels)

    step = compiled(small, normalisation="raw", weight=1.0, microbatch=microbatch)
    (_, measurements), grads = step(params, z.astype(dtype), labels)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(dtype)}
    with jax.enable_x64():
        double = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), (params, z.astype(dtype)))
        expected = float(fisher.penalty(small, *double, labels, normalisation="raw")[0])
    assert 0 < expected < 1e-9 and measurements["feature_gradient_norm"] / z[0].size ** 0.5 < 1e-5
    np.testing.assert_allclose(measurements["penalty"], expected, rtol=2**-8)
    assert fisher.usable(measurements)


def test_bad_options():
    for options, message in (
        ({"mode": "exakt"}, "mode 'exakt' is not known; use exact, .* or perturbed"),
        ({"reading": "per_batch"}, "reading 'per_batch' is not known; use per_sample, .* or centered"),
        ({"fraction": 0.0}, "fraction 0.0 must be above 0 and at most 1"),
        ({"fraction": 1.5}, "fraction 1.5 must be"),
        ({"every": 0}, "every 0 must be a whole number of at least 1"),
        ({"every": 2.5}, "every 2.5 must be a whole number"),
        ({"patch": (2, 2)}, "patch .* is only for the reading 'centered'"),
        ({"patch": (2, 0), "reading": "centered"}, "whole numbers of at least 1"),
        ({"microbatch": 1, "reading": "centered"}, "'centered' needs all samples"),
    ):
        with pytest.raises(UsageError, match=message):
            fisher.value_and_grad(bce, **options)


def test_missing_arguments_of_the_step():
    params, z, labels = problem()
    with pytest.raises(UsageError, match=r"'stochastic' needs a key: step\(..., rng="):
        fisher.value_and_grad(bce, mode="stochastic")(params, z, labels)
    with pytest.raises(UsageError, match=r"'every_k' needs the number of the step: step\(..., step="):
        fisher.value_and_grad(bce, mode="every_k")(params, z, labels)

    def loss_fn(params, z, frozen, labels):
        return bce(params, z * frozen["scale"], labels)

    frozen = {"scale": jnp.ones(())}
    for options in ({"microbatch": 1}, {"mode": "stochastic"}):
        more = {"rng": jax.random.key(0)}
        with pytest.raises(UsageError, match=r"Argument 0 .* shape \(\) without the batch axis of 3; .* batched_args"):
            fisher.value_and_grad(loss_fn, batched_args=(0, 1), **options)(params, z, frozen, labels, **more)
        with pytest.raises(UsageError, match="has 2 arguments after the features; name those .* with batched_args"):
            fisher.value_and_grad(loss_fn, **options)(params, z, frozen, labels, **more)
    step = jax.jit(fisher.value_and_grad(loss_fn, microbatch=1, batched_args=(1,)))
    assert_close(step(params, z, frozen, labels), compiled(bce)(params, z, labels))


@pytest.mark.slow
def test_gradient_errors_on_the_tiny_sam():
    """The decoder that ships, its own features of blobs, the default weight: total gradients, but of the modes that
    evaluate shifted features the penalty's share."""
    sam, samples = backbone.load_backbone(None, 1), 4
    rng = np.random.default_rng(0)
    centres = rng.uniform(16, 48, size=(samples, 2))
    rows, columns = np.mgrid[:64, :64]
    inside = (columns - centres[:, :1, None]) ** 2 + (rows - centres[:, 1:, None]) ** 2 < 150
    images = inside.repeat(2, axis=1).repeat(2, axis=2)[..., None] - 0.5 + 0.3 * rng.normal(size=(samples, 128, 128, 3))
    z = jax.jit(sam.encode)(sam.encoder, jnp.asarray(images, jnp.float32))
    points = np.stack([2 * centres, np.full((samples, 2), 4.0)], axis=1)
    prompts = Prompts(points=jnp.asarray(points, jnp.float32), labels=jnp.tile(jnp.array([1, 0]), (samples, 1)))

    def loss_fn(params, z, frozen, labels, prompts):
        logits = sam.decode(params, frozen, z, prompts)
        return losses.get("sam")(logits, labels), losses.get("bce")(logits, labels)

    arguments = sam.trainable, z, sam.frozen, jnp.asarray(inside, jnp.int32), prompts

    def gradient(**options):
        step = jax.jit(fisher.value_and_grad(loss_fn, batched_args=(1, 2), **options))
        return step, step(*arguments, rng=jax.random.key(0), step=0)

    _, ((_, measurements), expected) = gradient()
    plain = flat(gradient(weight=0)[1][1])

    def share_error(grads):
        return relative_error(flat(grads) - plain, flat(expected) - plain)

    errors = {
        name: relative_error(gradient(**options)[1][1], expected)
        for name, options in {
            "every_k": {"mode": "every_k", "every": 1},
            "microbatch": {"microbatch": 1},
        }.items()
    }
    _, ((_, shifted), grads) = gradient(mode="perturbed")
    errors |= {"perturbed": share_error(grads), "shift": shifted["shift"]}
    errors["finite_difference"] = share_error(gradient(mode="finite_difference")[1][1])
    stochastic, _ = gradient(mode="stochastic", fraction=0.25)
    draws = [stochastic(*arguments, rng=jax.random.key(i))[1] for i in range(40)]
    errors["stochastic"] = np.mean([relative_error(draw, expected) for draw in draws])
    errors["stochastic mean"] = relative_error(jax.tree.map(lambda *g: sum(g) / len(g), *draws), expected)
    print({name: float(error) for name, error in errors.items()}, float(measurements["ratio"]))
    assert 0.1 < errors["finite_difference"] < 0.9 and errors["perturbed"] > 5  # measured: 0.6 and 35; ReLU switches
    assert errors["every_k"] < 1e-5 and errors["microbatch"] < 1e-4
    assert errors["stochastic mean"] < 0.5 * errors["stochastic"]
