"""README.md: its Python is short, its make targets exist; that its snippets run and its links lead: test_snippets."""

import pathlib
import re

from tests import snippets

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_examples_are_short():
    blocks = [snippet.text for snippet in snippets.of("README.md") if snippet.language == snippets.PYTHON]
    assert len(blocks) == 2
    assert all(len([line for line in block.splitlines() if line.strip()]) <= 12 for block in blocks)


def test_make_targets_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"setup", "demo", "test", "lint", "bench"} <= targets
    assert set(re.findall(r"make (\w+)", README)) - {"and"} <= targets
