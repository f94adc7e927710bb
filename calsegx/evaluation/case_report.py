"""How sure a prediction is of itself, and what speaks against trusting it: one case, without a reference.

    report = case_report(probabilities, class_names, prepared, protocol, features, record.get("training_domain"))

A report is plain JSON values::

    classes          name -> volume_ml of the mask, expected_volume_ml (the sum of the probabilities), and
                     mean_probability of the class over its mask
    confidence       over the voxels with a foreground probability above 0.01: mean_confidence (of the top label),
                     mean_entropy (``scores.predictive_entropy``, 0 to 1) and uncertain_share (the share with a
                     foreground probability from 0.25 to 0.75)
    slices           of the working grid: total, prompted, between_prompts (not prompted, between ones that are) and
                     nothing_predicted (prompted, without foreground)
    intensities      channel -> percentiles 0.5, 50 and 99.5 of the raw voxels above 0
    training_domain  distance of the case from the training slices, the limit, and in words why it is not known
    warnings         list of {code, message}

What is undefined is null.  A warning of each code, and when it is given:

    nothing_predicted        no voxel of the case is foreground
    prompt_outside           a foreground point lies on background of the prediction or on a black voxel, or a box holds
                             no foreground
    slices_between_prompts   a user's prompts leave slices between them out
    intensity_out_of_range   of a channel, the median or 99.5th percentile of the raw voxels above 0 is more than
                             SCALE_FACTOR times outside the range of the training cases, or their ratio, which no
                             rescaling changes, more than CONTRAST_FACTOR times
    unlike_training          the median distance of the prompted slices is above the limit that 99 % of the training
                             slices keep (``training_domain.describe``)

Images that are constant, not finite or without a voxel above 0 are refused before, when they are read.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from calsegx import configs
from calsegx.data import frames, pipeline, preprocessing, training_domain
from calsegx.data.prompts import FOREGROUND
from calsegx.evaluation import predict, review
from calsegx.uncertainty import scores

LOWEST = 0.01  # foreground probability of the voxels that confidence is about, as in ``review.mean_confidence``
UNCERTAIN = (0.25, 0.75)
SCALE_FACTOR, CONTRAST_FACTOR = 10, 2
Warnings = Iterator[tuple[str, str]]  # code and message


def case_report(
    probabilities: np.ndarray,
    class_names: Sequence[str],
    prepared: preprocessing.PreparedCase,
    protocol: str,
    features: np.ndarray,
    domain: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The report of one case; see above.

    Args:
        probabilities: ``[D, H, W, K]`` of the classes on the native grid, as they are written.
        class_names: K names.
        prepared: the case, not augmented.
        protocol: the model's.
        features: ``[n, h, w, C]`` of the prompted slices.
        domain: ``training_domain`` of the model's record; None: a model of an earlier version.
    """
    labels = predict.segment(probabilities)
    distance = _distance(prepared, features, domain)
    slices = _slices(prepared, labels)
    found = [
        *_of_prediction(labels, slices, prepared, protocol),
        *_of_prompts(labels, prepared, protocol),
        *_of_intensities(prepared.intensities, domain),
        *_of_domain(distance),
    ]
    return {
        "classes": _classes(probabilities, labels, class_names, prepared.reference.voxel_ml),
        "confidence": _confidence(probabilities),
        "slices": slices,
        "intensities": {name: values and list(values) for name, values in prepared.intensities.items()},
        "training_domain": distance,
        "warnings": [{"code": code, "message": message} for code, message in found],
    }


def _classes(
    probabilities: np.ndarray, labels: np.ndarray, names: Sequence[str], voxel_ml: float
) -> dict[str, dict[str, float | None]]:
    found = {}
    for index, name in enumerate(names):
        of_class, mask = probabilities[..., index], labels == index + 1
        found[name] = {
            "volume_ml": np.count_nonzero(mask) * voxel_ml,
            "expected_volume_ml": float(of_class.sum(dtype=np.float64)) * voxel_ml,
            "mean_probability": _mean(of_class[mask]),
        }
    return found


def _confidence(probabilities: np.ndarray) -> dict[str, float | None]:
    total = np.minimum(probabilities.sum(axis=-1), 1)
    inside = total > LOWEST
    confidence = review.mean_confidence(probabilities)
    return {
        "mean_confidence": None if math.isnan(confidence) else confidence,
        "mean_entropy": _mean(scores.predictive_entropy(probabilities[inside])),
        "uncertain_share": _mean((total[inside] >= UNCERTAIN[0]) & (total[inside] <= UNCERTAIN[1])),
    }


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean(dtype=np.float64)) if values.size else None


def _slices(prepared: preprocessing.PreparedCase, labels: np.ndarray) -> dict[str, int]:
    prompted = prepared.slices
    between = prompted[-1] - prompted[0] + 1 - len(prompted) if len(prompted) else 0
    predicted = _on_prompted(prepared, labels > 0).any(axis=(1, 2))
    return {
        "total": prepared.geometry.depths[1],
        "prompted": len(prompted),
        "between_prompts": int(between),
        "nothing_predicted": int(np.count_nonzero(~predicted)),
    }


def _on_prompted(prepared: preprocessing.PreparedCase, volume: np.ndarray) -> np.ndarray:
    """``[n, H, W]`` of a bool volume ``[D, H, W]``: true on any of the file's slices that a prompted one holds."""
    holding = frames.working_slices(np.arange(len(volume)), prepared.geometry)
    native = prepared.geometry.depths[0]
    nearest = (2 * prepared.slices + 1) * native // (2 * prepared.geometry.depths[1])
    found = volume[nearest]
    for row, number in enumerate(prepared.slices):
        found[row] |= volume[holding == number].any(axis=0)
    return found


