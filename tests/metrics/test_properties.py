"""What holds of every metric whatever the data: invariances, sums of parts, limits."""

import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import special

from calsegx.metrics import (
    adaptive,
    binning,
    calibration,
    class_regions,
    device,
    lesions,
    overlap,
    ranks,
    regions,
    statistics,
    surface,
)

CLASSES = 4
SPACING = (2.0, 0.5, 1.0)
few = hypothesis.settings(max_examples=25, deadline=None, database=None, derandomize=True)
shapes = arrays.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=6)
seeds = st.integers(0, 2**32 - 1)


@st.composite
def pairs(draw, dtype=np.int64, elements=None, shapes=shapes):
    """Two label maps, or masks, of one shape."""
    shape = draw(shapes)
    elements = st.integers(0, CLASSES - 1) if elements is None else elements
    return tuple(draw(arrays.arrays(dtype, shape, elements=elements)) for _ in range(2))


masks = pairs(np.bool_, st.booleans())


@st.composite
def tables(draw):
    """Scores [methods, columns] with many ties."""
    shape = draw(st.tuples(st.integers(3, 6), st.integers(2, 8)))
    return draw(arrays.arrays(np.float64, shape, elements=st.integers(0, 4).map(float)))


def shuffled(seed, *values):
    order = np.random.default_rng(seed).permutation(values[0].size)
    return [v.ravel()[order] for v in values]


def spacing_of(mask):
    return SPACING[: mask.ndim]


@few
@hypothesis.given(pairs(), seeds, st.integers(0, 200))
def test_confusion_of_parts_in_any_order_is_that_of_the_whole(maps, seed, cut):
    whole = overlap.confusion(*maps, CLASSES)
    a, b = shuffled(seed, *maps)
    parts = overlap.confusion(a[:cut], b[:cut], CLASSES) + overlap.confusion(a[cut:], b[cut:], CLASSES)
    np.testing.assert_array_equal(parts, whole)
    np.testing.assert_array_equal(overlap.confusion(*maps[::-1], CLASSES), whole.T)
    counts = [overlap.overlap_counts(x == 1, y == 1) for x, y in ((a[:cut], b[:cut]), (a[cut:], b[cut:]))]
    assert counts[0] + counts[1] == counts[1] + counts[0] == overlap.counts_of(whole, [1])


@few
@hypothesis.given(pairs(shapes=st.sampled_from([(1, 1), (2, 5, 3)])))  # each shape is compiled
def test_confusion_on_a_device_is_that_of_numpy(maps):
    expected = overlap.confusion(*maps, CLASSES)
    compiled = jax.jit(overlap.confusion_on_device, static_argnums=2)
    for function in (overlap.confusion_on_device, compiled):
        np.testing.assert_array_equal(function(*maps, CLASSES), expected)


@few
@hypothesis.given(pairs())
def test_region_counts_are_those_of_the_region_masks(maps):
    structures = {"any": (1, 2, 3), "one": (1,), "outer": (0, 3)}
    counts = class_regions.region_counts(overlap.confusion(*maps, CLASSES), structures)
    predicted, true = (class_regions.region_masks(labels, structures) for labels in maps)
    assert counts == {name: overlap.overlap_counts(predicted[name], true[name]) for name in structures}


@few
@hypothesis.given(masks)
def test_overlap_scores_stay_in_range_and_swap(pair):
    found = overlap.overlap_counts(*pair).finalise(SPACING)
    swapped = overlap.overlap_counts(*pair[::-1]).finalise(SPACING)
    assert all(0 <= score.value <= 1 for score in found[:4])
    assert found.iou.value == pytest.approx(found.dsc.value / (2 - found.dsc.value))
    assert (found.dsc, found.iou, found.precision.value) == (swapped.dsc, swapped.iou, swapped.recall.value)
    assert found.volume_difference_ml.value == -swapped.volume_difference_ml.value


