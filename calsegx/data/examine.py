"""One case's files, read to the last byte: what they hold, what is wrong with them and what is odd."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
from nibabel import affines

from calsegx import configs
from calsegx.data import classes, images, intensity, nifti
from calsegx.interfaces import Case, DataError, Volume

LABEL = "label"  # roles of files: this, and image:<channel>, as the columns of cases.tsv
SAME_MM = 1e-4  # corners nearer than this differ by the rounding of float32 alone
ANISOTROPIC = 2.0  # longest over shortest voxel side, from which the slice axis matters
PLAUSIBLE_MM = (0.05, 20.0)  # voxel sides outside of it are a wrong unit rather than a scan
OBLIQUE_DEGREES = 0.5
SHEARED = 1e-3  # cosine between two voxel axes
MOST_LABEL_IDS = 16  # an image with no more different values, all of them whole numbers, looks like a label
_EXACT_IN_FLOAT32 = 2**24
_SAMPLE = 4096  # voxels that say whether counting all values is worth it


class Finding(NamedTuple):
    """One thing that was found; ``case_id`` and ``file`` are empty where it concerns the whole dataset."""

    level: str  # error: cannot be used; warning: probably not what was meant; note: good to know
    check: str  # short name of the check
    case_id: str
    file: str
    message: str  # one sentence with the remedy


class Contents(NamedTuple):
    """What one file holds."""

    file: str
    shape: tuple[int, ...]  # slices, rows, columns (working orientation)
    spacing_mm: tuple[float, ...]  # of the same axes
    orientation: str  # of the file's own axes, e.g. LPS
    sha256: str  # of the decoded voxels (float32, working orientation) and the shape, whatever the file's ending
    constant: bool  # every voxel has one value: says nothing about where it comes from
    ids: Mapping[int, float]  # of a label: millilitres by id; empty for an image


@dataclass(frozen=True)
class Examined:
    """A case: its files by role, as far as they can be read, and the findings."""

    case: Case
    files: Mapping[str, Contents]
    findings: tuple[Finding, ...]


def roles(case: Case) -> dict[str, Path]:
    """The case's files by role, images first."""
    files = {f"image:{channel}": path for channel, path in case.images.items()}
    return files | ({LABEL: case.label} if case.label else {})


def examine(case: Case, labels: Mapping[str, int]) -> Examined:
    """Read every byte of the case's files and check each file, and their grids against the first image's.

    Args:
        case: its files need not exist.
        labels: name -> id as the dataset declares them; empty: ids are not checked.
    """
    files: dict[str, Contents] = {}
    findings: list[Finding] = []
    first: tuple[Volume, Path] | None = None
    for role, path in roles(case).items():

        def say(level: str, check: str, message: str, path: Path = path) -> None:
            findings.append(Finding(level, check, case.case_id, str(path), message))

        try:
            index = case.volumes.get(role.removeprefix("image:"))
            volume = images.read_labels(path) if role == LABEL else images.read(path, index)
        except DataError as error:
            say("error", "file", str(error))
            continue
        except OSError as error:  # a folder that may not be entered, a drive that has gone
            say("error", "file", f"{path} cannot be read ({error.strerror}); check permissions and the drive.")
            continue
        files[role] = _contents(path, volume, role == LABEL)
        _check_twin(path, say)
        _check_header(path, volume, say)
        if role == LABEL:
            _check_label(path, files[role].ids, labels, say)
        else:
            _check_image(path, volume.voxels, say)
        if first is None:
            first = volume, path
            _check_axes(path, volume, say)
        else:
            _check_grid(first, path, volume, say)
    return Examined(case, files, tuple(findings))


Say = Callable[[str, str, str], None]  # level, check, message


def absent(labels: Mapping[str, int], ids: Collection[int]) -> list[str]:
    """The names of the classes that are not among the label ids."""
    return [name for name, value in labels.items() if value and value not in ids]


