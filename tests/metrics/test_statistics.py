import itertools
import math

import numpy as np
import pytest

from calsegx.interfaces import InputError, UsageError
from calsegx.metrics import statistics


def rng(seed=0):
    return np.random.default_rng(seed)


def literal_wilcoxon(differences):
    """Two-sided exact signed-rank p of distinct non-zero differences, by enumerating all signs."""
    order = sorted(range(len(differences)), key=lambda i: abs(differences[i]))
    signs = [differences[i] > 0 for i in order]
    observed = sum(rank for rank, positive in enumerate(signs, 1) if positive)
    sums = [
        sum(rank for rank, positive in enumerate(outcome, 1) if positive)
        for outcome in itertools.product((False, True), repeat=len(signs))
    ]
    below = sum(s <= observed for s in sums) / len(sums)
    above = sum(s >= observed for s in sums) / len(sums)
    return min(1.0, 2 * min(below, above))


def test_bootstrap_interval_approaches_the_normal_interval():
    values = rng(1).normal(3, 2, 400)
    interval = statistics.bootstrap_interval(values, rng())
    half = 1.96 * values.std() / 20
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert (interval.count, interval.dropped) == (400, 0)
    narrow = statistics.bootstrap_interval(values, rng(), level=0.5)
    assert interval.low < narrow.low < narrow.high < interval.high


def test_bootstrap_interval_covers_the_truth():
    covered = 0
    for seed in range(40):
        values = rng(seed).normal(1, 1, 40)
        interval = statistics.bootstrap_interval(values, rng(seed + 1000))
        covered += interval.low <= 1 <= interval.high
    assert 33 <= covered <= 40


def test_bootstrap_interval_is_reproducible():
    values = rng(2).random(20)
    assert statistics.bootstrap_interval(values, rng(3)) == statistics.bootstrap_interval(values, rng(3))
    assert statistics.bootstrap_interval(values, rng(3)) != statistics.bootstrap_interval(values, rng(4))


def test_bootstrap_interval_drops_and_counts_nan():
    interval = statistics.bootstrap_interval(np.array([1.0, np.nan, 3.0]), rng())
    assert (interval.mean, interval.count, interval.dropped) == (2.0, 2, 1)
    one = statistics.bootstrap_interval(np.array([5.0, np.nan]), rng())
    assert one.mean == 5.0 and math.isnan(one.low) and math.isnan(one.high)
    none = statistics.bootstrap_interval(np.array([np.nan]), rng())
    assert math.isnan(none.mean) and (none.count, none.dropped) == (0, 1)


def test_paired_difference_literal():
    a, b = rng(5).random((2, 9))
    got = statistics.paired_difference(a, b, rng())
    assert got.mean == pytest.approx((a - b).mean())
    assert got.low < got.mean < got.high
    assert got.p == pytest.approx(literal_wilcoxon((a - b).tolist()))
    assert (got.pairs, got.dropped) == (9, 0)
    swapped = statistics.paired_difference(b, a, rng())
    assert swapped.mean == pytest.approx(-got.mean) and swapped.p == pytest.approx(got.p)


def test_paired_difference_zeros_are_left_out():
    a = np.array([0.0, 0.0, 1.0, 2.5, 3.25, 4.125, 5.5, 6.75])
    got = statistics.paired_difference(a, np.zeros(8), rng())
    assert got.pairs == 8 and got.mean == pytest.approx(a.mean())
    assert got.p == pytest.approx(2 / 2**6)


def test_paired_difference_with_ties():
    got = statistics.paired_difference(np.repeat([1.0, 2.0], 10), np.zeros(20), rng())
    assert got.p < 0.001


def test_paired_difference_few_pairs_and_equal_models():
    a = np.arange(6.0)
    assert math.isnan(statistics.paired_difference(a[:5] + 1, a[:5], rng()).p)
    assert statistics.paired_difference(a + 1.0 + a / 8, a, rng()).p == pytest.approx(2 / 2**6)
    equal = statistics.paired_difference(a, a, rng())
    assert (equal.mean, equal.low, equal.high, equal.p) == (0.0, 0.0, 0.0, 1.0)


def test_paired_difference_drops_pairs_with_nan():
    a = np.array([1.0, np.nan, 3.0, 4.0, 5.0, 6.0, 7.0])
    b = np.array([0.0, 0.0, np.nan, 0.0, 0.0, 0.0, 0.0])
    got = statistics.paired_difference(a, b, rng())
    assert (got.pairs, got.dropped) == (5, 2)
    assert got.mean == pytest.approx(23 / 5) and math.isnan(got.p)


def test_generalisation_gap_is_positive_for_degradation():
    assert statistics.generalisation_gap(0.9, 0.7, higher_is_better=True) == pytest.approx(0.2)
    assert statistics.generalisation_gap(0.02, 0.1, higher_is_better=False) == pytest.approx(0.08)
    assert statistics.generalisation_gap(0.7, 0.9, higher_is_better=True) == pytest.approx(-0.2)


def test_bad_input_is_refused():
    with pytest.raises(UsageError, match="between 0 and 1"):
        statistics.bootstrap_interval(np.ones(3), rng(), level=95)
    with pytest.raises(InputError, match="one row"):
        statistics.bootstrap_interval(np.ones((3, 2)), rng())
    with pytest.raises(InputError, match="infinite"):
        statistics.paired_difference(np.array([1.0, np.inf]), np.ones(2), rng())
    with pytest.raises(InputError, match="same cases"):
        statistics.paired_difference(np.ones(3), np.ones(4), rng())
