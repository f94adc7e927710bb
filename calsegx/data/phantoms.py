"""Phantom MRI of two scanners, written as a dataset the way users have theirs.

``anatomy`` draws a head; this file looks at it with a scanner (``vendor``, ``render``) and writes an nnU-Net
v2 raw folder with a ``cases.tsv`` (``write_dataset``).  No patient data, no download, always the same files.
"""

import concurrent.futures
import csv
import gzip
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import scipy.fft
import scipy.ndimage
import scipy.spatial.transform

from calsegx.data import anatomy
from calsegx.interfaces import UsageError

CHANNELS = ("T1", "T1c", "T2", "FLAIR")
VENDORS = ("A", "B")
LABELS = {
    "tumour": {
        "background": 0,
        "necrotic_core": anatomy.NECROTIC_CORE,
        "oedema": anatomy.OEDEMA,
        "enhancing_rim": anatomy.ENHANCING_RIM,
    },
    "stroke": {"background": 0, "lesion": anatomy.LESION},
}
# Signal of each tissue, in the order of anatomy.Tissue:
#    air scalp skull marrow csf  grey deep white spot vessel oedema rim core stroke
_TABLES_A = {
    "T1": (0.0, 0.95, 0.10, 0.62, 0.15, 0.49, 0.56, 0.68, 0.58, 0.32, 0.45, 0.50, 0.28, 0.38),
    "T1c": (0.0, 0.95, 0.10, 0.62, 0.15, 0.49, 0.56, 0.68, 0.58, 0.92, 0.45, 0.95, 0.28, 0.38),
    "T2": (0.0, 0.60, 0.05, 0.38, 0.95, 0.57, 0.47, 0.40, 0.60, 0.12, 0.74, 0.62, 0.86, 0.78),
    "FLAIR": (0.0, 0.55, 0.05, 0.36, 0.12, 0.54, 0.49, 0.42, 0.70, 0.15, 0.80, 0.70, 0.45, 0.82),
}
_TABLES_B = {
    "T1": (0.0, 0.68, 0.17, 0.49, 0.33, 0.65, 0.63, 0.61, 0.62, 0.47, 0.60, 0.61, 0.50, 0.54),
    "T1c": (0.0, 0.68, 0.17, 0.49, 0.33, 0.65, 0.63, 0.61, 0.62, 0.66, 0.60, 0.68, 0.50, 0.54),
    "T2": (0.0, 0.97, 0.14, 0.69, 0.77, 0.73, 0.69, 0.69, 0.71, 0.36, 0.74, 0.73, 0.75, 0.74),
    "FLAIR": (0.0, 0.92, 0.14, 0.65, 0.41, 0.69, 0.67, 0.68, 0.66, 0.33, 0.69, 0.66, 0.63, 0.69),
}
_TEXTURE = {"T1": (0.045, 0.04), "T1c": (0.05, 0.04), "T2": (-0.06, 0.04), "FLAIR": (-0.05, 0.05)}


@dataclass(frozen=True)
class Vendor:
    """A scanner and its protocol.  Geometry is fixed by the name, appearance by the severity."""

    name: str
    centre: str
    field_strength: str  # tesla
    shape: tuple[int, int, int]  # (x, y, z)
    spacing_mm: tuple[float, float, float]
    flipped: bool  # file axes run to the Left and Posterior instead of to the Right and Anterior
    tilt_degrees: tuple[float, float]  # range of the obliquity: slices turned about the left-right axis
    tables: Mapping[str, np.ndarray]  # channel -> [len(Tissue)] signal
    bias: float  # standard deviation of the logarithm of the receive field
    gamma: float
    psf_pixels: float  # standard deviation of the in-plane point spread
    profile_mm: float  # standard deviation of the slice profile
    kspace: float  # share of k-space acquired in each in-plane direction
    noise: float  # Rician sigma, in units of the signal table


