"""Images into encoder frames, and mask logits back to the images.

The two conventions are two rows of ``PREPROCESSING``; ``SamConfig.preprocessing`` names the row:

* ``sam``: longest side to S with Pillow's antialiased bilinear filter on the uint8 image, pixel mean and
  standard deviation, then zeros at the bottom and the right (Kirillov et al., "Segment Anything", 2023).
* ``medsam``: stretched to S x S with a cubic spline, cast to uint8, min-max to [0, 1] (Ma et al., "Segment
  anything in medical images", 2024); probabilities, not logits, are resized on the way back.

The frame is square with side S = ``config.image_size``; replace that field for another size.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, UInt8
from PIL import Image
from scipy import ndimage

from calsegx.interfaces import DataError, UsageError
from calsegx.models.sam.presets import SamConfig

Size = tuple[int, int]  # (height, width)


@dataclass(frozen=True)
class Geometry:
    """Where the images of a batch lie in their encoder frames: the way there and back for points and boxes.

    An image starts at the frame's top left corner.  Each axis has its own scale, the ratio of the *rounded* sizes.
    The record of a single image serves any number of rows, so that many prompts can share one image.
    """

    original: tuple[Size, ...]  # (H0, W0) of every image
    resized: tuple[Size, ...]  # (h, w), its size inside the frame
    frame: int  # S

    def to_frame(self, coordinates: Num[Array | np.ndarray, "B ... c"]) -> Float[np.ndarray, "B ... c"]:
        """Points ``[B, ..., 2]`` (x, y) or boxes ``[B, ..., 4]`` (x0, y0, x1, y1) of the images, in frame pixels.

        Raises:
            UsageError: when the last axis is not 2 or 4, or the first is not the number of images.
        """
        return self._scale(coordinates, self.original, self.resized)

    def to_original(self, coordinates: Num[Array | np.ndarray, "B ... c"]) -> Float[np.ndarray, "B ... c"]:
        """The inverse of ``to_frame``: frame pixels to pixels of the images.  Nothing is rounded or clipped.

        Raises:
            UsageError: as ``to_frame``.
        """
        return self._scale(coordinates, self.resized, self.original)

    def _scale(self, coordinates: Any, source: tuple[Size, ...], target: tuple[Size, ...]) -> np.ndarray:
        values = np.asarray(coordinates, np.float64)  # float32 would lose 1e-4 pixels on the round trip
        count = len(self.original)
        if values.ndim < 2 or values.shape[-1] not in (2, 4) or count not in (1, values.shape[0]):
            raise UsageError(
                f"Coordinates of shape {values.shape} do not belong to {count} image(s); give points [B, ..., 2] as "
                f"(x, y) or boxes [B, ..., 4] as (x0, y0, x1, y1) with B = {count}."
            )
        per_axis = (np.asarray(target) / np.asarray(source))[:, ::-1]  # [B, (x, y)]
        factors = np.tile(per_axis, values.shape[-1] // 2)
        return values * factors.reshape(count, *[1] * (values.ndim - 2), -1)


class Preset(NamedTuple):
    """One convention: the size an image gets in the frame, the values it gets there, and the way back of logits."""

    resized: Callable[[Size, int], Size]  # (H0, W0), S -> (h, w)
    values: Callable[[SamConfig, np.ndarray, Size], np.ndarray]  # config, rgb [H0, W0, 3], (h, w) -> [h, w, 3]
    restore: Callable[[Array, Size, Size, int], Array]  # logits, (H0, W0), (h, w), S -> [B, M, H0, W0]


def preprocess(
    config: SamConfig, rgb: UInt8[np.ndarray, "H0 W0 3"] | Sequence[UInt8[np.ndarray, "H0 W0 3"]]
) -> tuple[Float[np.ndarray, "B S S 3"], Geometry]:
    """Images as float32 encoder frames, and the geometry of the way back.

    Args:
        config: ``preprocessing`` names the convention, ``image_size`` is S.
        rgb: one uint8 image or a list of them, of any sizes; channels red, green, blue in 0..255.

    Raises:
        DataError: for an image that is not uint8 ``[H0, W0, 3]``, is empty, or is so elongated that its short side
            rounds to nothing.
        UsageError: for an unknown convention or an empty list.
    """
    preset = _preset(config)
    images: list[Any] = list(rgb) if isinstance(rgb, list | tuple) else [rgb]
    if not images:
        raise UsageError("The list of images is empty; give at least one uint8 image [H0, W0, 3].")
    side = config.image_size
    for index, image in enumerate(images):
        _check(image, index)
        if min(preset.resized(image.shape[:2], side)) < 1:
            raise DataError(
                f"Image {index} is {image.shape[0]} x {image.shape[1]} pixels, too elongated: its short side rounds to "
                f"0 of the frame's {side} pixels; crop it into less elongated pieces."
            )

    original = tuple((int(image.shape[0]), int(image.shape[1])) for image in images)
    resized = tuple(preset.resized(size, side) for size in original)
    frames = np.zeros((len(images), side, side, 3), np.float32)
    for frame, image, (height, width) in zip(frames, images, resized, strict=True):
        frame[:height, :width] = preset.values(config, image, (height, width))
    return frames, Geometry(original, resized, side)


def postprocess(
    config: SamConfig, logits: Float[Array, "B *N M h w"], geometry: Geometry
) -> Float[Array, "B *N M H0 W0"] | list[Float[Array, "*N M H0 W0"]]:
    """Mask logits at the original size; ``> 0`` is the mask in every convention.

    ``sam``: bilinear (no antialiasing) to S x S, cropped to the resized size, bilinear to the original size.
    ``medsam``: probabilities are resized, bilinear from the square to the original size; their logits are returned.

    Args:
        config: as given to ``preprocess``.
        logits: the decoder's, low resolution; for a single image B may be any number of prompts.  ``[B, N, M, h, w]``,
            N groups of prompts per image, works too and keeps its axes.
        geometry: from ``preprocess``.

    Returns:
        One array where all images have one size, otherwise a list with one array per image.

    Raises:
        UsageError: for an unknown convention, or logits that do not belong to the geometry.
    """
    restore = _preset(config).restore
    count = len(geometry.original)
    if logits.ndim == 5 and count in (1, logits.shape[0]):
        masks = postprocess(config, logits.reshape(logits.shape[0], -1, *logits.shape[3:]), geometry)
        groups = logits.shape[1:3]
        if isinstance(masks, list):
            return [mask.reshape(*groups, *mask.shape[1:]) for mask in masks]
        return masks.reshape(*masks.shape[:1], *groups, *masks.shape[2:])
    if logits.ndim != 4 or logits.shape[2] != logits.shape[3] or count not in (1, logits.shape[0]):
        raise UsageError(
            f"Logits of shape {tuple(logits.shape)} do not belong to the square frames of {count} image(s); expected "
            f"[{count}, M, 4h, 4h], the output of decode."
        )
    if len(set(geometry.original)) == 1:
        return restore(logits, geometry.original[0], geometry.resized[0], geometry.frame)
    sizes = zip(geometry.original, geometry.resized, strict=True)
    return [restore(logits[i : i + 1], *size, geometry.frame)[0] for i, size in enumerate(sizes)]


def _preset(config: SamConfig) -> Preset:
    if config.preprocessing not in PREPROCESSING:
        known = ", ".join(sorted(PREPROCESSING))
        raise UsageError(f"There is no preprocessing named {config.preprocessing!r} (SamConfig); known: {known}.")
    return PREPROCESSING[config.preprocessing]


def _check(image: Any, index: int) -> None:
    where = f"Image {index}"
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        kind = getattr(image, "dtype", type(image).__name__)
        raise DataError(f"{where} is {kind}; expected a numpy uint8 array: scale it to 0..255, round, and cast it.")
    if image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 1):
        raise DataError(
            f"{where} is grey, shape {image.shape}; expected [H0, W0, 3]: repeat its channel with "
            "np.repeat(grey.reshape(*grey.shape[:2], 1), 3, axis=2)."
        )
    if image.ndim != 3 or image.shape[2] != 3:
        raise DataError(
            f"{where} has shape {image.shape}; expected [H0, W0, 3], red, green, blue: drop an alpha channel, and give "
            "several images as a list."
        )
    if image.size == 0:
        raise DataError(f"{where} is empty, shape {image.shape}; expected at least one pixel: check its crop.")


# ---------------------------------------------------------------------------------------------- the sam convention


def longest_side(size: Size, side: int) -> Size:
    """The size whose longest side is ``side``: ``int(x * scale + 0.5)`` per axis, as Meta rounds."""
    scale = side / max(size)
    return int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)


def _normalised(config: SamConfig, rgb: np.ndarray, size: Size) -> np.ndarray:
    # Pillow, not jax.image.resize: the model was trained on its fixed-point rounding.  (Which of the two passes comes
    # first depends on Pillow's version for some portrait images; that moves single values by one grey level.)
    resized = Image.fromarray(rgb).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    mean, std = (np.asarray(per_channel, np.float32) for per_channel in (config.pixel_mean, config.pixel_std))
    return (np.asarray(resized, np.float32) - mean) / std


def _restore_logits(logits: Array, original: Size, resized: Size, frame: int) -> Array:
    # Both resizes and the crop between them are linear and act on each axis alone: one matrix per axis does all,
    # and the S x S logits are never in memory.
    rows, columns = (_two_steps(logits.shape[2 + axis], frame, resized[axis], original[axis]) for axis in range(2))
    return _resize(logits, rows, columns)


@functools.lru_cache(maxsize=64)
def _two_steps(low: int, frame: int, resized: int, original: int) -> np.ndarray:
    return _bilinear(resized, original) @ _bilinear(low, frame)[:resized]


# ------------------------------------------------------------------------------------------- the medsam convention


def _square(_: Size, side: int) -> Size:
    return side, side


def _min_max(config: SamConfig, rgb: np.ndarray, size: Size) -> np.ndarray:
    del config  # no mean and no standard deviation
    # Truncation as in MedSAM; 1e-6 keeps the spline's rounding noise from turning a grey level of 42 into 41.
    grey_levels = np.floor(spline_resize(rgb, size) + 1e-6)
    low, high = grey_levels.min(), grey_levels.max()
    return (grey_levels - low) / max(high - low, 1.0)  # a constant image becomes 0


def spline_resize(rgb: Num[np.ndarray, "H W C"], size: Size) -> Float[np.ndarray, "h w C"]:
    """Cubic spline with a Gaussian against aliasing: scikit-image's ``resize(order=3, anti_aliasing=True)``.

    Sigma is ``max(0, (f - 1) / 2)`` pixels for a shrink by f, the border is mirrored, and the result is clipped to the
    range of the image.  An image that has the size already is returned as it is.

    Returns:
        float64, in the image's own units.
    """
    image = rgb.astype(np.float64)
    if image.shape[:2] == size:
        return image
    factors = np.asarray(image.shape[:2]) / np.asarray(size)
    sigma = np.maximum(0, (factors - 1) / 2)
    channels = []
    for channel in np.moveaxis(image, -1, 0):  # a third axis would cost four times the taps for nothing
        smooth = ndimage.gaussian_filter(channel, sigma, mode="mirror")
        channels.append(ndimage.zoom(smooth, 1 / factors, order=3, mode="mirror", grid_mode=True))
    return np.clip(np.stack(channels, axis=-1), image.min(), image.max())


def _restore_probabilities(logits: Array, original: Size, resized: Size, frame: int) -> Array:
    del resized, frame  # the whole square is resized at once
    rows, columns = (_bilinear(logits.shape[2 + axis], original[axis]) for axis in range(2))
    inside = _resize(jax.nn.sigmoid(logits), rows, columns)
    outside = _resize(jax.nn.sigmoid(-logits), rows, columns)  # 1 - inside, without the cancellation
    tiny = jnp.finfo(inside.dtype).tiny
    return jnp.log(jnp.maximum(inside, tiny)) - jnp.log(jnp.maximum(outside, tiny))


# --------------------------------------------------------------------------------------------------------- shared


def _bilinear(size_in: int, size_out: int) -> np.ndarray:
    """Weights ``[out, in]`` of a bilinear resize of one axis: pixel centres at halves, no antialiasing."""
    half = np.float32(0.5)  # positions in float32, as PyTorch has them: masks differ by 4e-5 otherwise
    centres = (np.arange(size_out, dtype=np.float32) + half) * np.float32(size_in / size_out) - half
    distance = np.clip(centres, 0, size_in - 1)[:, None] - np.arange(size_in, dtype=np.float32)
    return np.maximum(0, 1 - np.abs(distance))


@jax.jit
def _resize(values: Array, rows: Array, columns: Array) -> Array:
    dtype = jnp.promote_types(values.dtype, jnp.float32)
    values, rows, columns = (x.astype(dtype) for x in (values, rows, columns))
    return jnp.einsum("bmhw,Hh,Ww->bmHW", values, rows, columns, precision=jax.lax.Precision.HIGHEST)


PREPROCESSING: Mapping[str, Preset] = {
    "sam": Preset(longest_side, _normalised, _restore_logits),
    "medsam": Preset(_square, _min_max, _restore_probabilities),
}
