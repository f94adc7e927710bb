"""Calibrators: which golden method is which of ours, in which parity form."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from calsegx.calibrators import affine, dirichlet, local_temperature, temperature
from tests.golden_cases import FLOAT32, FLOAT64, Case, Close, Left, maps

PREFIX = "temperature_level_2_"
LEAVES = ("conv1", "conv2", "conv3", "conv4", "param1", "param2", "param3", "param_img")  # the columns of ``kernel``
ORIGINAL = "local_temperature(original=True)"
THROUGH_PROBABILITIES = "W and b are compared through the objective and the probabilities, as the case's tolerance says"


@maps("calibrators", "T minimising NLL of softmax")
def scaling(case: Case) -> dict[str, Any]:
    logits, labels = case.logits.reshape(-1, case.logits.shape[-1]), case.labels.ravel()
    every, foreground = (temperature.fit([(logits[kept], labels[kept])]) for kept in (labels >= 0, labels > 0))
    grid = {
        f"T_grid_{criterion}_orig": Close(
            temperature.grid_search(logits, labels, criterion=criterion), parity="temperature.grid_search"
        )
        for criterion in ("ece", "nll")
    }
    # Both minimise: ours may lie below their optimum, by what their search left, but not above.
    vector_nll = affine.Vector.fit([(logits, labels)])["nll_after"]
    tolerance = FLOAT64 if vector_nll > case.outputs["vector_nll"] else FLOAT32
    # A minimiser of function values alone, which made the exact T, knows it to the root of the precision.
    return grid | {
        "T_nll_exact": Close(every["temperature"], 1e-6),
        "nll_at_T": every["nll_after"],
        "nll_before": every["nll_before"],
        "T_nll_exact_fg": Close(foreground["temperature"], 1e-6),
        "nll_at_T_fg": foreground["nll_after"],
        "T_torch_uncertainty_lbfgs": Close(every["temperature"], 1e-3),
        "vector_nll": Close(vector_nll, tolerance),
    }


@maps("calibrators", "LTS at the repo zero initialisation")
def local_temperature_at_zero(case: Case) -> dict[str, Any]:
    logits, image = case.logits.astype(np.float32), np.moveaxis(case["image"], 1, -1)
    weights = local_temperature.initial(logits.shape[-1], image.shape[-1], logits.ndim - 2, original=True)
    scale = local_temperature.temperatures(weights, jnp.asarray(logits), jnp.asarray(image), original=True)
    error = np.abs(logits / np.asarray(scale)[..., None] / logits - 0.5).max()
    return {"scaled_over_logits_max_abs_err_vs_half": Close(error, parity=ORIGINAL)}


@maps("calibrators", "LTS forward with random weights")
def local_temperature_forward(case: Case) -> dict[str, Any]:
    def kernel(name: str) -> np.ndarray:
        """``[1, C, 5, 5]`` to ``[5, 5, C, 1]``."""
        return np.moveaxis(case[f"params/{PREFIX}{name}.weight"], (1, 0), (-2, -1))

    def bias(name: str) -> np.ndarray:
        return case[f"params/{PREFIX}{name}.bias"]

    weights = {
        "kernel": np.concatenate([kernel(name) for name in LEAVES], axis=-1),
        "bias": np.concatenate([bias(name) for name in LEAVES]),
        "image_kernel": kernel("conv_img"),
        "image_bias": bias("conv_img"),
    }
    arrays = (case.logits, case.labels, np.moveaxis(case["image"], 1, -1), np.ones(case.labels.shape, bool))
    with jax.enable_x64():
        weights, arrays = jax.tree.map(jnp.asarray, (weights, arrays))
        likelihood = jax.jit(jax.value_and_grad(lambda w: local_temperature.nll(w, *arrays, original=True)))
        nll, gradients = jax.tree.map(np.asarray, likelihood(weights))
        scale = np.asarray(local_temperature.temperatures(weights, arrays[0], arrays[2], original=True))
    found = {"temperature": scale, "nll": nll}
    for i, name in enumerate(LEAVES):
        found[f"grad_{PREFIX}{name}.weight"] = np.moveaxis(gradients["kernel"][..., i : i + 1], (-2, -1), (1, 0))
        found[f"grad_{PREFIX}{name}.bias"] = gradients["bias"][i : i + 1]
    found[f"grad_{PREFIX}conv_img.weight"] = np.moveaxis(gradients["image_kernel"], (-2, -1), (1, 0))
    found[f"grad_{PREFIX}conv_img.bias"] = gradients["image_bias"]
    return {role: Close(array, parity=ORIGINAL) for role, array in found.items()}


@maps("calibrators", r"Dirichlet calibration softmax\(W log p", "FullDirichletCalibrator of the original authors")
def dirichlet_calibration(case: Case) -> dict[str, Any]:
    hparams, logits = case.hparams, np.log(case["probs"])
    odir, intercept = (hparams[name] for name in (("lam", "mu") if "lam" in hparams else ("reg_lambda", "reg_mu")))
    ref_row = hparams.get("ref_row", False)
    params = dirichlet.fit([(logits, case.labels)], odir=odir, intercept=intercept, ref_row=ref_row)
    parity = "dirichlet(ref_row=True)" if ref_row else ""
    probabilities = special.softmax(dirichlet.apply(params, logits), axis=-1)
    return {
        "W": Left(THROUGH_PROBABILITIES),
        "b": Left(THROUGH_PROBABILITIES),
        "weights": Left(THROUGH_PROBABILITIES),
        "objective": Close(params["objective"], 1e-8, parity),
        "probs": Close(probabilities, 1e-4, parity),
        "nll": Close(params["nll_after"], 1e-6, parity),
    }
