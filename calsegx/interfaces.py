"""Records and protocols that cross folders.

Axes, always in this order: ``B`` batch, ``D`` slice, ``H`` row, ``W`` column, ``C`` channel, ``K`` class,
``N`` point.  Spatial data is channels-last.  This file imports neither jax nor nibabel.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

Array = Any  # a numpy or a jax array
Params = Mapping[str, Any]  # a nested dict of arrays
# (path of a part of the parameters, the part, the array it is about to be used with) -> the part, whole
Whole = Callable[[tuple[str, ...], Any, Array], Any]


class InputError(Exception):
    """Something the user gave cannot be used.

    The message is one sentence a user can act on: what is wrong, where (file, case, flag), what was expected and
    what to do.  Launch scripts print it without a traceback and exit with ``exit_code``.
    """

    exit_code = 1


class UsageError(InputError):
    """A flag or option has an unusable value (exit code 2)."""

    exit_code = 2


class DataError(InputError):
    """A file or dataset is invalid (exit code 3)."""

    exit_code = 3


@dataclass(frozen=True)
class Volume:
    """A scalar volume in the working orientation, and what the way back to its file needs.

    The working orientation is ``SPL`` for axial slices: ``D`` runs from inferior to Superior, ``H`` from anterior to
    Posterior and ``W`` from the patient's right to Left, so a slice ``voxels[d]`` shown with row 0 on top is the
    radiological view.  Coronal and sagittal slices: ``nifti.WORKING_AXES``.
    """

    voxels: np.ndarray  # [D, H, W]
    affine: np.ndarray  # [4, 4], working-orientation indices (d, h, w, 1) -> RAS+ millimetres
    spacing_mm: tuple[float, float, float]  # (D, H, W)
    orientation: np.ndarray  # [3, 2] nibabel orientation transform: file axes -> working axes
    header: Any  # a NIfTI file's nibabel header (shape, sform/qform and their codes, units), or pictures.PictureHeader

    @property
    def voxel_ml(self) -> float:
        """The volume of one voxel in millilitres, also where the axes are sheared."""
        return abs(float(np.linalg.det(self.affine[:3, :3]))) / 1000


@dataclass(frozen=True)
class Case:
    """One examination: its image files by channel name, its label file, and where it comes from."""

    case_id: str
    subject_id: str
    images: Mapping[str, Path]  # channel name -> file
    label: Path | None
    split: str  # "train", "val", "test" or "" (not assigned)
    centre: str = ""
    scanner: str = ""
    field_strength: str = ""
    # channel name -> which volume of a 4-D file, or which colour of a picture, counted from 0; an absent channel's file
    # holds one
    volumes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Dataset:
    """What a layout reader found in a folder."""

    root: Path
    cases: tuple[Case, ...]
    channels: tuple[str, ...]  # channel names, in the dataset's own order
    labels: Mapping[str, int]  # label name -> id in the files; "background" is 0; empty when not declared
    default_classes: str = ""  # what --config.data.classes is where it is empty; empty: every label is a class


class Prompts(NamedTuple):
    """SAM prompts for a batch of images, one group of prompts (one mask decoder call) per image.

    Coordinates are ``(x, y)`` pixels of the encoder frame, as in Meta's model.  Point labels: 1 foreground,
    0 background, -1 padding (no point).  ``None`` means that this kind of prompt is not given.
    """

    points: Array | None = None  # [B, N, 2]
    labels: Array | None = None  # [B, N]
    boxes: Array | None = None  # [B, 4], (x0, y0, x1, y1)
    masks: Array | None = None  # [B, 4h, 4w, 1] logits of an earlier prediction

    def map(self, function: Callable[..., Array], *others: "Prompts") -> "Prompts":
        """``function(values, *those of others)`` of every field that is given here."""
        fields = zip(self, *others, strict=True)
        return Prompts(*(None if values[0] is None else function(*values) for values in fields))


class Batch(NamedTuple):
    """What one training step sees."""

    features: Array  # [B, h, w, C], frozen encoder output, bfloat16 or float32
    labels: Array  # [B, Hl, Wl] int32 class indices 0..K at the decoder's resolution (0 = background)
    prompts: Prompts


class Loss(Protocol):
    """A loss: one value per sample.

    ``logits`` are ``[B, *spatial, L]``; ``L = 1`` is a sigmoid (one foreground class), ``L >= 2`` a softmax whose
    channel 0 is the background.  ``labels`` are integer ``[B, *spatial]``.  Options are keyword-only.
    """

    def __call__(self, logits: Array, labels: Array, /) -> Array:  # noqa: D102
        ...


@dataclass(frozen=True)
class Backbone:
    """A promptable network split into a frozen encoder and a trainable decoder, as pure functions.

    ``encoder`` and ``frozen`` are never differentiated.  They are apart because training on cached features needs
    ``frozen`` alone on the device: SAM's largest encoder is 2.5 GB, the rest of it 16 MB.

    What is compiled of a function is kept for as long as a process uses it: give the same function for the same kind of
    network, never one that holds parameters.
    """

    name: str
    fingerprint: str  # SHA-256 of weights and configuration; part of the feature cache's signature
    image_size: int  # S: the encoder frame is S x S pixels
    feature_shape: tuple[int, int, int]  # (h, w, C)
    logit_shape: tuple[int, int]  # (Hl, Wl)
    pixel_mean: tuple[float, float, float]  # of 0..255 images; the frame is padded after normalisation
    pixel_std: tuple[float, float, float]
    encoder: Params  # what encode needs
    frozen: Params  # what decode and zero_shot need and is not trained, e.g. the prompt encoder
    trainable: Params  # the decoder's initial parameters for the run's number of classes
    encode: Callable[[Params, Array], Array]  # (encoder, images [B, S, S, 3] normalised) -> [B, h, w, C]
    decode: Callable[[Params, Params, Array, Prompts], Array]  # (trainable, frozen, z, prompts) -> [B, Hl, Wl, L]
    zero_shot: Callable[[Params, Array, Prompts], Array] | None = None  # (frozen, z, prompts) -> [B, Hl, Wl, 1]
    # encode for an encoder whose parameters are stored in parts: it calls Whole for every part when its turn comes
    encode_in_parts: Callable[[Params, Array, Whole], Array] | None = None
