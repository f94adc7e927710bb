"""Write a dataset of corrupted copies of the test cases: how a model does when images get worse.

python -m launch.corrupt --data=DATASET --corruption=motion,bias_field --level=1,3,5 --output=corrupted
python -m launch.evaluate --runs=runs/x/calsam --data=corrupted --workdir=runs/x/corrupted

``all`` stands for every corruption, level or split.  Every copy is a case of its own (``CASE__motion-3``) whose scanner
is ``motion-3``, beside an unchanged copy of scanner ``clean``, so the evaluation has one row for each corruption and
level.  Grid, header and voxel type are the input's; labels are referenced where they are.  Writes ``images/``,
``dataset.json``, ``manifest.json`` and, last, ``cases.tsv``.  A killed run goes on with the same command: whole files
stay.  ``--check`` writes nothing: it makes every image of the manifest again and names what differs; see
docs/corruptions.md.
"""

import concurrent.futures
import dataclasses
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from calsegx import config_checks, configs, files, locks
from calsegx.data import cases as case_tools
from calsegx.data import corruptions, nifti
from calsegx.data.corruptions import manifest
from calsegx.data.layouts import table
from calsegx.interfaces import Case, DataError, Dataset, UsageError, Volume
from calsegx.training import progress
from launch import common

SAVE_SECONDS = 5.0  # between two writings of the manifest: what a kill can cost
_DATA_FLAGS = ("layout", "splits", "fold", "val_fraction", "test_fraction")  # of DataConfig, for the training's split

Entry = dict[str, Any]  # a file of the manifest


@dataclass(frozen=True)
class Copy:
    """One image to write: which scan, and what happens to it; level 0 is the unchanged copy."""

    case: Case
    channel: str
    corruption: str
    level: int
    name: str  # of the file, relative to the output

    @property
    def domain(self) -> str:
        """What the evaluation calls it."""
        return f"{self.corruption}-{self.level}" if self.level else manifest.CLEAN


def corrupt(
    data: configs.DataConfig,
    names: Sequence[str],
    levels: Sequence[int],
    output: Path,
    split: str = "test",
    workers: int = 1,
) -> int:
    """Write the corrupted dataset, or what is missing of it; returns the number of its cases.

    Args:
        data: the dataset and how it is split; as in training, so that test cases are test cases.
        names: of corruptions.
        levels: 1 to 5.
        output: the folder, new, empty or of an earlier call that asked for no more than this one.
        split: train, val, test or all.
        workers: images that are worked on at the same time.

    Raises:
        UsageError: before anything is written, for a folder that is not to be written to.
        DataError: for an image that cannot be read.
    """
    dataset = case_tools.load(data)
    cases = dataset.cases if split == "all" else case_tools.select(dataset, data, split)
    files.check_outside(output, dataset.root, "--output")
    if any(case.split != "test" for case in cases):
        print("note: not only test cases; do not evaluate a model on subjects it was trained on", file=sys.stderr)
    copies = _copies(dataset, cases, names, levels)
    known = _known_files(output, {copy.name for copy in copies})
    with locks.exclusive(output):
        _write_images(output, copies, known, names, workers)
        return _write_index(output, dataset, copies)


def check(data: configs.DataConfig, output: Path, workers: int = 1) -> tuple[int, list[str]]:
    """Make every image of the manifest again, in memory; returns their number and one line for each that differs.

    Files of the output folder are compared too, unless it holds no images, as when somebody else's manifest is checked.

    Raises:
        DataError: when there is no manifest, or it is damaged, of another version, or of another dataset.
    """
    dataset = case_tools.load(data)
    record = manifest.read(output / manifest.FILE_NAME)
    cases = {case.case_id: case for case in dataset.cases}
    copies = []
    for name, entry in record["files"].items():
        case = cases.get(entry["case"])
        if case is None or entry["channel"] not in case.images:
            raise DataError(
                f"{output / manifest.FILE_NAME} is of another dataset: {dataset.root} has no case {entry['case']!r} "
                f"with the channel {entry['channel']!r}; give --data the folder that it was made from."
            )
        copies.append(Copy(case, entry["channel"], entry["corruption"], entry["level"], name))
    with_files = (output / "images").is_dir()
    differing: list[str] = []

    def compare(copy: Copy, volume: Volume) -> None:
        entry, path = record["files"][copy.name], output / copy.name
        if manifest.voxels_sha256(volume.voxels) != entry["source_sha256"]:
            differing.append(f"{copy.name}: the dataset's image is not the one that the manifest was made from")
        elif manifest.voxels_sha256(_make(copy, volume)) != entry["voxels_sha256"]:
            differing.append(f"{copy.name}: the voxels made here are not those of the manifest")
        if with_files and manifest.file_sha256(path) != entry["file_sha256"]:
            differing.append(f"{copy.name}: the file is {'changed or damaged' if path.exists() else 'missing'}")

    _for_each_scan(copies, compare, workers, "Checking")
    return len(copies), sorted(differing)


