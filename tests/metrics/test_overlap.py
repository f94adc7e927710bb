import math
import subprocess
import sys

import numpy as np
import pytest

from calsegx.interfaces import InputError
from calsegx.metrics import overlap
from tests.metrics import golden

KINDS = ("ellipse", "island", "noisy", "identical", "shift", "single", "touch_border", "full", "empty_pred")
SHAPES = golden.names(*(f"_{kind}" for kind in (*KINDS, "empty_gt")))


def literal_dice(prediction, truth):
    both = predicted = true = 0
    for p, t in zip(prediction.ravel().tolist(), truth.ravel().tolist(), strict=True):
        both, predicted, true = both + (p and t), predicted + p, true + t
    return 2 * both / (predicted + true)


@pytest.mark.parametrize("name", SHAPES)
def test_dice_golden(name):
    inputs, _, outputs = golden.cases()[name]
    value = overlap.dice(inputs["pred"].astype(bool), inputs["gt"].astype(bool))
    assert value == pytest.approx(float(outputs["ref_dice"]), abs=1e-12)


def test_dice_literal():
    rng = np.random.default_rng(0)
    for density in (0.05, 0.5, 0.9):
        prediction, truth = rng.random((2, 5, 7, 6)) < density
        assert overlap.dice(prediction, truth) == literal_dice(prediction, truth)


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
    assert overlap.overlap_counts(prediction, truth) == overlap.OverlapCounts(2, 4, 3)
    assert overlap.dice(prediction, truth) == 4 / 7


def test_merge_equals_whole():
    prediction, truth = np.random.default_rng(1).random((2, 6, 8, 8)) < 0.3
    slices = [overlap.overlap_counts(p, t) for p, t in zip(prediction, truth, strict=True)]
    assert sum(slices[1:], slices[0]) == overlap.overlap_counts(prediction, truth)


def test_bad_masks_are_refused():
    mask = np.zeros((2, 3), bool)
    with pytest.raises(InputError, match="prediction mask is uint8"):
        overlap.dice(mask.astype(np.uint8), mask)
    with pytest.raises(InputError, match="truth mask is list"):
        overlap.dice(mask, mask.tolist())
    with pytest.raises(InputError, match="same grid"):
        overlap.dice(mask, mask.T)


def test_metrics_import_neither_flax_nor_torch_nor_nibabel_nor_jax():
    code = (
        "import sys\n"
        "from calsegx.metrics import calibration, overlap, regions, statistics, surface\n"
        "sys.exit(', '.join({'flax', 'torch', 'nibabel', 'jax'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