def _contents(path: Path, volume: Volume, label: bool) -> Contents:
    voxels = volume.voxels
    ids: dict[int, float] = {}
    if label:
        values, counts = np.unique(voxels, return_counts=True)
        ids = {int(value): int(count) * volume.voxel_ml for value, count in zip(values, counts, strict=True)}
    return Contents(
        file=str(path),
        shape=voxels.shape,
        spacing_mm=volume.spacing_mm,
        orientation="".join(_file_axes(volume)),
        sha256=images.voxels_sha256(voxels),
        constant=bool(voxels.min() == voxels.max()),
        ids=ids,
    )


def _file_axes(volume: Volume) -> Iterator[str]:
    """The directions of the file's own axes: the working ones (S, P, L), or their opposites."""
    for target, flip in volume.orientation.astype(int):
        yield nifti.WORKING_AXES["axial"][target] if flip == 1 else "IAR"[target]


def _check_twin(path: Path, say: Say) -> None:
    """The same case a second time, compressed or not."""
    twin = path.with_suffix("") if path.name.endswith(".nii.gz") else path.with_name(path.name + ".gz")
    if path.name.endswith(nifti.ENDINGS) and twin.exists():
        say("warning", "twice", f"{path} is used, but {twin.name} stands beside it; remove one of them.")


def _check_grid(first: tuple[Volume, Path], path: Path, volume: Volume, say: Say) -> None:
    """Same: nothing; within tolerance: a note; different: an error."""
    try:
        distance = nifti.same_grid(*first, volume, path)
    except DataError as error:
        say("error", "geometry", str(error))
        return
    if distance > SAME_MM:
        say(
            "note",
            "geometry",
            f"{path} lies up to {distance:.2g} mm apart from {first[1].name}, within the tolerance of "
            f"{nifti.GRID_TOLERANCE_MM} mm; the grid of {first[1].name} is used.",
        )


def _check_axes(path: Path, volume: Volume, say: Say) -> None:
    """Slices: how many, how thick, along which axis; of the first image, since the others have its grid."""
    names = configs.SLICE_AXES
    thinnest, thickest = min(volume.spacing_mm), max(volume.spacing_mm)
    axis = int(np.argmax(volume.spacing_mm))
    flat = [name for name, size in zip(names, volume.voxels.shape, strict=True) if size == 1]
    sizes = " x ".join(f"{side:.3g}" for side in volume.spacing_mm)
    if flat:
        along = flat[0]
        say(
            "note" if along == names[0] else "warning",
            "slices",
            f"{path} is a single {along} slice" + (_advice(along) if along != names[0] else "; it is segmented alone."),
        )
    elif thickest >= ANISOTROPIC * thinnest:
        say(
            "note" if axis == 0 else "warning",
            "slices",
            f"{path} has voxels of {sizes} mm (slice, row, column): its {names[axis]} slices are "
            f"{thickest / thinnest:.1f} times as thick as a pixel is wide"
            + (", and are what is segmented." if axis == 0 else _advice(names[axis])),
        )
    if thinnest < PLAUSIBLE_MM[0] or thickest > PLAUSIBLE_MM[1]:
        say(
            "warning",
            "units",
            f"{path} has voxels of {sizes} mm, which no scanner makes; correct its unit (xyzt_units) or voxel size.",
        )

    directions = volume.affine[:3, :3] / np.array(volume.spacing_mm)
    cosine = np.abs(directions.T @ directions - np.eye(3)).max()
    degrees = np.rad2deg(affines.obliquity(volume.affine).max())
    if cosine > SHEARED:
        skew = np.rad2deg(np.arcsin(cosine))
        say(
            "note",
            "axes",
            f"{path} is sheared: its axes are up to {skew:.1f} degrees off a right angle; its slices are segmented as "
            "they are stored, so resample it if that is not meant.",
        )
    elif degrees > OBLIQUE_DEGREES:
        say("note", "axes", f"{path} is oblique by {degrees:.1f} degrees; its slices are segmented as they are stored.")


def _advice(axis: str) -> str:
    return f", while slices are axial by default; set --config.data.slice_axis={axis}."


