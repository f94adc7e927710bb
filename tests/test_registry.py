"""The registry, and the promise that a loss, a dataset layout or a backbone is one new file."""

import sys

import jax.numpy as jnp
import pytest

from calsegx import losses, models
from calsegx.data import layouts
from calsegx.interfaces import UsageError
from calsegx.registry import Registry

LOSS = """
import jax.numpy as jnp
from calsegx import losses

@losses.registry.register("brand_new")
def brand_new(logits, labels, *, power=2.0):
    return jnp.abs(logits[..., 0] - labels).mean(axis=tuple(range(1, labels.ndim))) ** power
"""
LAYOUT = """
from calsegx.data import layouts
from calsegx.interfaces import Case, Dataset

@layouts.registry.register("brand_new")
def read(root):
    if not (root / "brand_new.txt").is_file():
        return None
    image = root / "image.nii.gz"
    return Dataset(root, (Case("case", "subject", {"T1": image}, None, "test"),), ("T1",), {})
"""
BACKBONE = """
from calsegx import models

@models.registry.register("brand_new")
def load_backbone(folder, num_classes):
    return ("a backbone", num_classes)
"""


@pytest.fixture
def one_new_file(tmp_path, monkeypatch):
    """Puts one more file into a package's folder, as a user would, and takes it out again."""

    def put(package, name, text):
        (tmp_path / f"{name}.py").write_text(text)
        package.registry.names()  # what is there already is registered once, before the copy below
        monkeypatch.setattr(package.registry, "_entries", dict(package.registry._entries))
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
        monkeypatch.delitem(sys.modules, f"{package.__name__}.{name}", raising=False)

    return put


def test_a_loss_is_one_new_file(one_new_file):
    one_new_file(losses, "brand_new_loss", LOSS)
    assert "brand_new" in losses.names()
    bound = losses.registry.bind("brand_new", {"power": 1.0})
    assert bound(jnp.ones((2, 3, 1)), jnp.zeros((2, 3), int)).tolist() == [1.0, 1.0]
    with pytest.raises(UsageError, match="no option 'powre'; it has: power"):
        losses.registry.bind("brand_new", {"powre": 1.0})


def test_a_layout_is_one_new_file(one_new_file, tmp_path):
    one_new_file(layouts, "brand_new_layout", LAYOUT)
    root = tmp_path / "data"
    root.mkdir()
    (root / "brand_new.txt").touch()
    (dataset,) = layouts.detect(root).cases
    assert dataset.case_id == "case"


def test_a_backbone_is_one_new_file(one_new_file):
    one_new_file(models, "brand_new_backbone", BACKBONE)
    assert models.registry.get("brand_new")(None, 3) == ("a backbone", 3)


def test_unknown_names_list_the_known_and_the_nearest():
    with pytest.raises(UsageError, match=r"no loss named 'dise'; known: .*dice.*Did you mean 'dice'"):
        losses.get("dise")


def test_a_name_with_a_colon_loads_code_from_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "my_package.py").write_text("def my_loss(logits, labels):\n    return 'mine'\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert losses.get("my_package:my_loss")(None, None) == "mine"
    with pytest.raises(UsageError, match="cannot be loaded"):
        losses.get("my_package:missing")


def test_a_name_is_taken_once():
    registry: Registry = Registry("thing", "calsegx.losses")
    registry.register("x")(len)
    registry.register("x")(len)  # importing a module twice is no conflict
    with pytest.raises(ValueError, match="registered twice"):
        registry.register("x")(max)
