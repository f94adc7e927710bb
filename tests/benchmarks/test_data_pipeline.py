"""The benchmark of data: every row is complete, both sides read the same, pages are written."""

import json

import numpy as np
import pytest
from absl import flags

from benchmarks import data_pipeline
from calsegx.interfaces import UsageError

TINY = ("--volume=32,40,24", "--features=8,8,16", "--slices=6", "--rounds=2", "--steps=1", "--volumes=8")


def run(*arguments):
    values = flags.FlagValues()
    data_pipeline.define_flags(values)
    values(["data_pipeline", *TINY, *arguments])
    return data_pipeline.run(values)


def test_rows_and_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{data_pipeline.MARKS[0]}\nold\n{data_pipeline.MARKS[1]}\nafter\n")
    run("--tables=reading,cache,verification", f"--json={tmp_path}/rows.json", f"--page={page}")
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["table"] for row in rows].count("reading") == 6
    for row in rows:
        assert all(name in row for name in data_pipeline.COLUMNS[row["table"]]) and row["seconds"] > 0
    cached = [row for row in rows if row["table"] == "cache"]
    assert len(cached) == 6 and all(row["ratio"] == row["npy_seconds"] / row["seconds"] for row in cached)
    assert [row["what"] for row in rows if row["table"] == "verification"] == ["8 volumes of 32x40x24, 0 errors"]
    text = page.read_text()
    assert "old" not in text and text.startswith("before\n") and "| single slices, 8x8x16 " in text


@pytest.mark.slow
def test_waiting():
    (row,) = run("--tables=waiting", "--slices=16")
    assert 0 < row["waiting"] < 1 and row["seconds_without_data"] > 0


def test_the_cache_and_npy_hold_the_same(tmp_path):
    cache, arrays = data_pipeline.write_cache(tmp_path, 4, (8, 8, 16), ["case"])
    read = cache.read_case("case", data_pipeline.VIEW)
    np.testing.assert_array_equal(read.features.view(np.uint16), arrays["features"])
    np.testing.assert_array_equal(read.labels, arrays["labels"])


def test_an_unknown_table():
    with pytest.raises(UsageError, match="--tables has 'speed', which is none of reading, cache"):
        run("--tables=speed")
