"""Calibration metrics: which golden method is which of our statistics, with which options."""

from typing import Any

import numpy as np
from scipy import special

from calsegx.metrics import adaptive, calibration, parity
from calsegx.metrics.calibration import CalibrationStatistics
from tests.golden_cases import FLOAT32, Case, Close, Left, maps

EXTRA_BIN = "binning='torchmetrics'"
ADAPTIVE = "parity.marginloss_adaptive_ece"


def softmax(case: Case) -> np.ndarray:
    """Probabilities ``[B, *spatial, K]``, or ``[V, K]`` of flattened logits."""
    return special.softmax(np.moveaxis(case["logits"], 1, -1), axis=-1)


def voxels(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities ``[V, K]`` and labels ``[V]`` of the region ``all`` or ``fg``, true foreground."""
    probabilities, labels = softmax(case), case.labels.ravel()
    kept = labels > 0 if case.hparams.get("region", "all") == "fg" else np.ones(labels.shape, bool)
    return probabilities.reshape(-1, probabilities.shape[-1])[kept], labels[kept]


def statistics(case: Case, **options: Any) -> CalibrationStatistics:
    return calibration.calibration_statistics(*voxels(case), bins=case.hparams.get("n_bins", 15), **options)


def published_cece(case: Case) -> Close:
    """The originals drop scores of exactly 0 and classes above the largest label."""
    return Close(statistics(case, above=0.0).cece(classes="present"), parity="cece(classes='present')")


def equal_width_tace(case: Case, threshold: float) -> Close:
    value = statistics(case, above=threshold).tace_equalwidth(classes="present")
    return Close(value, parity="tace_equalwidth(classes='present')")


@maps("calibration", "ECE / CECE / thresholded CECE")
def published(case: Case) -> dict[str, Any]:
    ours = statistics(case)
    return {
        "ece": ours.ece(),
        "cece": published_cece(case),
        "aece": Close(parity.marginloss_adaptive_ece(*voxels(case), ranges=case.hparams["n_bins"]), parity=ADAPTIVE),
        "dict_ece": ours.ece(),
        "dict_mce": ours.mce(),
        "dict_ace_average": ours.ace_nonempty(),
        "dict_l2": ours.rmsce(),
    } | {f"thresh_cece_{t:g}": equal_width_tace(case, t) for t in case.hparams["thresholds"]}


@maps("calibration", "torchmetrics ECE l1/l2/max")
def torchmetrics(case: Case) -> dict[str, Any]:
    ours = statistics(case, binning="torchmetrics")
    curve = ours.reliability_curve()
    found = {
        "tm_l1": ours.ece(),
        "tm_l2": ours.rmsce(),
        "tm_max": ours.mce(),
        "tm_bin_acc": np.nan_to_num(curve.accuracy),
        "tm_bin_conf": np.nan_to_num(curve.confidence),
        "tm_bin_prop": curve.count / ours.voxels,
    }
    found = {role: Close(array, FLOAT32, EXTRA_BIN) for role, array in found.items()}
    return found | {"tu_ace": Close(adaptive.top_label_ace(*voxels(case), ranges=case.hparams["n_bins"]), FLOAT32)}


@maps("calibration", "reliability curve")
def reliability(case: Case) -> dict[str, Any]:
    ours = statistics(case)
    curve = ours.reliability_curve()
    # The original stores 0 for an empty bin.
    means = {"bin_acc": np.nan_to_num(curve.accuracy), "bin_conf": np.nan_to_num(curve.confidence)}
    return means | {"ece": ours.ece(), "bin_count": curve.count}


@maps("calibration", "TACE/ACE: nixon_")
def tace(case: Case) -> dict[str, Any]:
    rows, ranges = voxels(case), case.hparams["n_bins"]
    found: dict[str, Any] = {"nixon_sce_even": statistics(case).cece()}
    for threshold in case.hparams["thresholds"]:
        found[f"ref_tace_{threshold:g}"] = adaptive.tace(*rows, threshold=threshold, ranges=ranges)
        theirs = parity.nixon_tace(*rows, threshold=threshold, ranges=ranges)
        found[f"nixon_tace_{threshold:g}"] = Close(theirs, parity="parity.nixon_tace")
    return found


@maps("calibration", r"Brier \(sum over K")
def brier_and_nll(case: Case) -> dict[str, Any]:
    ours = statistics(case)
    return {
        "brier_sum": ours.brier("sum"),
        "brier_mean_over_K": ours.brier("mean"),
        "brier_top": ours.brier("top_label"),
        "nll": ours.nll(),
        "tu_brier": Close(ours.brier("sum"), FLOAT32),
    }


@maps("calibration", "CRaC seg_brier_score AS CODED")
def seg_brier(case: Case) -> dict[str, Any]:
    return {"value": Close(parity.crac_seg_brier(softmax(case), case.labels), parity="parity.crac_seg_brier")}


@maps("calibration", "MONAI per-image per-class calibration bins")
def monai(case: Case) -> dict[str, Any]:
    # ``right`` is documented the wrong way round there.
    binning = "left" if case.hparams["right"] else "right"
    probabilities = softmax(case)
    images = [
        calibration.calibration_statistics(
            p.reshape(-1, p.shape[-1]), labels.ravel(), bins=case.hparams["n_bins"], binning=binning
        )
        for p, labels in zip(probabilities, case.labels, strict=True)
    ]
    curves = [image.class_reliability_curves() for image in images]
    found = {
        "mean_p": [np.nan_to_num(curve.confidence, nan=-1) for curve in curves],
        "mean_gt": [np.nan_to_num(curve.accuracy, nan=-1) for curve in curves],
        "count": [curve.count for curve in curves],
        "expected": [image.class_ece()[1:] for image in images],
        "average": [image.classes.average()[1:] for image in images],
        "maximum": [image.classes.maximum()[1:] for image in images],
    }
    return {
        role: Close(arrays, FLOAT32, parity=f"binning={binning!r}" if binning == "left" else "")
        for role, arrays in found.items()
    }


@maps("calibration", "degenerate calibration input")
def degenerate(case: Case) -> dict[str, Any]:
    rows, ours = voxels(case), statistics(case)
    extra = statistics(case, binning="torchmetrics")
    found: dict[str, Any] = {
        "ece": ours.ece() if ours.voxels else Left("the original's ECE of no voxels is 0, ours is NaN"),
        "cece": published_cece(case),
        "aece": Close(parity.marginloss_adaptive_ece(*rows, ranges=case.hparams["n_bins"]), parity=ADAPTIVE),
        "thresh_cece": equal_width_tace(case, 1e-3),
        "tm_l1": Close(extra.ece(), FLOAT32, EXTRA_BIN),
    }
    raised = [role for role, array in case.outputs.items() if np.isnan(array) and ours.voxels]
    return found | dict.fromkeys(raised, Left("the original raises on one voxel"))


@maps("calibration", r"half the voxels have confidence exactly 1\.0")
def saturated(case: Case) -> dict[str, Any]:
    extra = statistics(case, binning="torchmetrics")
    return {
        "ece_rightclosed": statistics(case).ece(),
        "aece_orig": Close(
            parity.marginloss_adaptive_ece(*voxels(case), ranges=case.hparams["n_bins"]), parity=ADAPTIVE
        ),
        "ece_torchmetrics": Close(extra.ece(), FLOAT32, EXTRA_BIN),
    }


@maps("calibration", "probabilities exactly on bin edges")
def edges(case: Case) -> dict[str, Any]:
    found = {}
    for bins in (int(role.rpartition("_b")[2]) for role in case.outputs if role.startswith("tm_binary_l1_b")):

        def ours(bins=bins, **options):
            return calibration.calibration_statistics(case["p"], case["y"], bins=bins, **options)

        top = ours()
        sides = {f"{side}closed": ours(score="foreground", binning=side) for side in ("right", "left")}
        found |= {f"ref_count_{name}_b{bins}": side.count for name, side in sides.items()}
        found |= {f"ref_ece_pos_{name}_b{bins}": side.ece() for name, side in sides.items()}
        found |= {f"svls_ece_top_b{bins}": top.ece(), f"svls_count_b{bins}": top.count}
        extra = ours(score="foreground", binning="torchmetrics").ece()
        found[f"tm_binary_l1_b{bins}"] = Close(extra, FLOAT32, EXTRA_BIN)
    return found


@maps("calibration", "binary readings: ece_pos")
def binary(case: Case) -> dict[str, Any]:
    p, y = special.expit(case["logits"]).ravel(), case.labels.ravel()

    def ours(kept=slice(None), **options):
        return calibration.calibration_statistics(p[kept], y[kept], **options)

    found: dict[str, Any] = {"brier": ours().brier(), "nll": ours().nll()}
    for bins in case.hparams["bins"]:
        positive = ours(bins=bins, score="foreground")
        extra = ours(bins=bins, score="foreground", binning="torchmetrics")
        found |= {
            f"ece_pos_tm_b{bins}": Close(extra.ece(), FLOAT32, EXTRA_BIN),
            f"ece_top_b{bins}": ours(bins=bins).ece(),
            f"ece_top_fg_b{bins}": ours(y == 1, bins=bins).ece(),
            f"ace_pos_avg_nonempty_b{bins}": positive.ace_nonempty(),
            f"ace_pos_adaptive_b{bins}": adaptive.ace_adaptive(p, y, ranges=bins),
        }
    return found