def vendor(name: str, severity: float = 0.7, *, scale: float = 1.0) -> Vendor:
    """The scanner ``"A"`` (north, 3 T, 4 mm slices) or ``"B"`` (south, 1.5 T, oblique 5 mm slices).

    ``severity`` moves every appearance value of B linearly from A's (0) to a strong shift (1): contrast tables,
    bias 0.12 -> 0.29, gamma 1 -> 1.33, point spread 0.55 -> 0.97 pixel, slice profile 1.4 -> 4.7 mm, k-space
    1 -> 0.47, noise 0.025 -> 0.067; at 1 oedema is hardly brighter than white matter in FLAIR.  A ignores it.
    The default costs a decoder fine-tuned on A about ten DSC points.  ``scale`` is the resolution, as in
    ``anatomy.make_anatomy``.

    Raises:
        UsageError: for another name, or a severity outside 0..1.
    """
    if name not in VENDORS:
        raise UsageError(f"There is no phantom vendor {name!r}; use one of: {', '.join(VENDORS)}.")
    if not 0.0 <= severity <= 1.0:
        raise UsageError(f"The phantom severity is {severity}; give a number from 0 to 1 (strong shift).")
    s = severity if name == "B" else 0.0
    thickness, slices = (4.0, 36) if name == "A" else (5.0, 29)
    columns, rows, slices = (max(int(round(n * scale)), 4) for n in (112, 132, slices))
    blend = {c: (1 - s) * np.array(_TABLES_A[c]) + s * np.array(_TABLES_B[c]) for c in CHANNELS}
    return Vendor(
        name=name,
        centre={"A": "north", "B": "south"}[name],
        field_strength={"A": "3.0", "B": "1.5"}[name],
        shape=(columns, rows, slices),
        spacing_mm=(1.5 / scale, 1.5 / scale, thickness / scale),
        flipped=name == "A",
        tilt_degrees=(0.0, 0.0) if name == "A" else (4.0, 9.0),
        tables={channel: table.astype(np.float32) for channel, table in blend.items()},
        bias=0.12 + 0.17 * s,
        gamma=1.0 + 0.33 * s,
        psf_pixels=0.55 + 0.42 * s,
        profile_mm=1.4 + 3.3 * s,
        kspace=1.0 - 0.53 * s,
        noise=0.025 + 0.042 * s,
    )


