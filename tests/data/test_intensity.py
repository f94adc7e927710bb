"""Intensity normalisations against their rules, written out."""

import numpy as np
import pytest

from calsegx import configs
from calsegx.data import intensity


def test_normalise_intensity():
    voxels = np.concatenate([np.zeros(500), np.arange(1, 1001)]).astype(np.float32)
    normal = intensity.normalise(voxels, configs.DataConfig())
    assert normal.dtype == np.float32
    assert (normal.min(), normal.max()) == (0, 255)
    assert normal[1000] == pytest.approx(127.5, abs=0.3)
    with pytest.raises(ValueError, match="constant"):
        intensity.normalise(np.full(9, 3.0, np.float32), configs.DataConfig())
    with pytest.raises(ValueError, match="no voxel above 0"):
        intensity.normalise(np.zeros(9, np.float32), configs.DataConfig())
