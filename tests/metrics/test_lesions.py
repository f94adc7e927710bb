import functools
import itertools
import math
import operator

import numpy as np
import pytest

from calsegx.interfaces import InputError, UsageError
from calsegx.metrics import lesions
from calsegx.metrics.overlap import Score

UNIT = (1.0, 1.0, 1.0)


def literal_components(mask, connectivity):
    """Sets of connected voxels: neighbours differ by one in at most ``connectivity`` axes."""
    left = {tuple(i) for i in np.argwhere(mask).tolist()}
    steps = [s for s in itertools.product((-1, 0, 1), repeat=mask.ndim) if 0 < sum(map(abs, s)) <= connectivity]
    found = []
    while left:
        queue = [left.pop()]
        component = set(queue)
        while queue:
            here = queue.pop()
            for step in steps:
                there = tuple(i + s for i, s in zip(here, step, strict=True))
                if there in left:
                    left.remove(there)
                    component.add(there)
                    queue.append(there)
        found.append(component)
    return found


def literal_hits(mask, other, connectivity, minimal_overlap):
    components = literal_components(mask, connectivity)
    elsewhere = {tuple(i) for i in np.argwhere(other).tolist()}
    shared = [len(c & elsewhere) for c in components]
    hits = [n > 0 and n / len(c) >= minimal_overlap for n, c in zip(shared, components, strict=True)]
    return len(components), sum(hits)


@pytest.mark.parametrize("connectivity", [1, 2, 3])
@pytest.mark.parametrize("minimal_overlap", [0.0, 0.3, 1.0])
def test_counts_literal(connectivity, minimal_overlap):
    prediction, truth = np.random.default_rng(0).random((2, 6, 7, 8)) < 0.12
    counts = lesions.lesion_counts(prediction, truth, UNIT, connectivity=connectivity, minimal_overlap=minimal_overlap)
    assert (*counts.true, *counts.detected) == literal_hits(truth, prediction, connectivity, minimal_overlap)
    assert (*counts.predicted, *counts.matched) == literal_hits(prediction, truth, connectivity, minimal_overlap)
    assert counts.true[0] > 0


def test_default_connects_all_neighbours():
    mask = np.eye(4, dtype=bool)
    assert lesions.lesion_counts(mask, mask, (1.0, 1.0)).true == (1,)
    assert lesions.lesion_counts(mask, mask, (1.0, 1.0), connectivity=1).true == (4,)


@pytest.fixture
def scene():
    """True lesions of 1, 4 and 12 voxels; the two larger ones found, one by half, and two false alarms."""
    prediction, truth = np.zeros((2, 3, 12, 12), bool)
    truth[0, 0, 0] = True
    truth[0, 4:6, 4:6] = True
    truth[1, 8:11, 8:12] = True
    prediction[0, 4, 4:6] = True
    prediction[1, 8:11, 8:12] = True
    prediction[2, 0, 5] = prediction[2, 0:3, 11] = True
    return prediction, truth


def test_scores_and_strata(scene):
    counts = lesions.lesion_counts(*scene, (2.0, 1.0, 1.0), edges_mm3=(4, 20))  # volumes 2, 8 and 24 mm3
    assert counts == lesions.LesionCounts((4.0, 20.0), (1, 1, 1), (0, 1, 1), (1, 2, 1), (0, 1, 1))
    assert counts.finalise() == (Score(2 / 3, True), Score(1 / 2, True), Score(pytest.approx(4 / 7), True))
    assert counts.finalise(0) == (Score(0.0, True), Score(0.0, True), Score(0.0, True))
    assert counts.finalise(1) == (Score(1.0, True), Score(0.5, True), Score(2 / 3, True))
    assert counts.finalise(2) == (Score(1.0, True),) * 3


def test_a_volume_on_an_edge_belongs_to_the_larger_stratum(scene):
    assert lesions.lesion_counts(*scene, UNIT, edges_mm3=(4,)).true == (1, 2)


def test_minimal_overlap(scene):
    detected = [lesions.lesion_counts(*scene, UNIT, minimal_overlap=x).detected for x in (0.5, 0.51)]
    assert detected == [(2,), (1,)]  # half of the second lesion is covered


def test_one_prediction_over_two_lesions():
    truth, prediction = np.zeros((2, 9), bool)
    truth[[1, 2, 5, 6]] = prediction[1:7] = True
    scores = lesions.lesion_counts(prediction, truth, (1.0,)).finalise()
    assert [s.value for s in scores] == [1.0, 1.0, 1.0]


def test_empty_policies(scene):
    _, truth = scene
    nothing = np.zeros_like(truth)
    both = lesions.lesion_counts(nothing, nothing, UNIT)
    missed, invented = (lesions.lesion_counts(*pair, UNIT) for pair in ((nothing, truth), (truth, nothing)))
    assert both.finalise() == (Score(1.0, False),) * 3
    assert missed.finalise() == (Score(0.0, True), Score(0.0, False), Score(0.0, True))
    assert invented.finalise() == (Score(0.0, False), Score(0.0, True), Score(0.0, True))
    assert all(math.isnan(value) and not defined for value, defined in both.finalise(empty="nan"))
    assert math.isnan(missed.finalise(empty="nan").precision.value)
    assert math.isnan(invented.finalise(empty="nan").sensitivity.value)
    assert missed.finalise(empty="nan").f1 == Score(0.0, True)


def test_merge_equals_whole():
    cases = np.random.default_rng(1).random((4, 2, 4, 6, 6)) < 0.15
    options = {"edges_mm3": (2.0, 4.0), "connectivity": 1}
    parts = [lesions.lesion_counts(*case, UNIT, **options) for case in cases]
    apart = np.pad(cases, [(0, 0), (0, 0), (0, 1), (0, 0), (0, 0)])  # a gap, so that no lesion spans two cases
    whole = lesions.lesion_counts(*np.concatenate(list(apart), axis=1), UNIT, **options)
    for order in itertools.permutations(parts):
        assert functools.reduce(operator.add, order) == whole
    with pytest.raises(UsageError, match="cannot be added"):
        parts[0] + lesions.lesion_counts(*cases[0], UNIT)


def test_bad_arguments_are_refused():
    mask = np.ones((2, 3), bool)
    with pytest.raises(InputError, match="boolean"):
        lesions.lesion_counts(mask.astype(int), mask, (1.0, 1.0))
    with pytest.raises(InputError, match="expected 2 positive numbers"):
        lesions.lesion_counts(mask, mask, UNIT)
    for connectivity in (0, 3):
        with pytest.raises(UsageError, match=r"not one of 1\.\.2"):
            lesions.lesion_counts(mask, mask, (1.0, 1.0), connectivity=connectivity)
    for minimal in (-0.1, 1.1, math.nan):
        with pytest.raises(UsageError, match=r"must lie in 0\.\.1"):
            lesions.lesion_counts(mask, mask, (1.0, 1.0), minimal_overlap=minimal)
    for edges in ((0.0,), (2.0, 2.0), (3.0, 1.0), (math.inf,), (math.nan,)):
        with pytest.raises(UsageError, match="must be positive and increase"):
            lesions.lesion_counts(mask, mask, (1.0, 1.0), edges_mm3=edges)
    counts = lesions.lesion_counts(mask, mask, (1.0, 1.0))
    with pytest.raises(UsageError, match=r"stratum 1 is not one of 0\.\.0"):
        counts.finalise(1)
    with pytest.raises(UsageError, match="empty='zero'"):
        counts.finalise(empty="zero")
