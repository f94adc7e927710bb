"""Every snippet of README.md and docs runs: its flags exist, its Python and its commands do what the page says.

Commands run in a folder of their page, in its order, on small stand-ins (``stand_ins``): that is the slow part.
"""

import contextlib
import io
import json
import re
import sys

import numpy as np
import pytest
import yaml

from calsegx.data import corruptions
from tests import snippets, stand_ins

# What cannot run here, and why: (page, or "" for any; what the snippet contains; reason).
NOT_RUN = (
    ("README.md", r"^make ", "installs, runs the demo and this suite; tests/test_readme.py knows the targets"),
    ("docs/scaling.md", r"^#!/bin/bash", "needs Slurm and 32 GPUs"),
    ("docs/scaling.md", r"--coordinator", "waits for a second machine; tests/launch/test_processes.py starts two"),
    ("docs/first-run.md", r"^(git clone|make |source )", "a network and an environment of its own"),
    ("docs/experiments.md", r"^nnUNetv2_predict", "nnU-Net is not installed with calsegx"),
    ("docs/results/phantoms.md", "", "half an hour; tests/test_results.py"),
    ("", r"-m benchmarks\.", "minutes on a quiet machine; tests/benchmarks runs them small"),
    ("docs/failure-contract.md", r"-m tests\.faults", "minutes; tests/faults runs them small"),
)


def why_not(snippet):
    """The reasons of ``NOT_RUN`` that hold for a snippet."""
    return [reason for page, part, reason in NOT_RUN if page in ("", snippet.page) and re.search(part, snippet.text)]


def runs(page, languages):
    return [s for s in snippets.of(page) if s.language in languages and not why_not(s)]


def test_every_snippet_is_of_a_kind_that_is_checked():
    known = {*snippets.SHELL, snippets.PYTHON, *snippets.DATA, *snippets.SHOWN}
    assert [str(s) for page in snippets.PAGES for s in snippets.of(page) if s.language not in known] == []


@pytest.mark.parametrize(("page", "part", "reason"), NOT_RUN)
def test_every_exception_is_needed(page, part, reason):
    assert any(reason in why_not(s) for name in snippets.PAGES for s in snippets.of(name)), (page, part)


@pytest.mark.parametrize("page", snippets.PAGES)
def test_every_flag_that_is_shown_exists(page):
    if any(module in ("benchmarks.metrics", "benchmarks.fisher_penalty") for module, _ in snippets.calls(page)):
        pytest.importorskip("torch", reason="the page's benchmark compares with torch")
    for module, given in snippets.calls(page):
        with snippets.defined(module) as (_, known):
            assert [wrong for flag in given if (wrong := snippets.wrong_flag(known, flag))] == [], module


def test_a_wrong_flag_is_found():
    with snippets.defined("launch.predict") as (_, known):
        given = ("--runn=x", "--split=nosuch", "--run", "--run=x", "--nocalibrate", "--split=test")
        assert [bool(snippets.wrong_flag(known, flag)) for flag in given] == [True, True, True, False, False, False]
    with snippets.defined("launch.train") as (_, known):
        assert snippets.wrong_flag(known, "--config.stepz=1") and not snippets.wrong_flag(known, "--config.steps=1")


@pytest.mark.parametrize("page", snippets.PAGES)
def test_data_can_be_read(page):
    for snippet in runs(page, snippets.DATA):
        assert (json.loads if snippet.language == "json" else yaml.safe_load)(snippet.text)


@pytest.mark.parametrize("page", snippets.PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`]*`", "", (snippets.ROOT / page).read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("http"):
            path, _, place = target.partition("#")
            found = (snippets.ROOT / page).parent / path if path else snippets.ROOT / page
            assert found.exists(), target
            headings = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE) if place else []
            assert place in ["", *(re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings)], target


@pytest.fixture(scope="session")
def kit(tmp_path_factory):
    """Where stand-ins are made, once."""
    return tmp_path_factory.mktemp("kit")


@pytest.fixture
def workspace(tmp_path, kit, monkeypatch):
    """A folder of the page's own, as current directory; what its Python registers is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    corruptions.names()  # what is there already is registered once, before the copy
    monkeypatch.setattr(corruptions.registry, "_entries", dict(corruptions.registry._entries))
    before = set(sys.modules)
    yield stand_ins.Workspace(tmp_path, kit)
    for name in set(sys.modules) - before:
        if name.startswith("my_"):
            del sys.modules[name]


def execute(snippet, workspace, names):
    """Run one snippet; returns what Python prints.  A block that starts with ``# name.py`` is also that file."""
    if snippet.language in snippets.SHELL:
        workspace.run(snippet.text)
        return ""
    workspace.prepare(snippet.text)
    if file := re.match(r"# (\w+\.py)\n", snippet.text):
        (workspace.folder / file[1]).write_text(snippet.text)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(snippet.text, snippet.page, "exec"), names)
    return printed.getvalue()


def light(page):
    """The Python of a page, if of what the page's own commands make it needs nothing but quick stand-ins."""
    blocks, shown = runs(page, (snippets.PYTHON,)), " ".join(s.text for s in runs(page, snippets.SHELL))
    made = set(re.findall(r"--(?:output|workdir|root)=(\S+)", shown))
    made -= {name for name, make in stand_ins.STAND_INS.items() if callable(make)}
    return [] if any(stand_ins.mentions(s.text, name) for s in blocks for name in made) else blocks


def readme(names, printed):
    loss, mask = printed
    assert re.fullmatch(r"loss \d\.\d+, Fisher penalty \d+\.\d+, penalty / loss \d\.\d+\n", loss)
    assert re.fullmatch(r"mask pixels \[\[.*\]\n", mask)


def methods(names, printed):
    assert np.isfinite(names["values"]).all() and np.isfinite(names["total"])
    assert np.isfinite(list(names["summary"].values())).all()
    assert names["params"]["identifiable"] and names["platt"]["identifiable"]


def darker(names, printed):
    changed = corruptions.corrupt("darker", names["image"], (3.0, 1.0, 1.0), 5, "case1")
    np.testing.assert_allclose(changed, names["image"] * 0.2, atol=1e-5)


def weights(names, printed):
    assert names["masks"].shape == (1, 3, 120, 90) and names["masks"].dtype == bool


def protocol(names, printed):
    assert names["difference"].low > 0 and names["difference"].p < 0.05
    assert re.fullmatch(r"0\.\d{3} \[0\.\d{3}, 0\.\d{3}\], p = 0\.\d{3}\n", printed[0])


# What a page's Python must come to, where running is not enough: a function of its names and of what each block prints.
COMES_TO = {
    "README.md": readme,
    "docs/methods.md": methods,
    "docs/corruptions.md": darker,
    "docs/weights.md": weights,
    "docs/evaluation-protocol.md": protocol,
}


@pytest.mark.parametrize("page", [page for page in snippets.PAGES if light(page)])
def test_the_python_of_a_page_runs(page, workspace):
    names = {"__name__": "page"}
    printed = [execute(snippet, workspace, names) for snippet in light(page)]
    if page in COMES_TO:
        COMES_TO[page](names, printed)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in snippets.PAGES if runs(page, snippets.SHELL)])
def test_the_commands_of_a_page_run_in_its_order(page, workspace):
    names = {"__name__": "page"}
    for snippet in runs(page, (*snippets.SHELL, snippets.PYTHON)):
        execute(snippet, workspace, names)