def _check_header(path: Path, volume: Volume, say: Say) -> None:
    header = volume.header
    if not isinstance(header, nibabel.Nifti1Header):  # a picture
        return
    unit = str(header.get_xyzt_units()[0])
    if unit == "unknown":
        say("note", "units", f"{path} names no unit of length; taken as millimetres: set xyzt_units if they are not.")
    elif unit != "mm":
        sizes = " x ".join(f"{side:.3g}" for side in volume.spacing_mm)
        say("warning", "units", f"{path} is in {unit}: its voxels count as {sizes} mm; correct xyzt_units if not.")
    stored = header.get_data_dtype()
    rounded = stored.kind in "iu" and stored.itemsize >= 4 and volume.voxels.dtype.kind == "f"
    if rounded and np.abs(volume.voxels).max() > _EXACT_IN_FLOAT32:
        say("warning", "type", f"{path} holds {stored.name} values beyond 2^24, which float32 rounds; rescale them.")
    elif stored.itemsize > 4 and stored.kind in "iu":
        say("note", "type", f"{path} is stored as {stored.name}, which many programs refuse; int16 or int32 would do.")
    _check_affine(path, volume, say)


def _check_affine(path: Path, volume: Volume, say: Say) -> None:
    sform, qform = (form(coded=True)[0] for form in (volume.header.get_sform, volume.header.get_qform))
    if sform is not None and qform is not None:
        unit = sum(volume.spacing_mm) / np.linalg.norm(sform[:3, :3], axis=0).sum()  # to millimetres
        shape = (*volume.header.get_data_shape(), 1)[:3]
        distance = nifti.corner_distance(shape, sform, qform) * unit
        if distance > nifti.GRID_TOLERANCE_MM:
            say(
                "warning",
                "header",
                f"{path} says two things about its place: sform and qform lie up to {distance:.3g} mm apart and the "
                "sform is used; set the code of the wrong one to 0.",
            )


def _check_image(path: Path, voxels: np.ndarray, say: Say) -> None:
    lowest, highest = float(voxels.min()), float(voxels.max())
    if lowest == highest:
        say("error", "constant", f"{path} is constant: every voxel is {lowest:g}; export it again or leave it out.")
        return
    negative = intensity.negative_share(voxels)
    if negative > intensity.MOST_NEGATIVE:
        say(
            "warning",
            "negative",
            f"{negative:.0%} of the voxels of {path} are negative (down to {lowest:g}), which "
            "--config.data.intensity=percentile, the default, refuses; choose another, such as medsam_ct for CT.",
        )
    sample = voxels.reshape(-1)[:: max(1, voxels.size // _SAMPLE)]
    if _label_like(sample) and _label_like(voxels):
        values = ", ".join(f"{value:g}" for value in np.unique(voxels))
        say(
            "warning",
            "label-as-image",
            f"{path} is given as an image and holds only the values {values}; check that it is no label.",
        )


def _label_like(voxels: np.ndarray) -> bool:
    values = np.unique(voxels)
    return len(values) <= MOST_LABEL_IDS and bool(np.all(values == np.rint(values)))


def _check_label(path: Path, ids: Mapping[int, float], labels: Mapping[str, int], say: Say) -> None:
    if set(ids) == {0}:
        say("warning", "empty-label", f"{path} is empty: no voxel has a label; check that the case is meant to be.")
    if not labels:
        if len(ids) > images.MOST_IDS:
            say(
                "error",
                "label-ids",
                f"{path} holds {len(ids)} different values, so it looks like an image; expected at most "
                f"{images.MOST_IDS} label ids: give the right file, or name the ids in dataset.json.",
            )
        return
    known = classes.ClassMap((), (), frozenset({0, *labels.values()}))
    try:
        classes.to_indices(known, np.array(list(ids)), path)
    except DataError as error:
        say("error", "label-ids", str(error))
    missing = absent(labels, ids)
    if missing and set(ids) != {0}:
        say(
            "warning",
            "empty-label",
            f"{path} has no voxel of {', '.join(missing)}; check that the case is meant to lack it.",
        )
