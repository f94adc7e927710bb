import math

import numpy as np
import pytest
from scipy import stats

from calsegx.interfaces import InputError, UsageError
from calsegx.metrics import ranks


def rng(seed=0):
    return np.random.default_rng(seed)


def literal_ranks(column, higher, ties):
    """Ranks of one column by counting who is better and who is equal."""
    result = []
    for value in column:
        better = {v for v in column if (v > value if higher else v < value)}
        count = sum(v in better for v in column)
        equal = sum(v == value for v in column)
        result.append({"min": count + 1, "average": count + (equal + 1) / 2, "dense": len(better) + 1}[ties])
    return result


def tied_scores(seed=0, methods=5, columns=8):
    return rng(seed).integers(0, 4, (methods, columns)).astype(float)


@pytest.mark.parametrize("ties", ranks.TIES)
def test_ranks_literal(ties):
    scores, higher = tied_scores(), [True, False] * 4
    expected = [literal_ranks(c, h, ties) for c, h in zip(scores.T.tolist(), higher, strict=True)]
    np.testing.assert_array_equal(ranks.ranks(scores, higher, ties=ties), np.transpose(expected))
    ranking = ranks.mean_rank(scores, higher, ties=ties)
    np.testing.assert_allclose(ranking.value, np.mean(expected, axis=0))
    np.testing.assert_array_equal(ranking.final, literal_ranks(ranking.value.tolist(), False, "min"))
    assert (ranking.columns, ranking.dropped) == (8, 0)


def test_one_direction_for_all_columns_and_infinite_scores():
    scores = np.array([[1.0, np.inf], [2.0, -np.inf], [3.0, 0.0]])
    np.testing.assert_array_equal(ranks.ranks(scores, True), [[3, 1], [2, 3], [1, 2]])
    np.testing.assert_array_equal(ranks.ranks(scores, False), 4 - ranks.ranks(scores, True))


def test_a_column_with_nan_is_left_out_for_all_and_counted():
    scores = tied_scores()
    with_nan = np.concatenate([scores, scores[:, :1]], axis=1)
    with_nan[2, -1] = np.nan
    assert np.isnan(ranks.ranks(with_nan, True)[:, -1]).all()
    ranking = ranks.mean_rank(with_nan, True)
    np.testing.assert_array_equal(ranking.value, ranks.mean_rank(scores, True).value)
    assert (ranking.columns, ranking.dropped) == (8, 1)
    assert ranks.friedman(with_nan, True) == ranks.friedman(scores, True)._replace(dropped=1)
    np.testing.assert_array_equal(ranks.nemenyi(with_nan, True), ranks.nemenyi(scores, True))


def test_no_complete_column_is_undefined():
    scores = np.full((3, 4), np.nan)
    ranking = ranks.mean_rank(scores, True)
    assert np.isnan(ranking.value).all() and np.isnan(ranking.final).all()
    assert (ranking.columns, ranking.dropped) == (0, 4)
    assert np.isnan(ranks.nemenyi(scores, True)).all()
    test = ranks.friedman(scores, True)
    assert math.isnan(test.statistic) and math.isnan(test.p) and (test.columns, test.dropped) == (0, 4)
    assert np.isnan(ranks.mean_case_rank(np.zeros((3, 0, 2)), True).value).all()


def test_mean_case_rank_is_over_cases_and_metrics():
    scores = rng(1).random((4, 6, 2))
    scores[1, 2, 1] = np.nan
    every = [
        literal_ranks(scores[:, case, metric].tolist(), metric == 0, "average")
        for case in range(6)
        for metric in range(2)
        if (case, metric) != (2, 1)
    ]
    ranking = ranks.mean_case_rank(scores, [True, False])
    np.testing.assert_allclose(ranking.value, np.mean(every, axis=0))
    assert (ranking.columns, ranking.dropped) == (11, 1)


def test_sum_rank_ranks_the_means_over_the_same_cases():
    scores = rng(2).random((4, 6, 2))
    scores[0, 3, 1] = np.nan
    first, second = scores[:, :, 0].mean(axis=1), np.delete(scores[:, :, 1], 3, axis=1).mean(axis=1)
    expected = np.add(literal_ranks(first.tolist(), True, "min"), literal_ranks(second.tolist(), False, "min"))
    ranking = ranks.sum_rank(scores, [True, False], ties="min")
    np.testing.assert_array_equal(ranking.value, expected)
    assert (ranking.columns, ranking.dropped) == (11, 1)
    scores[0, :, 1] = np.nan
    assert np.isnan(ranks.sum_rank(scores, [True, False]).value).all()


