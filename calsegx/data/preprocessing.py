"""From a case's files to prompted slices, ready for the encoder: one path for training, evaluation and prediction."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from calsegx import configs
from calsegx.data import augment, classes, frames, intensity, nifti, protocols, training_domain
from calsegx.data import clicks as click_tools
from calsegx.data import images as image_files
from calsegx.interfaces import Case, DataError, Prompts, Volume

VERSION = 2  # raise it when a change here or in augment makes other frames of the same files: caches are then refused


@dataclass(frozen=True)
class PreparedCase:
    """The prompted slices of a case, ready for the encoder, and the way back."""

    case: Case
    slices: np.ndarray  # int [n], indices along the working grid's D of the slices that have a prompt
    images: np.ndarray  # float32 [n, H, W, 3], 0..255, native pixels
    labels: np.ndarray | None  # uint8 [n, H, W] class indices, augmented like the images; None without a label file
    prompts: Mapping[str, Prompts]  # protocol -> prompts of the n slices, in frame coordinates
    geometry: frames.FrameGeometry
    reference: Volume  # the first channel's grid; its voxels are zeros of the right shape
    label_volume: np.ndarray | None  # uint8 [D, H, W] class indices of the file, never augmented
    # channel -> training_domain.percentiles of the raw image; of an augmented view empty
    intensities: Mapping[str, tuple[float, ...] | None]


def prepare_case(
    case: Case,
    channels: tuple[str, str, str],
    class_map: classes.ClassMap,
    config: configs.DataConfig,
    protocol: str,
    image_size: int,
    logit_shape: tuple[int, int],
    rng: np.random.Generator | None = None,
    clicks: Mapping[str, click_tools.Clicks] | None = None,
    count: int | None = None,
) -> PreparedCase:
    """Read, check and normalise a case; keep the slices that have a prompt.

    Without ``clicks`` the prompts come from the reference labels.  Protocols of ``configs.EVERY_SLICE`` take every
    slice that is not black, the others the slices with foreground (any class): a case without foreground has none.

    Args:
        case: its label may be None with ``clicks``, or with the protocol ``none``.
        channels: of ``cases.channels``.
        class_map: of ``classes.parse``.
        config: intensity, working grid, slice axis and the ranges of the augmentation.
        protocol: the model's; ``clicks`` must be of its kind, labels give every protocol that takes the same slices.
        image_size: S of the backbone.
        logit_shape: of the backbone.
        rng: given, the slices are an augmented view, and prompts follow it.
        clicks: all cases' clicks, of ``clicks.read_clicks``.
        count: keep only so many slices, drawn by ``rng``; repeated where there are fewer.

    Raises:
        DataError: for unusable files, channels or labels on another grid, and clicks that do not fit.
    """
    if rng is not None and clicks is not None:
        raise ValueError("clicks belong to the image as it is; rng asks for an augmented view")
    if rng is None and count is not None:
        raise ValueError("count slices are drawn at random; this needs rng")
    label = None
    if clicks is None and (case.label is not None or protocol != "none"):
        label = read_label_volume(case, class_map, config.slice_axis)  # before the larger images
    voxels, intensities, reference = _read_channels(case, channels, config, look=rng is None)
    if label is not None and case.label is not None:
        nifti.same_grid(reference, case.images[channels[0]], label, case.label)
    geometry = frames.frame_geometry(
        reference.voxels.shape, reference.spacing_mm, image_size, logit_shape, configs.resampled(config)
    )
    voxels = {name: frames.to_working_depth(volume, geometry) for name, volume in voxels.items()}
    classes_of = len(class_map.names)
    working = None if label is None else frames.labels_to_working_depth(label.voxels, geometry, classes_of)

    clicked = Prompts()
    if clicks is not None:
        table = click_tools.case_clicks(clicks, case.case_id)
        slices, clicked = click_tools.from_clicks(table, case.case_id, reference, protocol, geometry)
        if protocol in configs.EVERY_SLICE:
            kept = np.isin(slices, _not_black(voxels))
            slices, clicked = slices[kept], clicked.map(lambda values: values[kept])
    elif protocol in configs.EVERY_SLICE:
        slices = _not_black(voxels)
    else:
        slices = np.flatnonzero(np.any(working, axis=(1, 2)))
    if rng is not None and count is not None and len(slices):
        slices = np.sort(rng.choice(slices, count, replace=len(slices) < count))
    images = _slice_images(voxels, channels, slices, config.adjacent_slices)
    labels = None if working is None else working[slices]
    moves = np.tile(np.eye(3), (len(slices), 1, 1))
    if labels is not None and rng is not None:
        images, labels, moves = augment.augment(images, labels, rng, config, geometry.spacing_mm)

    prompts = {}
    if clicks is not None:
        prompts = {protocol: clicked}
    elif protocol in configs.EVERY_SLICE:
        spacing = frames.working_spacing(reference.spacing_mm, geometry)
        prompts = protocols.on_every_slice(working, moves, geometry.native_shape, spacing)
    elif labels is not None:
        prompts = protocols.on_foreground(labels, slices, geometry.spacing_mm, classes_of, case.case_id)
    return PreparedCase(
        case,
        slices,
        images,
        labels,
        {name: _to_frame_coordinates(native, geometry) for name, native in prompts.items()},
        geometry,
        reference,
        None if label is None else label.voxels,
        intensities,
    )


def read_label_volume(case: Case, class_map: classes.ClassMap, slice_axis: str = "axial") -> Volume:
    """The case's reference as class indices uint8 ``[D, H, W]``.

    Raises:
        DataError: when there is no label file, it is unusable, or it holds unknown ids.
    """
    if case.label is None:
        raise DataError(f"Case {case.case_id!r} has no label file; add one, or give clicks to predict.")
    volume = image_files.read_labels(case.label, slice_axis)
    return dataclasses.replace(volume, voxels=classes.to_indices(class_map, volume.voxels, case.label))


def _read_channels(
    case: Case, channels: Sequence[str], config: configs.DataConfig, look: bool
) -> tuple[dict[str, np.ndarray], dict[str, tuple[float, ...] | None], Volume]:
    """By channel normalised voxels ``[D, H, W]`` and, to ``look``, raw percentiles; and the first channel's grid."""

    def read(name: str) -> Volume:
        return image_files.read(case.images[name], case.volumes.get(name), config.slice_axis)

    first = read(channels[0])
    # Whoever holds the case needs the grid alone; a broadcast zero takes no memory.
    reference = dataclasses.replace(first, voxels=np.broadcast_to(np.float32(0), first.voxels.shape))
    voxels: dict[str, np.ndarray] = {}
    intensities: dict[str, tuple[float, ...] | None] = {}
    for name in dict.fromkeys(channels):
        path = case.images[name]
        volume = first if name == channels[0] else read(name)
        nifti.same_grid(reference, case.images[channels[0]], volume, path)
        try:
            voxels[name] = intensity.normalise(volume.voxels, config)
        except ValueError as error:
            raise DataError(f"{path} (case {case.case_id!r}) cannot be normalised: {error}; check the file.") from error
        if look:
            intensities[name] = training_domain.percentiles(volume.voxels)
    return voxels, intensities, reference


def _not_black(voxels: Mapping[str, np.ndarray]) -> np.ndarray:
    """The slices in which any channel shows something."""
    return np.flatnonzero(np.any([volume.any(axis=(1, 2)) for volume in voxels.values()], axis=0))


def _slice_images(
    voxels: Mapping[str, np.ndarray], channels: Sequence[str], slices: np.ndarray, adjacent: bool
) -> np.ndarray:
    """``[n, H, W, 3]``: the three channels of each slice, or the slices below, at and above it of the one channel."""
    if not adjacent:
        return np.stack([voxels[name][slices] for name in channels], axis=-1)
    volume = voxels[channels[0]]
    return np.stack([volume[np.clip(slices + step, 0, len(volume) - 1)] for step in (-1, 0, 1)], axis=-1)


def _to_frame_coordinates(native: Prompts, geometry: frames.FrameGeometry) -> Prompts:
    points, boxes = native.points, native.boxes
    if points is not None:
        points = frames.points_to_frame(points, geometry)
    if boxes is not None:
        boxes = frames.points_to_frame(boxes.reshape(-1, 2, 2), geometry).reshape(-1, 4)
    return native._replace(points=points, boxes=boxes)
