"""Losses and priors: which of our functions, with which options, a golden method is."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from calsegx import losses
from calsegx.losses import consistency, expression, neighbourhood, smoothing
from tests.golden_cases import FLOAT32, FLOAT64, Case, Close, Left, maps

DEGENERATE = " on degenerate input"
THIN = "BWCR's code gives a class that is two voxels thick or less the lowest weight, here it has a boundary"


def evaluate(function: Callable, *arguments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over samples and its derivative with respect to the first argument, in float64."""
    with jax.enable_x64():
        value_and_gradient = jax.jit(jax.value_and_grad(lambda *given: jnp.mean(function(*given))))
        value, gradient = value_and_gradient(*map(jnp.asarray, arguments))
        return np.asarray(value), np.asarray(gradient)


@functools.cache
def named(name: str, options: tuple[tuple[str, Any], ...]) -> Callable:
    """A loss with its options, jitted once for all cases of one shape."""
    function = functools.partial(losses.get(name), **dict(options))
    return jax.jit(jax.value_and_grad(lambda logits, labels: jnp.mean(function(logits, labels))))


def value_and_gradient(case: Case, name: str, **options: Any) -> tuple[float, np.ndarray]:
    with jax.enable_x64():
        function = named(name, tuple(sorted(options.items())))
        value, gradient = function(jnp.asarray(case.logits), jnp.asarray(case.labels))
        return float(value), np.moveaxis(np.asarray(gradient), -1, 1)


def loss(
    case: Case, name: str, *, times: float = 1, tolerance: float = FLOAT64, parity: str = "", **options: Any
) -> dict[str, Any]:
    """``value`` and ``grad`` of the registered loss ``name``, both ``times`` a factor."""
    value, gradient = value_and_gradient(case, name, **options)
    return {"value": Close(value * times, tolerance, parity), "grad": Close(gradient * times, tolerance, parity)}


def value(case: Case, name: str, **options: Any) -> float:
    return value_and_gradient(case, name, **options)[0]


@maps("losses", r"cross-entropy \(mean", "ce" + DEGENERATE)
def cross_entropy(case: Case) -> dict[str, Any]:
    return loss(case, "ce")


@maps(
    "losses",
    r"soft Dice loss as in MarginLoss",
    r"soft Dice variants \(MONAI\)",
    r"binary soft Dice on sigmoid",
    r"dice_(?P<background>orig|nobg)" + DEGENERATE,
)
def dice(case: Case, background: str = "") -> dict[str, Any]:
    options = dice_options(case, background)
    # MONAI squares the norm of targets in float32: its sums of squares are off by 1e-7.
    tolerance = FLOAT32 if options["squared"] else FLOAT64
    if not case.hparams.get("batch", False):
        return loss(case, "dice", tolerance=tolerance, **options)
    # Sums over the batch: the Dice of the batch as one sample.
    function = functools.partial(losses.get("dice"), **options)
    result, gradient = evaluate(lambda z, labels: function(z[None], labels[None]), case.logits, case.labels)
    return {"value": Close(result, tolerance), "grad": Close(np.moveaxis(gradient, -1, 1), tolerance)}


def dice_options(case: Case, background: str) -> dict[str, Any]:
    hparams = case.hparams
    options = {
        "include_background": hparams.get("include_background", background != "nobg"),
        "squared": hparams.get("squared_pred", False),
        "jaccard": hparams.get("jaccard", False),
        "smooth": hparams.get("smooth_nr", 1e-5),
    }
    denominator = hparams.get("smooth_dr", 1e-5)
    return options if denominator == options["smooth"] else options | {"smooth_denominator": denominator}


def voxels(case: Case) -> int:
    """The factor from a mean over voxels and samples to the sum over both, or 1."""
    return case.labels.size if case.hparams.get("reduction") == "sum" else 1


@maps("losses", "BCE with logits")
def bce(case: Case) -> dict[str, Any]:
    return loss(case, "bce", times=voxels(case))


@maps("losses", r"CalSAM Eq\.1 L_SAM", r"CE \+ Dice \(CEDiceLoss\)", "ce_dice" + DEGENERATE)
def overlap_and_cross_entropy(case: Case) -> dict[str, Any]:
    terms = {"loss_ce": value(case, "ce"), "loss_dice": value(case, "dice")}
    smooth, reduction = case.hparams.get("smooth", 1e-5), case.hparams.get("bce", "mean")
    if (smooth, reduction) == (1e-5, "mean"):
        return loss(case, "sam" if case.logits.shape[-1] == 1 else "ce_dice") | terms
    first = loss(case, "bce", times=case.labels.size if reduction == "sum" else 1)
    second = loss(case, "dice", smooth=smooth)
    return {role: first[role].actual + second[role].actual for role in first} | terms


