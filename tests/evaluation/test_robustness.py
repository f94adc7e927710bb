"""Prompts that are moved at random for the evaluation."""

import types

import numpy as np
import pytest

from calsegx import configs, features
from calsegx.data import frames
from calsegx.evaluation import robustness, study
from calsegx.interfaces import Case, Prompts


@pytest.mark.parametrize(("protocol", "alike"), [("volume_points", True), ("gt_points", False)])
def test_only_the_pair_of_a_volume_moves_alike_on_all_slices(protocol, alike):
    points = np.tile(np.array([[20, 30], [40, 10]], np.float32), (4, 1, 1))
    given = {protocol: Prompts(points=points, labels=np.tile(np.array([1, 0], np.int32), (4, 1)))}
    cached = features.CachedSlices(np.zeros((4, 1, 1, 1), features.BFLOAT16), None, np.arange(4), given)
    geometry = frames.frame_geometry((4, 50, 40), (1.0, 1.0, 1.0), 64, (16, 16))
    work = study.Study(None, types.SimpleNamespace(image_size=64), None, protocol, "", configs.DataConfig())
    case = Case("a", "a", {}, None, "test")
    subject = study.Subject(case, None, (1.0, 1.0, 1.0), geometry, cached, None, None)
    moved = [robustness.jittered(work, subject, 0.1, draw).cached.prompts[protocol] for draw in range(2)]
    for prompts in moved:
        assert (np.ptp(prompts.points, axis=0).max() == 0) == alike
        np.testing.assert_array_equal(prompts.labels, given[protocol].labels)
        assert np.abs(prompts.points - points).max() > 0.1
    assert np.abs(moved[0].points - moved[1].points).max() > 0.1
