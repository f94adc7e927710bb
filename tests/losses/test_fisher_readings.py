"""Readings of the penalty: goldens, normalisations, 3D patches, and labels drawn from the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calsegx import configs
from calsegx.interfaces import UsageError
from calsegx.losses import cross_entropy, fisher, fisher_modes, fisher_readings, overlap
from tests import golden_cases
from tests.losses.fisher_toy import assert_close, bce, compiled, decode, pair, problem

GOLDEN = {  # case -> (loss, reading)
    "fip_per_sample_bce": (cross_entropy.ce, "per_sample"),
    "fip_per_sample_dice": (overlap.dice, "per_sample"),
    "fip_per_sample_bce_sum": (lambda x, y: jnp.sum(cross_entropy.per_voxel(x, y), axis=(1, 2)), "per_sample"),
    "fip_batch_mean_loss_bce": (cross_entropy.ce, "batch_mean"),
    "fip_elementwise_mean_bce": (cross_entropy.ce, "elementwise_mean"),
    "fip_centered_bce": (cross_entropy.ce, "centered"),
}
# The step of the finite difference is 1e-4 here, not the default 0.01: its error is of second order.
TOLERANCES = {"exact": 1e-9, "finite_difference": 1e-5}


@pytest.mark.parametrize("mode", TOLERANCES)
@pytest.mark.parametrize("case_id", GOLDEN)
def test_golden(case_id: str, mode: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fisher_modes, "_RELATIVE_STEP", 1e-4)
    case, (loss, reading) = golden_cases.stored("losses", case_id), GOLDEN[case_id]
    recorded = case.outputs
    with jax.enable_x64():
        params = {name: jnp.asarray(case[name]) for name in ("W1", "b1", "W2", "b2")}
        z, labels = jnp.asarray(np.moveaxis(case["z"], 1, -1)), jnp.asarray(case.labels)

        def loss_fn(params, z, labels):
            return loss(decode(params, z), labels)

        step = fisher.value_and_grad(loss_fn, weight=0.7, mode=mode, reading=reading, normalisation="raw")

        def everything(params):
            return step(params, z, labels), jax.grad(lambda p: jnp.mean(loss_fn(p, z, labels)))(params)

        ((total, measurements), grads), plain = jax.tree.map(np.asarray, jax.jit(everything)(params))

    np.testing.assert_allclose(measurements["penalty"], recorded["penalty"], rtol=1e-9)
    np.testing.assert_allclose(measurements["loss"], recorded["loss"], rtol=1e-9)
    np.testing.assert_allclose(total, recorded["loss"] + 0.7 * recorded["penalty"], rtol=1e-9)
    gradient = recorded["g_z"] * (len(z) if reading == "batch_mean" else 1)  # there of the batch's mean loss
    squared_norms = np.sum(gradient**2, axis=(1, 2, 3))
    np.testing.assert_allclose(measurements["feature_gradient_norm"], np.sqrt(squared_norms.mean()), rtol=1e-9)
    tolerance = TOLERANCES[mode]
    for name in params:
        penalty_gradient, expected = (grads[name] - plain[name]) / 0.7, recorded[f"d_{name}"]
        rounding = 1e-14 * np.abs(grads[name]).max() + (tolerance > 1e-9) * tolerance * np.abs(expected).max()
        np.testing.assert_allclose(penalty_gradient, expected, rtol=tolerance, atol=rounding)


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


@pytest.mark.parametrize("normalisation", fisher.NORMALISATIONS)
def test_other_readings_are_fractions_of_per_sample(normalisation):
    params, z, labels = problem()
    value = {
        reading: fisher.penalty(bce, params, z, labels, reading=reading, normalisation=normalisation)[0]
        for reading in ("per_sample", "batch_mean", "elementwise_mean")
    }
    assert_close(value["batch_mean"], value["per_sample"] / 3**2)
    assert_close(value["elementwise_mean"], value["per_sample"] / (4 * 5 * 5))


def volumes(seed=0):
    """(params, z [2, 4, 4, 3, 5], labels): two volumes of four slices."""
    rng = np.random.default_rng(seed)
    params, _, _ = problem(seed)
    z = jnp.asarray(rng.normal(size=(2, 4, 4, 3, 5)), jnp.float32)
    return params, z, jnp.asarray(rng.integers(0, 2, size=(2, 4, 4, 3)))


@pytest.mark.parametrize("patch", [None, (2, 2, 3), (4, 1, 1)])
@pytest.mark.parametrize("normalisation", fisher.NORMALISATIONS)
def test_centered_over_patches_by_hand(patch, normalisation):
    params, z, labels = volumes()
    d, h, w = patch or (1, 1, 1)

    def by_hand(params):
        """Every patch shares one embedding: its gradient is that of adding a constant to all its positions."""

        def shifted(embeddings):
            spread = embeddings.repeat(d, axis=1).repeat(h, axis=2).repeat(w, axis=3)
            return jnp.sum(bce(params, z + spread, labels))

        g = jax.grad(shifted)(jnp.zeros((2, 4 // d, 4 // h, 3 // w, 5)))
        means = z.reshape(2, 4 // d, d, 4 // h, h, 3 // w, w, 5).mean(axis=(2, 4, 6))
        scale = jnp.sum(means**2, axis=(1, 2, 3, 4)) if normalisation == "relative" else jnp.ones(2)
        return 0.5 * jnp.mean(scale * jnp.sum((g - g.mean(axis=(0, 1, 2, 3))) ** 2, axis=(1, 2, 3, 4)))

    def ours(params):
        options = {"reading": "centered", "normalisation": normalisation, "patch": patch}
        return fisher.penalty(bce, params, z, labels, **options)[0]

    assert_close(jax.jit(jax.value_and_grad(ours))(params), jax.jit(jax.value_and_grad(by_hand))(params), rtol=1e-4)


def test_relative_does_not_change_with_the_number_of_the_features():
    """Every position given as a 2 x 2 patch of copies: the same volume on a finer grid."""
    params, z, labels = problem()
    fine = z.repeat(2, axis=1).repeat(2, axis=2)
    fine_labels = labels.repeat(2, axis=1).repeat(2, axis=2)
    for coarse, options in (({}, {}), ({"reading": "centered"}, {"reading": "centered", "patch": (2, 2)})):
        expected, _ = fisher.penalty(bce, params, z, labels, **coarse)
        actual, _ = fisher.penalty(bce, params, fine, fine_labels, **options)
        assert_close(actual, expected)


def test_centered_patch_must_fit():
    params, z, labels = volumes()
    for patch in ((3, 1, 1), (2, 2), (8, 1, 1)):
        with pytest.raises(UsageError, match=r"must have one size for each token axis of the features \(2, 4, 4, 3, 5"):
            fisher.value_and_grad(bce, reading="centered", patch=patch)(params, z, labels)


def test_configuration_knows_the_same_names():
    assert configs.FISHER_CHOICES["reading"] == fisher.READINGS
    assert configs.FISHER_CHOICES["normalisation"] == fisher.NORMALISATIONS
    assert configs.FISHER_CHOICES["mode"] == fisher.MODES


@pytest.mark.parametrize("channels", [1, 3])
def test_sampled_labels_give_the_true_fisher(channels):
    """Linear logits ``W_v z``: ``E_y |grad_z mean_v l_v|^2 = mean_v' tr(W_v^T (diag(p) - p p^T) W_v) / n``."""
    rng = np.random.default_rng(0)
    samples, voxels, size = 3, 4, 5
    weights = jnp.asarray(rng.normal(size=(voxels, channels, size)), jnp.float32)
    z = jnp.asarray(rng.normal(size=(samples, size)), jnp.float32)
    data = jnp.asarray(rng.integers(0, max(2, channels), size=(samples, voxels)))

    def sampled(weights, z, keys):
        logits = jnp.einsum("vkc,bc->bvk", weights, z)
        return cross_entropy.ce(logits, fisher.sample_labels(keys, logits))

    def penalty(key):
        keys = jax.random.split(key, samples)
        return fisher.penalty(sampled, weights, z, keys, normalisation="raw")[0]

    def empirical(weights, z, labels):
        return cross_entropy.ce(jnp.einsum("vkc,bc->bvk", weights, z), labels)

    draws = np.asarray(jax.jit(jax.vmap(penalty))(jax.random.split(jax.random.key(1), 4000)))
    logits = np.einsum("vkc,bc->bvk", weights, z)
    if channels == 1:
        p = 1 / (1 + np.exp(-logits[..., 0]))
        trace = p * (1 - p) * np.sum(np.square(weights[:, 0]), axis=-1)
    else:
        p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        mean = np.einsum("bvk,vkc->bvc", p, weights)
        trace = np.einsum("bvk,vk->bv", p, np.sum(np.square(weights), axis=-1)) - np.sum(mean**2, axis=-1)
    expected = 0.5 * np.mean(trace.sum(axis=1)) / voxels**2
    noise = draws.std() / np.sqrt(len(draws))
    assert abs(draws.mean() - expected) < 4 * noise < 0.1 * expected
    with_data, _ = fisher.penalty(empirical, weights, z, data, normalisation="raw")
    assert abs(with_data - expected) > 20 * noise  # another quantity altogether


