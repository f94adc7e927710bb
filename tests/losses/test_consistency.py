"""BWCR: boundary weights against scipy's distance transform, pairs, masks, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from calsegx.interfaces import UsageError
from calsegx.losses import consistency, cross_entropy, overlap

OPTIONS = ("radius", "exponent", "lowest", "highest")
weights = jax.jit(consistency.boundary_weights, static_argnums=1, static_argnames=OPTIONS)
agree = jax.jit(consistency.consistency, static_argnames=OPTIONS)
bwcr = jax.jit(consistency.bwcr, static_argnames=("weight", "base", *OPTIONS))


def reference(labels, classes: int, radius: float, exponent: float = 1.0, lowest: float = 0.01, highest: float = 1.0):
    """The same by scipy's exact transform of the whole image."""
    steps = np.full(labels.shape, np.inf)
    for b, k in np.ndindex(len(labels), classes):
        member = labels[b] == k
        if k and member.any() and not member.all():
            inside = np.floor(ndimage.distance_transform_edt(member)) - 1
            outside = np.ceil(ndimage.distance_transform_edt(~member))
            steps[b] = np.minimum(steps[b], np.where(member, inside, outside))
    return highest * (np.maximum(radius - steps, 0) / radius) ** exponent + lowest


def blobs(shape: tuple[int, ...], classes: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=(2, classes, *shape)), (0, 0, *(2.0 for _ in shape)), mode="wrap")
    smooth[:, 0] += 0.5 * smooth.std()
    return smooth.argmax(axis=1).astype(np.int32)


@pytest.mark.parametrize("shape", [(31, 40), (13, 9, 15), (25,)])
@pytest.mark.parametrize(("classes", "radius"), [(2, 10), (4, 4.5)])
def test_weights_are_those_of_the_exact_distance(shape: tuple[int, ...], classes: int, radius: float):
    labels = blobs(shape, classes)
    assert len(np.unique(labels)) == classes
    actual = weights(labels, classes, radius=radius, exponent=1.5, lowest=0.1, highest=2.0)
    np.testing.assert_allclose(actual, reference(labels, classes, radius, 1.5, 0.1, 2.0), rtol=1e-5)


def test_weights_around_one_voxel_and_thin_structures():
    labels = np.zeros((1, 7, 7), np.int32)
    labels[0, 3, 3] = 1
    actual = np.asarray(weights(labels, 2, radius=3))[0]
    np.testing.assert_allclose(actual[3], [0.01, 0.01 + 1 / 3, 0.01 + 2 / 3, 1.01, 0.01 + 2 / 3, 0.01 + 1 / 3, 0.01])
    np.testing.assert_allclose(actual[2, 2], 0.01 + 1 / 3)  # sqrt(2) is the second step outwards


@pytest.mark.parametrize("shape", [(5, 6), (1, 1), (2, 3, 2)])
def test_without_a_boundary_the_weight_is_the_lowest(shape: tuple[int, ...]):
    for label in (0, 2):
        np.testing.assert_allclose(weights(np.full((1, *shape), label), 3, radius=10), 0.01, rtol=1e-6)


def pairs(count: int, shape: tuple[int, ...] = (9, 8)):
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.normal(size=(4, *shape, count)), jnp.float32)
    return logits, jnp.asarray(np.repeat(blobs(shape, max(count, 2)), 2, axis=0))


@pytest.mark.parametrize("base", ["ce", "dice"])
def test_bwcr_is_the_weighted_mean_of_its_terms(base: str):
    logits, labels = pairs(3)
    supervised = {"ce": cross_entropy.ce, "dice": overlap.dice}[base](logits, labels)
    agreement = agree(logits[::2], logits[1::2], labels[::2], radius=5)
    expected = jnp.repeat((supervised[::2] + supervised[1::2] + 3 * agreement) / 5, 2)
    np.testing.assert_allclose(bwcr(logits, labels, weight=3.0, base=base, radius=5), expected, rtol=1e-6)


def test_equal_views_are_consistent_and_gradients_flow_into_both():
    logits, labels = pairs(1)
    same = jnp.repeat(logits[::2], 2, axis=0)
    np.testing.assert_allclose(bwcr(same, labels), cross_entropy.ce(same, labels) * 2 / 3, rtol=1e-6)
    first, second = jax.grad(lambda a, b: agree(a, b, labels[::2]).sum(), argnums=(0, 1))(logits[::2], logits[1::2])
    np.testing.assert_allclose(first, -second)
    assert jnp.abs(first).max() > 0


def test_mask_and_one_logit():
    logits, labels = pairs(1)
    first, second, labels = logits[::2], logits[1::2], labels[::2]
    mask = jnp.zeros(labels.shape, bool).at[:, 2:].set(True)
    outside = jnp.where(mask[..., None], second, first)  # no difference where the mask is false
    np.testing.assert_allclose(agree(first, second, labels, mask), agree(first, outside, labels), rtol=1e-6)
    two = [jnp.concatenate([-z / 2, z / 2], axis=-1) for z in (first, second)]
    np.testing.assert_allclose(agree(first, second, 3 * labels), agree(*two, labels), rtol=1e-6)  # any label is 1


def test_bad_arguments():
    logits, labels = pairs(3)
    with pytest.raises(UsageError, match="two views of one image, and got 3 samples; use an even batch size"):
        consistency.bwcr(logits[:3], labels[:3])
    with pytest.raises(UsageError, match="no base 'focal'; use one of ce, dice"):
        consistency.bwcr(logits, labels, base="focal")
    with pytest.raises(UsageError, match="radius above 0 voxels, got 0"):
        consistency.boundary_weights(labels, 3, radius=0)
    with pytest.raises(ValueError, match="Both views need the same shape"):
        consistency.consistency(logits, logits[..., :2], labels)
    with pytest.raises(ValueError, match="must be integers"):
        consistency.consistency(logits, logits, labels.astype(jnp.float32))
