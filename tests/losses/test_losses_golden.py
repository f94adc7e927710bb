"""Values and gradients against PyTorch, MONAI and the published MarginLoss, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calsegx import losses
from tests.losses import golden


def loss_of(case_id: str):
    """The name and the options of the loss that a golden case computes."""
    name = case_id.removeprefix("dg_")
    if name != case_id:
        name = name.split("_", 1)[1]
    parameters = golden.cases()[case_id]["hparams"]
    if name.startswith("cmp_"):
        return "cmp", {"threshold": parameters["tau"], "temperature": parameters["gamma"]}
    if name.startswith(("sam_dice_bce", "ce_dice")):
        return "sam", {}
    if name.startswith("dice_"):
        options = {
            "include_background": "nobg" not in name,
            "squared": "_sq_" in name,
            "jaccard": "_jac_" in name,
            "smooth": parameters.get("smooth_nr", 1e-5),
        }
        return "dice", options
    return name.split("_")[0], {}


@functools.cache
def value_and_gradient(name: str, options: tuple):
    loss = losses.registry.bind(name, dict(options))
    return jax.jit(jax.value_and_grad(lambda logits, labels: jnp.mean(loss(logits, labels))))


def ids():
    return [name for name in golden.cases() if not name.startswith(("fip_", "temperature"))]


def test_every_kind_of_loss_has_cases():
    assert {loss_of(case_id)[0] for case_id in ids()} == {"ce", "bce", "dice", "sam", "cmp"}


@pytest.mark.parametrize("case_id", ids())
def test_value_and_gradient(case_id: str):
    case = golden.read(case_id)
    name, options = loss_of(case_id)
    with jax.enable_x64():
        function = value_and_gradient(name, tuple(sorted(options.items())))
        value, gradient = function(jnp.asarray(case["logits"]), jnp.asarray(case["labels"]))
        value, gradient = np.asarray(value), np.asarray(gradient)
    # The one case that sums over voxels and samples; ours is the mean over both.
    count = case["labels"].size if case_id == "bce_sum_D" else 1
    np.testing.assert_allclose(value * count, case["value"], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(gradient * count, case["grad"], rtol=1e-9, atol=1e-9)
