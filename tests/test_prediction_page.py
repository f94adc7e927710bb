"""docs/prediction.md: its commands run, and it names every file that is written."""

import pathlib
import re
import subprocess
import sys

import pytest

from calsegx import configs
from calsegx.evaluation import prediction_files

ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "prediction.md").read_text()
COMMANDS = re.findall(r"^python -m launch\.predict (.*)$", PAGE, re.MULTILINE)


def test_protocols_and_files_are_right():
    assert set(configs.PROTOCOLS) <= set(re.findall(r"`(\w+)`", PAGE))
    assert {prediction_files.OWNER, prediction_files.LABELS} <= set(re.findall(r"`([\w.]+)`", PAGE))
    for name in prediction_files._bids_texts({}):
        assert name in PAGE.replace("seg-calsegx_{dseg,probseg}.json", "seg-calsegx_dseg.json seg-calsegx_probseg.json")


def test_every_flag_exists():
    command = [sys.executable, "-m", "launch.predict", "--helpfull"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    wanted = set(re.findall(r"--(?:no)?(\w+)", " ".join([*COMMANDS, *re.findall(r"`(--\w+)`", PAGE)])))
    assert len(COMMANDS) == 3 and {"images", "bids", "calibrate"} <= wanted
    assert wanted <= set(re.findall(r"^  --(?:\[no\])?(\w+)", listed, re.MULTILINE))


@pytest.mark.parametrize("protocol", configs.PROTOCOLS)
def test_every_protocol_says_what_to_give(protocol):
    (row,) = (line for line in PAGE.splitlines() if line.startswith("| ") and f"`{protocol}`" in line)
    assert len(row.split("|")) == 4
