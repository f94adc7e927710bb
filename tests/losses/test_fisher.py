"""The penalised step: its terms, its measurements, what is compiled, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calsegx.interfaces import UsageError
from calsegx.losses import fisher
from tests.losses.fisher_toy import assert_close, bce, compiled, pair, problem


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
    assert_close(measurements["ratio"], penalty / task)
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


def test_a_loss_of_zero_has_a_ratio_of_zero():
    params, z, labels = problem()
    step = compiled(lambda p, z, y: (0.0 * bce(p, z, y), bce(p, z, y)))
    (_, measurements), _ = step(params, z, labels)
    assert measurements["ratio"] == 0 < measurements["penalty"]


@pytest.mark.parametrize("mode", ["exact", "finite_difference", "perturbed"])
@pytest.mark.parametrize("reduce", [jnp.mean, lambda loss: loss[:, None], lambda loss: loss[:2]])
def test_every_loss_must_be_per_sample(mode, reduce):
    params, z, labels = problem()
    for loss_fn in (
        lambda p, z, y: reduce(bce(p, z, y)),
        lambda p, z, y: (bce(p, z, y), reduce(bce(p, z, y))),
        lambda p, z, y: ({"a": bce(p, z, y), "b": reduce(bce(p, z, y))}, bce(p, z, y)),
    ):
        with pytest.raises(UsageError, match=r"array of shape \(.*one value per sample, shape \(3,\)"):
            jax.eval_shape(fisher.value_and_grad(loss_fn, mode=mode), params, z, labels)


@pytest.mark.parametrize("name", ["loss", "penalty", "ratio", "gradient_norm", "feature_gradient_norm", "shift"])
def test_task_terms_have_names_of_their_own(name):
    params, z, labels = problem()
    with pytest.raises(UsageError, match=f"is named {name!r}, the name of another measurement"):
        jax.eval_shape(fisher.value_and_grad(lambda *a: ({name: bce(*a)}, bce(*a))), params, z, labels)


def test_bad_options():
    with pytest.raises(UsageError, match="normalisation 'relativ' is not known; use relative or raw"):
        fisher.value_and_grad(bce, normalisation="relativ")
    for weight in (-0.1, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="must be finite and at least 0"):
            fisher.value_and_grad(bce, weight=weight)
