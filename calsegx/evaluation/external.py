"""Another tool's predictions, nnU-Net's for example, as foreground probabilities that are scored like our own.

Of every case the first of these that its folder holds is read:

1. ``CASE.npz``: nnU-Net's ``--save_probabilities``, the array ``probabilities`` (v1: ``softmax``) ``[C, z, y, x]``, the
   axes of the image files in reverse; those of RAS+ where ``plans.json`` beside it names a reader that reorients;
2. ``CASE_prob-CLASS.nii.gz``, ``.nii`` or ``.png`` (16 bits, 65535 is 1): one map for every class, as
   ``launch.predict`` writes them;
3. ``CASE.nii.gz`` or ``.nii`` with several volumes: probabilities, one volume for each channel;
4. ``CASE.nii.gz``, ``.nii`` or ``.png``: a mask of the dataset's label ids.  Every voxel counts as certain (0 or 1).

``dataset.json`` in the folder, which nnU-Net writes beside its predictions, says what the channels are: a softmax over
label ids, or a sigmoid for each region.  Without it their number says it: a softmax over all label ids of the dataset
in ascending order, a softmax over background and classes, or a sigmoid for each class.
Format: github.com/MIC-DKFZ/nnUNet, ``inference/export_prediction.py`` and ``utilities/label_handling``.
"""

import functools
import glob
import hashlib
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nibabel import orientations

from calsegx.data import classes, images, nifti, pictures
from calsegx.data.layouts import nnunet_v2
from calsegx.evaluation import methods
from calsegx.interfaces import Case, DataError, UsageError, Volume

SUM_TOLERANCE = 1e-3  # of a softmax: nnU-Net has saved float16
NPZ, MAPS, VOLUMES = "probabilities (.npz)", "probability maps of classes", "4-D probabilities"
MASKS = "masks, certain of every voxel"
_KEYS = ("probabilities", "softmax")  # of nnU-Net v2 and v1
_NAME = re.compile(r"[^\W_][\w .()-]*")
_NAMED = 12  # of missing cases
_DESCRIPTION, _PLANS = "dataset.json", "plans.json"


@dataclass(frozen=True)
class Survey:
    """What a folder holds for the cases of an evaluation."""

    method: str
    folder: str  # its name alone
    kinds: Mapping[str, int]  # kind of file -> cases
    sha256: str  # over names and contents of all files that are read

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} cases of {kind}" for kind, count in self.kinds.items())
        return f"{self.method}: {kinds} from the folder {self.folder}, SHA-256 {self.sha256[:12]}"