@maps(
    "losses",
    "focal loss, mean",
    "focal loss, sum",
    "binary sigmoid focal, no alpha",
    r"focal_g(?P<gamma>[\d.]+)" + DEGENERATE,
)
def focal(case: Case, gamma: float | None = None) -> dict[str, Any]:
    return loss(case, "focal", times=voxels(case), gamma=case.hparams.get("gamma", gamma))


@maps("losses", "label smoothing CE", r"ls_a(?P<alpha>[\d.]+)" + DEGENERATE)
def label_smoothing(case: Case, alpha: float | None = None) -> dict[str, Any]:
    return loss(case, "label_smoothing", smoothing=case.hparams.get("alpha", alpha))


@maps("losses", "ECP as coded", r"ecp_orig_a(?P<alpha>[\d.]+)" + DEGENERATE)
def ecp_as_coded(case: Case, alpha: float | None = None) -> dict[str, Any]:
    options = {"weight": case.hparams.get("alpha", alpha), "mean_over_classes": True}
    result = loss(case, "ecp", parity="ecp(mean_over_classes=True)", **options)
    entropy = (value(case, "ce") - result["value"].actual) / options["weight"]
    return result | {"loss_ce": value(case, "ce"), "loss_ent": entropy}


@maps("losses", "ECP as in the paper")
def ecp(case: Case) -> dict[str, Any]:
    return loss(case, "ecp", weight=case.hparams["alpha"])


@maps("losses", "SVLS 2D", r"SVLS 3D \(original repo", r"svls_s(?P<sigma>[\d.]+)" + DEGENERATE)
def svls(case: Case, sigma: float | None = None) -> dict[str, Any]:
    return loss(case, "svls", sigma=case.hparams.get("sigma", sigma))


@maps("priors", "SVLS soft labels", "3D kernel before final normalisation")
def svls_labels(case: Case) -> dict[str, Any]:
    sigma, outputs = case.hparams["sigma"], {}
    with jax.enable_x64():
        outputs["kernel"] = np.asarray(neighbourhood.svls_kernel(case.outputs["kernel"].ndim, sigma))
        if "soft_labels" in case.outputs:
            classes = case.outputs["soft_labels"].shape[1]
            targets = smoothing.svls_targets(jnp.asarray(case.labels), classes, sigma=sigma)
            outputs["soft_labels"] = np.moveaxis(np.asarray(targets), -1, 1)
    return outputs


@maps("losses", "MbLS L1", r"mbls_l1_m(?P<margin>[\d.]+)" + DEGENERATE)
def mbls(case: Case, margin: float | None = None) -> dict[str, Any]:
    return mbls_terms(case, margin, distance="l1")


@maps("losses", "MbLS L2 AS CODED")
def mbls_as_coded(case: Case) -> dict[str, Any]:
    return mbls_terms(case, None, distance="l2_without_hinge", parity="mbls(distance='l2_without_hinge')")


@maps("losses", "MbLS L2 as in the paper")
def mbls_squared(case: Case) -> dict[str, Any]:
    return mbls_terms(case, None, distance="l2")


@maps("losses", r"CE \+ Dice\(no background", r"mbls_dice_m(?P<margin>[\d.]+)" + DEGENERATE)
def mbls_dice(case: Case, margin: float | None = None) -> dict[str, Any]:
    hparams = case.hparams
    options = {"include_background": hparams.get("include_background", False), "smooth": hparams.get("eps", 1e-5)}
    overlap = {"loss_dice": value(case, "dice", **options)}
    if options == {"include_background": False, "smooth": 1e-5}:
        return mbls_terms(case, margin, distance="l1", dice=True) | overlap
    constraint = f"margin={hparams.get('margin', margin)}, weight={hparams.get('alpha', 0.1)}"
    dice = ", ".join(f"{name}={option!r}" for name, option in options.items())
    total = expression.parse(f"mbls({constraint}) + dice({dice})")
    result, gradient = evaluate(lambda z, labels: total(z, labels), case.logits, case.labels)
    sums = {"value": Close(result, FLOAT64), "grad": Close(np.moveaxis(gradient, -1, 1), FLOAT64)}
    return mbls_terms(case, margin, distance="l1") | overlap | sums


def mbls_terms(case: Case, margin: float | None, *, distance: str, parity: str = "", **options: Any) -> dict[str, Any]:
    constraint = {"margin": case.hparams.get("margin", margin), "distance": distance}
    weight = case.hparams.get("alpha", 0.1)
    return loss(case, "mbls", weight=weight, parity=parity, **constraint, **options) | {
        "loss_ce": value(case, "ce"),
        "loss_margin_l1": value(case, "mbls_penalty", **constraint),
    }