@few
@hypothesis.given(masks)
def test_a_perfect_mask_and_an_empty_one(pair):
    mask, spacing = pair[0], spacing_of(pair[0])
    perfect = overlap.overlap_counts(mask, mask).finalise(SPACING)
    assert [score.value for score in perfect] == [1, 1, 1, 1, 0, 0]
    distances = surface.surface_scores(mask, mask, spacing, tolerance_mm=0)
    assert [score.value for score in distances] == [0, 0, 0, 0, 1]
    assert {score.defined for score in (*perfect[:4], *distances)} == {bool(mask.any())}
    hypothesis.assume(mask.any())
    missed = overlap.overlap_counts(np.zeros_like(mask), mask).finalise(SPACING)
    assert (missed.dsc.value, missed.iou.value, missed.recall.value) == (0, 0, 0)
    absent = surface.surface_scores(np.zeros_like(mask), mask, spacing, tolerance_mm=1)
    assert not any(score.defined for score in absent[:4]) and absent.nsd.value == 0
    assert absent.hd.value >= surface.surface_scores(pair[1] | mask, mask, spacing, tolerance_mm=1).hd.value


@few
@hypothesis.given(masks, st.integers(0, 2))
def test_distances_do_not_depend_on_orientation(pair, axis):
    hypothesis.assume(pair[0].any() and pair[1].any())
    spacing, axis = spacing_of(pair[0]), axis % pair[0].ndim
    found = surface.surface_scores(*pair, spacing, tolerance_mm=1.0)
    flipped = surface.surface_scores(*(np.flip(mask, axis) for mask in pair), spacing, tolerance_mm=1.0)
    turned = surface.surface_scores(*(mask.T for mask in pair), spacing[::-1], tolerance_mm=1.0)
    larger = surface.surface_scores(*pair, tuple(3 * s for s in spacing), tolerance_mm=3.0)
    swapped = surface.surface_scores(*pair[::-1], spacing, tolerance_mm=1.0)
    for name in found._fields:
        value, scale = getattr(found, name).value, 1 if name == "nsd" else 3
        assert getattr(flipped, name).value == pytest.approx(value)
        assert getattr(turned, name).value == pytest.approx(value)
        assert getattr(larger, name).value == pytest.approx(scale * value)
        assert name == "asd" or getattr(swapped, name).value == pytest.approx(value)
    assert found.hd95.value <= found.hd.value and found.assd.value <= found.hd.value + 1e-12


@few
@hypothesis.given(masks, masks)
def test_lesions_add_up_and_swap(first, second):
    counts = [lesions.lesion_counts(*p, spacing_of(p[0]), edges_mm3=(2.0, 5.0)) for p in (first, second)]
    assert counts[0] + counts[1] == counts[1] + counts[0]
    prediction, truth = first
    swapped = lesions.lesion_counts(truth, prediction, spacing_of(truth), edges_mm3=(2.0, 5.0))
    assert (swapped.true, swapped.detected) == (counts[0].predicted, counts[0].matched)
    flipped = lesions.lesion_counts(prediction[::-1], truth[::-1], spacing_of(truth), edges_mm3=(2.0, 5.0))
    assert flipped == counts[0]
    perfect = lesions.lesion_counts(truth, truth, spacing_of(truth)).finalise()
    assert [score.value for score in perfect] == [1, 1, 1]


@few
@hypothesis.given(tables(), seeds, st.sampled_from(ranks.TIES))
def test_ranks_depend_on_the_order_of_scores_alone(scores, seed, ties):
    rng = np.random.default_rng(seed)
    methods, columns = (rng.permutation(n) for n in scores.shape)
    found = ranks.mean_rank(scores, True, ties=ties)
    for other in (np.exp(scores), scores[:, columns]):
        np.testing.assert_allclose(ranks.mean_rank(other, True, ties=ties).value, found.value)
    np.testing.assert_allclose(ranks.mean_rank(-scores[methods], False, ties=ties).value, found.value[methods])
    average = ranks.ranks(scores, True)
    np.testing.assert_allclose(average.sum(axis=0), len(scores) * (len(scores) + 1) / 2)
    assert (ranks.ranks(scores, True, ties="dense") <= ranks.ranks(scores, True, ties="min")).all()
    assert (ranks.ranks(scores, True, ties="min") <= average).all()


@few
@hypothesis.given(tables(), seeds)
def test_friedman_and_nemenyi_do_not_depend_on_the_order(scores, seed):
    methods, columns = (np.random.default_rng(seed).permutation(n) for n in scores.shape)
    found = ranks.friedman(scores, True)
    assert ranks.friedman(scores[methods][:, columns], True) == pytest.approx(found)
    assert found.statistic >= -1e-9 and 0 <= found.p <= 1
    p = ranks.nemenyi(scores, True)
    assert ((p >= 0) & (p <= 1)).all()
    np.testing.assert_allclose(ranks.nemenyi(scores[methods], True), p[np.ix_(methods, methods)], atol=1e-12)


