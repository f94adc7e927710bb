"""Scanner B is unlike the training cases, other patients on the training's scanner are not: on real phantoms."""

import pytest

from benchmarks import training_domain


@pytest.mark.slow
def test_the_other_scanner_is_flagged_and_the_same_is_not(tmp_path):
    same, other = training_domain.rows_of(seed=5, severity=0.7, train=8, test=3, folder=tmp_path)
    assert (same["scanner"], same["cases"], same["flagged"]) == ("A", 3, 0)
    assert (other["scanner"], other["cases"], other["flagged"]) == ("B", 3, 3)
    assert same["single"] < 0.1 < 0.9 < other["single"]
    assert same["most"] < same["limit"] < other["least"]
