"""docs/prediction.md: it names every file that is written, and every protocol."""

import pathlib
import re

import pytest

from calsegx import configs
from calsegx.evaluation import prediction_files

ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "prediction.md").read_text()


def test_protocols_and_files_are_right():
    assert set(configs.PROTOCOLS) <= set(re.findall(r"`(\w+)`", PAGE))
    assert {prediction_files.OWNER, prediction_files.LABELS} <= set(re.findall(r"`([\w.]+)`", PAGE))
    for name in prediction_files._bids_texts({}):
        assert name in PAGE.replace("seg-calsegx_{dseg,probseg}.json", "seg-calsegx_dseg.json seg-calsegx_probseg.json")


@pytest.mark.parametrize("protocol", configs.PROTOCOLS)
def test_every_protocol_says_what_to_give(protocol):
    (row,) = (line for line in PAGE.splitlines() if line.startswith("| ") and f"`{protocol}`" in line)
    assert len(row.split("|")) == 4
