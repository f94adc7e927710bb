"""From a case's files to the encoder's square frame, and from low-resolution logits back to native pixels.

Every resampling here is linear and separable, so it is one matrix per axis.  The frame follows SAM: resize so
that the longer side fills it, normalise, then pad with zeros at the bottom and on the right.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from calsegx import configs
from calsegx.data import augment, classes, nifti
from calsegx.data import prompts as prompt_tools
from calsegx.interfaces import Case, DataError, Prompts, Volume

VERSION = 1  # raise it when a change here or in augment makes other frames of the same files: caches are then refused


@dataclass(frozen=True)
class FrameGeometry:
    """How a native slice lies in the encoder frame; all the way back needs."""

    native_shape: tuple[int, int]  # (H, W) pixels
    spacing_mm: tuple[float, float]  # (H, W)
    resized_shape: tuple[int, int]  # (H, W) of the slice in the frame: its top left part
    image_size: int  # S: the frame is S x S
    logit_shape: tuple[int, int]  # (Hl, Wl): the decoder's output covers the whole frame


@dataclass(frozen=True)
class PreparedCase:
    """The prompted slices of a case, ready for the encoder, and the way back."""

    case: Case
    slices: np.ndarray  # int [n], indices along D of the slices that have a prompt
    images: np.ndarray  # float32 [n, H, W, 3], 0..255, native pixels
    labels: np.ndarray | None  # uint8 [n, H, W] class indices, augmented like the images; None without a label file
    prompts: Prompts  # of the n slices, in frame coordinates
    geometry: FrameGeometry
    reference: Volume  # the first channel's grid; its voxels are zeros of the right shape
    label_volume: np.ndarray | None  # uint8 [D, H, W] class indices, never augmented


def prepare_case(
    case: Case,
    channels: tuple[str, str, str],
    class_map: classes.ClassMap,
    config: configs.DataConfig,
    protocol: str,
    image_size: int,
    logit_shape: tuple[int, int],
    rng: np.random.Generator | None = None,
    clicks: Mapping[str, prompt_tools.Clicks] | None = None,
) -> PreparedCase:
    """Read, check and normalise a case; keep the slices that have a prompt.

    Without ``clicks`` the prompts come from the reference labels: all slices with foreground (any class).  A
    case without foreground has no slices (n = 0).

    Args:
        case: its label may be None with ``clicks``.
        channels: of ``cases.channels``.
        class_map: of ``classes.parse``.
        config: percentiles and the ranges of the augmentation.
        protocol: ``gt_points`` or ``gt_box``: the kind that ``clicks`` must be; labels give both kinds.
        image_size: S of the backbone.
        logit_shape: of the backbone.
        rng: given, the slices are an augmented view, and prompts follow it; a slice whose foreground the
            rotation moves out of the image is dropped.
        clicks: all cases' clicks, of ``prompts.read_clicks``.

    Raises:
        DataError: for unusable files, channels or labels on another grid, and clicks that do not fit.
    """
    if rng is not None and clicks is not None:
        raise ValueError("clicks belong to the image as it is; rng asks for an augmented view")
    label = None
    if clicks is None:
        label = read_label_volume(case, class_map)  # before the larger images
    voxels, reference = _read_channels(case, channels, config)
    if label is not None and case.label is not None:
        nifti.same_grid(reference, case.images[channels[0]], label, case.label)
    label_volume = None if label is None else label.voxels
    height, width = reference.voxels.shape[1:]
    spacing = (reference.spacing_mm[1], reference.spacing_mm[2])
    geometry = frame_geometry((height, width), spacing, image_size, logit_shape)

    native = Prompts()
    if clicks is not None:
        table = prompt_tools.case_clicks(clicks, case.case_id)
        slices, native = prompt_tools.from_clicks(table, case.case_id, reference, protocol)
    else:
        slices = np.flatnonzero(np.any(label_volume, axis=(1, 2)))
    images = np.stack([voxels[name][slices] for name in channels], axis=-1)
    labels = None if label_volume is None else label_volume[slices]
    if labels is not None and rng is not None:
        images, labels = augment.augment(
            images, labels, rng, config.rotation_degrees, config.intensity_fraction, spacing
        )
        kept = np.any(labels, axis=(1, 2))
        slices, images, labels = slices[kept], images[kept], labels[kept]
    if labels is not None and clicks is None:
        native = _prompts_from_labels(labels > 0, spacing)
    return PreparedCase(
        case,
        slices,
        images,
        labels,
        _to_frame_coordinates(native, geometry),
        geometry,
        reference,
        label_volume,
    )


def read_label_volume(case: Case, class_map: classes.ClassMap) -> Volume:
    """The case's reference as class indices uint8 ``[D, H, W]``.

    Raises:
        DataError: when there is no label file, it is unusable, or it holds unknown ids.
    """
    if case.label is None:
        raise DataError(f"Case {case.case_id!r} has no label file; add one, or give clicks to predict.")
    volume = nifti.read_labels(case.label)
    return dataclasses.replace(volume, voxels=classes.to_indices(class_map, volume.voxels, case.label))


def frame_geometry(
    native_shape: tuple[int, int],
    spacing_mm: tuple[float, float],
    image_size: int,
    logit_shape: tuple[int, int],
) -> FrameGeometry:
    """The frame with square pixels (in mm) whose longer side the slice fills.

    With equal spacings this is SAM's rule, ``int(side * scale + 0.5)`` with ``scale = S / max(H, W)``.
    """
    unit = min(spacing_mm)  # dividing first makes equal spacings exactly 1
    sides = [pixels * (spacing / unit) for pixels, spacing in zip(native_shape, spacing_mm, strict=True)]
    scale = image_size / max(sides)
    height, width = (max(1, int(side * scale + 0.5)) for side in sides)
    return FrameGeometry(native_shape, spacing_mm, (height, width), image_size, logit_shape)


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
    rows, columns = (
        resample_matrix(native, resized, antialias=True)
        for native, resized in zip(geometry.native_shape, geometry.resized_shape, strict=True)
    )
    resized = _along_rows_and_columns(slices.astype(np.float32), rows, columns)
    height, width = geometry.resized_shape
    frames = np.zeros((len(slices), geometry.image_size, geometry.image_size, 3), np.float32)
    frames[:, :height, :width] = (resized - np.array(mean, np.float32)) / np.array(std, np.float32)
    return frames


def from_low_res(logits: np.ndarray, geometry: FrameGeometry) -> np.ndarray:
    """Decoder logits ``[n, Hl, Wl, L]`` to native pixels ``[n, H, W, L]``: SAM's ``postprocess_masks``.

    Bilinear to the frame, cropped to the slice, bilinear to native; never antialiased.  The steps are linear,
    so each axis is the product of their matrices.
    """
    rows, columns = (
        resample_matrix(resized, native, antialias=False)
        @ resample_matrix(low, geometry.image_size, antialias=False)[:resized]
        for low, resized, native in zip(
            geometry.logit_shape, geometry.resized_shape, geometry.native_shape, strict=True
        )
    )
    return _along_rows_and_columns(np.asarray(logits, np.float32), rows, columns)


def labels_to_low_res(labels: np.ndarray, geometry: FrameGeometry, num_classes: int) -> np.ndarray:
    """Class indices ``[n, H, W]`` (0..num_classes) on the decoder's grid, uint8 ``[n, Hl, Wl]``.

    One-hot, through the frame with antialias, then the largest share; the padding is background, ties go to
    the lower index.
    """
    rows, columns = (
        resample_matrix(geometry.image_size, low, antialias=True)[:, :resized]
        @ resample_matrix(native, resized, antialias=True)
        for low, resized, native in zip(
            geometry.logit_shape, geometry.resized_shape, geometry.native_shape, strict=True
        )
    )
    best = np.zeros((len(labels), *geometry.logit_shape), np.uint8)
    shares = [
        _along_rows_and_columns((labels == index)[..., None].astype(np.float32), rows, columns)[..., 0]
        for index in range(1, num_classes + 1)
    ]
    best_share = 1.0 - np.sum(shares, axis=0)
    for index, share in enumerate(shares, start=1):
        best = np.where(share > best_share, np.uint8(index), best)
        best_share = np.maximum(share, best_share)
    return best


def points_to_frame(points: np.ndarray, geometry: FrameGeometry) -> np.ndarray:
    """Native ``(x, y)`` pixels ``[..., 2]`` to frame pixels, each axis by its own (rounded) ratio, as SAM."""
    return (points * _ratio(geometry)).astype(np.float32)


def points_from_frame(points: np.ndarray, geometry: FrameGeometry) -> np.ndarray:
    """The inverse of ``points_to_frame``."""
    return (points / _ratio(geometry)).astype(np.float32)


def normalise_intensity(voxels: np.ndarray, lower: float, upper: float) -> np.ndarray:
    """Map the ``lower`` and ``upper`` percentile (0..100) of voxels above 0 to 0 and 255, clipped; float32.

    Raises:
        ValueError: when the two are equal, no voxel is above 0, or more than one in a hundred is clearly below 0
            (z-scores, CT): half of the tissue would silently become black.
    """
    negative = np.count_nonzero(voxels < -0.05 * np.abs(voxels).max())
    if negative > 0.01 * voxels.size:
        raise ValueError(
            f"{negative / voxels.size:.0%} of its voxels are negative; expected magnitudes with the background near 0 "
            "(add a constant to z-scores, window CT)"
        )
    inside = voxels[voxels > 0]
    if not inside.size:
        raise ValueError("it has no voxel above 0")
    low, high = np.percentile(inside, [lower, upper])
    if not high > low:
        raise ValueError(f"its voxels above 0 are constant ({low:.6g}) between the percentiles {lower} and {upper}")
    return np.clip((voxels - np.float32(low)) * np.float32(255 / (high - low)), 0, 255).astype(np.float32)


def _read_channels(
    case: Case, channels: Sequence[str], config: configs.DataConfig
) -> tuple[dict[str, np.ndarray], Volume]:
    """Normalised voxels ``[D, H, W]`` by channel, and the first channel's grid."""
    first = nifti.read(case.images[channels[0]])
    # Whoever holds the case needs the grid alone; a broadcast zero takes no memory.
    reference = dataclasses.replace(first, voxels=np.broadcast_to(np.float32(0), first.voxels.shape))
    voxels: dict[str, np.ndarray] = {}
    for name in dict.fromkeys(channels):
        path = case.images[name]
        volume = first if name == channels[0] else nifti.read(path)
        nifti.same_grid(reference, case.images[channels[0]], volume, path)
        try:
            voxels[name] = normalise_intensity(volume.voxels, config.lower_percentile, config.upper_percentile)
        except ValueError as error:
            raise DataError(f"{path} (case {case.case_id!r}) cannot be normalised: {error}; check the file.") from error
    return voxels, reference


