"""The README's Python runs, and its commands and paths exist."""

import pathlib
import re
import subprocess
import sys

import pytest

from calsegx import configs
from launch import common

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


PYTHON = {"loss": r"loss \d\.\d+, Fisher penalty \d+\.\d+, penalty / loss \d\.\d+\n", "mask": r"mask pixels \[\[.*\]\n"}


@pytest.mark.parametrize("says", PYTHON)
def test_the_examples_run_and_are_short(says, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == len(PYTHON)
    (code,) = (block for block in blocks if f'print("{says}' in block or f'print(f"{says}' in block)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    exec(compile(code, "README.md", "exec"), {})
    assert re.fullmatch(PYTHON[says], capsys.readouterr().out)


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


@pytest.mark.parametrize("script", sorted(set(re.findall(r"-m launch\.(\w+)", README))))
def test_every_flag_that_is_shown_exists(script):
    shown = set(re.findall(rf"-m launch\.{script}(.*)", README.replace("\n--", " --")))
    wanted = {flag for line in shown for flag in re.findall(r"--([\w.]+)", line)} - {"helpfull"}
    listed = subprocess.run(
        [sys.executable, "-m", f"launch.{script}", "--helpfull"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    known = set(re.findall(r"^  --(?:\[no\])?([\w.]+)", listed, re.MULTILINE))
    known |= set(common.field_names(configs.TrainConfig()))
    assert wanted <= known, wanted - known


def test_make_targets_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"setup", "demo", "test", "lint", "bench"} <= targets
    assert set(re.findall(r"make (\w+)", README)) - {"and"} <= targets
