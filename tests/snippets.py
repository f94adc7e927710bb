"""The fenced blocks of README.md and docs, taken apart into what a reader would run."""

import contextlib
import importlib
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from absl import flags

from calsegx import configs
from launch import common

ROOT = Path(__file__).parent.parent
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")))
SHELL, PYTHON, DATA = ("bash", ""), "python", ("json", "yaml")
SHOWN = ("math", "text", "console")  # formulas, file contents and what commands print
_FENCE = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
_MODULE = re.compile(r"-m ((?:launch|weights_conversion|benchmarks)\.\w+)(.*)", re.DOTALL)


@dataclass(frozen=True)
class Snippet:
    """One command, or one block of another language."""

    page: str
    language: str
    text: str

    def __str__(self):
        return f"{self.page}: {self.text}"


def of(page):
    """The snippets of a page, in its order; a block of the shell is cut into its commands."""
    found = []
    for indent, language, block in _FENCE.findall((ROOT / page).read_text()):
        text = re.sub(rf"^{indent}", "", block, flags=re.MULTILINE)
        parts = commands(text) if language in SHELL else [text]
        found += [Snippet(page, language, part) for part in parts]
    return found


def commands(block):
    """The commands of a block, without comments; a script (``#!``) is one."""
    if block.startswith("#!"):
        return [block]
    lines = block.replace("\\\n", " ").splitlines()
    return [text for line in lines if (text := _without_comment(line))]


def _without_comment(line):
    return re.sub(r"(^|\s+)#\s.*$", "", line).strip()


def calls(page):
    """Every call of one of our modules that a page shows, in blocks or in running text: (module, its flags)."""
    text = (ROOT / page).read_text()
    inline = [re.sub(r"\s+", " ", code) for code in re.findall(r"`([^`]+)`", _FENCE.sub("", text))]
    shown = [snippet.text for snippet in of(page) if snippet.language in SHELL]
    for line in [*inline, *shown]:
        if found := _MODULE.search(line.replace("\\\n", " ")):
            yield found[1], re.findall(r"--[\w.]+(?:=(?:\"[^\"]*\"|'[^']*'|\S+))?", found[2].partition("\n")[0])


@contextlib.contextmanager
def defined(module):
    """A script of ours with its flags defined, and taken back in the end, so that scripts do not meet."""
    script, values = importlib.import_module(module), flags.FLAGS
    before = set(values)
    try:
        if module.startswith("benchmarks."):
            script.define_flags(values)
            flags.DEFINE_bool("keep_memory", True, "As benchmarks.measure.main defines it for all of them.")
        else:
            script.define_flags()
        yield script, {name: values[name] for name in set(values) - before}
    finally:
        for name in set(values) - before:
            delattr(values, name)


def script(command):
    """The script of ours that a command starts, and what it is given; ("", []) for another command."""
    words = shlex.split(command)
    while words and re.fullmatch(r"\w+=\S*", words[0]):  # a variable of the environment
        words.pop(0)
    found = re.fullmatch(r"python -m ((?:launch|weights_conversion)\.\w+)", " ".join(words[:3]))
    return (found[1], words[3:]) if found else ("", [])


def call(module, given):
    """Run a script of ours in this process, as its command would."""
    importlib.invalidate_caches()  # a file that the page just wrote may be named
    with mock.patch.object(sys, "argv", [module, *given]), defined(module) as (script, _):
        assert len(flags.FLAGS(sys.argv)) == 1, f"{given}: not all are flags"
        script.main()


def wrong_flag(known, flag):
    """What is wrong with ``--name=value``; empty if nothing is."""
    name, given, value = flag.removeprefix("--").partition("=")
    if name.startswith("config."):
        return "" if name in common.field_names(configs.TrainConfig()) and "config" in known else f"{flag}: no setting"
    if name not in known:
        plain = name.removeprefix("no")
        return "" if plain in known and known[plain].boolean else f"{flag}: no flag"
    try:
        if given:
            known[name].parser.parse(shlex.split(value)[0])
    except ValueError as error:
        return f"{flag}: {error}"
    return "" if given or known[name].boolean else f"{flag}: no value"
