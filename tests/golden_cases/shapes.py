"""Overlap and surface distances: which golden method is which of our metrics, with which policy for empty masks."""

from typing import Any

import numpy as np

from calsegx.metrics import overlap, surface
from tests.golden_cases import FLOAT32, Case, Close, Left, maps

DUAL_GRID = "DeepMind measures areas on the grid of voxel corners, ours are voxels"
RAISED = "empty='nan', both_empty='nan'"
INFINITE = "empty='inf', both_empty='nan'"
ONE_EMPTY = "the evaluator's values for an empty mask are recorded defects: HD95 0, DSC 1 without truth, ASD 0 or 1"
BITWISE = "the evaluator takes ASD 0 where the bitwise and of both numbers of voxels is 0"


@maps("overlap/surface", "surface distances and overlap")
def distances_and_overlap(case: Case) -> dict[str, Any]:
    prediction, truth = case["pred"].astype(bool), case["gt"].astype(bool)
    ones = (1.0,) * truth.ndim
    spacings = {"vox": ones, "mm": case.hparams["spacing_mm"]}
    found = overlaps(prediction, truth)
    for unit, spacing in spacings.items():
        found |= {f"{role}_{unit}": value for role, value in distances(prediction, truth, spacing).items()}
    deepmind = [role for role in case.outputs if role.startswith("deepmind_")]
    return found | dict.fromkeys(deepmind, Left(DUAL_GRID))


def distances(prediction: np.ndarray, truth: np.ndarray, spacing: tuple[float, ...]) -> dict[str, Any]:
    no_distance = not (prediction.any() and truth.any())
    ours = surface.surface_distances(prediction, truth, spacing)
    swapped = surface.surface_distances(truth, prediction, spacing)
    medpy = {"empty": "nan", "both_empty": "nan"}  # it raises
    monai = {"empty": "inf", "both_empty": "nan"}

    def medpy_is(score: overlap.Score) -> Close:
        return Close(score.value, parity=RAISED if no_distance else "")

    def monai_is(score: overlap.Score, policy: str = INFINITE) -> Close:
        return Close(score.value, FLOAT32, policy if no_distance else "")

    found = {
        "medpy_hd": medpy_is(ours.hausdorff(**medpy)),
        "medpy_hd95": medpy_is(ours.hausdorff(percentile=95, method="pooled", **medpy)),
        "medpy_asd_pred2gt": medpy_is(ours.asd(**medpy)),
        "medpy_asd_gt2pred": medpy_is(swapped.asd(**medpy)),
        "medpy_assd": medpy_is(ours.assd(**medpy)),
        "monai_hd": monai_is(ours.hausdorff(**monai)),
        "monai_hd95": monai_is(ours.hausdorff(percentile=95, **medpy), RAISED),
        "monai_hd95_directed": monai_is(ours.hausdorff(percentile=95, method="directed", **medpy), RAISED),
        "monai_asd": monai_is(ours.asd(**monai)),
        "monai_assd": monai_is(ours.assd(**monai)),
    }
    if no_distance:
        return found
    return found | {
        "ref_hd": ours.hausdorff().value,
        "ref_hd95_union": ours.hausdorff(percentile=95, method="pooled").value,
        "ref_hd95_maxdir": ours.hausdorff(percentile=95).value,
        "ref_assd_concat": ours.assd().value,
    }


def overlaps(prediction: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    counts = overlap.overlap_counts(prediction, truth)
    ours = counts.finalise((1, 1, 1), empty="nan")
    monai = counts.finalise((1, 1, 1), empty="nan_without_truth")
    agree = counts.finalise((1, 1, 1))
    nan = "empty='nan'" if counts.predicted + counts.truth == 0 else ""
    monai_parity = "empty='nan_without_truth'" if counts.truth == 0 else ""
    return {
        "medpy_dc": Close(ours.dsc.value, parity=nan),
        "medpy_jc": agree.iou.value,
        "ref_dice": Close(overlap.dice(prediction, truth, both_empty=np.nan), parity=nan),
        "ref_iou": Close(ours.iou.value, parity=nan),
        "monai_dice": Close(monai.dsc.value, FLOAT32, monai_parity),
        "monai_iou": Close(monai.iou.value, FLOAT32, monai_parity),
    }


@maps("overlap/surface", "repo evaluators: dsc")
def published_evaluator(case: Case) -> dict[str, Any]:
    classes, ones = case.hparams["K"], (1.0,) * case["gt"].ndim
    matrix = overlap.confusion(case["pred"], case["gt"], classes)
    counts = [overlap.counts_of(matrix, (k,)) for k in range(classes)]
    both = np.array([c.predicted > 0 and c.truth > 0 for c in counts])
    bitwise = np.array([c.predicted & c.truth for c in counts]) != 0
    found = [surface.surface_distances(case["pred"] == k, case["gt"] == k, ones) for k in range(classes)]
    asd = [distance.asd().value for distance in found]
    dsc = [c.finalise((1, 1, 1)).dsc.value for c in counts]
    hd95 = [distance.hausdorff(percentile=95, method="pooled").value for distance in found]
    return {
        "dsc": Close(np.round(dsc, 4), where=both, reason=ONE_EMPTY),
        "hd95": Close(hd95, where=both, reason=ONE_EMPTY),
        "asd": Close(asd, where=both & bitwise, reason=ONE_EMPTY if bitwise[both].all() else BITWISE),
        "inter": [c.true_positive for c in counts],
        "union": [c.predicted + c.false_negative for c in counts],
        "area_pred": [c.predicted for c in counts],
        "area_gt": [c.truth for c in counts],
    }
