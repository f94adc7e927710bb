"""docs/weights.md: its Python runs, its commands have only flags that exist."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from calsegx.models.sam import backbone

ROOT = pathlib.Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "weights.md").read_text()


def test_the_example_runs(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    shutil.copytree(backbone.tiny_weights(), tmp_path / "weights" / "sam_vit_h")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, "docs/weights.md", "exec"), names)
    assert names["masks"].shape == (1, 3, 120, 90) and names["masks"].dtype == bool


@pytest.mark.parametrize("page", ["README.md", "docs/weights.md"])
def test_the_commands_have_flags_that_exist(page):
    text = (ROOT / page).read_text()
    commands = re.findall(r"-m weights_conversion\.convert_sam(.*)", text)
    assert commands
    listed = subprocess.run(
        [sys.executable, "-m", "weights_conversion.convert_sam", "--helpfull"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    known = set(re.findall(r"^  --(?:\[no\])?([\w.]+)", listed, re.MULTILINE))
    wanted = {flag for line in commands for flag in re.findall(r"--([\w.]+)", line)}
    assert wanted and wanted <= known
    assert {"source", "output", "preprocessing", "check"} <= known