def _prompts_from_labels(foreground: np.ndarray, spacing_mm: tuple[float, float]) -> Prompts:
    points, labels = prompt_tools.points_from_labels(foreground, spacing_mm)
    return Prompts(points=points, labels=labels, boxes=prompt_tools.boxes_from_labels(foreground))


def _to_frame_coordinates(native: Prompts, geometry: FrameGeometry) -> Prompts:
    points, boxes = native.points, native.boxes
    if points is not None:
        points = points_to_frame(points, geometry)
    if boxes is not None:
        boxes = points_to_frame(boxes.reshape(-1, 2, 2), geometry).reshape(-1, 4)
    return native._replace(points=points, boxes=boxes)


def _ratio(geometry: FrameGeometry) -> np.ndarray:
    (height, width), (frame_height, frame_width) = geometry.native_shape, geometry.resized_shape
    return np.array([frame_width / width, frame_height / height])


def _along_rows_and_columns(values: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """``[n, H, W, C]`` to ``[n, H', W', C]`` with ``rows [H', H]`` and ``columns [W', W]``."""
    channels_first = np.ascontiguousarray(np.moveaxis(values, -1, 1))  # else matmul does without BLAS
    moved = rows @ channels_first @ columns.T
    return np.ascontiguousarray(np.moveaxis(moved, 1, -1))
