"""The way from a file's grid to the encoder's square frame, and from low-resolution logits back.

Every resampling here is linear and separable, so it is one matrix per axis.  A volume may first be resampled to a
working grid (``--config.data.resample``): along D at once, along rows and columns as part of the way to the frame.  The
frame follows SAM: resize so that the longer side fills it, normalise, then pad with zeros at the bottom and on the
right.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class FrameGeometry:
    """How the slices of a file lie in the encoder frame; all the way back needs."""

    native_shape: tuple[int, int]  # (H, W) pixels
    spacing_mm: tuple[float, float]  # (H, W)
    resized_shape: tuple[int, int]  # (H, W) of the slice in the frame: its top left part
    image_size: int  # S: the frame is S x S
    logit_shape: tuple[int, int]  # (Hl, Wl): the decoder's output covers the whole frame
    working_shape: tuple[int, int]  # (H, W) of the working grid; native_shape where nothing is resampled
    depths: tuple[int, int]  # number of slices of the file and of the working grid


def frame_geometry(
    native_shape: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
    image_size: int,
    logit_shape: tuple[int, int],
    resample: tuple[int, ...] = (),
) -> FrameGeometry:
    """The frame with square pixels (in mm) whose longer side the slice fills.

    With equal spacings this is SAM's rule, ``int(side * scale + 0.5)`` with ``scale = S / max(H, W)``.

    Args:
        native_shape: (D, H, W) of the file in the working orientation.
        spacing_mm: of D, H and W.
        image_size: S.
        logit_shape: (Hl, Wl).
        resample: of ``configs.resampled``: the working grid, which covers the same field of view.
    """
    depth, *plane = native_shape
    unit = min(spacing_mm[1:])  # dividing first makes equal spacings exactly 1
    sides = [pixels * (spacing / unit) for pixels, spacing in zip(plane, spacing_mm[1:], strict=True)]
    scale = image_size / max(sides)
    height, width = (max(1, int(side * scale + 0.5)) for side in sides)
    rows, columns = resample[-2:] or plane
    depths = depth, resample[0] if len(resample) == 3 else depth
    return FrameGeometry(
        (plane[0], plane[1]), spacing_mm[1:], (height, width), image_size, logit_shape, (rows, columns), depths
    )


def working_spacing(spacing_mm: tuple[float, float, float], geometry: FrameGeometry) -> tuple[float, float, float]:
    """(D, H, W) of native pixels on the working grid's slices."""
    native, working = geometry.depths
    return spacing_mm[0] * native / working, spacing_mm[1], spacing_mm[2]


def to_working_depth(volume: np.ndarray, geometry: FrameGeometry) -> np.ndarray:
    """``[D, ...]`` of the file on the working grid's slices: linear, with antialias."""
    native, working = geometry.depths
    return volume if native == working else _along_depth(volume, resample_matrix(native, working, antialias=True))


def from_working_depth(volume: np.ndarray, geometry: FrameGeometry, predicted: np.ndarray) -> np.ndarray:
    """``[D', ...]`` probabilities of the working grid's slices on those of the file, linearly.

    Slices without a prompt hold no prediction, so nothing is mixed with their zeros: the file's slices that they hold
    are 0, the others are means of predicted slices alone.  Sums of probabilities never exceed 1.

    Args:
        volume: 0 where nothing is predicted.
        geometry: of the case.
        predicted: indices along D' of the slices that are.
    """
    native, working = geometry.depths
    if native == working:
        return volume
    known = np.isin(np.arange(working), predicted)
    inside = known[working_slices(np.arange(native), geometry)]
    weights = np.where(inside[:, None] & known, resample_matrix(working, native, antialias=False), 0)
    sums = weights.sum(axis=1, keepdims=True)  # at least one half inside: the holding slice is the nearest
    return _along_depth(volume, weights / np.where(inside[:, None], sums, 1))


def working_slices(slices: np.ndarray, geometry: FrameGeometry) -> np.ndarray:
    """The working grid's slices that hold the middles of the file's ``slices``: ``floor((d + 1/2) D' / D)``."""
    native, working = geometry.depths
    return (2 * slices + 1) * working // (2 * native)


def labels_to_working_depth(labels: np.ndarray, geometry: FrameGeometry, num_classes: int) -> np.ndarray:
    """Class indices ``[D, H, W]`` on the working grid's slices: the largest share wins, exact ties go to the lower."""
    native, working = geometry.depths
    if native == working:
        return labels
    return _largest_share(labels, num_classes, lambda mask: to_working_depth(mask.astype(np.float32), geometry))


