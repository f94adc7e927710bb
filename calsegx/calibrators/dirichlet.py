"""Dirichlet calibration: matrix scaling of log-probabilities, with off-diagonal and intercept regularisation (ODIR)."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Integer

from calsegx import calibrators
from calsegx.calibrators import affine, voxels
from calsegx.interfaces import Array, UsageError

EPSILON = float(np.finfo(np.float64).eps)


def fit(
    logits: Float[np.ndarray, "*shape L"] | Iterable[tuple[np.ndarray, np.ndarray]],
    labels: Integer[np.ndarray, "*shape"] | None = None,
    *,
    odir: float = 0.01,
    intercept: float | None = None,
    reg_norm: bool = False,
    ref_row: bool = False,
    epsilon: float = EPSILON,
    max_voxels: int = 100_000,
    seed: int = 0,
    provenance: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Fits ``p' = softmax(W log p + b)`` (Kull et al., 2019, linear parametrisation).

    The objective is ``mean_v -log p'_y + odir * sum_{i != j} W_ij^2 + intercept * sum_j b_j^2`` (ODIR), from ``W = I``
    and ``b = 0``, by L-BFGS-B.  The diagonal is free, hence the bounds of ``affine.minimise``.  One logit stands for
    the two classes ``[1 - p, p]``.

    Args:
        logits: arrays or chunks, see ``temperature.fit``; the log-probabilities are theirs.
        labels: class indices.
        odir: weight of the off-diagonal entries, >= 0; often chosen from 0.01 to 100.
        intercept: weight of the biases, >= 0; None: as ``odir``.
        reg_norm: divide the weights by their numbers of entries, K (K - 1) and K.
        ref_row: parity with the authors' package, whose default subtracts the last row of ``[W, b]`` before it
            penalises: another optimum, and the last row stays 0.
        epsilon: probabilities below it count as it, in (0, 1).
        max_voxels: as in ``temperature.fit``.
        seed: as in ``temperature.fit``.
        provenance: as in ``temperature.fit``.

    Returns:
        ``weight`` [K][K] and ``bias`` [K], ``objective`` (nats, penalties included), ``odir``, ``intercept``,
        ``epsilon``, ``logits`` (L), and the record of every calibrator.

    Raises:
        DataError: as in ``temperature.fit``.
        UsageError: for a negative weight, or epsilon outside (0, 1).
    """
    intercept = odir if intercept is None else intercept
    if not (0 <= odir < math.inf and 0 <= intercept < math.inf):
        raise UsageError(f"Dirichlet calibration needs weights of at least 0, got odir={odir}, intercept={intercept}.")
    if not 0 < epsilon < 1:
        raise UsageError(f"Dirichlet calibration needs epsilon between 0 and 1, got {epsilon}.")
    checked = (voxels.check(*chunk) for chunk in voxels.as_chunks(logits, labels))
    (kept, truth), seen = voxels.sample(checked, max_voxels, seed)
    features = _log_probabilities(voxels.as_classes(kept), epsilon)
    count = features.shape[1]
    penalty = np.full((count, count + 1), odir / (count * (count - 1) if reg_norm else 1))
    penalty[:, -1] = intercept / (count if reg_norm else 1)
    np.fill_diagonal(penalty, 0)
    start, free = affine.identity(count), np.ones(penalty.shape, bool)
    if ref_row:
        start = start - start[-1]
        free[-1] = False
    weights, reason = affine.minimise(features, truth, start, free, penalty)
    after = affine.likelihood(features, truth, weights)[0]
    return voxels.record(
        "dirichlet",
        {
            "weight": weights[:, :-1].tolist(),
            "bias": weights[:, -1].tolist(),
            "objective": after + float(np.sum(penalty * weights**2)),
            "odir": odir,
            "intercept": intercept,
            "epsilon": epsilon,
            "logits": kept.shape[1],
        },
        reason=reason,
        nll=(affine.likelihood(features, truth, start)[0], after),
        voxels=(len(truth), seen),
        provenance=provenance,
    )


def apply(params: Mapping[str, Any], logits: Array, image: Array | None = None) -> Array:
    """``W log p + b``: logits of the same shape, of any number of leading axes; for one logit their difference.

    Raises:
        DataError: when the params were fitted on another number of logits.
    """
    affine.check_count(params["logits"], logits)
    xp = logits.__array_namespace__()
    single = logits.shape[-1] == 1
    classes = xp.concat([xp.zeros_like(logits), logits], axis=-1) if single else logits
    log_p = _log_probabilities(classes, params["epsilon"])
    mapped = log_p @ xp.asarray(params["weight"], dtype=logits.dtype).T + xp.asarray(params["bias"], dtype=logits.dtype)
    return mapped[..., 1:] - mapped[..., :1] if single else mapped


@calibrators.registry.register("dirichlet")
class Dirichlet:
    """Dirichlet calibration as a registered calibrator."""

    spatial = False
    fit = staticmethod(fit)
    apply = staticmethod(apply)


def _log_probabilities(logits: Array, epsilon: float) -> Array:
    xp = logits.__array_namespace__()
    shifted = logits - xp.max(logits, axis=-1, keepdims=True)
    log_p = shifted - xp.log(xp.sum(xp.exp(shifted), axis=-1, keepdims=True))
    return xp.clip(log_p, math.log(epsilon), None)
