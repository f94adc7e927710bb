"""MbLS and NACL: cases by hand, invariances, one logit as two classes, derivatives at the kinks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calsegx import losses
from calsegx.interfaces import UsageError
from calsegx.losses import cross_entropy, logit_constraints, neighbourhood
from tests.losses import derivatives

mbls_penalty, nacl_penalty = logit_constraints.mbls_penalty, logit_constraints.nacl_penalty
LOSSES = {
    "mbls": functools.partial(logit_constraints.mbls, margin=1.0, weight=0.5),
    "mbls l2": functools.partial(logit_constraints.mbls, margin=1.0, weight=0.5, distance="l2"),
    "mbls l2 without hinge": functools.partial(logit_constraints.mbls, weight=0.5, distance="l2_without_hinge"),
    "mbls dice": functools.partial(logit_constraints.mbls, margin=1.0, dice=True),
    "nacl": functools.partial(logit_constraints.nacl, weight=0.5),
    "nacl l2 gaussian": functools.partial(logit_constraints.nacl, weight=0.5, distance="l2", prior="gaussian"),
    "nacl probabilities": functools.partial(logit_constraints.nacl, weight=0.5, on="probabilities"),
}
EAGER, LOSSES = LOSSES, {name: jax.jit(loss) for name, loss in LOSSES.items()}
ALL = pytest.mark.parametrize("name", LOSSES)


def draw(shape, count, seed=0, scale=3.0):
    rng = np.random.default_rng(seed)
    logits = scale * rng.normal(size=(*shape, count))
    return logits.astype(np.float32), rng.integers(0, max(count, 2), size=shape, dtype=np.int32)


def test_mbls_by_hand():
    logits, labels = jnp.asarray([[[3.0, 1.0, -4.0]]]), jnp.asarray([[0]])  # distances 0, 2, 7
    for distance, expected in {"l1": 7 / 3, "l2": 37 / 3, "l2_without_hinge": (1 + 1 + 36) / 3}.items():
        np.testing.assert_allclose(mbls_penalty(logits, labels, margin=1.0, distance=distance), [expected], rtol=1e-6)
    loss = logit_constraints.mbls(logits, labels, margin=1.0, weight=0.5)
    np.testing.assert_allclose(loss, cross_entropy.ce(logits, labels) + 7 / 6, rtol=1e-6)
    np.testing.assert_allclose(mbls_penalty(logits, labels, margin=0.0), [9 / 3], rtol=1e-6)  # linear, no margin


def test_mbls_leaves_distances_below_the_margin_alone():
    logits, labels = draw((2, 3, 4), 4, scale=0.5)
    for distance in ("l1", "l2"):
        value, gradient = jax.value_and_grad(
            lambda z, d=distance: jnp.sum(mbls_penalty(z, labels, margin=10.0, distance=d))
        )(logits)
        assert value == 0
        assert (gradient == 0).all()
    uniform = mbls_penalty(0 * logits, labels, margin=10.0, distance="l2_without_hinge")
    np.testing.assert_allclose(uniform, 100)  # where the code's L2 is largest


def test_mbls_invariances():
    logits, labels = draw((2, 3, 4), 4)
    value = mbls_penalty(logits, labels, margin=1.0)
    shift = jnp.arange(24.0).reshape(2, 3, 4, 1)
    for other in (logits[..., ::-1], logits[:, ::-1, ::-1], logits + shift):
        np.testing.assert_allclose(mbls_penalty(other, 0 * labels, margin=1.0), value, rtol=1e-5)


def test_mbls_gives_the_gradient_of_equal_logits_to_the_first():
    gradient = jax.grad(lambda z: mbls_penalty(z, jnp.asarray([[0]]), margin=1.0)[0])(jnp.asarray([[[2.0, -3, 2]]]))
    np.testing.assert_allclose(gradient[0, 0], [1 / 3, -1 / 3, 0], rtol=1e-6)


@pytest.mark.parametrize("count", [1, 3])
def test_mbls_with_dice_leaves_the_background_out(count):
    logits, labels = draw((2, 3, 4), count)
    dice = losses.registry.bind("dice", {"include_background": False})(logits, labels)
    loss = logit_constraints.mbls(logits, labels, dice=True)
    np.testing.assert_allclose(loss, logit_constraints.mbls(logits, labels) + dice, rtol=1e-6)


def test_nacl_by_hand():
    logits = jnp.asarray([[[2.0, -1.0], [0.5, 0.5], [0.0, 0.0]]])
    labels = jnp.asarray([[0, 1, 1]])  # tau_1 = 1/3, 2/3, 1, and the border replicated
    differences = np.array([2 / 3 - 2, 1 / 3 + 1, 1 / 3 - 0.5, 2 / 3 - 0.5, 0, 1])
    np.testing.assert_allclose(nacl_penalty(logits, labels), [np.abs(differences).mean()], rtol=1e-6)
    np.testing.assert_allclose(nacl_penalty(logits, labels, distance="l2"), [np.square(differences).mean()], rtol=1e-6)
    zero = np.array([2 / 3 - 2, 1 / 3 + 1, 1 / 3 - 0.5, 2 / 3 - 0.5, 0, 2 / 3])
    zero[0] = 1 / 3 - 2  # the first voxel has lost a background neighbour
    np.testing.assert_allclose(nacl_penalty(logits, labels, border="zero"), [np.abs(zero).mean()], rtol=1e-6)
    loss = logit_constraints.nacl(logits, labels, weight=0.7)
    np.testing.assert_allclose(loss, cross_entropy.ce(logits, labels) + 0.7 * nacl_penalty(logits, labels), rtol=1e-6)


@pytest.mark.parametrize("prior", neighbourhood.KINDS)
def test_nacl_is_zero_at_the_prior(prior):
    _, labels = draw((2, 4, 5), 3)
    tau = neighbourhood.prior(labels, 3, kind=prior, size=5, sigma=0.7, border="background")
    options = {"prior": prior, "size": 5, "sigma": 0.7, "border": "background"}
    for distance in ("l1", "l2"):
        value, gradient = jax.value_and_grad(
            lambda z, d=distance: jnp.sum(nacl_penalty(z, labels, distance=d, **options))
        )(tau)
        assert value == 0
        assert (gradient == 0).all()
    np.testing.assert_allclose(nacl_penalty(tau + 0.25, labels, **options), 0.25, rtol=1e-5)


def test_nacl_on_probabilities():
    labels = jnp.ones((1, 3, 3), int)
    right = 100 * jax.nn.one_hot(labels, 3)
    np.testing.assert_allclose(nacl_penalty(right, labels, on="probabilities"), 0, atol=1e-7)
    np.testing.assert_allclose(nacl_penalty(right, 0 * labels, on="probabilities"), 2 / 3, rtol=1e-6)
    np.testing.assert_allclose(nacl_penalty(0 * right, labels, on="probabilities"), 4 / 9, rtol=1e-6)


@ALL
def test_one_logit_is_two_classes(name):
    logits, labels = draw((2, 3, 4), 1)
    two = jnp.concatenate([-logits / 2, logits / 2], axis=-1)
    np.testing.assert_allclose(LOSSES[name](logits, labels), LOSSES[name](two, labels), rtol=1e-6)
    np.testing.assert_array_equal(LOSSES[name](logits, 7 * labels), LOSSES[name](logits, labels))


@ALL
@pytest.mark.parametrize("count", [1, 3])
def test_one_value_per_sample(name, count):
    logits, labels = draw((3, 2, 4), count)
    values = LOSSES[name](logits, labels)
    assert values.shape == (3,)
    assert values.dtype == jnp.float32
    order = jnp.asarray([2, 0, 1])
    np.testing.assert_allclose(EAGER[name](logits[order], labels[order]), values[order], rtol=1e-6)
    alone = jax.jit(jax.vmap(lambda z, y: LOSSES[name](z[None], y[None])[0]))(logits, labels)
    np.testing.assert_allclose(alone, values, rtol=1e-6)
    axes = (1, 2)
    np.testing.assert_allclose(LOSSES[name](jnp.flip(logits, axes), jnp.flip(labels, axes)), values, rtol=1e-6)
    volume = LOSSES[name](logits[:, None], labels[:, None])  # one slice, its own neighbours above and below
    if "gaussian" not in name:
        np.testing.assert_allclose(volume, values, rtol=1e-6)
    halves = logits.astype(jnp.bfloat16)
    np.testing.assert_array_equal(LOSSES[name](halves, labels), LOSSES[name](halves.astype(jnp.float32), labels))


@ALL
@pytest.mark.parametrize("count", [1, 3])
def test_derivatives(name, count):
    derivatives.check(LOSSES[name], count, scale=2.0)
    derivatives.check_extremes(LOSSES[name], draw, count)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mbls", {"distance": "l3"}, "MbLS has no distance 'l3'; choose one of l1, l2, l2_without_hinge"),
        ("nacl", {"distance": "l3"}, "NACL has no distance 'l3'; choose l1 or l2"),
        ("nacl", {"on": "odds"}, "logits or probabilities, not 'odds'"),
        ("nacl", {"prior": "avg"}, "no prior 'avg'"),
        ("nacl", {"border": "mirror"}, "no border rule 'mirror'"),
        ("nacl", {"size": 2}, "odd and at least 3, got 2"),
        ("nacl", {"prior": "gaussian", "sigma": 0.0}, "must be positive, got 0.0"),
    ],
)
def test_registered_and_errors(name, options, message):
    logits, labels = draw((2, 4), 3)
    assert losses.get(name) is getattr(logit_constraints, name)
    for loss in (name, f"{name}_penalty"):
        with pytest.raises(UsageError, match=message):
            losses.registry.bind(loss, options)(logits, labels)
        with pytest.raises(ValueError, match="need labels"):
            losses.get(loss)(logits, labels[:1])
