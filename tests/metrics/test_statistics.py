import itertools
import math

import numpy as np
import pytest
from scipy import stats

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


def crossed(seed, seeds=6, cases=60):
    """Values that are a seed's and a case's effect alone."""
    generator = rng(seed)
    return generator.normal(0, 0.5, (seeds, 1)) + generator.normal(1, 1, (1, cases))


def test_seeds_x_cases_interval_has_the_variance_of_both():
    values = crossed(1, seeds=20, cases=200)
    by_seed, by_case = values.mean(axis=1), values.mean(axis=0)
    half = 1.96 * math.sqrt(by_seed.var() / 20 + by_case.var() / 200)
    interval = statistics.bootstrap_interval_over_seeds(values, rng())
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert (interval.count, interval.dropped) == (200, 0)
    assert interval == statistics.bootstrap_interval_over_seeds(values, rng())


def test_seeds_x_cases_interval_covers_the_truth_and_that_of_the_cases_alone_does_not():
    both, cases_alone = 0, 0
    for seed in range(40):
        values = crossed(seed, seeds=10, cases=100)
        interval = statistics.bootstrap_interval_over_seeds(values, rng(seed))
        both += interval.low <= 1 <= interval.high
        interval = statistics.bootstrap_interval(values.mean(axis=0), rng(seed))
        cases_alone += interval.low <= 1 <= interval.high
    assert both >= 33 and cases_alone <= 28


def test_seeds_x_cases_interval_of_equal_seeds_is_that_of_the_cases():
    cases = rng(3).random(40)
    interval = statistics.bootstrap_interval_over_seeds(np.tile(cases, (3, 1)), rng())
    alone = statistics.bootstrap_interval(cases, rng())
    assert interval == pytest.approx(alone, abs=0.15 * (alone.high - alone.low))


def test_seeds_x_cases_interval_drops_a_case_in_all_seeds():
    values = np.array([[1.0, 2.0, 30.0], [3.0, 4.0, np.nan]])
    interval = statistics.bootstrap_interval_over_seeds(values, rng())
    assert (interval.mean, interval.count, interval.dropped) == (2.5, 2, 1)
    assert interval.low == 1.0 and interval.high == 4.0
    for few in (values[:1, :2], values[:, :1]):
        interval = statistics.bootstrap_interval_over_seeds(few, rng())
        assert interval.mean == few.mean() and math.isnan(interval.low) and math.isnan(interval.high)
    none = statistics.bootstrap_interval_over_seeds(values[:, 2:], rng())
    assert math.isnan(none.mean) and (none.count, none.dropped) == (0, 1)


def test_paired_t_test_literal():
    a, b = rng(7).random((2, 12))
    difference = a - b
    t = difference.mean() / (difference.std(ddof=1) / math.sqrt(12))
    with_nan = [np.append(row, [np.nan, 0.5]) for row in (a, b)]
    with_nan[1][-1] = np.nan
    got = statistics.paired_t_test(*with_nan)
    assert got == pytest.approx((t, 2 * stats.t.sf(abs(t), 11), 12, 2))
    swapped = statistics.paired_t_test(b, a)
    assert (swapped.statistic, swapped.p) == pytest.approx((-t, got.p))


def test_paired_t_test_without_spread():
    a = np.array([0.1, 0.2, 0.3, 0.4])
    assert statistics.paired_t_test(a, a) == (0.0, 1.0, 4, 0)
    for shifted in (a + 0.1, a[:1] * 2, a[:0]):
        got = statistics.paired_t_test(shifted, a[: len(shifted)])
        assert math.isnan(got.statistic) and math.isnan(got.p) and got.pairs == len(shifted)


def test_holm_literal():
    p = np.array([0.01, 0.04, 0.03, 0.005, np.nan, 0.9, 0.9])
    expected = [5 * 0.01, 4 * 0.03, 4 * 0.03, 6 * 0.005, math.nan, 1.0, 1.0]
    np.testing.assert_allclose(statistics.holm(p), expected)
    # The step-down procedure itself: reject from the smallest while p_(i) <= level / (m - i + 1).
    for level in (0.02, 0.05, 0.1, 0.2):
        rejected, remaining = set(), 6
        for i in np.argsort(p)[:6]:
            if p[i] > level / remaining:
                break
            rejected.add(int(i))
            remaining -= 1
        assert set(np.flatnonzero(statistics.holm(p) <= level + 1e-12).tolist()) == rejected
    assert statistics.holm(np.array([])).shape == (0,)


def test_pearson_literal():
    x = np.array([0.5, 0.7, 0.6, 0.9, np.nan, 0.8])
    y = np.array([0.4, 0.75, 0.5, 0.7, 0.3, 0.85])
    a, b = (np.delete(row, 4) for row in (x, y))
    da, db = a - a.mean(), b - b.mean()
    r = (da * db).sum() / math.sqrt((da**2).sum() * (db**2).sum())
    slope = (da * db).sum() / (da**2).sum()
    p = 2 * stats.t.sf(abs(r) * math.sqrt(3 / (1 - r**2)), 3)
    assert statistics.pearson(x, y) == pytest.approx((r, p, slope, b.mean() - slope * a.mean(), 5, 1))


def test_pearson_on_the_probit_scale_straightens_the_line():
    scale = np.linspace(-2, 2, 9)
    got = statistics.pearson(stats.norm.cdf(scale), stats.norm.cdf(0.5 * scale - 1), probit=True)
    assert (got.r, got.slope, got.intercept) == pytest.approx((1.0, 0.5, -1.0))
    assert statistics.pearson(stats.norm.cdf(scale), stats.norm.cdf(0.5 * scale - 1)).r < 0.98


def test_pearson_undefined():
    row = np.array([0.1, 0.2, 0.3])
    for x, y in ((row[:2], row[:2]), (row, np.full(3, 0.1 + 0.2)), (np.full(3, 0.0), row)):
        got = statistics.pearson(x, y)
        assert all(math.isnan(v) for v in got[:4]) and got.pairs == len(x)


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
    with pytest.raises(InputError, match="same cases"):
        statistics.paired_t_test(np.ones(3), np.ones(4))
    with pytest.raises(InputError, match="seeds, cases"):
        statistics.bootstrap_interval_over_seeds(np.ones(3), rng())
    with pytest.raises(UsageError, match="between 0 and 1"):
        statistics.bootstrap_interval_over_seeds(np.ones((3, 2)), rng(), level=0)
    with pytest.raises(InputError, match="infinite"):
        statistics.bootstrap_interval_over_seeds(np.full((3, 2), np.inf), rng())
    with pytest.raises(InputError, match="expected 0..1"):
        statistics.holm(np.array([0.5, 1.5]))
    with pytest.raises(InputError, match="strictly between"):
        statistics.pearson(np.array([0.5, 0.6, 1.0]), np.array([0.5, 0.6, 0.7]), probit=True)