def _copies(dataset: Dataset, cases: Iterable[Case], names: Sequence[str], levels: Sequence[int]) -> list[Copy]:
    changes = [(manifest.CLEAN, 0), *((name, level) for name in names for level in levels)]
    copies = []
    for case in cases:
        for number, channel in enumerate(dataset.channels):
            if channel not in case.images:
                raise DataError(f"Case {case.case_id!r} of {dataset.root} has no channel {channel!r}; add its file.")
            if not case.images[channel].name.endswith(nifti.ENDINGS):
                raise DataError(f"{case.images[channel]} is no NIfTI volume; the corruptions are those of MR scanners.")
            for name, level in changes:
                copy = Copy(case, channel, name, level, "")
                file = f"images/{case.case_id}__{copy.domain}_{number:04d}.nii.gz"
                copies.append(dataclasses.replace(copy, name=file))
    return copies


def _make(copy: Copy, volume: Volume) -> np.ndarray:
    """The copy's voxels in the type of its file: the input's, where that holds unscaled integers of up to 16 bits."""
    dtype = volume.header.get_data_dtype().newbyteorder("=")
    slope, intercept = volume.header.get_slope_inter()  # None: not scaled
    if dtype.kind not in "iu" or dtype.itemsize > 2 or (slope or 1, intercept or 0) != (1, 0):
        dtype = np.dtype(np.float32)
    if not copy.level:
        return volume.voxels.astype(dtype)
    scan = (copy.case.case_id, copy.channel)
    return corruptions.corrupt(copy.corruption, volume.voxels, volume.spacing_mm, copy.level, *scan, dtype=dtype)


def _write_images(
    output: Path, copies: Sequence[Copy], known: Mapping[str, Entry], names: Sequence[str], workers: int
) -> None:
    """Write what is missing or is not what the manifest says, and the manifest, now and then and at the end."""
    entries, lock = dict(known), threading.Lock()
    saved = time.monotonic()

    def save() -> None:
        found = {copy.name: entries[copy.name] for copy in copies if copy.name in entries}
        files.write_atomically(output / manifest.FILE_NAME, files.seal({**manifest.describe(names), "files": found}))

    def write(copy: Copy, volume: Volume) -> None:
        nonlocal saved
        path, entry, source = output / copy.name, known.get(copy.name), manifest.voxels_sha256(volume.voxels)
        if entry and entry["source_sha256"] == source and manifest.file_sha256(path) == entry["file_sha256"]:
            return
        voxels = _make(copy, volume)
        nifti.write(path, voxels, volume, voxels.dtype.type)
        with lock:
            entries[copy.name] = {
                "case": copy.case.case_id,
                "channel": copy.channel,
                "corruption": copy.corruption,
                "level": copy.level,
                "source_sha256": source,
                "voxels_sha256": manifest.voxels_sha256(voxels),
                "file_sha256": manifest.file_sha256(path),
            }
            if time.monotonic() - saved > SAVE_SECONDS:
                save()
                saved = time.monotonic()

    save()  # from here on the folder is known as ours
    for leftover in (output / "images").glob(".*.tmp"):  # of a process that was killed while writing
        leftover.unlink()
    try:
        _for_each_scan(copies, write, workers, "Corrupting")
    finally:
        save()


def _for_each_scan(copies: Sequence[Copy], work: Callable[[Copy, Volume], None], workers: int, title: str) -> None:
    """Call ``work`` for every copy with the scan it is made of, which is read once for all of them."""
    scans: dict[tuple[str, str], list[Copy]] = {}
    for copy in copies:
        scans.setdefault((copy.case.case_id, copy.channel), []).append(copy)
    stop, lock, done = threading.Event(), threading.Lock(), 0

    def run(group: Sequence[Copy]) -> None:
        nonlocal done
        if stop.is_set():
            return
        case, channel = group[0].case, group[0].channel
        volume = nifti.read(case.images[channel], case.volumes.get(channel))
        for copy in group:
            if stop.is_set():
                return
            work(copy, volume)
            with lock:
                done += 1
                bar.update(done, Path(copy.name).name)

    with (
        progress.Progress(title, len(copies), "images") as bar,
        concurrent.futures.ThreadPoolExecutor(workers) as pool,
    ):
        futures = [pool.submit(run, group) for group in scans.values()]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
        except BaseException:  # Ctrl-C among them: the images in work are finished, no further ones begun
            stop.set()
            raise