@dataclass(frozen=True)
class Predictions:
    """A folder of another tool's predictions, named by case id."""

    method: str  # what the tool is called
    folder: Path
    class_map: classes.ClassMap
    slice_axis: str

    def survey(self, cases: Sequence[Case]) -> Survey:
        """Read every case's prediction once, so that nothing is refused in the middle of the evaluation.

        Raises:
            DataError: for cases without a prediction, with their ids, and as ``read``.
        """
        found = [self._files(case) for case in cases]
        missing = [case.case_id for case, (_, paths) in zip(cases, found, strict=True) if not paths]
        if missing:
            more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
            raise DataError(
                f"{self.folder} ({self.method}) has no prediction of {len(missing)} of {len(cases)} test cases: "
                f"{', '.join(missing[:_NAMED])}{more}; expected CASE.npz, CASE_prob-CLASS.nii.gz or CASE.nii.gz, named "
                "by case id."
            )
        for case in cases:
            self.read(case)
        paths = [path for name in (_DESCRIPTION, _PLANS) if (path := self.folder / name).is_file()]
        paths += [path for _, own in found for path in own]
        digest = hashlib.sha256()
        for path in paths:
            with path.open("rb") as stream:
                digest.update(f"{path.name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
        return Survey(self.method, self.folder.name, dict(Counter(kind for kind, _ in found)), digest.hexdigest())

    def read(self, case: Case) -> np.ndarray:
        """Foreground probabilities float32 ``[D, H, W, K]`` on the grid of the case's labels, 0..1.

        Raises:
            DataError: for a damaged file, another grid than the labels', other channels than the classes need, and
                values that are no probabilities.
        """
        kind, paths = self._files(case)
        own = [frozenset(ids) for ids in self.class_map.ids]
        if kind == NPZ:
            return self._of_channels(paths[0], self._read_npz(case, paths[0]))
        if kind == MAPS:
            return self._of_classes(
                paths[0], self._read_volumes(case, [(path, None) for path in paths]), own, False, named=True
            )
        if kind == VOLUMES:
            count = images.count_volumes(paths[0])
            return self._of_channels(paths[0], self._read_volumes(case, [(paths[0], i) for i in range(count)]))
        volume = images.read_labels(paths[0], self.slice_axis)
        nifti.same_grid(*self._reference(case), volume, paths[0])
        indices = classes.to_indices(self.class_map, volume.voxels, paths[0])
        return (indices[..., None] == np.arange(1, len(own) + 1)).astype(np.float32)

    def _files(self, case: Case) -> tuple[str, list[Path]]:
        """What kind of prediction a case has, and its files; none where it has no prediction."""
        path = self.folder / f"{case.case_id}.npz"
        if path.is_file():
            return NPZ, [path]
        for ending in images.ENDINGS:
            found = sorted(self.folder.glob(f"{glob.escape(case.case_id)}_prob-*{ending}"))
            maps = [self.folder / f"{case.case_id}_prob-{name}{ending}" for name in self.class_map.names]
            absent = [path.name for path in maps if path not in found]
            if not absent:
                return MAPS, maps
            if found:
                raise DataError(
                    f"{self.folder} holds {found[0].name} of case {case.case_id!r}, but not {', '.join(absent)}; add "
                    "the map of every class, or move the maps away."
                )
        for path in (self.folder / f"{case.case_id}{ending}" for ending in images.ENDINGS):
            if path.is_file():
                several = path.name.endswith(nifti.ENDINGS) and images.count_volumes(path) > 1
                return VOLUMES if several else MASKS, [path]
        return "", []

    def _read_npz(self, case: Case, path: Path) -> np.ndarray:
        """``[C, D, H, W]`` of nnU-Net's file, which knows no affine: its axes are those of the image."""
        array = _load_npz(path)
        image = next(iter(case.images.values()))
        reference = images.read_reference(image, self.slice_axis)
        transform, axes = reference.orientation, "the file's axes"
        if self._reoriented:
            target = orientations.axcodes2ornt(nifti.WORKING_AXES[self.slice_axis])
            transform = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), target)
            axes = f"in RAS+ ({_PLANS} names a reader that reorients)"
        expected = tuple(reference.voxels.shape[int(axis)] for axis in transform[::-1, 0])
        if array.shape[1:] != expected:
            raise DataError(
                f"{path} has the shape {array.shape}; expected channels and {expected}, the voxels of {image.name} "
                f"along z, y and x, {axes}; save probabilities of the whole image (nnU-Net v1 crops them: give its "
                "masks)."
            )
        return np.stack([orientations.apply_orientation(values.T, transform) for values in array])

    def _read_volumes(self, case: Case, parts: Sequence[tuple[Path, int | None]]) -> np.ndarray:
        """``[C, D, H, W]`` of files, or of the volumes of one."""
        reference, found = self._reference(case), []
        for path, number in parts:
            picture = path.suffix == pictures.ENDING
            volume = pictures.read_probabilities(path) if picture else nifti.read(path, number, self.slice_axis)
            nifti.same_grid(*reference, volume, path)
            found.append(volume.voxels)
        return np.stack(found)

    def _reference(self, case: Case) -> tuple[Volume, Path]:
        """The labels, on whose grid a prediction must lie, and their file."""
        if case.label is None:
            raise DataError(f"Case {case.case_id!r} has no label file to score a prediction with; add one.")
        return images.read_reference(case.label, self.slice_axis), case.label

    def _of_channels(self, path: Path, channels: np.ndarray) -> np.ndarray:
        """Classes from a tool's channels, see the head of this file."""
        count, own = len(channels), [frozenset(ids) for ids in self.class_map.ids]
        every = [frozenset([value]) for value in sorted(self.class_map.known)]
        background = frozenset([0])
        if self._described is not None:
            sets, softmax = self._described
            if count != len(sets):
                raise DataError(
                    f"{path} has {count} channels, but {_DESCRIPTION} beside it describes {len(sets)}; put the "
                    f"{_DESCRIPTION} of the training there, or remove it."
                )
            return self._of_classes(path, channels, sets, softmax)
        for sets, softmax in ((every, True), ([background, *own], True), (own, False)):
            if count == len(sets):
                return self._of_classes(path, channels, sets, softmax)
        raise DataError(
            f"{path} has {count} channels; expected {len(every)} (the dataset's label ids), {len(own) + 1} (background "
            f"and classes) or {len(own)} (classes); otherwise put the {_DESCRIPTION} of its training beside it."
        )

    def _of_classes(
        self, path: Path, channels: np.ndarray, sets: Sequence[frozenset[int]], softmax: bool, named: bool = False
    ) -> np.ndarray:
        """``[D, H, W, K]`` from ``channels [C, D, H, W]`` whose label ids are ``sets``, checked.

        Channels of a softmax add up to a class; one of regions, which overlap, must be the class itself.  Where files
        are ``named`` by their class, all may be 0: a case without foreground.
        """
        if not np.isfinite(channels).all():
            raise DataError(f"{path} has {(~np.isfinite(channels)).sum()} values that are no number; predict it again.")
        if channels.min() < -SUM_TOLERANCE or channels.max() > 1 + SUM_TOLERANCE:
            raise DataError(
                f"{path} has values from {channels.min():.4g} to {channels.max():.4g}; expected probabilities from 0 "
                "to 1: apply softmax or sigmoid to logits."
            )
        channels = np.clip(channels, 0, 1)
        if not named and not channels.any():
            raise DataError(f"{path} is 0 in every channel and voxel, which no prediction is; predict it again.")
        # Older nnU-Net v2 leaves zeros in all channels outside the region it cropped to.
        total = channels.sum(axis=0)
        excess = np.abs(total - 1)[total > 0].max(initial=0)
        if not named and not softmax and len(sets) > 1 and self._described is None and excess <= SUM_TOLERANCE:
            raise DataError(
                f"{path} has a channel for each class, which sum to 1 everywhere, so that one may be the background; "
                f"put the {_DESCRIPTION} of its training beside it."
            )
        if softmax and excess > SUM_TOLERANCE:
            raise DataError(
                f"{path}: its channels sum to 1 only within {excess:.2g}, expected {SUM_TOLERANCE:g}; save the softmax "
                f"of all channels, or describe regions in {_DESCRIPTION} beside it."
            )
        found = []
        for name, ids in zip(self.class_map.names, map(frozenset, self.class_map.ids), strict=True):
            chosen = [i for i, own in enumerate(sets) if (own <= ids if softmax else own == ids)]
            if frozenset[int]().union(*(sets[i] for i in chosen)) != ids:
                listed = ", ".join("+".join(map(str, sorted(own))) for own in sets)
                raise DataError(
                    f"{path} has channels of the label ids {listed}, of which the class {name} = "
                    f"{'+'.join(map(str, ids))} cannot be made; choose other classes with {classes.FLAG}, or correct "
                    f"{_DESCRIPTION} beside it."
                )
            found.append(np.minimum(channels[chosen].sum(axis=0), 1))  # float16 rounds
        result = np.stack(found, axis=-1).astype(np.float32, copy=False)
        largest = result.sum(axis=-1).max(initial=0)
        if largest > 1 + SUM_TOLERANCE:
            raise DataError(
                f"{path}: the probabilities of the classes {', '.join(self.class_map.names)} sum to {largest:.4g} in a "
                "voxel, though classes exclude each other; give masks, or evaluate each class alone."
            )
        return result

    @functools.cached_property
    def _described(self) -> tuple[list[frozenset[int]], bool] | None:
        """Label ids of each channel by ``dataset.json``, and whether they are a softmax; None without that file."""
        path = self.folder / _DESCRIPTION
        if not path.is_file():
            return None
        labels = nnunet_v2.read_description(path).get("labels")
        named = labels if isinstance(labels, dict) else {}
        values = [v if isinstance(v, list) else [v] for n, v in named.items() if n != "ignore"]
        if not values or not all(ids and all(type(one) is int for one in ids) for ids in values):
            raise DataError(f"{path}: labels is {labels!r}; expected name: id or list of ids, as nnU-Net v2 writes it.")
        softmax = all(len(ids) == 1 for ids in values)
        if softmax:
            return sorted((frozenset(ids) for ids in values), key=min), True
        return [frozenset(ids) for ids in values if set(ids) != {0}], False

    @functools.cached_property
    def _reoriented(self) -> bool:
        """Whether nnU-Net read the images in RAS+ (``NibabelIOWithReorient``, ``SimpleITKIOWithReorient``)."""
        path = self.folder / _PLANS
        plans = nnunet_v2.read_description(path) if path.is_file() else {}
        return str(plans.get("image_reader_writer", "")).endswith("WithReorient")


