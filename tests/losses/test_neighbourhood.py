"""Priors and regions against definitions written with loops, and cases by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats

from calsegx.interfaces import UsageError
from calsegx.losses import neighbourhood

prior = jax.jit(neighbourhood.prior, static_argnums=1, static_argnames=("kind", "size", "sigma", "border"))
CHOSEN = {
    "max": max,
    "min": min,
    "median": lambda patch: sorted(patch)[(len(patch) - 1) // 2],
    "mode": lambda patch: min(set(patch), key=lambda label: (-patch.count(label), label)),
}


def draw(shape, classes=3, seed=0):
    return np.random.default_rng(seed).integers(0, classes, size=shape).astype(np.int32)


def patches(labels, size, border):
    """Index of every voxel -> the labels of its patch."""
    offsets = list(itertools.product(range(-(size // 2), size // 2 + 1), repeat=labels.ndim))
    for index in np.ndindex(labels.shape):
        patch = []
        for offset in offsets:
            position = np.add(index, offset)
            nearest = np.clip(position, 0, np.subtract(labels.shape, 1))
            if border == "replicate" or (nearest == position).all():
                patch.append(int(labels[tuple(nearest)]))
            elif border == "background":
                patch.append(0)
        yield index, patch


@pytest.mark.parametrize("border", neighbourhood.BORDERS)
@pytest.mark.parametrize("kind", ["mean", *CHOSEN])
@pytest.mark.parametrize(("shape", "size"), [((5,), 3), ((4, 3), 3), ((3, 6), 5), ((2, 3, 4), 3)])
def test_priors_of_counts(kind, border, shape, size):
    for seed in range(3):
        labels = draw((1, *shape), seed=seed)
        expected = np.zeros((*shape, 3))
        for index, patch in patches(labels[0], size, border):
            if kind == "mean":
                whole = len(patch) if border == "inside" else size ** len(shape)
                expected[index] = [patch.count(k) / whole for k in range(3)]
            else:
                expected[index][CHOSEN[kind](patch)] = 1
        tau = prior(jnp.asarray(labels), 3, kind=kind, size=size, border=border)
        np.testing.assert_allclose(tau[0], expected, rtol=1e-6)


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 5)])
@pytest.mark.parametrize(("border", "mode"), [("replicate", "nearest"), ("background", "constant"), ("zero", "")])
def test_gaussian_prior_is_a_correlation(size, shape, border, mode):
    labels, reach = draw(shape), size // 2
    squares = sum(np.square(o) for o in np.ogrid[(slice(-reach, reach + 1),) * len(shape)])
    kernel = np.where(squares == 0, 0, np.exp(-squares / (2 * 0.8**2)))
    kernel /= kernel.sum()
    kernel[(reach,) * len(shape)] = 1
    planes = [
        scipy.ndimage.correlate(
            (labels == k).astype(float), kernel / 2, mode=mode or "constant", cval=float(k == 0 and border != "zero")
        )
        for k in range(3)
    ]
    tau = prior(jnp.asarray(labels)[None], 3, kind="gaussian", size=size, sigma=0.8, border=border)
    np.testing.assert_allclose(tau[0], np.stack(planes, axis=-1), rtol=1e-5, atol=1e-7)
    if size == 3:
        np.testing.assert_allclose(kernel, neighbourhood.svls_kernel(len(shape), 0.8), rtol=1e-12)


def test_monai_gaussian_prior():
    labels = np.zeros((1, 13), np.int32)
    labels[0, 6] = 1
    with jax.enable_x64():
        tau = np.asarray(prior(jnp.asarray(labels), 2, kind="monai_gaussian", sigma=1.5))
    edges = scipy.stats.norm.cdf(np.arange(-6.5, 7) / 1.5)
    np.testing.assert_allclose(tau[0, :, 1], np.diff(edges), atol=1e-12)
    assert 1e-6 < 1 - tau[0, 6].sum() < 2e-5  # what lies beyond 4 sigma


def test_borders_by_hand():
    labels = jnp.asarray([[[0, 1], [1, 2]]])
    expected = {
        "replicate": [4 / 9, 4 / 9, 1 / 9],
        "background": [6 / 9, 2 / 9, 1 / 9],
        "inside": [1 / 4, 2 / 4, 1 / 4],
        "zero": [1 / 9, 2 / 9, 1 / 9],
    }
    for border, corner in expected.items():
        np.testing.assert_allclose(prior(labels, 3, border=border)[0, 0, 0], corner, rtol=1e-6)


@pytest.mark.parametrize("kind", neighbourhood.KINDS)
@pytest.mark.parametrize("border", ["replicate", "background", "inside"])
def test_priors_sum_to_one(kind, border):
    tau = prior(jnp.asarray(draw((2, 4, 7))), 4, kind=kind, border=border)
    assert (tau >= 0).all()
    np.testing.assert_allclose(jnp.sum(tau, axis=-1), 1, atol=2e-5 if kind == "monai_gaussian" else 1e-6)


@pytest.mark.parametrize("kind", ["mean", "max", "min", "median", "mode"])
def test_pure_patches_are_exactly_one_hot(kind):
    for border in ("replicate", "inside"):
        tau = prior(jnp.full((1, 3, 4, 2), 2), 4, kind=kind, size=5, border=border)
        np.testing.assert_array_equal(tau, np.broadcast_to(np.eye(4)[2], tau.shape))


@pytest.mark.parametrize("sigma", [0.01, 0.3, 1.0, 50.0])
@pytest.mark.parametrize("size", [3, 5])
def test_gaussian_centre_keeps_one_half(sigma, size):
    labels = jnp.zeros((1, 9, 9), jnp.int32).at[0, 4, 4].set(1)
    tau = prior(labels, 2, kind="gaussian", size=size, sigma=sigma)
    np.testing.assert_allclose(tau[0, 4, 4], 0.5, rtol=1e-6)


def test_renumbered_classes():
    """Where no labels tie, mean, gaussian and mode go with the numbers; max, min and median do not."""
    labels, new = np.array([[0, 0, 1, 1, 2, 2, 0, 0, 1, 1]]), np.array([2, 0, 1])
    for kind in ("mean", "gaussian", "mode"):
        tau = prior(jnp.asarray(labels), 3, kind=kind)
        renumbered = prior(jnp.asarray(new[labels]), 3, kind=kind)
        np.testing.assert_array_equal(renumbered[..., new], tau)
    assert prior(jnp.asarray(labels), 3, kind="max")[0, 1, 1] == 1
    assert prior(jnp.asarray(new[labels]), 3, kind="max")[0, 1, new[0]] == 1


@pytest.mark.parametrize("border", neighbourhood.BORDERS)
@pytest.mark.parametrize(("shape", "size"), [((7,), 3), ((6, 5), 3), ((6, 7), 5), ((3, 4, 3), 3)])
def test_outer_mask(border, shape, size):
    for seed in range(3):
        labels = (draw((1, *shape), classes=9, seed=seed) == 0).astype(np.int32) * 3 + 1  # mostly ones, some fours
        mask = neighbourhood.outer_mask(jnp.asarray(labels), size=size, border=border)
        for index, patch in patches(labels[0], size, border):
            assert mask[0][index] == (len(set(patch)) > 1)


def test_outer_mask_where_the_mean_label_is_whole():
    """Labels whose sum is divisible by 9: the published code finds no boundary here."""
    assert neighbourhood.outer_mask(jnp.asarray([[[0, 1, 2], [1, 1, 1], [2, 1, 0]]]))[0, 1, 1]
    assert neighbourhood.outer_mask(jnp.asarray([[[9, 0, 0], [0, 0, 0], [0, 0, 0]]]))[0, 1, 1]


def test_single_voxels_and_small_integers():
    labels = jnp.asarray([[[3]], [[0]]], jnp.uint8)
    np.testing.assert_array_equal(prior(labels, 4)[:, 0, 0], np.eye(4)[[3, 0]])
    np.testing.assert_array_equal(neighbourhood.outer_mask(labels), [[[False]], [[False]]])
    np.testing.assert_array_equal(neighbourhood.outer_mask(labels, border="background"), [[[True]], [[False]]])


def test_under_jit_and_vmap():
    labels = jnp.asarray(draw((3, 2, 4, 5)))
    for function in (lambda y: neighbourhood.prior(y, 3, kind="median"), neighbourhood.outer_mask):
        expected = jnp.stack([function(y) for y in labels])
        np.testing.assert_array_equal(jax.jit(jax.vmap(function))(labels), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "avg"}, "no prior 'avg'; choose one of mean, gaussian"),
        ({"border": "mirror"}, "no border rule 'mirror'; choose one of replicate"),
        ({"size": 4}, "odd and at least 3, got 4"),
        ({"size": 1}, "odd and at least 3, got 1"),
        ({"sigma": 0.0}, "must be positive, got 0.0"),
    ],
)
def test_bad_options(options, message):
    labels = jnp.zeros((1, 3, 3), jnp.int32)
    with pytest.raises(UsageError, match=message):
        prior(labels, 2, **options)
    if options.keys() & {"size", "border"}:
        with pytest.raises(UsageError, match=message):
            neighbourhood.outer_mask(labels, **options)
