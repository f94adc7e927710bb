"""Temperature scaling: one positive number that divides all logits."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import scipy.optimize
import scipy.special

from calsegx import calibrators
from calsegx.interfaces import Array, DataError, UsageError

LOWEST, HIGHEST = 0.05, 20.0
_BLOCK = 1 << 18  # voxels per evaluation: bounds the temporaries


def fit(
    chunks: Iterable[tuple[np.ndarray, np.ndarray]], *, max_voxels: int = 2_000_000, seed: int = 0
) -> dict[str, Any]:
    """The temperature that minimises the negative log-likelihood of ``softmax(z / T)`` (Guo et al., 2017).

    The likelihood is convex in ``b = 1/T``, so the root of its derivative, ``mean_v sum_k p_k (z_k - z_y)``,
    is the optimum: it is bracketed between T = 0.05 and 20 and found exactly.  Without a root in between
    (every voxel is right, or nothing is to be learnt from the logits) the temperature is not identifiable,
    and 1 is returned: the logits stay as they are.

    Args:
        chunks: ``(logits [n, L], labels [n])``; ``L = 1`` is a sigmoid, ``L >= 2`` a softmax.  Read once.
        max_voxels: more voxels than this are replaced by a uniform random sample of this size; memory
            grows with it, not with the data.
        seed: of that sample, which does not depend on how the voxels are cut into chunks.

    Returns:
        ``temperature`` (1 where not identifiable), ``identifiable``, ``nll_before`` and ``nll_after`` (mean
        over voxels, nats), ``voxels`` (used) and ``voxels_seen``.

    Raises:
        DataError: for no voxels, logits that are not finite or have the wrong shape, or labels outside the
            classes.
        UsageError: for max_voxels below 1.
    """
    if max_voxels < 1:
        raise UsageError(f"Temperature scaling needs max_voxels of at least 1, got {max_voxels}.")
    margins, seen = _sample(map(_margins, chunks), max_voxels, np.random.default_rng(seed))
    identifiable = _slope(margins, 1 / HIGHEST) < 0 < _slope(margins, 1 / LOWEST)
    temperature = 1.0
    if identifiable:
        bounds = np.log(LOWEST), np.log(HIGHEST)
        root = scipy.optimize.brentq(lambda t: _slope(margins, np.exp(-t)), *bounds, xtol=1e-12)
        temperature = float(np.exp(root))
    return {
        "temperature": temperature,
        "identifiable": identifiable,
        "nll_before": _likelihood(margins, 1.0),
        "nll_after": _likelihood(margins, 1 / temperature),
        "voxels": len(margins),
        "voxels_seen": seen,
    }


def apply(params: Mapping[str, Any], logits: Array) -> Array:
    """``logits / T``, of any shape; the decision (argmax, or the side of 1/2) does not change."""
    return logits / params["temperature"]


@calibrators.registry.register("temperature")
class Temperature:
    """Temperature scaling as a registered calibrator."""

    fit = staticmethod(fit)
    apply = staticmethod(apply)


def _margins(chunk: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """``z_k - z_y`` ``[n, K]``: likelihood and derivative depend on the logits through these alone.

    The true class is exactly 0, so a voxel that is right has no positive margin and the sign of its
    derivative is exact.
    """
    logits, labels = (np.asarray(array) for array in chunk)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"Temperature scaling needs logits [n, L] and integer labels [n], got {logits.shape} and "
            f"{labels.dtype} {labels.shape}."
        )
    logits = logits.astype(np.result_type(logits.dtype, np.float32))
    if logits.shape[1] == 1:
        logits = np.concatenate([np.zeros_like(logits), logits], axis=1)  # sigmoid(z) = softmax([0, z])_1
    if not np.isfinite(logits).all():
        raise DataError("Temperature scaling got logits that are not finite; check the model's predictions.")
    if labels.size and not 0 <= labels.min() <= labels.max() < logits.shape[1]:
        raise DataError(
            f"Temperature scaling got labels from {labels.min()} to {labels.max()}, but the logits know the "
            f"classes 0 to {logits.shape[1] - 1}."
        )
    return logits - np.take_along_axis(logits, labels[:, None], axis=1)


def _sample(chunks: Iterable[np.ndarray], limit: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """A uniform sample of at most ``limit`` rows, without replacement, and the number of rows seen.

    Every row draws a number and those with the smallest numbers stay: one pass, and the same rows for any
    chunking.
    """
    waiting: list[tuple[np.ndarray, np.ndarray]] = []
    seen = 0
    for chunk in chunks:
        waiting.append((chunk, rng.random(len(chunk))))
        seen += len(chunk)
        if sum(len(rows) for rows, _ in waiting) > 2 * limit:
            waiting = [_smallest(waiting, limit)]
    if seen == 0:
        raise DataError("Temperature scaling got no voxels; give a validation case with voxels in the region.")
    return _smallest(waiting, limit)[0], seen


def _smallest(waiting: list[tuple[np.ndarray, np.ndarray]], limit: int) -> tuple[np.ndarray, np.ndarray]:
    rows, numbers = (np.concatenate(part) for part in zip(*waiting, strict=True))
    if len(rows) > limit:
        keep = np.sort(np.argpartition(numbers, limit)[:limit])
        rows, numbers = rows[keep], numbers[keep]
    return rows, numbers


def _blocks(margins: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(margins), _BLOCK):
        yield margins[start : start + _BLOCK]


def _slope(margins: np.ndarray, inverse_temperature: float) -> float:
    """Derivative of the mean negative log-likelihood with respect to 1/T."""
    total = 0.0
    for block in _blocks(margins):
        total += np.sum(scipy.special.softmax(inverse_temperature * block, axis=1) * block, dtype=np.float64)
    return float(total / len(margins))


def _likelihood(margins: np.ndarray, inverse_temperature: float) -> float:
    """Mean negative log-likelihood in nats."""
    total = 0.0
    for block in _blocks(margins):
        total += np.sum(scipy.special.logsumexp(inverse_temperature * block, axis=1), dtype=np.float64)
    return float(total / len(margins))