def resample_matrix(size_in: int, size_out: int, antialias: bool) -> np.ndarray:
    """Linear interpolation from ``size_in`` to ``size_out`` samples: float32 ``[size_out, size_in]``.

    Half-pixel centres (``align_corners=False``).  With ``antialias`` the triangle is widened when shrinking,
    as in Pillow and in torch's ``antialias=True``.  Rows sum to 1.
    """
    scale = size_in / size_out
    support = max(scale, 1.0) if antialias else 1.0
    centres = (np.arange(size_out) + 0.5) * scale
    distance = np.abs(np.arange(size_in) + 0.5 - centres[:, None]) / support
    weights = np.maximum(0.0, 1.0 - distance)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def to_frame(slices: np.ndarray, geometry: FrameGeometry, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Native slices ``[n, H, W, 3]`` (0..255) to encoder frames float32 ``[n, S, S, 3]``.

    Bilinear with antialias, ``(x - mean) / std``, then zeros at the bottom and on the right: padding before
    normalising would be another input.
    """
    rows, columns = _to_resized(geometry)
    resized = _along_rows_and_columns(slices.astype(np.float32), rows, columns)
    height, width = geometry.resized_shape
    frames = np.zeros((len(slices), geometry.image_size, geometry.image_size, 3), np.float32)
    frames[:, :height, :width] = (resized - np.array(mean, np.float32)) / np.array(std, np.float32)
    return frames


def from_low_res(logits: np.ndarray, geometry: FrameGeometry) -> np.ndarray:
    """Decoder logits ``[n, Hl, Wl, L]`` to native pixels ``[n, H, W, L]``: SAM's ``postprocess_masks``.

    Bilinear to the frame, cropped to the slice, bilinear to the working grid and to native; never antialiased.  The
    steps are linear, so each axis is the product of their matrices.
    """
    rows, columns = (
        _between(resized, working, native, antialias=False)
        @ resample_matrix(low, geometry.image_size, antialias=False)[:resized]
        for low, resized, working, native in zip(
            geometry.logit_shape, geometry.resized_shape, geometry.working_shape, geometry.native_shape, strict=True
        )
    )
    return _along_rows_and_columns(np.asarray(logits, np.float32), rows, columns)


def labels_to_low_res(labels: np.ndarray, geometry: FrameGeometry, num_classes: int) -> np.ndarray:
    """Class indices ``[n, H, W]`` (0..num_classes) on the decoder's grid, uint8 ``[n, Hl, Wl]``.

    One-hot, through the frame with antialias, then the largest share; the padding is background, exact ties go
    to the lower index.
    """
    rows, columns = (
        resample_matrix(geometry.image_size, low, antialias=True)[:, : len(matrix)] @ matrix
        for low, matrix in zip(geometry.logit_shape, _to_resized(geometry), strict=True)
    )

    def share(mask: np.ndarray) -> np.ndarray:
        return _along_rows_and_columns(mask[..., None].astype(np.float32), rows, columns)[..., 0]

    return _largest_share(labels, num_classes, share)


def points_to_frame(points: np.ndarray, geometry: FrameGeometry) -> np.ndarray:
    """Native ``(x, y)`` pixels ``[..., 2]`` to frame pixels, each axis by its own (rounded) ratio, as SAM."""
    return (points * _ratio(geometry)).astype(np.float32)


def points_from_frame(points: np.ndarray, geometry: FrameGeometry) -> np.ndarray:
    """The inverse of ``points_to_frame``."""
    return (points / _ratio(geometry)).astype(np.float32)


def _ratio(geometry: FrameGeometry) -> np.ndarray:
    (height, width), (frame_height, frame_width) = geometry.native_shape, geometry.resized_shape
    return np.array([frame_width / width, frame_height / height])


def _to_resized(geometry: FrameGeometry) -> tuple[np.ndarray, np.ndarray]:
    """Native rows and columns to those of the slice in the frame, through the working grid."""
    rows, columns = (
        _between(native, working, resized, antialias=True)
        for native, working, resized in zip(
            geometry.native_shape, geometry.working_shape, geometry.resized_shape, strict=True
        )
    )
    return rows, columns


def _between(size_in: int, size_working: int, size_out: int, antialias: bool) -> np.ndarray:
    """``resample_matrix`` from ``size_in`` to ``size_out`` by way of the working grid, where that is another one."""
    if size_working in (size_in, size_out):
        return resample_matrix(size_in, size_out, antialias)
    return resample_matrix(size_working, size_out, antialias) @ resample_matrix(size_in, size_working, antialias)


def _largest_share(labels: np.ndarray, num_classes: int, share: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Resampled class indices: of every mask its ``share``, the largest wins, exact ties go to the lower."""
    shares = [share(labels == index) for index in range(1, num_classes + 1)]
    best_share = 1.0 - np.sum(shares, axis=0)
    best = np.zeros(best_share.shape, np.uint8)
    for index, of_class in enumerate(shares, start=1):
        best = np.where(of_class > best_share, np.uint8(index), best)
        best_share = np.maximum(of_class, best_share)
    return best


def _along_depth(volume: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    flat = np.ascontiguousarray(volume, np.float32).reshape(len(volume), -1)
    return (matrix @ flat).reshape(len(matrix), *volume.shape[1:])


def _along_rows_and_columns(values: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """``[n, H, W, C]`` to ``[n, H', W', C]`` with ``rows [H', H]`` and ``columns [W', W]``."""
    channels_first = np.ascontiguousarray(np.moveaxis(values, -1, 1))  # else matmul does without BLAS
    moved = rows @ channels_first @ columns.T
    return np.ascontiguousarray(np.moveaxis(moved, 1, -1))