@few
@hypothesis.given(arrays.arrays(np.float64, st.integers(0, 9), elements=st.floats(0, 1) | st.just(math.nan)), seeds)
def test_holm_corrects_upwards_whatever_the_order(p, seed):
    order = np.random.default_rng(seed).permutation(len(p))
    adjusted = statistics.holm(p)
    np.testing.assert_array_equal(statistics.holm(p[order]), adjusted[order])
    tested = ~np.isnan(p)
    np.testing.assert_array_equal(~np.isnan(adjusted), tested)
    assert (adjusted[tested] >= p[tested]).all() and (adjusted[tested] <= 1).all()
    assert (np.diff(adjusted[tested][np.argsort(p[tested])]) >= 0).all()


@few
@hypothesis.given(arrays.arrays(np.float64, (3, 7), elements=st.floats(-9, 9)), st.floats(-5, 5))
def test_intervals_move_with_the_values(values, shift):
    for interval_of, rows in (
        (statistics.bootstrap_interval_over_seeds, values),
        (statistics.bootstrap_interval, values[0]),
    ):
        here, there = (interval_of(v, np.random.default_rng(0)) for v in (rows, rows + shift))
        assert there[:3] == pytest.approx([v + shift for v in here[:3]], abs=1e-9)
        assert rows.min() - 1e-9 <= here.low <= here.high <= rows.max() + 1e-9


@st.composite
def predictions(draw, shape=None):
    """Probabilities [V, K], many of them tied, on the edges of bins, 0 or 1, and labels [V]."""
    shape = shape or draw(st.tuples(st.integers(1, 40), st.integers(2, 4)))
    weights = draw(arrays.arrays(np.float64, shape, elements=st.integers(0, 5).map(float)))
    weights[weights.sum(axis=1) == 0, 0] = 1
    labels = draw(arrays.arrays(np.int64, shape[0], elements=st.integers(0, shape[1] - 1)))
    return weights / weights.sum(axis=1, keepdims=True), labels


def errors_of(sums):
    return np.array(
        [
            *(sums.ece(), sums.rmsce(), sums.mce(), sums.ace_nonempty(), sums.cece(), sums.cece(classes="foreground")),
            *(sums.nll(), sums.brier("sum"), sums.brier("mean"), sums.brier("top_label"), *sums.class_ece()),
        ]
    )


@few
@hypothesis.given(predictions(), seeds, st.integers(0, 40), st.sampled_from(binning.BINNINGS))
def test_calibration_of_parts_in_any_order_is_that_of_the_whole(voxels, seed, cut, closed):
    probabilities, labels = voxels
    order = np.random.default_rng(seed).permutation(len(labels))
    p, y = probabilities[order], labels[order]
    whole = calibration.calibration_statistics(probabilities, labels, binning=closed)
    first, second = (calibration.calibration_statistics(p[part], y[part], binning=closed) for part in cuts(cut))
    for sums in (first + second, second + first, first.update(p[cut:], y[cut:])):
        np.testing.assert_array_equal(sums.count, whole.count)
        np.testing.assert_allclose(errors_of(sums), errors_of(whole), rtol=1e-9, atol=1e-12)


def cuts(cut):
    return slice(None, cut), slice(cut, None)


@few
@hypothesis.given(predictions(), seeds, st.integers(0, 40))
def test_adaptive_calibration_of_parts_is_within_its_bound_of_the_whole(voxels, seed, cut):
    probabilities, labels = voxels
    order = np.random.default_rng(seed).permutation(len(labels))
    p, y = probabilities[order], labels[order]
    whole = adaptive.adaptive_statistics(probabilities, labels)
    first, second = (adaptive.adaptive_statistics(p[part], y[part]) for part in cuts(cut))
    assert (first + second).tace() == pytest.approx(whole.tace(), abs=1e-12)
    for exact in (adaptive.tace(probabilities, labels), adaptive.tace(p, y)):
        assert abs(exact - whole.tace()) <= whole.error_bound() + 1e-12


