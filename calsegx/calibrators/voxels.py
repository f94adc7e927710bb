"""What all calibrators share: checked voxels, a uniform sample of a stream of them, and the record of a fit."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Integer, Shaped

from calsegx.interfaces import DataError, UsageError

FORMAT = 1  # of the params


def check(
    logits: Shaped[np.ndarray, "n L"], labels: Shaped[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, "n L"], Integer[np.ndarray, " n"]]:
    """Voxels as numpy arrays, the logits in float32 or their own higher precision.

    Raises:
        DataError: for wrong shapes, labels that are no integers or outside the classes, logits that are not finite.
    """
    logits, labels = np.asarray(logits), np.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"A calibrator needs logits [n, L] and integer labels [n], got {logits.shape} and "
            f"{labels.dtype} {labels.shape}."
        )
    logits = logits.astype(np.result_type(logits.dtype, np.float32), copy=False)
    if not np.isfinite(logits).all():
        raise DataError("A calibrator got logits that are not finite; check the model's predictions.")
    classes = max(2, logits.shape[1])
    if labels.size and not 0 <= labels.min() <= labels.max() < classes:
        raise DataError(
            f"A calibrator got labels from {labels.min()} to {labels.max()}, but the logits know the "
            f"classes 0 to {classes - 1}."
        )
    return logits, labels


def as_chunks(logits: Any, labels: Any) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Arrays ``logits [*shape, L]`` and ``labels [*shape]`` as one chunk; without labels, ``logits`` are the chunks."""
    if labels is None:
        return logits
    logits, labels = np.asarray(logits), np.asarray(labels)
    if logits.shape[:-1] != labels.shape:
        raise DataError(f"A calibrator needs a label for every voxel of the logits {logits.shape}, got {labels.shape}.")
    return [(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))]


def as_classes(logits: Float[np.ndarray, "n L"]) -> Float[np.ndarray, "n K"]:
    """Logits of a softmax: one logit ``z`` becomes ``[0, z]``, as ``sigmoid(z) = softmax([0, z])_1``."""
    if logits.shape[1] > 1:
        return logits
    return np.concatenate([np.zeros_like(logits), logits], axis=1)


def sample(
    chunks: Iterable[tuple[np.ndarray, ...]], limit: int, seed: int, *, sized: bool = False
) -> tuple[tuple[np.ndarray, ...], int]:
    """A uniform sample of at most ``limit`` rows, without replacement, and the number of rows seen.

    Every row draws a number and those with the smallest numbers stay: one pass, and the same rows for any chunking.

    Args:
        chunks: arrays of equal length; row i of a chunk is row i of each of its arrays.
        limit: rows; at most ``2 * limit`` and one chunk are held at a time.
        seed: of the numbers.
        sized: the last array holds the size of each row, and ``limit`` bounds their sum.  The row with the smallest
            number stays however large it is.

    Raises:
        DataError: for no rows, or rows whose shape changes between chunks.
        UsageError: for a limit below 1.
    """
    if limit < 1:
        raise UsageError(f"A calibrator needs max_voxels of at least 1, got {limit}.")
    rng = np.random.default_rng(seed)
    waiting: list[tuple[np.ndarray, ...]] = []
    seen = held = 0
    for arrays in chunks:
        numbers = rng.random(len(arrays[0]))
        if waiting and [a.shape[1:] for a in arrays] != [a.shape[1:] for a in waiting[0][1:]]:
            raise DataError("A calibrator got voxels with different numbers of logits; fit one model at a time.")
        waiting.append((numbers, *arrays))
        seen += len(numbers)
        held += int(arrays[-1].sum()) if sized else len(numbers)
        if held > 2 * limit:
            waiting = [_smallest(waiting, limit, sized)]
            held = int(waiting[0][-1].sum()) if sized else limit
    if seen == 0:
        raise DataError("A calibrator got no voxels; give a validation case with voxels in the region.")
    return _smallest(waiting, limit, sized)[1:], seen


def _smallest(waiting: list[tuple[np.ndarray, ...]], limit: int, sized: bool) -> tuple[np.ndarray, ...]:
    arrays = tuple(np.concatenate(parts) for parts in zip(*waiting, strict=True))
    if sized:
        order = np.argsort(arrays[0], kind="stable")
        count = np.searchsorted(np.cumsum(arrays[-1][order]), limit, side="right")
        keep = np.sort(order[: max(1, count)])
    elif len(arrays[0]) > limit:
        keep = np.sort(np.argpartition(arrays[0], limit)[:limit])
    else:
        return arrays
    return tuple(array[keep] for array in arrays)


def record(
    calibrator: str,
    found: Mapping[str, Any],
    *,
    reason: str,
    nll: tuple[float, float],
    voxels: tuple[int, int],
    provenance: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The params of a fit: what was found, and what it was found on.

    Args:
        calibrator: its registered name.
        found: its own values, plain JSON.
        reason: why the data do not determine the values, which are then those that change nothing; empty if they do.
        nll: mean over the voxels used, in nats, before and after.
        voxels: used and seen.
        provenance: what the caller knows, stored as it is: region, split, subjects, dataset.
    """
    return {
        "calibrator": calibrator,
        "format": FORMAT,
        **found,
        "identifiable": not reason,
        "reason": reason,
        "nll_before": nll[0],
        "nll_after": nll[1],
        "voxels": voxels[0],
        "voxels_seen": voxels[1],
        "provenance": dict(provenance or {}),
    }
