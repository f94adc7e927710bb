import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from calsegx.interfaces import InputError, UsageError
from calsegx.metrics import surface


def literal_surface(mask):
    points = []
    for index in np.argwhere(mask).tolist():
        for axis, step in itertools.product(range(mask.ndim), (-1, 1)):
            neighbour = list(index)
            neighbour[axis] += step
            inside = all(0 <= i < n for i, n in zip(neighbour, mask.shape, strict=True))
            if not inside or not mask[tuple(neighbour)]:
                points.append(index)
                break
    return points


def literal_percentile(values, percent):
    values = sorted(values)
    position = (len(values) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (position - low)


def literal_directed(a, b, spacing):
    """Distances prediction -> truth and truth -> prediction, from the definition."""

    def points(mask):
        return [[i * s for i, s in zip(point, spacing, strict=True)] for point in literal_surface(mask)]

    def distances(here, there):
        return [min(math.dist(p, q) for q in there) for p in here]

    return distances(points(a), points(b)), distances(points(b), points(a))


def literal_hausdorff(directed, percent, method):
    sets = {"max_directed": directed, "pooled": (directed[0] + directed[1],), "directed": directed[:1]}[method]
    return max(literal_percentile(distances, percent) for distances in sets)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (5.0, 0.7, 1.3)])
@pytest.mark.parametrize("density", [0.05, 0.4])
def test_all_scores_literal(spacing, density):
    prediction, truth = np.random.default_rng(2).random((2, 4, 6, 5)) < density
    directed = literal_directed(prediction, truth, spacing)
    both = directed[0] + directed[1]
    for method, assd_method in itertools.product(surface.METHODS, surface.ASSD_METHODS):
        scores = surface.surface_scores(
            prediction, truth, spacing, tolerance_mm=1.3, hd95_method=method, assd_method=assd_method
        )
        means = [sum(d) / len(d) for d in (both, *directed)]
        assert [s.value for s in scores] == pytest.approx(
            [
                max(both),
                literal_hausdorff(directed, 95, method),
                means[1],
                means[0] if assd_method == "pooled" else (means[1] + means[2]) / 2,
                sum(d < 1.3001 for d in both) / len(both),
            ],
            rel=1e-12,
        )
        assert all(s.defined for s in scores)
        assert surface.hausdorff95(prediction, truth, spacing, method=method) == scores.hd95


masks = arrays(bool, st.tuples(st.just(2), st.integers(1, 4), st.integers(1, 5), st.integers(1, 4)))


@settings(max_examples=40, deadline=None)
@given(masks)
def test_limits_and_symmetry(pair):
    prediction, truth = pair
    spacing = (2.0, 0.5, 1.0)
    there = surface.surface_scores(prediction, truth, spacing, tolerance_mm=1.0)
    back = surface.surface_scores(truth, prediction, spacing, tolerance_mm=1.0)
    for name in ("hd", "hd95", "assd", "nsd"):
        assert getattr(there, name) == pytest.approx(getattr(back, name))
    assert there.asd.value <= there.hd.value and there.hd95.value <= there.hd.value + 1e-12
    identical = surface.surface_scores(truth, truth, spacing, tolerance_mm=0.0)
    assert [s.value for s in identical] == [0, 0, 0, 0, 1]
    # More background around both, which is cropped away, changes nothing but the diagonal.
    padded = surface.surface_scores(np.pad(prediction, 2), np.pad(truth, 2), spacing, tolerance_mm=1.0)
    if prediction.any() == truth.any():
        assert padded == there


def test_a_surface_one_voxel_away_is_within_a_tolerance_of_one_voxel():
    prediction, truth = np.zeros((2, 8), bool)
    prediction[[0, 4]] = truth[[0, 3]] = True
    found = surface.surface_distances(prediction, truth, (0.7,))
    assert found.to_truth.max() > 0.7  # by rounding
    assert found.nsd(0.7) == (1.0, True) and found.nsd(0.69) == (0.5, True)


