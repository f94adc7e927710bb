"""docs/your-own-data.md names every layout, column and protocol."""

import pathlib
import re

import pytest

from calsegx import configs
from calsegx.data import layouts, side_table
from calsegx.data.layouts import table

ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "your-own-data.md").read_text()


@pytest.mark.parametrize("name", layouts.registry.names())
def test_every_layout_is_described(name):
    assert re.search(rf"^##+ .*`{name}`", PAGE, re.MULTILINE)


def test_columns_and_protocols_are_named():
    text = re.sub(r"```.*?```", lambda block: f"`{block[0].strip('`')}`", PAGE, flags=re.DOTALL)
    told = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", text))))
    assert set(table.COLUMNS) | {*side_table.SUBJECT} <= told
    assert {name for names in side_table.COLUMNS.values() for name in names} <= told
    assert set(configs.PROTOCOLS) <= told