def test_sampled_labels_are_constants_and_one_key_per_sample():
    params, z, _ = problem()
    keys = jax.random.split(jax.random.key(0), len(z))

    def loss_fn(params, z, keys):
        logits = decode(params, z)
        return cross_entropy.ce(logits, fisher.sample_labels(keys, logits))

    labels = fisher.sample_labels(keys, decode(params, z))
    assert labels.shape == z.shape[:-1] and labels.dtype == jnp.int32
    for i in range(len(z)):  # a sample's labels do not depend on its neighbours
        np.testing.assert_array_equal(labels[i], fisher.sample_labels(keys[i], decode(params, z)[i]))
    assert_close(compiled(loss_fn)(params, z, keys), compiled(bce)(params, z, labels))
    for legacy in (jnp.zeros(2, jnp.uint32), jnp.zeros((len(z), 2), jnp.uint32)):
        with pytest.raises(UsageError, match="legacy key of jax.random.PRNGKey"):
            fisher.sample_labels(legacy, decode(params, z))


def test_squared_norms_are_summed_in_float32():
    halves = jnp.full((1, 4096), 1e-6, jnp.bfloat16)
    expected = 4096 * float(halves[0, 0]) ** 2
    np.testing.assert_allclose(fisher_readings.squared_norms(halves), [expected], rtol=1e-6)