@few
@hypothesis.given(predictions(), seeds)
def test_calibration_errors_are_ordered_and_do_not_depend_on_the_names_of_classes(voxels, seed):
    probabilities, labels = voxels
    sums = calibration.calibration_statistics(probabilities, labels)
    assert 0 <= sums.ece() <= sums.rmsce() + 1e-12 and sums.rmsce() <= sums.mce() + 1e-12 and sums.mce() <= 1
    assert 0 <= sums.brier("sum") <= 2 and sums.nll() >= 0
    renamed = np.random.default_rng(seed).permutation(probabilities.shape[1])
    other = calibration.calibration_statistics(probabilities[:, renamed], np.argsort(renamed)[labels])
    np.testing.assert_allclose(other.class_ece(), sums.class_ece()[renamed], atol=1e-12)
    assert (other.nll(), other.brier("sum")) == pytest.approx((sums.nll(), sums.brier("sum")))


@few
@hypothesis.given(predictions())
def test_a_certain_and_right_prediction_and_a_uniform_one(voxels):
    probabilities, labels = voxels
    classes = probabilities.shape[1]
    perfect = calibration.calibration_statistics(np.eye(classes)[labels], labels)
    np.testing.assert_array_equal(errors_of(perfect), 0)
    assert adaptive.tace(np.eye(classes)[labels], labels) == 0
    uniform = calibration.calibration_statistics(np.full_like(probabilities, 1 / classes), labels)
    shares = np.bincount(labels, minlength=classes) / len(labels)
    np.testing.assert_allclose(uniform.class_ece(), np.abs(shares - 1 / classes), atol=1e-12)
    expected = (abs(shares[0] - 1 / classes), math.log(classes), 1 - 1 / classes)  # ties go to class 0
    assert (uniform.ece(), uniform.nll(), uniform.brier("sum")) == pytest.approx(expected, abs=1e-12)


@hypothesis.settings(few, max_examples=8)  # eager operations are slow, and every binning is compiled
@hypothesis.given(predictions((12, 3)), arrays.arrays(np.bool_, 12), st.sampled_from(["right", "torchmetrics"]))
def test_calibration_on_a_device_is_that_of_numpy(voxels, mask, closed):
    probabilities, labels = voxels[0].astype(np.float32), voxels[1]
    expected = calibration.calibration_statistics(probabilities[mask], labels[mask], bins=5, binning=closed)
    compiled = device.calibration_sums(probabilities, labels, mask, bins=5, binning=closed)
    with jax.disable_jit():
        eager = device.calibration_sums(
            jnp.array(probabilities), jnp.array(labels), jnp.array(mask), bins=5, binning=closed
        )
    for sums in (compiled, eager):
        found = device.to_statistics(sums, binning=closed)
        np.testing.assert_array_equal(found.classes.count, expected.classes.count)
        np.testing.assert_array_equal(found.top_label.hit_sum, expected.top_label.hit_sum)
        np.testing.assert_allclose(errors_of(found), errors_of(expected), atol=1e-6)


@hypothesis.settings(few, max_examples=10)
@hypothesis.given(seeds, st.floats(0.5, 2))
def test_labels_drawn_from_the_prediction_are_calibrated_on_every_label_independent_region(seed, sharpness):
    rng = np.random.default_rng(seed)
    shape = (4, 100, 100)
    probabilities = special.softmax(sharpness * rng.normal(size=(*shape, 3)) + np.array([1, 0, 0]), axis=-1)
    labels = (rng.random((*shape, 1)) > probabilities.cumsum(axis=-1)[..., :2]).sum(axis=-1)
    masks = {
        name: regions.region(name, 1 - probabilities[..., 0], labels > 0, SPACING, probabilities.argmax(axis=-1) > 0)
        for name in ("all", "p>0.01", "p>0.5", "pred_fg", "union", "gt_fg")
    }
    found = {n: calibration.calibration_statistics(probabilities[m], labels[m]) for n, m in masks.items()}
    for name, sums in found.items():
        if regions.label_independent(name):
            assert max(sums.ece(), sums.cece()) < 0.03, name
        else:  # nothing is wrong with the prediction, and yet
            assert sums.cece() > 0.06, name
    assert adaptive.tace(probabilities[masks["all"]], labels[masks["all"]]) < 0.03
    assert found["gt_fg"].cece() > 5 * found["pred_fg"].cece()
