"""Vector, matrix and Platt scaling: an affine map of the logits, and its maximum likelihood fit."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import scipy.optimize
import scipy.special
from jaxtyping import Bool, Float, Integer

from calsegx import calibrators
from calsegx.calibrators import temperature, voxels
from calsegx.interfaces import Array, DataError

BOUND = 20.0  # of |weights| and |bias|, as 1/T in temperature scaling
_BLOCK = 1 << 16  # voxels per evaluation, in float64


def minimise(
    features: Float[np.ndarray, "n K"],
    labels: Integer[np.ndarray, " n"],
    start: Float[np.ndarray, "K K1"],
    free: Bool[np.ndarray, "K K1"],
    penalty: Float[np.ndarray, "K K1"] | float = 0.0,
) -> tuple[Float[np.ndarray, "K K1"], str]:
    """Minimises ``mean_v -log softmax(W x + b)_y + sum penalty * [W, b]^2`` over the ``free`` entries of ``[W, b]``.

    Convex; L-BFGS-B with the analytic gradient ``mean_v (p - q) [x, 1] + 2 penalty [W, b]``, each column of W in units
    of its feature's size, within ``|W|, |b| <= 20``.  Not identifiable, so that ``start`` is returned with the reason:
    a class without voxels (its bias falls for ever), voxels that scaling separates, an optimum at the bounds.

    Args:
        features: x, e.g. logits.
        labels: class indices 0..K-1.
        start: ``[W, b]`` where the search begins; entries that are not free stay.
        free: which entries to optimise.
        penalty: of the squares; 0 for none.
    """
    count = features.shape[1]
    absent = np.setdiff1d(np.arange(count), labels)
    if absent.size:
        return start, f"no voxel has class {', '.join(map(str, absent))}"
    if temperature.separable(temperature.margins(features, labels)):
        return start, "the voxels are separable: larger weights always fit better"
    size = np.sqrt(np.mean(np.square(features), axis=0, dtype=np.float64))
    units = np.broadcast_to(np.append(np.where(size > 0, size, 1), 1), start.shape)

    def objective(variables: np.ndarray) -> tuple[float, np.ndarray]:
        weights = start.copy()
        weights[free] = variables / units[free]
        value, gradient = likelihood(features, labels, weights)
        gradient = gradient + 2 * penalty * weights
        return value + float(np.sum(penalty * weights**2)), gradient[free] / units[free]

    limits = BOUND * units[free]
    found = scipy.optimize.minimize(
        objective,
        start[free] * units[free],
        jac=True,
        method="L-BFGS-B",
        bounds=scipy.optimize.Bounds(-limits, limits),
        options={"ftol": 1e-15, "gtol": 1e-9, "maxcor": 30, "maxiter": 2000, "maxfun": 5000},
    )
    weights = start.copy()
    weights[free] = found.x / units[free]
    if np.any(np.abs(weights[free]) > BOUND * (1 - 1e-9)):
        return start, f"the optimum lies outside +-{BOUND:g}"
    return weights, ""


def likelihood(
    features: Float[np.ndarray, "n K"], labels: Integer[np.ndarray, " n"], weights: Float[np.ndarray, "K K1"]
) -> tuple[float, Float[np.ndarray, "K K1"]]:
    """Mean negative log-likelihood of ``softmax(W x + b)`` in nats, and its gradient with respect to ``[W, b]``."""
    total, gradient = 0.0, np.zeros(weights.shape)
    for begin in range(0, len(features), _BLOCK):
        block, truth = features[begin : begin + _BLOCK].astype(np.float64), labels[begin : begin + _BLOCK]
        log_p = scipy.special.log_softmax(block @ weights[:, :-1].T + weights[:, -1], axis=1)
        rows = np.arange(len(truth))
        total -= log_p[rows, truth].sum()
        residual = np.exp(log_p)
        residual[rows, truth] -= 1
        gradient[:, :-1] += residual.T @ block
        gradient[:, -1] += residual.sum(axis=0)
    return float(total / len(features)), gradient / len(features)


def identity(count: int) -> Float[np.ndarray, "K K1"]:
    """``[W, b]`` that changes nothing."""
    return np.eye(count, count + 1)


class _Affine:
    """A calibrator whose params are ``weight`` and ``bias``."""

    spatial = False
    name: str

    @classmethod
    def fit(
        cls,
        logits: Float[np.ndarray, "*shape L"] | Iterable[tuple[np.ndarray, np.ndarray]],
        labels: Integer[np.ndarray, "*shape"] | None = None,
        *,
        max_voxels: int = 100_000,
        seed: int = 0,
        provenance: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """``weight`` and ``bias`` of least negative log-likelihood; arguments and errors as in ``temperature.fit``.

        Raises:
            DataError: for more than two classes in Platt scaling, and as in ``temperature.fit``.
        """
        chunks = (voxels.check(*chunk) for chunk in voxels.as_chunks(logits, labels))
        if cls.name == "platt":
            chunks = (_log_odds(*chunk) for chunk in chunks)
        return _fit(cls.name, chunks, max_voxels, seed, provenance)


@calibrators.registry.register("vector")
class Vector(_Affine):
    """Vector scaling ``w * z + b``, one weight and one bias per class (Guo et al., 2017, section 4.2).

    A single logit gives ``a z + b``, i.e. Platt scaling.  The biases of a softmax sum to 0, which changes nothing.
    """

    name = "vector"

    @staticmethod
    def apply(params: Mapping[str, Any], logits: Array, image: Array | None = None) -> Array:
        """``w * z + b``, logits of the same shape."""
        weight, bias = _arrays(params, logits)
        return logits * weight + bias


@calibrators.registry.register("matrix")
class Matrix(_Affine):
    """Matrix scaling ``W z + b`` (Guo et al., 2017, section 4.2); for many classes prefer Dirichlet's penalties.

    Columns of W sum to 1 and b to 0, as at the start: adding a row to all rows changes nothing.
    """

    name = "matrix"

    @staticmethod
    def apply(params: Mapping[str, Any], logits: Array, image: Array | None = None) -> Array:
        """``W z + b``, logits of the same shape."""
        weight, bias = _arrays(params, logits)
        return logits @ weight.T + bias


@calibrators.registry.register("platt")
class Platt(_Affine):
    """Platt scaling ``a d + b`` of the log-odds ``d`` of two classes (Platt, 1999; without his smoothed targets)."""

    name = "platt"

    @staticmethod
    def apply(params: Mapping[str, Any], logits: Array, image: Array | None = None) -> Array:
        """``a d + b`` for one logit; the mean of two logits stays, their difference becomes ``a d + b``."""
        (a,), (b,) = params["weight"], params["bias"]
        if logits.shape[-1] == 1:
            return a * logits + b
        if logits.shape[-1] != 2:
            raise DataError(f"Platt scaling is for two classes, got {logits.shape[-1]} logits; use vector scaling.")
        mean = logits.mean(axis=-1, keepdims=True)
        difference = a * (logits[..., 1:] - logits[..., :1]) + b
        xp = logits.__array_namespace__()
        return xp.concat([mean - difference / 2, mean + difference / 2], axis=-1)


def check_count(count: int, logits: Array) -> None:
    """Raises a DataError unless the logits are as many per voxel as the params were fitted on."""
    if logits.shape[-1] != count:
        raise DataError(
            f"The calibrator was fitted on {count} logits per voxel, got {logits.shape[-1]}; fit it on this model."
        )


def _arrays(params: Mapping[str, Any], logits: Array) -> tuple[Array, Array]:
    """``weight`` and ``bias`` as arrays of the logits' kind and precision."""
    check_count(len(params["bias"]), logits)
    xp = logits.__array_namespace__()
    return xp.asarray(params["weight"], dtype=logits.dtype), xp.asarray(params["bias"], dtype=logits.dtype)