def test_surface_literal_and_border():
    mask = np.random.default_rng(3).random((5, 6, 7)) < 0.7
    assert np.argwhere(surface.surface(mask)).tolist() == literal_surface(mask)
    full = np.ones((4, 5), bool)
    assert surface.surface(full).sum() == 4 * 5 - 2 * 3  # the image border is a surface


def test_anisotropic_spacing():
    prediction, truth = np.zeros((2, 9, 9, 9), bool)
    prediction[2, 4, 4] = truth[4, 4, 4] = True
    assert surface.hausdorff95(prediction, truth, (6.0, 1.0, 1.0)) == (12.0, True)
    assert surface.hausdorff95(prediction.T.copy(), truth.T.copy(), (6.0, 1.0, 1.0)) == (2.0, True)


def test_empty_policies():
    empty, some = np.zeros((2, 3, 4, 12), bool)
    some[1, 1, 1] = True
    spacing = (1.0, 0.75, 0.5)  # extent 3 x 3 x 6 mm
    values = {"diagonal": math.sqrt(9 + 9 + 36), "inf": math.inf, "nan": math.nan}
    for prediction, truth in ((empty, some), (some, empty)):
        for policy, value in values.items():
            *distances, nsd = surface.surface_scores(prediction, truth, spacing, tolerance_mm=1.0, empty=policy)
            assert [s.value for s in distances] == pytest.approx([value] * 4, nan_ok=True)
            assert not any(s.defined for s in distances)
            assert nsd == (0.0, True)
            assert not surface.hausdorff95(prediction, truth, spacing, empty=policy).defined
    for policy in surface.EMPTY:
        agree = surface.surface_scores(empty, empty, spacing, tolerance_mm=1.0, empty=policy)
        assert agree == ((0.0, False),) * 4 + ((1.0, False),)
        left_out = surface.surface_scores(empty, empty, spacing, tolerance_mm=1.0, empty=policy, both_empty="nan")
        assert all(math.isnan(value) and not defined for value, defined in left_out)


def test_diagonal_exceeds_every_distance():
    corners = np.zeros((2, 4, 5, 6), bool)
    corners[0, 0, 0, 0] = corners[1, -1, -1, -1] = True
    far, _ = surface.hausdorff95(*corners, (2.0, 1.0, 0.5))
    missed, _ = surface.hausdorff95(corners[0], np.zeros((4, 5, 6), bool), (2.0, 1.0, 0.5))
    assert missed > far


def test_names():
    assert surface.hausdorff95_name() == "HD95[max_directed,empty=diagonal] (mm)"
    assert surface.hausdorff95_name("pooled", "nan") == "HD95[pooled,empty=nan] (mm)"


def test_bad_arguments_are_refused():
    mask = np.ones((2, 3), bool)
    with pytest.raises(UsageError, match="method='medpy' is not one of max_directed, pooled, directed"):
        surface.hausdorff95(mask, mask, (1.0, 1.0), method="medpy")
    with pytest.raises(UsageError, match="empty='zero'"):
        surface.hausdorff95_name("pooled", "zero")
    with pytest.raises(UsageError, match="both_empty='zero'"):
        surface.hausdorff95(mask, mask, (1.0, 1.0), both_empty="zero")
    found = surface.surface_distances(mask, mask, (1.0, 1.0))
    with pytest.raises(UsageError, match="method='mean' is not one of pooled, mean_directed"):
        found.assd(method="mean")
    for percentile in (0.0, 101.0, math.nan):
        with pytest.raises(UsageError, match="must lie above 0"):
            found.hausdorff(percentile=percentile)
    for tolerance in (-1.0, math.inf, math.nan):
        with pytest.raises(UsageError, match="finite number of at least 0"):
            found.nsd(tolerance)
    for spacing in (1.0, (1.0,), (1.0, 0.0), (1.0, math.nan), (1.0, 1.0, 1.0)):
        with pytest.raises(InputError, match="expected 2 positive numbers"):
            surface.hausdorff95(mask, mask, spacing)
    with pytest.raises(InputError, match="boolean"):
        surface.hausdorff95(mask.astype(int), mask, (1.0, 1.0))
