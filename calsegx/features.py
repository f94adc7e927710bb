"""The feature cache: frozen encoder output on disk, one file per view with a chunk per slice, checked when it is read.

Layout of a cache folder::

    signature.json                     what the features depend on; checked before reuse
    <case id>/view0/features/...       zarr3, bfloat16 [n, h, w, C]
    <case id>/view0/labels/...         zarr3, uint8 [n, Hl, Wl]
    <case id>/view0/slices/...
    <case id>/view0/<protocol>.{points,labels,boxes}/...
    <case id>/view0/done.json          written last: the case's fingerprint, percentiles of its raw images, the arrays'
                                       shapes, and the SHA-256 of their zarr.json and of itself
    <case id>/view0.set-aside          a view that was found damaged, until it was computed anew
    .claims/<case id>.view0.lock       locked by the process that computes the view

Every array is one file with a chunk per slice, each with a crc32c (``slice_files``): reading a slice reads no other.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from calsegx import configs, files, slice_files
from calsegx.interfaces import InputError, Prompts

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_PER_SLICE = ("features", "labels")  # one inner chunk per slice; the small arrays are read as a whole
_PROMPT_TYPES = {"points": np.float32, "labels": np.int32, "boxes": np.float32}  # array "<protocol>.<field>"


class CachedSlices(NamedTuple):
    """Slices of one view of one case.  Without the leading axis when one slice was asked for."""

    features: np.ndarray  # [n, h, w, C] bfloat16
    labels: np.ndarray | None  # [n, Hl, Wl] uint8 at the decoder's resolution; None for a case without labels
    slices: np.ndarray  # [n] int64: position of each slice in the volume
    prompts: Mapping[str, Prompts]  # by protocol


class _View(NamedTuple):
    """An opened view: files for what is large, arrays for what is small."""

    files: dict[str, slice_files.SliceFile]
    arrays: dict[str, np.ndarray]


class FeatureCache:
    """Encoder features on disk; ``open`` checks that they belong to this model and this preprocessing."""

    def __init__(self, root: Path):
        self.root = root
        self._opened: dict[tuple[str, str], _View] = {}

    @classmethod
    def open(cls, root: Path, signature: Mapping[str, Any]) -> "FeatureCache":
        """Open the cache in ``root``, or create it.

        Args:
            root: the cache folder.
            signature: everything the features depend on, as plain JSON values: weights fingerprint,
                preprocessing, image size, classes, prompt protocol, view seed.

        Raises:
            InputError: when the folder was made with another signature; the message lists the keys that
                differ.
        """
        root = Path(root)
        path = root / "signature.json"
        wanted = json.loads(json.dumps(signature))
        if path.exists():
            _check_signature(root, _read(path, json.loads), wanted)
            return cls(root)
        if root.is_dir() and any(not entry.name.startswith(".") for entry in root.iterdir()):
            raise InputError(
                f"{root} is not empty and has no signature.json, so it is no feature cache; name an empty or "
                "a new folder with --config.data.cache."
            )
        files.write_atomically(path, json.dumps(wanted, indent=2, sort_keys=True) + "\n")
        _check_signature(root, _read(path, json.loads), wanted)  # another process may have been a moment later
        return cls(root)

    def has(self, case_id: str, view: str, fingerprint: str) -> bool:
        """Whether the view was written completely, and from this ``fingerprint`` of the case's files.

        Raises:
            InputError: when what says so is damaged; the view is set aside.
        """
        return self.holds(case_id, view) and self._done(case_id, view)["fingerprint"] == fingerprint

    def holds(self, case_id: str, view: str) -> bool:
        """Whether the view was written completely, from whatever files."""
        return (self._folder(case_id, view) / "done.json").exists()

    def claim_path(self, case_id: str, view: str) -> Path:
        """The file to lock while the view is computed."""
        self._folder(case_id, view)
        return self.root / ".claims" / f"{case_id}.{view}.lock"

    def fingerprint(self, case_id: str, view: str) -> str:
        """The fingerprint of the case's files that the view was made from.

        Raises:
            InputError: when the view is not in the cache.
        """
        return self._done(case_id, view)["fingerprint"]

    def intensities(self, case_id: str, view: str) -> Mapping[str, Any] | None:
        """Percentiles of the case's raw images, as they were given to ``write``; None of an earlier version's view.

        Raises:
            InputError: when the view is not in the cache.
        """
        return self._done(case_id, view).get("intensities")

    def write(
        self,
        case_id: str,
        view: str,
        *,
        features: np.ndarray,
        labels: np.ndarray | None,
        slices: np.ndarray,
        prompts: Mapping[str, Prompts],
        fingerprint: str,
        intensities: Mapping[str, Any] | None = None,
    ) -> None:
        """Write one view of a case: complete in a temporary folder, then renamed; an older view is replaced.

        Args:
            case_id: folder name inside the cache.
            view: ``view0`` (unaugmented), ``view1``, ...
            features: ``[n, h, w, C]``; stored as bfloat16.
            labels: ``[n, Hl, Wl]`` uint8, or None.
            slices: ``[n]``, the slices' positions in the volume.
            prompts: by protocol: ``points [n, N, 2]``, ``labels [n, N]``, ``boxes [n, 4]``; what is None is not stored.
            fingerprint: of the case's files.
            intensities: channel -> percentiles of its raw image, JSON values.

        Raises:
            InputError: when the disk refuses (full, read-only).
        """
        arrays = {"features": np.asarray(features, BFLOAT16), "slices": np.asarray(slices, np.int64)}
        if labels is not None:
            arrays["labels"] = np.asarray(labels, np.uint8)
        for protocol, of_protocol in prompts.items():
            for field, dtype in _PROMPT_TYPES.items():
                if getattr(of_protocol, field) is not None:
                    arrays[f"{protocol}.{field}"] = np.asarray(getattr(of_protocol, field), dtype)
        counts = {name: len(array) for name, array in arrays.items()}
        if len(set(counts.values())) != 1:
            raise ValueError(f"case {case_id!r}, {view}: arrays of different length {counts}")

        folder = self._folder(case_id, view)
        temporary = folder.with_name(f".{view}.{os.getpid()}")
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            for name, array in arrays.items():
                slice_files.write(temporary / name, array, per_slice=name in _PER_SLICE)
            done = {
                "fingerprint": fingerprint,
                "intensities": intensities,
                "shapes": {name: list(array.shape) for name, array in arrays.items()},
                "metadata": {name: slice_files.metadata_digest(temporary / name) for name in arrays},
            }
            files.write_atomically(temporary / "done.json", files.seal(done))
            shutil.rmtree(folder, ignore_errors=True)
            try:
                os.replace(temporary, folder)
            except OSError:
                if not self.has(case_id, view, fingerprint):  # else a process without a claim was faster
                    raise
            shutil.rmtree(_aside(folder), ignore_errors=True)
        except (OSError, ValueError) as error:
            raise InputError(
                f"The features of case {case_id!r}, {view} cannot be written to {self.root} ({error}); free "
                "some space or name another folder with --config.data.cache, then run again: what is "
                "complete is kept."
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # is there only when something stopped us, be it Ctrl-C
        self._opened.pop((case_id, view), None)

    def slices(self, case_id: str, view: str) -> np.ndarray:
        """``[n]`` positions, in the volume, of the slices that the view holds."""
        return self._open(case_id, view).arrays["slices"]

    def read_slices(self, case_id: str, view: str, index: int | slice | Sequence[int]) -> CachedSlices:
        """Read the slices at ``index``: positions 0..n-1 in the view; an integer drops the slice axis.

        Raises:
            InputError: when the view is missing, or what is read of it is damaged or missing: it is then set aside, so
                that filling the cache computes it anew.
        """
        opened = self._open(case_id, view)
        chosen = index if isinstance(index, int | slice) else np.asarray(index, np.int64)
        with self._damage(case_id, view):
            large = {name: file.read(chosen) for name, file in opened.files.items()}
        return _cached(large, {name: array[chosen] for name, array in opened.arrays.items()})

    def read_case(self, case_id: str, view: str) -> CachedSlices:
        """Read a whole view; errors as in ``read_slices``."""
        opened = self._open(case_id, view)
        with self._damage(case_id, view):
            large = {name: file.read_all() for name, file in opened.files.items()}
        return _cached(large, opened.arrays)

    def verify(self, case_id: str, view: str) -> None:
        """Check every byte of a view, also what was read before; errors as in ``read_slices``."""
        self._opened.pop((case_id, view), None)
        opened = self._open(case_id, view)
        with self._damage(case_id, view):
            for file in opened.files.values():
                file.check()

    def _folder(self, case_id: str, view: str) -> Path:
        if case_id in ("", ".", "..") or case_id.startswith(".") or "/" in case_id or "\\" in case_id:
            raise InputError(f"The case id {case_id!r} is no valid folder name; rename the case in the dataset.")
        return self.root / case_id / view

    def _done(self, case_id: str, view: str) -> dict[str, Any]:
        path = self._folder(case_id, view) / "done.json"
        if not path.exists():
            raise InputError(
                f"Case {case_id!r} has no {view} in the feature cache {self.root}; run the training command "
                "again: it computes what is missing before it trains."
            )
        with self._damage(case_id, view):
            return files.unseal(path.read_bytes())

    def _open(self, case_id: str, view: str) -> _View:
        if (case_id, view) not in self._opened:
            folder = self._folder(case_id, view)
            done = self._done(case_id, view)
            opened = _View({}, {})
            with self._damage(case_id, view):
                for name, shape in done["shapes"].items():
                    if slice_files.metadata_digest(folder / name) != done["metadata"][name]:
                        raise ValueError(f"the zarr.json of {name} is not what was written")
                    if name in _PER_SLICE:
                        opened.files[name] = slice_files.SliceFile(folder / name, shape)
                    else:
                        opened.arrays[name] = slice_files.read(folder / name, shape)
            self._opened[case_id, view] = opened
        return self._opened[case_id, view]

    @contextlib.contextmanager
    def _damage(self, case_id: str, view: str) -> Iterator[None]:
        """Inside it, what cannot be read sets the view aside and raises an InputError that says so."""
        try:
            yield
        except (OSError, ValueError) as error:
            raise self._set_aside(case_id, view, error) from error

    def _set_aside(self, case_id: str, view: str, error: Exception) -> InputError:
        """The error to raise."""
        folder = self._folder(case_id, view)
        self._opened.pop((case_id, view), None)
        what = f"The cached features of case {case_id!r}, {view} are damaged ({str(error).splitlines()[0][:300]})"
        try:
            shutil.rmtree(_aside(folder), ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):  # another process has found the same
                folder.rename(_aside(folder))
        except OSError as refused:
            return InputError(
                f"{what}, and {folder} cannot be moved out of the way ({refused.strerror}); delete that folder, then "
                "run the same command again."
            )
        return InputError(
            f"{what}; they were moved to {_aside(folder)}: run the same command again (with --resume where a step was "
            "saved), which computes this view anew and keeps the others."
        )


def _aside(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.set-aside")


def _cached(large: Mapping[str, np.ndarray], small: Mapping[str, np.ndarray]) -> CachedSlices:
    prompts: dict[str, dict[str, np.ndarray]] = {}
    for name in small.keys() - {"slices"}:
        protocol, _, field = name.partition(".")
        prompts.setdefault(protocol, {})[field] = small[name]
    by_protocol = {protocol: Prompts(**fields) for protocol, fields in prompts.items()}
    return CachedSlices(large["features"], large.get("labels"), small["slices"], by_protocol)


def size_bytes(slices: int, feature_shape: Sequence[int]) -> int:
    """Bytes on disk of the bfloat16 features of ``slices`` slices, each ``feature_shape`` (h, w, C)."""
    return slices * int(np.prod(feature_shape)) * BFLOAT16.itemsize


def _read(path: Path, decode: Callable[[bytes], Any]) -> dict[str, Any]:
    try:
        return decode(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); delete the folder {path.parent} and run again.") from error


def _check_signature(root: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    different = configs.differences(stored, wanted)
    if different:
        changes = "; ".join(f"{key} is {old!r}, this run has {new!r}" for key, (old, new) in different.items())
        raise InputError(
            f"The feature cache {root} was made for another setting: {changes}; name another folder with "
            "--config.data.cache, or delete this one."
        )
