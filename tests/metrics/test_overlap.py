import functools
import itertools
import math
import operator
import random
import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calsegx.interfaces import InputError, UsageError
from calsegx.metrics import overlap
from calsegx.metrics.overlap import OverlapCounts, Score

UNIT = (1.0, 1.0, 1.0)


def literal_counts(prediction, truth):
    pairs = list(zip(prediction.ravel().tolist(), truth.ravel().tolist(), strict=True))
    return OverlapCounts(*(pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))))


def test_scores_literal():
    prediction = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0], bool)
    truth = np.array([0, 0, 1, 1, 1, 0, 0, 0, 0, 0], bool)
    counts = overlap.overlap_counts(prediction, truth)
    assert counts == OverlapCounts(2, 2, 1, 5) == literal_counts(prediction, truth)
    scores = counts.finalise((5.0, 10.0, 20.0))  # voxels of 1 ml
    assert scores == (
        Score(4 / 7, True),
        Score(2 / 5, True),
        Score(2 / 4, True),
        Score(2 / 3, True),
        Score(pytest.approx(1.0), True),
        Score(1 / 3, True),
    )
    assert overlap.dice(prediction, truth) == 4 / 7
    assert overlap.overlap_counts(truth, prediction).finalise(UNIT).volume_difference_ml.value == pytest.approx(-0.001)


@pytest.mark.parametrize("shape", [(7,), (5, 7), (3, 4, 5)])
def test_counts_literal(shape):
    rng = np.random.default_rng(0)
    for density in (0.05, 0.5, 0.9):
        prediction, truth = rng.random((2, *shape)) < density
        assert overlap.overlap_counts(prediction, truth) == literal_counts(prediction, truth)


@pytest.mark.parametrize(
    ("counts", "empty", "values", "defined"),
    [  # dsc, iou, precision, recall, relative volume difference
        (OverlapCounts(0, 0, 0, 9), "agree", (1, 1, 1, 1, 0), (False,) * 5),
        (OverlapCounts(0, 0, 0, 9), "nan", (math.nan,) * 5, (False,) * 5),
        (OverlapCounts(0, 0, 0, 9), "nan_without_truth", (math.nan,) * 5, (False,) * 5),
        (OverlapCounts(0, 4, 0, 5), "agree", (0, 0, 0, 0, math.nan), (True, True, True, False, False)),
        (OverlapCounts(0, 4, 0, 5), "nan", (0, 0, 0, math.nan, math.nan), (True, True, True, False, False)),
        (OverlapCounts(0, 4, 0, 5), "nan_without_truth", (math.nan,) * 5, (False,) * 5),
        (OverlapCounts(0, 0, 4, 5), "agree", (0, 0, 0, 0, -1), (True, True, False, True, True)),
        (OverlapCounts(0, 0, 4, 5), "nan", (0, 0, math.nan, 0, -1), (True, True, False, True, True)),
        (OverlapCounts(0, 0, 4, 5), "nan_without_truth", (0, 0, math.nan, 0, -1), (True, True, False, True, True)),
    ],
)
def test_empty_policies(counts, empty, values, defined):
    scores = counts.finalise(UNIT, empty=empty)
    ratios = (*scores[:4], scores.relative_volume_difference)
    assert [s.value for s in ratios] == pytest.approx(list(values), nan_ok=True)
    assert tuple(s.defined for s in ratios) == defined
    assert scores.volume_difference_ml.defined


def test_dice_empty_policies():
    empty, full = np.zeros((2, 3), bool), np.ones((2, 3), bool)
    assert overlap.dice(empty, empty) == 1.0
    assert math.isnan(overlap.dice(empty, empty, both_empty=math.nan))
    assert overlap.dice(empty, full) == 0.0
    assert overlap.dice(full, empty) == 0.0  # false positives where there is nothing (the original said 1)


def test_counts_are_not_bitwise():
    # 4 predicted and 3 true voxels: 4 & 3 == 0, which the original took for an empty case.
    prediction, truth = np.zeros((2, 3, 3), bool)
    prediction[0, :2] = prediction[1, :2] = True
    truth[0, :3] = True
    assert overlap.overlap_counts(prediction, truth) == OverlapCounts(2, 2, 1, 4)
    assert overlap.dice(prediction, truth) == 4 / 7


label_maps = st.integers(1, 6).flatmap(
    lambda n: st.tuples(*(st.lists(st.integers(0, 3), min_size=n, max_size=n) for _ in range(2)))
)