def _of_prediction(
    labels: np.ndarray, slices: Mapping[str, int], prepared: preprocessing.PreparedCase, protocol: str
) -> Warnings:
    if not labels.any():
        yield (
            "nothing_predicted",
            f"No voxel is segmented on the {slices['prompted']} prompted slices; look at the prompts and the image.",
        )
    users = prepared.label_volume is None and protocol not in configs.EVERY_SLICE
    if users and (left := slices["between_prompts"]):
        yield (
            "slices_between_prompts",
            f"{left} slices between prompted ones have no prompt and are background; add prompts there if the target "
            "goes through them.",
        )


def _of_prompts(labels: np.ndarray, prepared: preprocessing.PreparedCase, protocol: str) -> Warnings:
    prompts = pipeline.protocol_prompts(prepared.prompts, protocol)
    if protocol == "none" or not len(prepared.slices):
        return
    predicted, shown = _on_prompted(prepared, labels > 0), prepared.images.max(axis=-1) > 0
    if protocol == "volume_points":  # one set of points for the volume, whose own slices are not kept
        predicted, shown = (volume.max(axis=0, keepdims=True) for volume in (predicted, shown))
    if prompts.boxes is not None:
        corners = _pixels(prepared, prompts.boxes.reshape(-1, 2, 2))
        inside = [
            mask[top : bottom + 1, left : right + 1].any()
            for mask, ((left, top), (right, bottom)) in zip(predicted, corners, strict=True)
        ]
        yield from _outside(np.array(inside), "boxes", "hold no segmented voxel")
        return
    points, kinds = (np.asarray(values)[: len(predicted)] for values in (prompts.points, prompts.labels))
    row, which = np.nonzero(kinds == FOREGROUND)
    column, line = _pixels(prepared, points[row, which]).T
    yield from _outside(predicted[row, line, column], "foreground points", "lie outside what was segmented")
    yield from _outside(shown[row, line, column], "foreground points", "lie on black voxels of the image")


def _pixels(prepared: preprocessing.PreparedCase, points: np.ndarray) -> np.ndarray:
    """Native ``(x, y)`` pixels, int, of points in frame coordinates."""
    height, width = prepared.geometry.native_shape
    native = frames.points_from_frame(points, prepared.geometry)
    return np.clip(np.rint(native), 0, [width - 1, height - 1]).astype(int)


def _outside(inside: np.ndarray, what: str, how: str) -> Warnings:
    wrong = int(np.count_nonzero(~inside))
    if wrong:
        yield (
            "prompt_outside",
            f"{wrong} of {len(inside)} {what} {how} (expected: none); check whether they belong to this image; if they "
            "do, the model does not segment there.",
        )


def _of_intensities(intensities: Mapping[str, tuple[float, ...] | None], domain: Mapping[str, Any] | None) -> Warnings:
    trained = domain["intensities"] if domain else {}
    for name, values in intensities.items():
        known = trained.get(name)
        if known is None:
            continue
        if values is None:
            yield "intensity_out_of_range", f"{name} has no voxel above 0, training images have; check the file."
            continue
        for number, what in ((1, "median"), (2, "99.5th percentile")):
            low, high, value = known["lowest"][number], known["highest"][number], values[number]
            if not low / SCALE_FACTOR <= value <= high * SCALE_FACTOR:
                yield (
                    "intensity_out_of_range",
                    f"{name}: the {what} of the voxels above 0 is {value:.4g}, of the training images {low:.4g} to "
                    f"{high:.4g}, which it leaves by more than {SCALE_FACTOR} times; check the file and its units.",
                )
        low, high = known["ratio"]
        ratio = values[1] / values[2]
        if not low / CONTRAST_FACTOR <= ratio <= high * CONTRAST_FACTOR:
            yield (
                "intensity_out_of_range",
                f"{name}: the median of the voxels above 0 is {ratio:.2g} of their 99.5th percentile, of the training "
                f"images {low:.2g} to {high:.2g}, which it leaves by more than {CONTRAST_FACTOR} times; check that the "
                "file is this kind of image.",
            )


def _distance(
    prepared: preprocessing.PreparedCase, features: np.ndarray, domain: Mapping[str, Any] | None
) -> dict[str, Any]:
    known = domain["features"] if domain else None
    if known is None:
        why = (
            "was trained with its encoder, without a feature cache or on one case"
            if domain
            else "is of an earlier version"
        )
        return {"distance": None, "limit": None, "unknown": f"the model {why}, so it does not know its training slices"}
    if not len(features):
        return {"distance": None, "limit": known["limit"], "unknown": "no slice was prompted"}
    found = training_domain.distances(known, training_domain.slice_vectors(features, prepared.geometry))
    return {"distance": float(np.median(found)), "limit": known["limit"], "unknown": None}


def _of_domain(distance: Mapping[str, Any]) -> Warnings:
    if distance["distance"] is not None and distance["distance"] > distance["limit"]:
        yield (
            "unlike_training",
            f"The encoder sees the case at the distance {distance['distance']:.3g} from the training slices, 99 % of "
            f"which lie within {distance['limit']:.3g}; calibration may not hold here, so check the result by eye.",
        )