@maps(
    "losses",
    r"NACL: CE \+ alpha",
    "NACL variants",
    "NACL default configuration",
    r"nacl_(?P<kernel_ops>[a-z]+)_ks(?P<kernel_size>\d+)_(?P<distance_type>l\d)" + DEGENERATE,
)
def nacl(case: Case, **written: Any) -> dict[str, Any]:
    hparams = written | case.hparams
    options = published_prior(hparams) | {
        "distance": hparams["distance_type"],
        "on": "probabilities" if hparams.get("is_softmax", False) else "logits",
    }
    options["prior"] = options.pop("kind")
    parity = f"border={options['border']!r}" if options["border"] != "replicate" else ""
    return loss(case, "nacl", weight=hparams.get("alpha", 0.1), parity=parity, **options) | {
        "loss_ce": value(case, "ce"),
        "loss_margin_l1": value(case, "nacl_penalty", **options),
    }


def published_prior(hparams: dict[str, Any]) -> dict[str, Any]:
    """The published patches see class 0 outside the image, but the Gaussian ones replicate."""
    kind = hparams["kernel_ops"]
    options = {"kind": kind, "size": int(hparams["kernel_size"]), "sigma": hparams.get("sigma", 1.0)}
    return options | {"border": "replicate" if kind == "gaussian" else "background"}


@maps("priors", r"NACL prior tau \[")
def nacl_prior(case: Case) -> dict[str, Any]:
    options = published_prior(dict(case.hparams))
    parity = f"border={options['border']!r}" if options["border"] != "replicate" else ""
    return {"tau": Close(tau(case, **options), parity=parity)}


@maps("priors", "NACL mean prior with a different border rule", "NACL 3D mean prior")
def nacl_prior_at_borders(case: Case) -> dict[str, Any]:
    border = case.hparams["border"]
    return {"tau": tau(case, size=case.hparams["kernel_size"], border={"valid": "inside"}.get(border, border))}


def tau(case: Case, **options: Any) -> np.ndarray:
    with jax.enable_x64():
        found = neighbourhood.prior(jnp.asarray(case.labels), case.outputs["tau"].shape[1], **options)
        return np.moveaxis(np.asarray(found), -1, 1)


@maps("losses", "MONAI NACLLoss")
def monai_nacl(case: Case) -> dict[str, Any]:
    hparams = case.hparams
    options = {
        "prior": "mean" if hparams["kernel_ops"] == "mean" else "monai_gaussian",
        "size": hparams["kernel_size"],
        "sigma": hparams["sigma"],
        "distance": hparams["distance_type"],
        "border": "zero",
        "weight": hparams["alpha"],
    }
    parity = f"border='zero', prior={options['prior']!r}"
    return loss(case, "nacl", tolerance=FLOAT32, parity=parity, **options)


@maps("losses", r"CalSAM CMP Eq\.4", r"CMP Eq\.4, multi-class softmax CE")
def cmp(case: Case) -> dict[str, Any]:
    return loss(case, "cmp", threshold=case.hparams["tau"], temperature=case.hparams["gamma"])


@maps("losses", "proposed masked-focal CMP")
def cmp_focal(case: Case) -> dict[str, Any]:
    assert case.hparams["norm"] == "all", case.hparams
    return loss(case, "cmp", variant="focal", confidence=case.hparams["kappa"], gamma=case.hparams["gamma_f"])


@maps("losses", "BWCR: mean_")
def bwcr(case: Case) -> dict[str, Any]:
    hparams = case.hparams
    assert hparams["mask"] == "all ones", hparams
    if any(is_thin(labels == k) for labels in case.labels for k in range(1, case.logits.shape[-1])):
        return dict.fromkeys(case.outputs, Left(THIN))
    options = {
        "radius": hparams["R"],
        "exponent": hparams["alpha"],
        "lowest": hparams["lambda_min"],
        "highest": hparams["lambda_max"],
    }
    view, classes = np.moveaxis(case["view2"], 1, -1), case.logits.shape[-1]
    result, gradient = evaluate(
        lambda *given: consistency.consistency(*given, **options), case.logits, view, case.labels
    )
    with jax.enable_x64():
        weigh = jax.jit(lambda labels: consistency.boundary_weights(labels, classes, **options))
        weights = weigh(jnp.asarray(case.labels))
    # The original's weights, and so all that it computes from them, are rounded to float32.
    rounded = {"value": result, "grad": np.moveaxis(gradient, -1, 1), "lambda_map": np.asarray(weights)}
    return {role: Close(array, 2e-7) for role, array in rounded.items()}


def is_thin(mask: np.ndarray) -> bool:
    return mask.any() and ndimage.distance_transform_edt(mask).max() < 2


@maps("losses", r"DSC\+\+ \(Yeung")
def dice_plus_plus(case: Case) -> dict[str, Any]:
    epsilon = case.hparams["eps"]
    options = {"gamma": case.hparams["gamma"], "smooth": epsilon, "clip": epsilon}
    return loss(case, "dice_plus_plus", parity=f"dice_plus_plus(clip={epsilon:g})", **options)
