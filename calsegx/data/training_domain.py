"""What the training cases look like, kept with a model so that a case unlike them can be named.

Two things of every case: percentiles of its raw intensities, and how the frozen encoder sees its prompted slices.  The
record of all of them holds no image and no name.
"""

import base64
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from calsegx.data import frames

MOST_CASES = 64  # that a record is made of, spread evenly over the training cases: it costs reading their images again
PERCENTILES = (0.5, 50, 99.5)
MOST_VOXELS = 1_000_000  # of which percentiles are taken
DIRECTIONS = 16  # in which the scatter of the slices is kept apart
LIMIT_PERCENTILE = 99  # of the distances of held-out training slices


class Look(NamedTuple):
    """What one case looks like."""

    intensities: Mapping[str, tuple[float, ...] | None]  # of ``percentiles``, by channel
    slices: np.ndarray | None  # [n, C] of ``slice_vectors``; None: not known


def chosen(cases: Sequence[Any]) -> list[Any]:
    """At most ``MOST_CASES`` of the cases, evenly spread over them."""
    count = min(MOST_CASES, len(cases))
    return [cases[number * len(cases) // count] for number in range(count)]


def percentiles(voxels: np.ndarray) -> tuple[float, ...] | None:
    """``PERCENTILES`` of the voxels above 0 of a raw image; None where there are none.

    Of more than ``MOST_VOXELS`` every k-th is taken.
    """
    inside = voxels[voxels > 0]
    if not inside.size:
        return None
    found = np.percentile(inside[:: -(-inside.size // MOST_VOXELS)], PERCENTILES)
    return tuple(float(value) for value in found)


def slice_vectors(features: np.ndarray, geometry: frames.FrameGeometry) -> np.ndarray:
    """Mean encoder features of every slice, float64 ``[n, C]``, without the frame's padding.

    Args:
        features: ``[n, h, w, C]``.
        geometry: of the case.
    """
    rows, columns = (
        max(1, round(part / geometry.image_size * size))
        for part, size in zip(geometry.resized_shape, features.shape[1:3], strict=True)
    )
    inside = features[:, :rows, :columns].astype(np.float32)
    return inside.mean(axis=(1, 2), dtype=np.float64)


def describe(looks: Iterable[Look]) -> dict[str, Any]:
    """The record of the training cases, as plain JSON values.

    It is::

        cases        how many it is made of
        intensities  channel -> lowest and highest of each of PERCENTILES over the cases, and both of the ratio of the
                     median to the last; None where no voxel is above 0
        features     None with fewer than two cases with slices, else
            slices      how many
            mean        [C] of the slices' vectors
            directions  [k, C] orthonormal, k <= DIRECTIONS: principal axes of the slices' scatter
            variances   [k + 1]: along each of them, and the mean across them
            limit       the LIMIT_PERCENTILE of the distances of the slices, each from the slices of the other cases

    Arrays are base64 text of little-endian float32.  The scatter is the covariance as Ledoit and Wolf shrink it, ``(1 -
    r) S + r m I`` with ``m = trace(S) / C`` ("A well-conditioned estimator for large-dimensional covariance matrices",
    J. Multivariate Analysis 88, 2004).
    """
    looks = list(looks)
    names = looks[0].intensities if looks else ()
    groups = [look.slices for look in looks if look.slices is not None and len(look.slices)]
    return {
        "cases": len(looks),
        "intensities": {name: _ranges([look.intensities[name] for look in looks]) for name in names},
        "features": _features(groups) if len(groups) > 1 else None,
    }


def distances(features: Mapping[str, Any], vectors: np.ndarray) -> np.ndarray:
    """Mahalanobis' distance of slices, ``sqrt((x - m)^T S^-1 (x - m) / C)``: about 1 for a training slice.

    Args:
        features: of ``describe``'s record.
        vectors: ``[n, C]`` of ``slice_vectors``.

    Returns:
        float64 ``[n]``.
    """
    mean, directions, variances = (_unpack(features[name]) for name in ("mean", "directions", "variances"))
    return _Scatter(mean, directions.reshape(-1, len(mean)), variances).distances(vectors)


class _Scatter(NamedTuple):
    mean: np.ndarray
    directions: np.ndarray
    variances: np.ndarray

    def distances(self, vectors: np.ndarray) -> np.ndarray:
        centred = vectors - self.mean
        along = np.square(centred @ self.directions.T)
        across = np.square(centred).sum(axis=1) - along.sum(axis=1)
        squares = (along / self.variances[:-1]).sum(axis=1) + np.maximum(across, 0) / self.variances[-1]
        return np.sqrt(squares / len(self.mean))


def _ranges(found: Sequence[tuple[float, ...] | None]) -> dict[str, list[float]] | None:
    known = [values for values in found if values is not None]
    if not known:
        return None
    ratios = [median / highest for _, median, highest in known]
    return {
        "lowest": np.min(known, axis=0).tolist(),
        "highest": np.max(known, axis=0).tolist(),
        "ratio": [min(ratios), max(ratios)],
    }


def _features(groups: Sequence[np.ndarray]) -> dict[str, Any]:
    held_out = []
    for number, group in enumerate(groups):
        others = _scatter(np.concatenate([*groups[:number], *groups[number + 1 :]]))
        held_out.append(others.distances(group))
    whole = _scatter(np.concatenate(groups))
    return {
        "slices": sum(map(len, groups)),
        **{name: _pack(values) for name, values in whole._asdict().items()},
        "limit": float(np.percentile(np.concatenate(held_out), LIMIT_PERCENTILE)),
    }


def _scatter(vectors: np.ndarray) -> _Scatter:
    count, size = vectors.shape
    mean = vectors.mean(axis=0)
    centred = vectors - mean
    covariance = centred.T @ centred / count
    average, square = np.trace(covariance) / size, np.square(covariance).sum()
    spread = square / size - average**2
    error = (np.square(np.square(centred).sum(axis=1)).mean() - square) / count / size
    shrinkage = np.clip(error / spread, 0, 1) if spread > 0 else 1
    values, axes = np.linalg.eigh(covariance)  # ascending
    values = (1 - shrinkage) * values[::-1] + shrinkage * average
    # Few slices, or equal ones, leave axes without any variance; no distance becomes infinite.
    values = np.maximum(values, 1e-3 * average + 1e-9)
    kept = min(DIRECTIONS, size - 1)
    return _Scatter(mean, axes.T[::-1][:kept], np.append(values[:kept], values[kept:].mean()))


def _pack(values: np.ndarray) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def _unpack(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4").astype(np.float64)