def _log_odds(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if logits.shape[1] > 2:
        raise DataError(f"Platt scaling is for two classes, got {logits.shape[1]} logits; use vector scaling.")
    return (logits if logits.shape[1] == 1 else logits[:, 1:] - logits[:, :1]), labels


def _fit(
    name: str,
    chunks: Iterable[tuple[np.ndarray, np.ndarray]],
    max_voxels: int,
    seed: int,
    provenance: Mapping[str, Any] | None,
) -> dict[str, Any]:
    (logits, labels), seen = voxels.sample(chunks, max_voxels, seed)
    count = logits.shape[1]
    features = voxels.as_classes(logits)
    start = identity(features.shape[1])
    free = start.astype(bool) if name == "vector" else np.ones(start.shape, bool)
    free[:, -1] = True
    if count == 1:
        free[0] = False  # class 0 keeps the logit 0
        free[:, 0] = False
    weights, reason = minimise(features, labels, start, free)
    own = weights[-count:, -1 - count :]  # of a single logit: what makes class 1's from itself
    return voxels.record(
        name,
        {"weight": (own[:, :-1] if name == "matrix" else own.diagonal()).tolist(), "bias": own[:, -1].tolist()},
        reason=reason,
        nll=(likelihood(features, labels, start)[0], likelihood(features, labels, weights)[0]),
        voxels=(len(labels), seen),
        provenance=provenance,
    )
