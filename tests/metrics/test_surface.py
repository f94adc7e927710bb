import itertools
import math

import numpy as np
import pytest

from calsegx.interfaces import InputError, UsageError
from calsegx.metrics import surface
from tests.metrics import golden

KINDS = ["ellipse", "island", "noisy", "identical", "shift", "single", "touch_border", "full"]
DEFINED = golden.names(*(f"_{kind}" for kind in KINDS))


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


def literal_hausdorff95(a, b, spacing, method):
    def points(mask):
        return [[i * s for i, s in zip(point, spacing, strict=True)] for point in literal_surface(mask)]

    def distances(here, there):
        return [min(math.dist(p, q) for q in there) for p in here]

    directed = [distances(points(a), points(b)), distances(points(b), points(a))]
    if method == "pooled":
        return literal_percentile(directed[0] + directed[1], 95)
    return max(literal_percentile(d, 95) for d in directed)


@pytest.mark.parametrize("name", DEFINED)
@pytest.mark.parametrize(
    ("method", "reference", "library"),
    [("max_directed", "ref_hd95_maxdir", "monai_hd95"), ("pooled", "ref_hd95_union", "medpy_hd95")],
)
def test_hausdorff95_golden(name, method, reference, library):
    inputs, hparams, outputs = golden.cases()[name]
    prediction, truth = inputs["pred"].astype(bool), inputs["gt"].astype(bool)
    for unit, spacing in (("mm", hparams["spacing_mm"]), ("vox", (1.0,) * truth.ndim)):
        value, defined = surface.hausdorff95(prediction, truth, tuple(spacing), method=method)
        assert defined
        assert value == pytest.approx(float(outputs[f"{reference}_{unit}"]), rel=1e-9, abs=1e-9)
        assert value == pytest.approx(float(outputs[f"{library}_{unit}"]), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("method", surface.METHODS)
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (5.0, 0.7, 1.3)])
def test_hausdorff95_literal(method, spacing):
    rng = np.random.default_rng(2)
    for density in (0.05, 0.4):
        prediction, truth = rng.random((2, 4, 6, 5)) < density
        value, defined = surface.hausdorff95(prediction, truth, spacing, method=method)
        assert defined
        assert value == pytest.approx(literal_hausdorff95(prediction, truth, spacing, method), rel=1e-12)


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
    diagonal = math.sqrt(9 + 9 + 36)
    for prediction, truth in ((empty, some), (some, empty)):
        assert surface.hausdorff95(prediction, truth, spacing) == (pytest.approx(diagonal), False)
        assert surface.hausdorff95(prediction, truth, spacing, empty="inf") == (math.inf, False)
        value, defined = surface.hausdorff95(prediction, truth, spacing, empty="nan")
        assert math.isnan(value) and not defined
    for empty_policy in surface.EMPTY:
        assert surface.hausdorff95(empty, empty, spacing, empty=empty_policy) == (0.0, True)


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
    with pytest.raises(UsageError, match="method='medpy' is not one of max_directed, pooled"):
        surface.hausdorff95(mask, mask, (1.0, 1.0), method="medpy")
    with pytest.raises(UsageError, match="empty='zero'"):
        surface.hausdorff95_name("pooled", "zero")
    for spacing in ((1.0,), (1.0, 0.0), (1.0, math.nan), (1.0, 1.0, 1.0)):
        with pytest.raises(InputError, match="expected 2 positive numbers"):
            surface.hausdorff95(mask, mask, spacing)
    with pytest.raises(InputError, match="boolean"):
        surface.hausdorff95(mask.astype(int), mask, (1.0, 1.0))
