"""Who may import whom: walks the imports of every file and holds them against DESIGN's direction."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FOUNDATION = {"interfaces", "registry", "configs", "config_checks", "files"}
# What each part of calsegx may import of calsegx, beside itself and the foundation.
ALLOWED = {
    "interfaces": set(),
    "registry": {"interfaces"},
    "configs": {"interfaces"},
    "config_checks": {"interfaces", "configs"},
    "files": {"interfaces"},
    "models": {"bundle"},  # sam.load opens one
    "losses": set(),
    "metrics": set(),
    "calibrators": set(),
    "sharding": set(),
    "locks": set(),
    "uncertainty": {"losses", "metrics"},
    "experiment": {"data"},
    "memory": set(),
    "slice_files": set(),
    "features": {"slice_files"},
    "data": {"features"},  # the pipeline reads the cache
    "training": {"losses", "sharding", "features", "locks", "data"},
    "bundle": {"data", "models", "calibrators", "training"},
    "evaluation": {"metrics", "calibrators", "features", "data", "uncertainty"},
}
# Third-party packages that only some files may touch; a path prefix, relative to the project.
CONFINED = {
    "flax": ("calsegx/models/",),
    "orbax": ("calsegx/training/checkpoints.py",),
    "jax": (
        "calsegx/models/",
        "calsegx/losses/",
        "calsegx/metrics/device.py",
        "calsegx/metrics/overlap.py",
        "calsegx/calibrators/",
        "calsegx/uncertainty/",
        "calsegx/sharding.py",
        "calsegx/training/",
        "calsegx/evaluation/",
    ),
    "torch": (),
    "launch": (),
    "weights_conversion": (),
    "benchmarks": (),
    "tests": (),
}


def imports(path):
    """Absolute names of everything that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


FILES = sorted((ROOT / "calsegx").rglob("*.py"))
PARTS = {path: path.relative_to(ROOT / "calsegx").with_suffix("").parts[0] for path in FILES}


def test_every_part_is_known():
    assert set(PARTS.values()) - {"__init__"} == set(ALLOWED)


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_imports_point_downwards(part):
    allowed = ALLOWED[part] | {part} | (FOUNDATION if part not in FOUNDATION else set())
    for path in (p for p in FILES if PARTS[p] == part):
        for name in imports(path):
            if name.startswith("calsegx."):
                target = name.split(".")[1]
                assert target in allowed or target == "__version__", f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("package", sorted(CONFINED))
def test_packages_stay_where_they_belong(package):
    for path in FILES:
        relative = path.relative_to(ROOT).as_posix()
        if relative.startswith(CONFINED[package] or ("\0",)):
            continue
        found = [name for name in imports(path) if name.split(".")[0] == package]
        assert not found, f"{relative} imports {found}"


def test_the_walk_sees_a_violation(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("import flax.linen as nn\nfrom calsegx import models\n")
    assert list(imports(path)) == ["flax.linen", "calsegx.models"]


LIBRARY = """
import sys
class Absent:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in ("flax", "torch", "nibabel", "orbax", "grain", "tensorstore"):
            raise ImportError(f"{name} was imported")
sys.meta_path.insert(0, Absent)
import calsegx.calibrators, calsegx.losses, calsegx.metrics, calsegx.uncertainty
import pkgutil, importlib
for package in (calsegx.calibrators, calsegx.losses, calsegx.metrics, calsegx.uncertainty):
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
assert "mbls" in calsegx.losses.names() and "dirichlet" in calsegx.calibrators.names()
"""


def test_losses_metrics_and_calibrators_need_no_network_or_file_library():
    subprocess.run([sys.executable, "-c", LIBRARY], cwd=ROOT, check=True)
