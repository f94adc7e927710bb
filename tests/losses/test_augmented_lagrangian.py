"""CRaC: penalty functions, the per-sample penalty against a literal reference, and the update after each epoch."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calsegx.interfaces import InputError, UsageError
from calsegx.losses import augmented_lagrangian as crac
from calsegx.losses import cross_entropy

FUNCTIONS = crac.FUNCTIONS
OPTIONS = ("function", "constraint", "margin", "outer_margin")
CRAC, SUMS = (jax.jit(f, static_argnames=OPTIONS) for f in (crac.crac, crac.sums))


def sample(shape=(5, 6), count=3, batch=2, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, size=(batch, *shape, count)).astype(dtype)
    # Large equal areas, so that both regions exist.
    labels = np.broadcast_to(np.arange(shape[-1]) * max(count, 2) // shape[-1], (batch, *shape)).astype(np.int32)
    return logits, labels


def state_of(classes=3):
    ramp = jnp.arange(2.0 * classes).reshape(2, classes)
    return crac.init(classes)._replace(multipliers=0.02 + 0.03 * ramp, rho=0.1 + 0.2 * ramp)


def violations(logits, labels, constraint="absolute", margin=5.0):
    """Literal h [B, 2, *spatial, K] (inner, outer), 0 outside the region, from the patches of an edge-padded image."""
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    reach = [(0, 0)] + [(1, 1)] * (labels.ndim - 1)
    padded = np.pad(labels, reach, mode="edge")
    h = np.zeros((labels.shape[0], 2, *logits.shape[1:]))
    for index in np.ndindex(labels.shape):
        patch = padded[(index[0], *(slice(i, i + 3) for i in index[1:]))]
        outer = int(len(np.unique(patch)) > 1)
        target = np.array([np.mean(patch == k) for k in range(logits.shape[-1])]) * (1.0 if outer else margin)
        difference = target - logits[index]
        h[(index[0], outer, *index[1:])] = np.abs(difference) if constraint == "absolute" else difference
    return h


def per_class(array, h):
    """[2, K] for h [B, 2, *spatial, K]."""
    return np.asarray(array, np.float64).reshape(1, 2, *[1] * (h.ndim - 3), -1)


# ------------------------------------------------------------------------------------------ penalty functions


@pytest.mark.parametrize("function", FUNCTIONS)
def test_penalty_axioms(function):
    with jax.enable_x64():
        h = jnp.asarray([-1e4, -3.0, -0.5, -0.1, 0.0, 0.1, 0.5, 3.0, 1e4])
        for multiplier, rho in itertools.product((1e-6, 0.05, 1.0), (0.1, 1.0, 10.0)):
            slopes = crac.penalty_derivative(h, multiplier, rho, function=function)
            gradient = jax.vmap(jax.grad(lambda x: crac.penalty(x, multiplier, rho, function=function)))  # noqa: B023
            np.testing.assert_allclose(gradient(h), slopes, rtol=1e-12, atol=1e-15)
            assert (slopes >= 0).all()
            assert (np.diff(slopes) >= 0).all()  # convex
            assert slopes[4] == multiplier
            assert crac.penalty(h, multiplier, rho, function=function)[4] == 0


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_larger_rho_separates_good_from_bad(function):
    weak, strong = (crac.penalty_derivative(jnp.asarray([-0.5, 0.5]), 1.0, rho, function=function) for rho in (1, 100))
    assert strong[0] < weak[0]
    assert strong[1] > weak[1]


@pytest.mark.parametrize(("function", "expected"), [("phr", (-0.25, 2)), ("p2", (-0.4, 3 + 4 / 6)), ("p3", (-0.4, 3))])
def test_penalty_by_hand(function, expected):
    np.testing.assert_allclose(crac.penalty(jnp.asarray([-2.0, 1.0]), 1.0, 2.0, function=function), expected, rtol=1e-6)


# ------------------------------------------------------------------------------------------------- the penalty


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6)])
@pytest.mark.parametrize("constraint", crac.CONSTRAINTS)
def test_against_the_formula(shape, constraint):
    with jax.enable_x64():
        logits, labels = sample(shape, dtype=np.float64)
        state = state_of()
        h = violations(logits, labels, constraint)
        # The mean over voxels and 2K; outside its region h = 0 costs nothing.
        prices = crac.penalty(h, per_class(state.multipliers, h), per_class(state.rho, h), function="phr")
        found = CRAC(logits, labels, state, constraint=constraint)
        np.testing.assert_allclose(found, np.mean(prices, axis=tuple(range(1, h.ndim))), rtol=1e-12)


def test_one_logit_is_two_classes():
    logits, labels = sample(count=1)
    state = state_of(2)
    two = jnp.concatenate([-logits / 2, logits / 2], axis=-1)
    np.testing.assert_array_equal(CRAC(logits, labels, state), CRAC(two, labels, state))
    # Any label above 0 is the foreground of a sigmoid.
    np.testing.assert_array_equal(CRAC(logits, 3 * labels, state), CRAC(logits, labels, state))


def test_precision_and_samples():
    logits, labels = sample()
    value = CRAC(logits, labels, state_of())
    assert value.shape == (2,)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(CRAC(logits[1:], labels[1:], state_of())[0], value[1], rtol=1e-6)
    assert CRAC(logits.astype(jnp.bfloat16), labels, state_of()).dtype == jnp.float32
    each = jax.vmap(lambda z, y: crac.crac(z[None], y[None], state_of())[0])(logits, labels)
    np.testing.assert_allclose(each, value, rtol=1e-6)
    with jax.enable_x64():
        wide, labels = sample(dtype=np.float64)
        exact = CRAC(wide, labels, state_of())
        assert exact.dtype == jnp.float64
        np.testing.assert_allclose(value, exact, rtol=2e-5)


def test_margin_moves_the_target_of_its_region():
    logits, labels = sample()
    labels = jnp.zeros_like(labels)  # no outer voxel
    target = jnp.zeros_like(logits).at[..., 0].set(4.0)
    assert (CRAC(target, labels, state_of(), margin=4.0) < 1e-6).all()
    assert (CRAC(target, labels, state_of(), margin=5.0) > 1e-3).all()
    np.testing.assert_array_equal(CRAC(logits, labels, state_of(), outer_margin=3.0), CRAC(logits, labels, state_of()))


def test_derivatives_are_finite():
    def total(logits, labels, state, function, constraint):
        return jnp.sum(CRAC(logits, labels, state, function=function, constraint=constraint))

    def norm(*arguments):
        gradient = jax.grad(total)(*arguments)
        return jnp.sum(jnp.square(gradient)), gradient

    both = jax.jit(jax.grad(norm, has_aux=True), static_argnums=(3, 4))
    for shape, count, function, constraint in (
        *(((2, 4), 3, function, constraint) for function in FUNCTIONS for constraint in crac.CONSTRAINTS),
        ((1, 1), 3, "phr", "absolute"),
        ((2, 4), 1, "phr", "absolute"),
    ):
        logits, labels = sample(shape, count)
        for z, y in itertools.product((0 * logits, 1e4 * jnp.sign(logits)), (labels, 0 * labels, 0 * labels + 1)):
            for array in both(z, y, state_of(max(count, 2)), function, constraint):
                assert np.isfinite(array).all()


def test_gradient_is_zero_where_a_logit_meets_its_target():
    labels = jnp.zeros((1, 1, 1), jnp.int32)
    gradient = jax.grad(lambda z: CRAC(z, labels, state_of(2))[0])(jnp.zeros((1, 1, 1, 2)))[0, 0, 0]
    assert gradient[0] < 0
    assert gradient[1] == 0  # the kink of |0 - 0|


# -------------------------------------------------------------------------------------------------- the update


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("average", ["voxels", "region"])
def test_update_against_the_formula(function, average):
    with jax.enable_x64():
        logits, labels = sample((6, 9), dtype=np.float64)
        state = state_of()
        new = jax.jit(lambda s, t: crac.update(s, t, average=average))(
            state, SUMS(logits, labels, state, function=function)
        )
        h = violations(logits, labels)
        slopes = crac.penalty_derivative(h, per_class(state.multipliers, h), per_class(state.rho, h), function=function)
        inside = np.ones((2, 1, 1, 3)) * (np.abs(h).sum(-1, keepdims=True) > 0)  # no logit meets its target
        weights = np.ones_like(h) if average == "voxels" else inside
        axes = (0, 2, 3)
        np.testing.assert_allclose(new.multipliers, np.average(slopes, axis=axes, weights=weights), rtol=1e-12)
        np.testing.assert_allclose(new.violation, np.average(h, axis=axes, weights=weights), rtol=1e-12)
        np.testing.assert_array_equal(new.rho, state.rho)


def test_one_multiplier_for_all():
    logits, labels = sample()
    state = crac.init(3)
    new = crac.update(state, SUMS(logits, labels, state), average="all")
    violation = violations(logits, labels).sum(axis=1).mean()  # of voxels and classes: each voxel is in one region
    np.testing.assert_allclose(new.violation, np.full((2, 3), violation), rtol=1e-5)
    np.testing.assert_allclose(new.multipliers, np.full((2, 3), 1e-6 + 0.1 * violation), rtol=1e-5)


def test_sums_of_batches_add_up():
    logits, labels = sample(batch=4)
    state = state_of()
    whole = SUMS(logits, labels, state)
    parts = crac.merge(*[SUMS(logits[i : i + 1], labels[i : i + 1], state) for i in range(4)])
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    assert whole.voxels.sum() == labels.size


def constant_sums(violation, multiplier, rho, voxels=100.0):
    """Sums of an absolute PHR constraint with the same mean violation everywhere."""
    ones = jnp.full((2, 2), voxels)
    return crac.Sums(ones * (multiplier + rho * violation), ones * violation, jnp.full(2, voxels))


def test_rho_grows_every_rho_step_epochs_where_nothing_improves():
    state, values = crac.init(2), []
    for epoch in range(9):
        violation = 1.0 if epoch < 6 else 0.5**epoch  # improves from epoch 6
        state = crac.update(state, constant_sums(violation, state.multipliers, state.rho), rho_step=3)
        values.append(float(state.rho[0, 0]))
    np.testing.assert_allclose(values, [0.1, 0.1, 0.12, 0.12, 0.12, 0.144, 0.144, 0.144, 0.144], rtol=1e-5)
    # In the first epoch there is nothing to compare with.
    assert (crac.update(crac.init(2), constant_sums(1.0, 1e-6, 0.1), rho_step=1).rho == crac.init(2).rho).all()


def test_multipliers_of_an_absolute_constraint_never_fall_those_of_a_signed_one_do():
    _, labels = sample()
    above = 9 + jnp.zeros((*labels.shape, 3))  # every logit above its target
    state = state_of()
    for constraint, falls in (("absolute", False), ("signed", True)):
        new = crac.update(state, SUMS(above, labels, state, constraint=constraint))
        assert ((new.multipliers < state.multipliers) == falls).all()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_bounded_whatever_happens(function):
    logits, labels = sample((3, 4))
    state = crac.init(3, multiplier=0.5)

    @jax.jit
    def epoch(state, logits):
        found = SUMS(logits, labels, state, function=function)
        return crac.update(state, found, rho_step=1, multiplier_range=(1e-6, 50.0))

    for scale in [1e4] * 60 + [jnp.inf]:
        state = epoch(state, scale * jnp.sign(logits))
    assert (state.multipliers == 50).all()
    assert (state.rho <= 10).all()
    assert np.isfinite(CRAC(logits, labels, state, function=function)).all()
    assert state.epoch == 61
    assert [a.dtype for a in state] == [jnp.float32] * 3 + [jnp.int32]


def test_nothing_to_average_over():
    state = state_of(2)
    empty = crac.Sums(jnp.zeros((2, 2)), jnp.zeros((2, 2)), jnp.zeros(2))
    np.testing.assert_array_equal(crac.update(state, empty).multipliers, state.multipliers)
    logits, labels = sample(count=2)
    only_inner = SUMS(logits, 0 * labels, state)
    for average in ("voxels", "region"):
        new = crac.update(state, only_inner, average=average, rho_step=1)
        np.testing.assert_allclose(new.multipliers[1], state.multipliers[1], rtol=1e-6)
        assert (new.multipliers[0] > state.multipliers[0]).all()


def test_summary_shows_growth_and_refuses_what_is_not_finite():
    state = state_of()
    shown = crac.summary(state)
    assert set(shown) == {"largest_multiplier", "mean_rho", "largest_violation"}
    np.testing.assert_allclose(shown["largest_multiplier"], 0.17, rtol=1e-6)
    np.testing.assert_allclose(shown["mean_rho"], 0.6, rtol=1e-6)
    logits, labels = sample()
    broken = crac.update(state, SUMS(logits * jnp.nan, labels, state))
    with pytest.raises(InputError, match="not finite after epoch 1"):
        crac.summary(broken)


def test_epochs_bring_logits_to_their_targets():
    logits, labels = sample((4, 6), dtype=np.float32)

    @jax.jit
    def train(logits, state):
        def loss(z):
            return jnp.sum(cross_entropy.ce(z, labels) + CRAC(z, labels, state)) * logits.size

        for _ in range(30):
            logits = logits - 0.1 * jax.grad(loss)(logits) / 20
        return logits, crac.update(state, SUMS(logits, labels, state), rho_step=1)

    state, history = crac.init(3), []
    for _ in range(25):
        logits, state = train(logits, state)
        history.append(crac.summary(state)["largest_violation"])
    assert history[-1] < 0.3 * history[0]


# -------------------------------------------------------------------------------------------------------- errors


def test_errors():
    logits, labels = sample()
    state = crac.init(3)
    with pytest.raises(UsageError, match="no penalty function 'p1'; choose one of phr, p2, p3"):
        crac.crac(logits, labels, state, function="p1")
    with pytest.raises(UsageError, match="no constraint 'relu'"):
        crac.sums(logits, labels, state, constraint="relu")
    with pytest.raises(UsageError, match="no average 'pixels'"):
        crac.update(state, crac.sums(logits, labels, state), average="pixels")
    with pytest.raises(ValueError, match=r"\(2, 2\) need to be \(2, 3\)"):
        crac.crac(logits, labels, crac.init(2))
    with pytest.raises(ValueError, match="need labels"):
        crac.crac(logits, labels[..., :2], state)
    with pytest.raises(UsageError, match="2 or more classes"):
        crac.init(1)
    for wrong in ({"rho_range": (0.0, 1.0)}, {"multiplier_range": (2.0, 1.0)}, {"growth": 0.5}, {"rho_step": 0}):
        with pytest.raises(UsageError, match="update needs"):
            crac.update(state, crac.sums(logits, labels, state), **wrong)
