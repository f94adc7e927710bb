"""The figures of docs/scaling.md: one exchange per step, of the same size on any number of devices."""

import json
import pathlib

import pytest

from benchmarks import scaling

ROWS = json.loads((pathlib.Path(__file__).parents[2] / "docs" / "scaling.json").read_text())


def test_the_exchange_is_the_gradients_and_does_not_grow():
    measured = [row for row in ROWS if row.get("devices", 0) > 1 and "decoder" in row]
    assert {row["devices"] for row in measured if row["decoder"] == "tiny"} == {2, 4, 8}
    for row in measured:
        assert row["collectives"] == ["all-reduce"] and row["exchanges"] == 1
        assert 0.9 < row["exchanged_mb"] / row["gradients_mb"] < 1
    assert len({row["exchanged_mb"] for row in measured}) == 2  # one for each decoder


def test_a_ring():
    assert scaling.ring_bytes(8.0, 1) == 0 and scaling.ring_bytes(8.0, 2) == 8 and scaling.ring_bytes(8.0, 4) == 12
    [row] = [row for row in scaling.model(14e6, [256]) if row["gb_per_second"] == 50]
    assert row["milliseconds"] == pytest.approx(1e3 * (2 * 255 / 256 * 14e6 / 50e9 + 510 * 5e-6))


def test_the_figure_is_drawn(tmp_path):
    scaling.draw(tmp_path / "figure.png", [row for row in ROWS if row.get("decoder") == "tiny"])
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