def _write_index(output: Path, dataset: Dataset, copies: Sequence[Copy]) -> int:
    """``dataset.json`` and, last of all, ``cases.tsv``; returns the number of its cases."""
    images: dict[tuple[str, str], dict[str, Path]] = {}
    cases: dict[tuple[str, str], Case] = {}
    for copy in copies:
        key = copy.case.case_id, copy.domain
        images.setdefault(key, {})[copy.channel] = output / copy.name
        new = {"case_id": "__".join(key), "split": "test", "scanner": copy.domain, "volumes": {}}
        cases[key] = dataclasses.replace(copy.case, **new, images=images[key])
    written = dataclasses.replace(dataset, cases=tuple(cases.values()))
    for name, text in reversed(table.contents(written, lambda path: _relative(path, output)).items()):
        files.write_atomically(output / name, text)
    return len(cases)


def _relative(path: Path, folder: Path) -> str:
    """``path`` as seen from ``folder``, so that both can move together; absolute from another drive."""
    try:
        return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
    except ValueError:
        return path.resolve().as_posix()


def _known_files(output: Path, wanted: set[str]) -> dict[str, Entry]:
    """What an earlier call wrote to the folder; nothing for a new or empty one."""
    path = output / manifest.FILE_NAME
    if not path.is_file():
        if output.exists() and (not output.is_dir() or any(not p.name.startswith(".") for p in output.iterdir())):
            raise UsageError(f"--output={output} is neither empty nor of this script; name a new folder.")
        return {}
    known = manifest.read(path)["files"]
    for name in sorted(known.keys() - wanted):
        raise UsageError(
            f"--output={output} holds {name}, which this call does not ask for; ask for at least what is there, or "
            "name a new folder."
        )
    return known


def read_names(texts: Sequence[str]) -> list[str]:
    """Corruptions by name, or ``all``.

    Raises:
        UsageError: for an unknown name, with the nearest.
    """
    if list(texts) == ["all"]:
        return corruptions.names()
    for name in texts:
        corruptions.registry.get(name)
        if ":" in name:  # it becomes part of file names
            raise UsageError(f"--corruption={name}: register it in calsegx.data.corruptions to give it a short name.")
    if not texts:
        raise UsageError(f"--corruption is empty; give all or some of {', '.join(corruptions.names())}.")
    return list(dict.fromkeys(texts))


def read_levels(texts: Sequence[str]) -> list[int]:
    """Levels 1 to 5, or ``all``.

    Raises:
        UsageError: for anything else.
    """
    if list(texts) == ["all"]:
        return list(corruptions.LEVELS)
    known = {str(level): level for level in corruptions.LEVELS}
    for text in texts or [""]:
        if text not in known:
            raise UsageError(f"--level={text!r} is no level; give all or some of {', '.join(known)}.")
    return [known[text] for text in dict.fromkeys(texts)]


def define_flags() -> None:
    """The dataset and its split, the corruptions and levels, and the folder."""
    flags.DEFINE_string("data", None, "The dataset folder; nothing is written to it.", required=True)
    common.define_folder("output", "The folder to write, or to check.")
    flags.DEFINE_list("corruption", ["all"], "Corruptions, separated by commas, or all.")
    flags.DEFINE_list("level", ["all"], "Levels from 1 (hardly visible) to 5 (severe), separated by commas, or all.")
    flags.DEFINE_enum("split", "test", ["train", "val", "test", "all"], "Which cases.")
    flags.DEFINE_integer("workers", 2, "Images that are worked on at the same time.", lower_bound=1)
    flags.DEFINE_bool("check", False, "Write nothing; make the images of the manifest again and compare.")
    kinds = {str: flags.DEFINE_string, int: flags.DEFINE_integer, float: flags.DEFINE_float}
    for name in _DATA_FLAGS:
        default = getattr(configs.DataConfig(), name)
        kinds[type(default)](f"data_{name}", default, f"As --config.data.{name} of the training.")


def main() -> None:
    """Write or check, and say what is there."""
    f = flags.FLAGS
    data = configs.DataConfig(root=f.data, **{name: f[f"data_{name}"].value for name in _DATA_FLAGS})
    config_checks.validate(configs.TrainConfig(data=data))
    output = Path(f.output)
    if f.check:
        count, differing = check(data, output, f.workers)
        for line in differing:
            print(line)
        if differing:
            raise DataError(f"{len(differing)} differences in {count} images of {output}; the first: {differing[0]}.")
        print(f"All {count} images of {output / manifest.FILE_NAME} come out the same, to the last bit.")
        return
    count = corrupt(data, read_names(f.corruption), read_levels(f.level), output, f.split, f.workers)
    print(f"Wrote {count} cases to {output}; launch.evaluate --data={output} scores them.")


if __name__ == "__main__":
    common.run(main, define_flags)
