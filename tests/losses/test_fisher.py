"""The Fisher penalty: goldens, normalisations, what is compiled, and the check of second derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calsegx.interfaces import UsageError
from calsegx.losses import composite, cross_entropy, fisher, overlap
from tests.losses import golden

LOSSES = {
    "fip_per_sample_bce": lambda logits, labels: cross_entropy.ce(logits, labels),
    "fip_per_sample_dice": overlap.dice,
    "fip_per_sample_bce_sum": lambda logits, labels: jnp.sum(cross_entropy.per_voxel(logits, labels), axis=(1, 2)),
}


def decode(params, z):
    return jnp.tanh(z @ params["W1"].T + params["b1"]) @ params["W2"].T + params["b2"]


def bce(params, z, labels):
    return cross_entropy.ce(decode(params, z), labels)


def pair(params, z, labels):
    logits = decode(params, z)
    return composite.sam(logits, labels), cross_entropy.ce(logits, labels)


def problem(seed: int = 0):
    """(params, z, labels): the toy decoder of the goldens, in float32."""
    rng = np.random.default_rng(seed)
    shapes = {"W1": (7, 5), "b1": (7,), "W2": (1, 7), "b2": (1,)}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    z = jnp.asarray(rng.normal(size=(3, 4, 5, 5)), jnp.float32)
    return params, z, jnp.asarray(rng.integers(0, 2, size=(3, 4, 5)))


@functools.cache
def compiled(loss_fn, **options):
    return jax.jit(fisher.value_and_grad(loss_fn, **options))


def assert_close(actual, expected, rtol: float = 2e-5):
    def leaf(a, e):
        np.testing.assert_allclose(a, e, rtol=rtol, atol=rtol * np.abs(e).max())

    jax.tree.map(leaf, actual, expected)


@pytest.mark.parametrize("case_id", LOSSES)
def test_golden(case_id: str):
    case = golden.read(case_id)
    with jax.enable_x64():
        params = {name: jnp.asarray(case[name]) for name in ("W1", "b1", "W2", "b2")}
        z, labels = jnp.asarray(case["z"]), jnp.asarray(case["labels"])

        def loss_fn(params, z, labels):
            return LOSSES[case_id](decode(params, z), labels)

        step = fisher.value_and_grad(loss_fn, weight=0.7, normalisation="raw")

        def everything(params):
            return step(params, z, labels), jax.grad(lambda p: jnp.mean(loss_fn(p, z, labels)))(params)

        ((total, measurements), grads), plain = jax.tree.map(np.asarray, jax.jit(everything)(params))

    np.testing.assert_allclose(measurements["penalty"], case["penalty"], rtol=1e-9)
    np.testing.assert_allclose(measurements["loss"], case["loss"], rtol=1e-9)
    np.testing.assert_allclose(total, case["loss"] + 0.7 * case["penalty"], rtol=1e-9)
    squared_norms = np.sum(case["g_z"] ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(measurements["feature_gradient_norm"], np.sqrt(squared_norms.mean()), rtol=1e-9)
    for name in params:
        penalty_gradient = (grads[name] - plain[name]) / 0.7
        rounding = 1e-14 * np.abs(grads[name]).max()
        np.testing.assert_allclose(penalty_gradient, case[f"d_{name}"], rtol=1e-9, atol=rounding)


def test_relative_is_raw_with_the_feature_norm_inserted():
    params, z, labels = problem()

    def by_hand(params):
        def one(zi, label):
            gradient = jax.grad(lambda zi: bce(params, zi[None], label[None])[0])(zi)
            return 0.5 * jnp.sum(zi**2) * jnp.sum(gradient**2)

        return jnp.mean(jax.vmap(one)(z, labels))

    def ours(params):
        return fisher.penalty(bce, params, z, labels, normalisation="relative")[0]

    expected = jax.jit(jax.value_and_grad(by_hand))(params)
    assert_close(jax.jit(jax.value_and_grad(ours))(params), expected)


def test_total_is_task_plus_weighted_penalty_of_the_other_loss():
    params, z, labels = problem()
    (total, measurements), grads = compiled(pair, weight=0.3)(params, z, labels, weight_scale=0.5)
    penalty, penalty_gradient = jax.jit(jax.value_and_grad(lambda p: fisher.penalty(bce, p, z, labels)[0]))(params)
    task, task_gradient = jax.jit(jax.value_and_grad(lambda p: jnp.mean(pair(p, z, labels)[0])))(params)
    expected = jax.tree.map(lambda t, p: t + 0.15 * p, task_gradient, penalty_gradient)
    assert_close(total, task + 0.15 * penalty)
    assert_close(grads, expected)
    assert set(measurements) == {"loss", "penalty", "ratio", "feature_gradient_norm", "gradient_norm"}
    assert_close(measurements["loss"], task)
    assert_close(measurements["ratio"], 0.3 * penalty / task)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(grads)))
    assert_close(measurements["gradient_norm"], norm)


def test_a_task_of_named_terms():
    params, z, labels = problem()

    def terms(params, z, labels):
        task, penalised = pair(params, z, labels)
        return {"overlap": task - penalised, "cross_entropy": penalised}, penalised

    (total, measurements), grads = compiled(terms)(params, z, labels)
    (expected_total, expected), expected_grads = compiled(pair)(params, z, labels)
    assert_close((total, grads), (expected_total, expected_grads))
    assert_close(measurements["overlap"] + measurements["cross_entropy"], expected["loss"])
    assert set(measurements) - set(expected) == {"overlap", "cross_entropy"}


def test_relative_does_not_change_with_the_scale_of_the_features():
    params, z, labels = problem()
    scaled = params | {"W1": params["W1"] / 50}
    (total, measurements), grads = compiled(pair)(params, z, labels)
    (total_50, measurements_50), grads_50 = compiled(pair)(scaled, 50 * z, labels)
    assert_close(total_50, total)
    assert_close(measurements_50["penalty"], measurements["penalty"])
    assert_close(grads_50 | {"W1": grads_50["W1"] / 50}, grads, rtol=1e-4)
    np.testing.assert_allclose(
        measurements_50["feature_gradient_norm"], measurements["feature_gradient_norm"] / 50, rtol=1e-4
    )


def test_jit_equals_eager():
    params, z, labels = problem()
    eager = fisher.value_and_grad(pair)(params, z, labels, weight_scale=0.25)
    assert_close(compiled(pair)(params, z, labels, weight_scale=jnp.float32(0.25)), eager)


def test_the_warm_up_scale_does_not_recompile():
    params, z, labels = problem()
    traces = []

    def traced(*arguments):
        traces.append(None)
        return pair(*arguments)

    step = jax.jit(fisher.value_and_grad(traced))
    results = [step(params, z, labels, weight_scale=jnp.float32(0))]
    first = len(traces)
    results += [step(params, z, labels, weight_scale=jnp.float32(scale)) for scale in (0.5, 1)]
    assert len(traces) == first > 0
    losses, totals = [r[0][1]["loss"] for r in results], [r[0][0] for r in results]
    np.testing.assert_array_equal(totals[0], losses[0])
    assert totals[0] < totals[1] < totals[2]
    assert_close(results[0][1], compiled(pair, weight=0)(params, z, labels)[1])


def test_weight_zero_compiles_to_the_plain_step():
    params, z, labels = problem()

    def plain(params, z, labels):
        return jax.value_and_grad(lambda p: jnp.mean(pair(p, z, labels)[0]))(params)

    def matmuls(function):
        return str(jax.make_jaxpr(function)(params, z, labels)).count("dot_general")

    zero = fisher.value_and_grad(pair, weight=0)
    assert matmuls(zero) == matmuls(plain) < matmuls(fisher.value_and_grad(pair))
    (total, measurements), grads = compiled(pair, weight=0)(params, z, labels)
    assert_close((total, grads), jax.jit(plain)(params, z, labels))
    assert set(measurements) == {"loss", "gradient_norm"}


def test_bfloat16_features_are_cast_first():
    params, z, labels = problem()
    halves = z.astype(jnp.bfloat16)
    expected = compiled(pair)(params, halves.astype(jnp.float32), labels)
    actual = compiled(pair)(params, halves, labels)
    assert actual[0][1]["penalty"].dtype == jnp.float32
    assert_close(actual, expected, rtol=1e-6)


def test_bad_options():
    with pytest.raises(UsageError, match="normalisation 'relativ' is not known; use relative or raw"):
        fisher.value_and_grad(bce, normalisation="relativ")
    for weight in (-0.1, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="must be finite and at least 0"):
            fisher.value_and_grad(bce, weight=weight)


def stopped(params, z, labels):
    """Right value and right first derivative, (p - y) as a constant: the second derivative lacks dp."""
    logits = decode(params, z)
    error = jax.lax.stop_gradient(jax.nn.sigmoid(logits[..., 0]) - labels)
    return cross_entropy.voxel_mean(error * logits[..., 0])


@jax.custom_vjp
def fused_tanh(x):
    return jnp.tanh(x)


# What a hand-written kernel does: its backward pass is opaque to a second differentiation.
fused_tanh.defvjp(
    lambda x: (jnp.tanh(x), jnp.tanh(x)),
    lambda y, g: (jax.lax.stop_gradient(1 - y**2) * g,),
)


def fused(params, z, labels):
    logits = fused_tanh(z @ params["W1"].T + params["b1"]) @ params["W2"].T + params["b2"]
    return cross_entropy.ce(logits, labels)


@jax.custom_vjp
def honest_tanh(x):
    return jnp.tanh(x)


honest_tanh.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: ((1 - jnp.tanh(x) ** 2) * g,))


def honest(params, z, labels):
    logits = honest_tanh(z @ params["W1"].T + params["b1"]) @ params["W2"].T + params["b2"]
    return cross_entropy.ce(logits, labels)


def kinked(params, z, labels):
    """ReLU: the first derivative jumps wherever a unit switches."""
    hidden = jax.nn.relu(z @ params["W1"].T + params["b1"])
    return cross_entropy.ce(hidden @ params["W2"].T + params["b2"], labels)


def single(params, z, labels):
    """A decoder that computes in float32, whatever it is given."""
    params, z = jax.tree.map(lambda x: x.astype(jnp.float32), (params, z))
    return bce(params, z, labels)


@pytest.mark.parametrize("loss_fn", [pair, honest, kinked, single])
def test_check_accepts(loss_fn):
    params, z, labels = problem()
    # Biases start at zero and features come in half precision.
    params |= {"b1": jnp.zeros(7), "b2": jnp.zeros(1)}
    fisher.second_derivative_check(loss_fn, params, z.astype(jnp.bfloat16), labels)


@pytest.mark.parametrize("loss_fn", [stopped, fused])
def test_check_detects(loss_fn):
    for seed in range(2):
        params, z, labels = problem(seed)
        with pytest.raises(ValueError, match="second derivative of the loss is wrong"):
            fisher.second_derivative_check(loss_fn, params, z, labels, seed=seed)


def test_check_detects_features_cut_off_and_bad_values():
    params, z, labels = problem()
    with pytest.raises(ValueError, match=r"penalty is 0\.0: .* stop_gradient"):
        fisher.second_derivative_check(lambda p, z, y: bce(p, jax.lax.stop_gradient(z), y), params, z, labels)
    with pytest.raises(ValueError, match="penalty is nan"):
        fisher.second_derivative_check(bce, params, z * jnp.nan, labels)