def parse(given: Sequence[str]) -> dict[str, Path]:
    """``["NAME=FOLDER", ...]`` of ``--external``, as name -> folder.

    Raises:
        UsageError: for another form, a name twice, and as ``check``.
    """
    found: dict[str, Path] = {}
    for text in given:
        name, equals, folder = (part.strip() for part in text.partition("="))
        if not (name and equals and folder):
            raise UsageError(f"--external={text!r}: expected NAME=FOLDER, for example nnU-Net=predictions/nnunet.")
        if name in found:
            raise UsageError(f"--external names {name!r} twice; give each folder a name of its own.")
        found[name] = Path(folder)
    check(found)
    return found


def check(given: Mapping[str, Path]) -> None:
    """Names that can stand beside our methods, and folders that are there.

    Raises:
        UsageError: for an unusable name, that of a method of ours, or a folder that does not exist.
    """
    known = {name.casefold() for method in methods.KNOWN for name in (method, methods.display(method))}
    for name, folder in given.items():
        if not _NAME.fullmatch(name):
            raise UsageError(f"External predictions {name!r}: use letters, digits, space and ._()- in the name.")
        if name.casefold() in known:
            raise UsageError(f"External predictions {name!r}: that is the name of a method here; give another one.")
        if not folder.is_dir():
            raise UsageError(f"External predictions {name!r}: there is no folder {folder}; check the path.")


def _load_npz(path: Path) -> np.ndarray:
    """float32 ``[C, z, y, x]``."""
    try:
        with path.open("rb") as stream, np.lib.npyio.NpzFile(stream, allow_pickle=False) as content:
            key = next((key for key in _KEYS if key in content), None)
            if key is None:
                raise DataError(
                    f"{path} holds {', '.join(content) or 'nothing'}; expected the array {' or '.join(_KEYS)}, as "
                    "nnU-Net saves it."
                )
            array = content[key]
    except (OSError, ValueError, EOFError, MemoryError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read ({error}); copy it again.") from error
    if not isinstance(array, np.ndarray) or array.ndim != 4 or not array.size or array.dtype.kind not in "fiu":
        found = f"the shape {array.shape} and type {array.dtype}" if isinstance(array, np.ndarray) else "no array"
        raise DataError(f"{path}: {key} has {found}; expected numbers [channels, z, y, x].")
    return array.astype(np.float32, copy=False)
