"""Temperature scaling: one positive number that divides all logits."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import scipy.optimize
import scipy.special
from jaxtyping import Float, Integer

from calsegx import calibrators
from calsegx.calibrators import voxels
from calsegx.interfaces import Array, UsageError

LOWEST, HIGHEST = 0.05, 20.0
_BLOCK = 1 << 18  # voxels per evaluation: bounds the temporaries


def fit(
    logits: Float[np.ndarray, "*shape L"] | Iterable[tuple[np.ndarray, np.ndarray]],
    labels: Integer[np.ndarray, "*shape"] | None = None,
    *,
    max_voxels: int = 2_000_000,
    seed: int = 0,
    provenance: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The temperature that minimises the negative log-likelihood of ``softmax(z / T)`` (Guo et al., 2017).

    The likelihood is convex in ``b = 1/T``, so the root of its derivative, ``mean_v sum_k p_k (z_k - z_y)``,
    is the optimum: it is bracketed between T = 0.05 and 20 and found exactly.  Without a root in between
    (every voxel is right, or nothing is to be learnt from the logits) the temperature is not identifiable,
    and 1 is returned: the logits stay as they are.

    Args:
        logits: ``L = 1`` is a sigmoid, ``L >= 2`` a softmax; or, without ``labels``, an iterable of chunks
            ``(logits [n, L], labels [n])``, read once.
        labels: class indices.
        max_voxels: more voxels than this are replaced by a uniform random sample of this size; memory
            grows with it, not with the data.
        seed: of that sample, which does not depend on how the voxels are cut into chunks.
        provenance: stored as it is, e.g. region and split.

    Returns:
        ``temperature`` (1 where not identifiable) and the record of every calibrator: ``identifiable`` and else the
        ``reason``, ``nll_before`` and ``nll_after`` (mean over voxels, nats), ``voxels`` (used), ``voxels_seen``.

    Raises:
        DataError: for no voxels, logits that are not finite or have the wrong shape, or labels outside the
            classes.
        UsageError: for max_voxels below 1.
    """
    (differences,), seen = voxels.sample(
        ((margins(*chunk),) for chunk in voxels.as_chunks(logits, labels)), max_voxels, seed
    )
    temperature, reason = solve(differences)
    return voxels.record(
        "temperature",
        {"temperature": temperature},
        reason=reason,
        nll=(likelihood(differences, 1.0), likelihood(differences, 1 / temperature)),
        voxels=(len(differences), seen),
        provenance=provenance,
    )


def apply(params: Mapping[str, Any], logits: Array, image: Array | None = None) -> Array:
    """``logits / T``, of any shape; the decision (argmax, or the side of 1/2) does not change."""
    return logits / params["temperature"]


@calibrators.registry.register("temperature")
class Temperature:
    """Temperature scaling as a registered calibrator."""

    spatial = False
    fit = staticmethod(fit)
    apply = staticmethod(apply)


def grid_search(
    logits: Float[np.ndarray, "n L"], labels: Integer[np.ndarray, " n"], *, criterion: str = "ece", bins: int = 15
) -> float:
    """The temperature as the code of MbLS and CRaC searches it; for parity, ``fit`` is exact.

    100 steps of 0.1 from 0.1, added up in floating point (so the result differs from the decimal in the last digits);
    the first of equal temperatures.  MbLS (Murugesan et al., 2023) writes that the NLL chooses, its code's default is
    the ECE: the gap of mean confidence and accuracy in bins ``(lo, hi]``, weighted by their voxels.

    Args:
        logits: one (sigmoid) or several (softmax) per voxel.
        labels: class indices.
        criterion: ``ece`` or ``nll``.
        bins: of the ECE, of equal width.

    Raises:
        DataError: as ``fit``.
        UsageError: for another criterion.
    """
    if criterion not in ("ece", "nll"):
        raise UsageError(f"The temperature grid search knows the criteria 'ece' and 'nll', got {criterion!r}.")
    differences = margins(logits, labels)
    candidates = np.cumsum(np.full(100, 0.1))
    if criterion == "nll":
        scores = [likelihood(differences, 1 / t) for t in candidates]
    else:
        scores = [_calibration_error(differences / t, labels, bins) for t in candidates]
    return float(candidates[np.argmin(scores)])


def margins(logits: Float[np.ndarray, "n L"], labels: Integer[np.ndarray, " n"]) -> Float[np.ndarray, "n K"]:
    """``z_k - z_y``: likelihood and derivative depend on the logits through these alone.

    The true class is exactly 0, so a voxel that is right has no positive margin and the sign of its
    derivative is exact.
    """
    logits, labels = voxels.check(logits, labels)
    logits = voxels.as_classes(logits)
    return logits - np.take_along_axis(logits, labels[:, None], axis=1)


def solve(differences: Float[np.ndarray, "n K"]) -> tuple[float, str]:
    """The optimal temperature for these margins, or 1 and the reason why there is none."""
    if separable(differences):
        return 1.0, (
            f"the likelihood has no maximum above T = {LOWEST}: (almost) no voxel is wrong, or the logits hardly differ"
        )
    if slope(differences, 1 / HIGHEST) >= 0:
        return 1.0, (
            f"the likelihood has no maximum below T = {HIGHEST:g}: the logits say nothing about the labels, or are huge"
        )
    bounds = np.log(LOWEST), np.log(HIGHEST)
    root = scipy.optimize.brentq(lambda t: slope(differences, np.exp(-t)), *bounds, xtol=1e-12)
    return float(np.exp(root)), ""


def separable(differences: Float[np.ndarray, "n K"]) -> bool:
    """Whether larger logits always fit better, up to the lowest temperature: scaling has no finite optimum."""
    return slope(differences, 1 / LOWEST) <= 0


def slope(differences: Float[np.ndarray, "n K"], inverse_temperature: float) -> float:
    """Derivative of the mean negative log-likelihood with respect to 1/T."""
    total = 0.0
    for block in _blocks(differences):
        total += np.sum(scipy.special.softmax(inverse_temperature * block, axis=1) * block, dtype=np.float64)
    return float(total / len(differences))


def likelihood(differences: np.ndarray, inverse_temperature: float) -> float:
    """Mean negative log-likelihood in nats."""
    total = 0.0
    for block in _blocks(differences):
        total += np.sum(scipy.special.logsumexp(inverse_temperature * block, axis=1), dtype=np.float64)
    return float(total / len(differences))


def _blocks(differences: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(differences), _BLOCK):
        yield differences[start : start + _BLOCK]


def _calibration_error(logits: np.ndarray, labels: np.ndarray, bins: int) -> float:
    probabilities = scipy.special.softmax(logits, axis=1)
    confidence = probabilities.max(axis=1)
    gap = (probabilities.argmax(axis=1) == labels) - confidence
    index = np.searchsorted(np.linspace(0, 1, bins + 1), confidence, side="left") - 1
    return float(np.abs(np.bincount(index, weights=gap)).sum() / len(labels))