def test_sum_rank_and_mean_case_rank_can_disagree():
    """One catastrophe counts once in the ranks of cases and decides the mean."""
    scores = np.array([[0.9, 0.9, 0.0], [0.8, 0.8, 0.8]])[:, :, None]
    assert ranks.mean_case_rank(scores, True).final.tolist() == [1, 2]
    assert ranks.sum_rank(scores, True).final.tolist() == [2, 1]


def test_friedman_literal():
    scores = rng(3).random((5, 12))
    mean = ranks.mean_rank(scores, True).value
    chi = 12 * 12 / (5 * 6) * ((mean**2).sum() - 5 * 6**2 / 4)
    got = ranks.friedman(scores, True)
    assert got == pytest.approx((chi, stats.chi2.sf(chi, 4), 12, 0))
    assert ranks.friedman(scores, False) == pytest.approx(got)
    assert ranks.friedman(np.exp(scores), True) == pytest.approx(got)


def test_friedman_with_ties_is_corrected():
    scores = tied_scores(4)
    mean = ranks.mean_rank(scores, True).value
    chi = 12 * 8 / (5 * 6) * ((mean**2).sum() - 5 * 6**2 / 4)
    groups = [np.unique(column, return_counts=True)[1] for column in scores.T]
    correction = 1 - sum((g**3 - g).sum() for g in groups) / (8 * (5**3 - 5))
    assert ranks.friedman(scores, True).statistic == pytest.approx(chi / correction)
    assert ranks.friedman(np.ones((3, 4)), True) == (0.0, 1.0, 4, 0)


def test_nemenyi_two_methods_is_the_normal_test():
    # The studentised range of two means with infinite degrees of freedom is sqrt(2) |z|.
    scores = np.array([[1.0, 1, 1, 1, 1, 0, 1, 1], [0.0, 0, 0, 0, 0, 1, 0, 0]])
    z = (15 / 8 - 9 / 8) / math.sqrt(1 / 8)
    p = ranks.nemenyi(scores, True)
    assert p[0, 1] == pytest.approx(2 * stats.norm.sf(z), rel=1e-6)
    np.testing.assert_array_equal(p, p.T)
    np.testing.assert_array_equal(np.diag(p), 1)


@pytest.mark.parametrize(("methods", "q"), [(2, 1.960), (3, 2.343), (5, 2.728), (10, 3.164)])
def test_critical_difference_as_in_demsar(methods, q):
    got = ranks.critical_difference(methods, 7)
    assert got == pytest.approx(q * math.sqrt(methods * (methods + 1) / (6 * 7)), rel=5e-4)
    assert got < ranks.critical_difference(methods, 7, level=0.99) and got < ranks.critical_difference(methods, 6)


def test_nemenyi_agrees_with_the_critical_difference():
    scores = rng(5).normal(size=(6, 15)) + np.arange(6)[:, None] / 2
    mean = ranks.mean_rank(scores, True).value
    significant = np.abs(mean[:, None] - mean) > ranks.critical_difference(6, 15)
    assert 0 < significant.sum() < 30
    np.testing.assert_array_equal(ranks.nemenyi(scores, True) < 0.05, significant)


def test_bad_input_is_refused():
    scores = np.ones((3, 4))
    with pytest.raises(UsageError, match="average, min, dense"):
        ranks.mean_rank(scores, True, ties="max")
    with pytest.raises(UsageError, match="between 0 and 1"):
        ranks.critical_difference(3, 4, level=5)
    for wrong in ([True, False], 1, ["yes"] * 4):
        with pytest.raises(InputError, match="does not fit 4 columns"):
            ranks.mean_rank(scores, wrong)
    with pytest.raises(InputError, match=r"expected \[methods, columns\]"):
        ranks.ranks(np.ones(3), True)
    with pytest.raises(InputError, match=r"expected \[methods, cases, metrics\]"):
        ranks.sum_rank(scores, True)
    with pytest.raises(InputError, match="infinite"):
        ranks.sum_rank(np.full((3, 4, 1), np.inf), True)
    with pytest.raises(InputError, match="3 or more"):
        ranks.friedman(scores[:2], True)
    with pytest.raises(InputError, match="2 or more"):
        ranks.nemenyi(scores[:1], True)
    with pytest.raises(InputError, match="at least one"):
        ranks.critical_difference(3, 0)
