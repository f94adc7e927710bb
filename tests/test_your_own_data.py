"""docs/your-own-data.md: its Python runs, it names every layout and column, and its flags exist."""

import pathlib
import re
import subprocess
import sys

import pytest

from calsegx import configs
from calsegx.data import layouts, side_table
from calsegx.data.layouts import table
from launch import common
from tests.data.layouts import fake

ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "your-own-data.md").read_text()
SCRIPTS = sorted(set(re.findall(r"-m launch\.(\w+)", PAGE)))


def test_the_layout_of_the_example_is_read(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "layout_of_the_page.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    root = fake.write(tmp_path / "data", "patient1/t1.nii.gz", "patient1/lesion.nii.gz")
    (case,) = layouts.detect(root, "layout_of_the_page:read").cases
    assert case.images["T1"].is_file() and case.label.is_file()


@pytest.mark.parametrize("name", layouts.registry.names())
def test_every_layout_is_described(name):
    assert re.search(rf"^##+ .*`{name}`", PAGE, re.MULTILINE)


def test_columns_and_protocols_are_named():
    text = re.sub(r"```.*?```", lambda block: f"`{block[0].strip('`')}`", PAGE, flags=re.DOTALL)
    told = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", text))))
    assert set(table.COLUMNS) | {*side_table.SUBJECT} <= told
    assert {name for names in side_table.COLUMNS.values() for name in names} <= told
    assert set(configs.PROTOCOLS) <= told


def test_settings_exist():
    shown = set(re.findall(r"--(config\.[\w.]+)", PAGE))
    assert shown and shown <= set(common.field_names(configs.TrainConfig()))


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_that_is_shown_exists(script):
    lines = re.findall(rf"^python -m launch\.{script}(.*)$", PAGE, re.MULTILINE)
    wanted = {flag for line in lines for flag in re.findall(r"--([\w.]+)", line) if not flag.startswith("config.")}
    command = [sys.executable, "-m", f"launch.{script}", "--helpfull"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    assert wanted <= set(re.findall(r"^  --(?:\[no\])?(\w+)", listed, re.MULTILINE)) and wanted
