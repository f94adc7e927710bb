"""The check of second derivatives, and what a training step's measurements must be."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calsegx.interfaces import InputError
from calsegx.losses import cross_entropy, fisher
from tests.losses.fisher_toy import bce, decode, pair, problem


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


GOOD = {"loss": 1.0, "penalty": 2.0, "gradient_norm": 3.0, "feature_gradient_norm": 4.0, "ratio": math.nan}


@pytest.mark.parametrize("name", ["loss", "penalty", "gradient_norm", "feature_gradient_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_by_name(name, value):
    fisher.check_measurements(GOOD, 7)
    assert jax.jit(fisher.usable)(GOOD)
    bad = GOOD | {name: value}
    assert not jax.jit(fisher.usable)(bad)
    said = rf"stopped at step 7: the {name.replace('_', ' ')} is {value}; go home\."
    with pytest.raises(InputError, match=said):
        fisher.check_measurements(bad, 7, "go home")


def test_all_bad_quantities_are_named():
    with pytest.raises(InputError, match="the loss is nan and the penalty is inf; use a lower learning rate"):
        fisher.check_measurements(GOOD | {"loss": math.nan, "penalty": math.inf}, 3)


@pytest.mark.parametrize(("shift", "good"), [(0.0999, True), (0.11, False), (math.inf, False), (math.nan, False)])
def test_a_large_shift_is_refused(shift, good):
    measurements = GOOD | {"shift": shift}
    assert bool(fisher.usable(jax.tree.map(jnp.float32, measurements))) == good
    if good:
        fisher.check_measurements(measurements, 7)
    else:
        with pytest.raises(InputError, match=f"step 7: the features were shifted by {shift:.3g} of their norm"):
            fisher.check_measurements(measurements, 7)


def test_error_of_perturbed():
    """Small with a small weight, too large with one whose shift is still allowed."""
    params, z, labels = problem()
    errors = {}
    for weight in (0.0003, 0.03):
        errors[weight] = fisher.perturbed_error(pair, params, z, labels, weight=weight)
        (_, measurements), _ = jax.jit(fisher.value_and_grad(pair, mode="perturbed", weight=weight))(params, z, labels)
        assert measurements["shift"] < 0.1
    assert errors[0.0003] < 0.01 < 0.1 < errors[0.03]


def test_overflow_is_found():
    """Finite features and loss, but a penalty beyond float32."""
    params, z, labels = problem()
    step = fisher.value_and_grad(lambda p, z, y: bce(p, z, y) * 1e20)
    (_, measurements), _ = jax.jit(step)(params, z, labels)
    assert np.isfinite(measurements["loss"]) and not fisher.usable(measurements)
    with pytest.raises(InputError, match="the penalty is inf"):
        fisher.check_measurements(measurements, 1)