@settings(max_examples=40, deadline=None)
@given(st.lists(label_maps, min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_merge_equals_whole(cases, shuffle: random.Random):
    volumes = [tuple(np.array(labels, np.uint8) for labels in case) for case in cases]
    whole = tuple(np.concatenate(labels) for labels in zip(*volumes, strict=True))
    shuffle.shuffle(volumes)
    matrix = sum(overlap.confusion(p, t, 4) for p, t in volumes)
    np.testing.assert_array_equal(matrix, overlap.confusion(*whole, 4))
    for labels in ((0,), (2,), (1, 3)):
        expected = overlap.overlap_counts(*(np.isin(w, labels) for w in whole))
        parts = [overlap.overlap_counts(np.isin(p, labels), np.isin(t, labels)) for p, t in volumes]
        assert overlap.counts_of(matrix, labels) == functools.reduce(operator.add, parts, OverlapCounts()) == expected


@settings(max_examples=40, deadline=None)
@given(label_maps, st.randoms(use_true_random=False))
def test_limits_and_permutation(case, shuffle: random.Random):
    prediction, truth = (np.array(labels) > 1 for labels in case)
    counts = overlap.overlap_counts(prediction, truth)
    order = list(range(len(truth)))
    shuffle.shuffle(order)
    assert overlap.overlap_counts(prediction[order], truth[order]) == counts
    perfect, opposite = (overlap.overlap_counts(m, truth).finalise(UNIT) for m in (truth, ~truth))
    assert [s.value for s in perfect] == [1, 1, 1, 1, 0, 0]
    assert opposite.dsc.value == opposite.iou.value == 0
    dsc, iou = counts.finalise(UNIT)[:2]
    assert dsc.value == pytest.approx(2 * iou.value / (1 + iou.value))


@pytest.mark.parametrize("classes", [2, 4, 15, 16, 300])  # K^2 in uint8, its edge, uint16, and above
def test_confusion_literal(classes):
    rng = np.random.default_rng(1)
    prediction, truth = rng.integers(0, classes, (2, 6, 7, 5))
    expected = np.zeros((classes, classes), int)
    for p, t in zip(prediction.ravel(), truth.ravel(), strict=True):
        expected[p, t] += 1
    for kind in (np.int64, np.uint16, np.int32):
        np.testing.assert_array_equal(overlap.confusion(prediction.astype(kind), truth.astype(kind), classes), expected)


def test_confusion_on_device():
    prediction, truth = np.random.default_rng(2).integers(0, 3, (2, 4, 5, 6))
    on_device = jax.jit(overlap.confusion_on_device, static_argnums=2)
    expected = overlap.confusion(prediction, truth, 3)
    np.testing.assert_array_equal(on_device(prediction, truth, 3), expected)
    np.testing.assert_array_equal(overlap.confusion_on_device(jax.numpy.asarray(prediction), truth, 3), expected)
    prediction[0, 0, :3] = (3, -1, 9)
    assert on_device(prediction, truth, 3).sum() == truth.size - 3


def test_case_scores():
    first = overlap.case_scores([Score(0.1, True), Score(0.7, True)])
    second = overlap.case_scores(iter([Score(math.nan, False), Score(0.2, False)]))
    assert (first + second).finalise() == overlap.CaseMean(pytest.approx(1 / 3), 3, 2)
    assert math.isnan(overlap.CaseScores().finalise().mean) and overlap.CaseScores().finalise().cases == 0
    # Plain sums of these differ in the last bit by order.
    parts = [overlap.case_scores([Score(v, True)]) for v in (0.1, 0.2, 0.3, 1e16, -1e16)]
    means = {sum(order[1:], order[0]).finalise().mean for order in itertools.permutations(parts)}
    assert means == {math.fsum([0.1, 0.2, 0.3]) / 5}


def test_bad_input_is_refused():
    mask, labels = np.zeros((2, 3), bool), np.zeros((2, 3), np.uint8)
    with pytest.raises(InputError, match="prediction mask is uint8"):
        overlap.dice(labels, mask)
    with pytest.raises(InputError, match="truth mask is list"):
        overlap.dice(mask, mask.tolist())
    with pytest.raises(InputError, match="same grid"):
        overlap.dice(mask, mask.T)
    with pytest.raises(InputError, match="truth is float64, expected an array of integer labels"):
        overlap.confusion(labels, labels.astype(float), 2)
    with pytest.raises(InputError, match="prediction is bool"):
        overlap.confusion(mask, labels, 2)
    with pytest.raises(InputError, match="same grid"):
        overlap.confusion(labels, labels.T, 2)
    with pytest.raises(InputError, match=r"prediction holds labels 4\.\.4, expected 0\.\.3"):
        overlap.confusion(labels + np.uint8(4), labels, 4)
    with pytest.raises(InputError, match=r"truth holds labels -1\.\.-1"):
        overlap.confusion(labels, labels.astype(int) - 1, 4)
    for ids in ((), (4,), (-1, 2)):
        with pytest.raises(InputError, match="not in a confusion matrix of 4 classes"):
            overlap.counts_of(np.eye(4, dtype=int), ids)
    with pytest.raises(UsageError, match="empty='one' is not one of agree, nan, nan_without_truth"):
        OverlapCounts().finalise(UNIT, empty="one")
    with pytest.raises(InputError, match="expected 3 positive numbers"):
        OverlapCounts().finalise((1.0, 1.0))


def test_metrics_import_neither_flax_nor_torch_nor_nibabel_nor_jax():
    code = (
        "import sys\n"
        "from calsegx.metrics import calibration, class_regions, lesions, overlap, regions, statistics, surface\n"
        "sys.exit(', '.join({'flax', 'torch', 'nibabel', 'jax'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
