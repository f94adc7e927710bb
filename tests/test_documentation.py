"""docs/methods.md: its losses parse, it names everything there is, and its pictures are drawn."""

import ast
import importlib
import inspect
import math
import pathlib
import pkgutil
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from calsegx import calibrators, losses, metrics
from calsegx.calibrators import local_temperature
from calsegx.data import corruptions
from calsegx.losses import augmented_lagrangian, expression, fisher
from launch import calibrate

ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "methods.md").read_text()
LINKED = set(re.findall(r"\]\(figures/(\w+)\.png\)", PAGE))
CORRUPTIONS = (ROOT / "docs" / "corruptions.md").read_text()
PROTOCOL = (ROOT / "docs" / "evaluation-protocol.md").read_text()
SHOWN = LINKED | set(re.findall(r"\]\(figures/(\w+)\.png\)", CORRUPTIONS + PROTOCOL))


def section(title):
    """The text under a heading, up to the next."""
    (text,) = re.findall(rf"^##+ {title}\n(.*?)(?=^##|\Z)", PAGE, re.DOTALL | re.MULTILINE)
    return text


def defaults(function):
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def documented(text):
    """The options that a text gives as `name=value`, with their values."""
    found = re.findall(r"`(\w+)=([^`]+)`", text)
    return {name: math.log(2) if value == "math.log(2)" else ast.literal_eval(value) for name, value in found}


@pytest.mark.parametrize("name", losses.names())
def test_every_loss_has_its_picture_its_options_a_flag_and_a_call(name):
    text = section(f"`{name}`")
    assert documented(text) == defaults(losses.get(name))
    assert name in LINKED and f"(figures/{name}.png)" in text
    assert f'losses.get("{name}")' in text
    assert re.search(rf"--config\.loss=\S*[^`]*\b{name}\b", text)


@pytest.mark.parametrize("text", sorted(set(re.findall(r'--config\.loss=(?:"([^"]+)"|(?=\w))', PAGE)) - {""}))
def test_the_expressions_of_losses_can_be_used(text):
    for classes in (1, 3):
        shapes = jax.ShapeDtypeStruct((2, 6, 6, classes), np.float32), jax.ShapeDtypeStruct((2, 6, 6), np.int32)
        assert jax.eval_shape(expression.parse(text), *shapes).shape == (2,)


@pytest.mark.parametrize(("title", "function"), [("CRaC", augmented_lagrangian.crac), ("FIP", fisher.value_and_grad)])
def test_the_penalties_are_described_with_their_options(title, function):
    assert defaults(function).items() <= documented(section(title)).items()


def test_every_calibrator_is_described_with_its_options():
    text = section("Calibrators")
    for name in calibrators.names():
        (row,) = re.findall(rf"^\| `{name}` .*$", text, re.MULTILINE)
        told, taken = documented(row), defaults(calibrators.get(name).fit)
        assert told.items() <= (taken | {"use_image": False}).items(), name


def test_the_calibrator_of_the_command_can_be_used():
    (text,) = re.findall(r'--calibrator="([^"]+)"', PAGE)
    name, options = calibrate.read_calibrator(text)
    assert options.items() <= defaults(calibrators.get(name).fit).items()


def test_the_parameters_of_local_temperature_are_counted_right():
    for dimensions, found in ((2, lambda n, c: 200 * n + 25 * c + 9), (3, lambda n, c: 1000 * n + 125 * c + 9)):
        weights = local_temperature.initial(3, 2, dimensions)
        assert sum(array.size for array in weights.values()) == found(3, 2)


@pytest.mark.parametrize("module", [module.name for module in pkgutil.iter_modules(metrics.__path__)])
def test_every_function_of_the_metrics_is_named(module):
    text = re.sub(r"```.*?```", "", PAGE[PAGE.index("\n## Metrics") :], flags=re.DOTALL)
    told = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", text))))
    found = importlib.import_module(f"calsegx.metrics.{module}")
    public = {name: thing for name, thing in vars(found).items() if getattr(thing, "__module__", "") == found.__name__}
    for kind in [thing for name, thing in public.items() if name.endswith(("Statistics", "Counts", "Distances"))]:
        public |= {name: thing for name, thing in vars(kind).items() if inspect.isfunction(thing)}
    wanted = {name for name in public if name[0].islower() and not name.startswith("check_")}
    assert wanted and wanted <= told, wanted - told


def test_every_picture_exists_and_every_file_is_shown():
    assert {path.stem for path in (ROOT / "docs" / "figures").iterdir()} == SHOWN
    for path in (ROOT / "docs" / "figures").iterdir():
        assert path.stat().st_size < (700_000 if path.stem == "corruptions" else 60_000)  # 66 noisy images


@pytest.mark.parametrize("name", corruptions.names())
def test_every_corruption_is_described_with_its_levels(name):
    (row,) = re.findall(rf"^\| `{name}` .*\| ([^|]*) \|$", CORRUPTIONS, re.MULTILINE)
    told = {
        key: [float(value) for value in values.split(", ")] for key, values in re.findall(r"`(\w+)` ([\d., ]+)", row)
    }
    assert told == corruptions.parameters(name)


@pytest.mark.slow
def test_the_script_draws_every_picture(tmp_path):
    subprocess.run([sys.executable, ROOT / "docs" / "gallery.py", tmp_path / "figures"], cwd=tmp_path, check=True)
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == SHOWN