def render(
    head: anatomy.Anatomy, scanner: Vendor, rng: np.random.Generator
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Scan a head.

    Tissue tables, texture, point spread and slice profile act on the fine grid; then the scanner's own grid
    samples it, and receive field, gamma, k-space truncation and Rician noise follow.  World coordinates are
    the patient's, so two scans of a head agree in millimetres.

    Returns:
        channel -> int16 ``[x, y, z]`` (the scale is random, as scanners' is), label uint8 ``[x, y, z]``, and
        the affine ``[4, 4]`` (voxel -> RAS+ mm).
    """
    affine = _scan_affine(scanner, rng)
    to_working = np.linalg.inv(head.affine) @ affine
    label = scipy.ndimage.affine_transform(head.label, to_working, output_shape=scanner.shape, order=0)
    receive = np.exp(scanner.bias * anatomy.random_field(rng, scanner.shape, scanner.spacing_mm, 40.0))
    # The slice profile is laid along the patient's z: at a few degrees of tilt nobody sees the difference.
    working_mm = np.diag(head.affine)[:3]
    blur_mm = (scanner.psf_pixels * scanner.spacing_mm[0], scanner.psf_pixels * scanner.spacing_mm[1])
    sigma = np.array([*blur_mm, scanner.profile_mm]) / working_mm

    images = {}
    for channel in CHANNELS:
        signal = _signal(head, channel, scanner.tables[channel], rng)
        signal = scipy.ndimage.gaussian_filter(signal, sigma, truncate=3.0)
        image = scipy.ndimage.affine_transform(signal, to_working, output_shape=scanner.shape, order=1)
        image = (image * receive) ** scanner.gamma
        if scanner.kspace < 1.0:
            image = _truncate_kspace(image, scanner.kspace)
        noise = rng.standard_normal((2, *scanner.shape), dtype=np.float32) * scanner.noise
        image = np.hypot(image + noise[0], noise[1])
        images[channel] = np.rint(image * rng.uniform(350.0, 800.0)).astype(np.int16)
    return images, label, affine


def write_dataset(
    root: Path,
    *,
    train: int = 16,
    val: int = 4,
    test: int = 12,
    kind: str = "tumour",
    severity: float = 0.7,
    seed: int = 2024,
    scale: float = 1.0,
    centres: int = 0,
    processes: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write phantom patients as an nnU-Net v2 raw dataset with a ``cases.tsv``.

    Train and validation patients are scanned by vendor A (``imagesTr``, ``labelsTr``), test patients by A and
    by B (``imagesTs``, ``labelsTs``).  Besides kind, severity and scale, a file depends on the seed, the
    patient's number and the vendor alone.  The folder appears complete or not at all.

    Args:
        root: the dataset folder; must not exist or be empty.
        train: number of training patients; at least 1.
        val: number of validation patients.
        test: number of test patients, each with two scans.
        kind: ``"tumour"`` or ``"stroke"``.
        severity: how far vendor B is from A, 0..1.
        seed: of the whole dataset.
        scale: resolution; 0.35 makes tiny volumes for tests.
        centres: deal the patients out to so many centres, each with both scanners, so that one can be left out; 0: a
            centre is a scanner.
        processes: number of worker processes; 1 works in this process.
        progress: called as ``progress(done, total)`` with numbers of patients.

    Raises:
        UsageError: for an unusable argument or a folder that is not empty.
    """
    root = Path(root).absolute()
    counts = {"train": (train, 1), "val": (val, 0), "test": (test, 0), "processes": (processes, 1)}
    for flag, (number, least) in counts.items():
        if number < least:
            raise UsageError(f"The phantom dataset was asked for {flag}={number}; give at least {least}.")
    if seed < 0:
        raise UsageError(f"The phantom seed is {seed}; give 0 or a positive integer.")
    anatomy.check_options(kind, scale)
    scanners = {name: vendor(name, severity, scale=scale) for name in VENDORS}
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UsageError(f"The folder {root} is not empty; give --root a new or an empty folder.")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent)
    except OSError as error:
        raise UsageError(f"Cannot write beside {root} ({error.strerror}); give another --root.") from error
    with scratch as name:
        staging = Path(name) / root.name
        for folder in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
            (staging / folder).mkdir(parents=True)
        splits = ["train"] * train + ["val"] * val + ["test"] * test
        jobs = [(staging, number, split, kind, scanners, seed, scale) for number, split in enumerate(splits, start=1)]
        rows = _run(jobs, processes, progress)
        if centres:
            numbers = {subject: number for number, subject in enumerate(dict.fromkeys(r["subject_id"] for r in rows))}
            rows = [row | {"centre": f"centre{numbers[row['subject_id']] % centres + 1}"} for row in rows]
        _write_index(staging, rows, kind, train + val)
        if root.exists():
            root.rmdir()  # empty, checked above; Windows cannot replace a folder
        os.replace(staging, root)


def _scan_affine(scanner: Vendor, rng: np.random.Generator) -> np.ndarray:
    """Voxel -> RAS+ mm: turned by the obliquity, centred within a few millimetres of the origin."""
    tilt = rng.uniform(*scanner.tilt_degrees)
    turn = scipy.spatial.transform.Rotation.from_euler("xyz", [tilt, 0.3 * tilt, -0.4 * tilt], degrees=True)
    direction = turn.as_matrix() * np.where(scanner.flipped, [-1.0, -1.0, 1.0], 1.0)
    affine = np.eye(4)
    affine[:3, :3] = direction * scanner.spacing_mm
    affine[:3, 3] = rng.uniform(-2.0, 2.0, 3) - affine[:3, :3] @ ((np.array(scanner.shape) - 1) / 2)
    return affine


def _signal(head: anatomy.Anatomy, channel: str, table: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    values = table * (1.0 + 0.04 * rng.standard_normal(len(table), dtype=np.float32))
    if channel == "T1c":  # a weakly enhancing rim looks like grey matter
        rim, grey = anatomy.Tissue.RIM, anatomy.Tissue.GREY
        values[rim] = values[grey] + head.enhancement * (values[rim] - values[grey])
    signal = values[head.tissue]
    lesion = anatomy.Tissue.OEDEMA if head.kind == "tumour" else anatomy.Tissue.STROKE
    signal += head.soft_weight * (values[lesion] - signal)
    fine, smooth = _TEXTURE[channel]
    return signal * (1.0 + fine * head.fine_texture + smooth * head.smooth_texture)


def _truncate_kspace(image: np.ndarray, share: float) -> np.ndarray:
    """Keep the central ``share`` of the frequencies of both in-plane axes: blur, and ringing at edges."""
    spectrum = np.asarray(scipy.fft.rfft2(image, axes=(1, 0)))
    along_x = np.abs(np.fft.rfftfreq(image.shape[0])) <= share / 2
    along_y = np.abs(np.fft.fftfreq(image.shape[1])) <= share / 2
    spectrum *= (along_x[:, None] & along_y[None, :])[..., None]
    return np.asarray(scipy.fft.irfft2(spectrum, s=image.shape[1::-1], axes=(1, 0)))


def _run(jobs: Sequence[tuple], processes: int, progress: Callable[[int, int], None] | None) -> list[dict[str, str]]:
    """All jobs' rows, in the order of the jobs whatever the number of processes."""
    report = progress or (lambda done, total: None)
    rows: list[dict[str, str]] = []
    report(0, len(jobs))
    if processes == 1:
        for done, job in enumerate(jobs, start=1):
            rows += _write_subject(*job)
            report(done, len(jobs))
        return rows
    # Spawned, because forking a process in which jax has started its threads can hang.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(processes, len(jobs)), mp_context=context) as pool:
        futures = [pool.submit(_write_subject, *job) for job in jobs]
        try:
            for done, future in enumerate(concurrent.futures.as_completed(futures), start=1):
                future.result()
                report(done, len(jobs))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for future in futures:
        rows += future.result()
    return rows


def _write_subject(
    root: Path, number: int, split: str, kind: str, scanners: Mapping[str, Vendor], seed: int, scale: float
) -> list[dict[str, str]]:
    """Write one patient's scans; return their rows of cases.tsv."""
    subject = f"subject{number:03d}"
    head = anatomy.make_anatomy(np.random.default_rng([seed, number]), kind, scale=scale)
    suffix = "Ts" if split == "test" else "Tr"
    rows = []
    for code, name in enumerate(VENDORS if split == "test" else VENDORS[:1], start=1):
        scanner, case = scanners[name], f"{subject}_{name}"
        images, label, affine = render(head, scanner, np.random.default_rng([seed, number, code]))
        row = {"case_id": case, "subject_id": subject}
        for index, channel in enumerate(CHANNELS):
            row[f"image:{channel}"] = f"images{suffix}/{case}_{index:04d}.nii.gz"
            _write_nifti(root / row[f"image:{channel}"], images[channel], affine)
        row["label"] = f"labels{suffix}/{case}.nii.gz"
        _write_nifti(root / row["label"], label, affine)
        row |= {
            "split": split,
            "centre": scanner.centre,
            "scanner": name,
            "field_strength": scanner.field_strength,
        }
        rows.append(row)
    return rows


def _write_nifti(path: Path, voxels: np.ndarray, affine: np.ndarray) -> None:
    image = nib.Nifti1Image(voxels, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))


def _write_index(root: Path, rows: Sequence[Mapping[str, str]], kind: str, labelled: int) -> None:
    description = {
        "name": root.name,
        "description": "Procedural phantom MRI of two scanners; no patient data.",
        "channel_names": {str(index): channel for index, channel in enumerate(CHANNELS)},
        "labels": LABELS[kind],
        "numTraining": labelled,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    with open(root / "cases.tsv", "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, rows[0], delimiter="\t", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
