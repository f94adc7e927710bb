"""Disks that are full, break, write less than asked or refuse to rename, at each write of a run.

python -m tests.faults.disk

A first run records every file operation of Python in the run folder; then each kind of them fails once in a run of its
own.  The writes of TensorStore's C++ are met by file systems that are really full (tmpfs; needs the right to mount) and
by a limit on the size of files (RLIMIT_FSIZE), which cuts a write short as a full disk does.  Each time the run must
end with one sentence and the exit code 1, every checkpoint that was reported must still be whole, and when there is
space again the run must go on to the end of an undisturbed one, bit for bit.
"""

import argparse
import builtins
import collections
import contextlib
import dataclasses
import errno
import fnmatch
import functools
import io
import os
import re
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from types import TracebackType
from typing import Any

from calsegx.training import checkpoints
from tests.faults import jobs, kills

ERRORS = {"open": errno.ENOSPC, "write": errno.ENOSPC, "fsync": errno.EIO, "rename": errno.EIO, "mkdir": errno.ENOSPC}


class Watched:
    """Inside it, Python's file operations in ``folder`` come to ``met(operation, name)``, which may raise.

    Operations are ``open`` (for writing), ``write`` (half of what is to be written is, before ``met``), ``fsync``,
    ``rename`` and ``mkdir``; names are relative to the folder, without process ids.
    """

    def __init__(self, folder: Path):
        self.folder = os.path.realpath(folder)
        self._before: list[tuple[Any, str, Any]] = []

    def met(self, operation: str, name: str) -> None:
        """An operation on a file of the folder."""
        raise NotImplementedError

    def __enter__(self) -> "Watched":
        opened, fsync, replace, rename, mkdir = io.open, os.fsync, os.replace, os.rename, os.mkdir

        def watched_open(file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
            writes = not isinstance(file, int) and set(mode) & set("wax+")
            if writes:
                self._meet("open", file)
            stream = opened(file, mode, *rest, **options)
            return _Half(stream, functools.partial(self._meet, "write", file)) if writes else stream

        def on_source(number: int) -> None:
            self._meet("fsync", os.readlink(f"/proc/self/fd/{number}"))
            fsync(number)

        def moved(original: Callable[..., None], source: Any, target: Any, **options: Any) -> None:
            self._meet("rename", target)
            original(source, target, **options)

        def made(path: Any, *rest: Any, **options: Any) -> None:
            if not os.path.isdir(path):
                self._meet("mkdir", path)
            mkdir(path, *rest, **options)

        self._patch(io, "open", watched_open)
        self._patch(builtins, "open", watched_open)
        self._patch(os, "fsync", on_source)
        self._patch(os, "replace", functools.partial(moved, replace))
        self._patch(os, "rename", functools.partial(moved, rename))
        self._patch(os, "mkdir", made)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._before:
            owner, name, value = self._before.pop()
            setattr(owner, name, value)

    def __call__(self) -> None:
        """For the rest of the process."""
        self.__enter__()

    def _patch(self, owner: Any, name: str, value: Any) -> None:
        self._before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def _meet(self, operation: str, path: Any) -> None:
        name = os.path.relpath(os.path.realpath(os.fspath(path)), self.folder)
        if not name.startswith(".."):
            self.met(operation, re.sub(rf"\.{os.getpid()}\b", "", name))


class _Half:
    """A file of which every write is announced when half of it is done."""

    def __init__(self, stream: Any, announce: Callable[[], None]):
        self._stream, self._announce = stream, announce

    def write(self, content: Any) -> int:
        middle = len(content) // 2
        self._stream.write(content[:middle])
        self._stream.flush()
        self._announce()
        self._stream.write(content[middle:])
        return len(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> "_Half":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stream.close()


class Record(Watched):
    """Writes a line to ``listing`` for each operation."""

    def __init__(self, folder: Path, listing: Path):
        super().__init__(folder)
        self._listing = listing

    def met(self, operation: str, name: str) -> None:
        """Append it."""
        number = os.open(self._listing, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(number, f"{operation}\t{name}\n".encode())
        os.close(number)


class Fault(Watched):
    """From its ``first`` time on, the operation fails on files whose name fits ``pattern``."""

    def __init__(self, folder: Path, operation: str, pattern: str, first: int = 1, error: int | None = None):
        super().__init__(folder)
        self.operation, self.pattern, self.left = operation, pattern, first
        self.error = error or ERRORS[operation]

    def met(self, operation: str, name: str) -> None:
        """Fail where it is this one's turn."""
        if operation == self.operation and fnmatch.fnmatch(name, self.pattern):
            self.left -= 1
            if self.left <= 0:
                raise OSError(self.error, os.strerror(self.error), name)


@dataclasses.dataclass(frozen=True)
class Limit:
    """No file may grow beyond so many bytes; a write is cut short there, and the next one fails."""

    size: int

    def __call__(self) -> None:
        """For the rest of the process."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of ``size`` bytes at ``folder``.

    Raises:
        PermissionError: where one may not mount.
    """
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise PermissionError("there is no mount command") from error
    if mounted.returncode:
        raise PermissionError(mounted.stderr.strip())
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path, free: int) -> Path:
    """A file that leaves ``free`` bytes on the file system."""
    ballast = folder / "ballast"
    with ballast.open("wb") as file:
        file.write(b"x" * max(0, shutil.disk_usage(folder).free - free))
    return ballast


def points(listing: Path) -> dict[str, tuple[str, str, int]]:
    """What can fail: each operation on each kind of file, at its middle time.

    Steps, cases and views count as one, and so do the files of a checkpoint that the manifest flushes again.
    """
    kinds = collections.defaultdict(list)
    for line in listing.read_text().splitlines():
        operation, name = line.split("\t")
        kind = re.sub(r"(?<=checkpoints/)\d+|\d{3}(?=_[AB])|(?<=view)\d", "*", name)
        if operation == "fsync" and not name.endswith(".tmp"):
            kind = re.sub(r"(?<=checkpoints/\*/).*", "*", kind)
        kinds[f"{operation} {kind}"].append((operation, kind))
    return {title: (*found[0], (len(found) + 1) // 2) for title, found in sorted(kinds.items())}


def survive(
    inputs: jobs.Inputs, workdir: Path, whole: Path, before: Callable[[], None], space_again: Callable[[], None] = int
) -> str:
    """A training run with a fault, and one without: what the first said (or that the fault did not matter to it)."""
    arguments = inputs.arguments(workdir, method="sam_ft")
    code, said = jobs.run(inputs, arguments, before=before)
    sentences = [line for line in said.splitlines() if line.startswith("error: ")]
    if code != 0:
        jobs.expect(code == 1 and len(sentences) == 1, f"exit code {code}, no sentence: {said[-1500:]}")
    reported = [int(step) for step in re.findall(r"^saved step (\d+)$", said, re.MULTILINE)]
    steps = checkpoints.whole_steps(workdir / "checkpoints")
    jobs.expect(not reported or steps and steps[-1] >= max(reported), f"reported {reported}, there are {steps}")
    space_again()
    if code != 0:
        again, more = jobs.run(inputs, [*arguments, *(["--resume"] if steps else [])])
        jobs.expect(again == 0, f"after {sentences[0]!r} it did not go on: {more[-1500:]}")
    kills.compare(workdir, whole)
    shutil.rmtree(workdir)
    return sentences[0] if code else "did not matter"


def injected(inputs: jobs.Inputs, folder: Path, whole: Path, workers: int, say: Callable[[str], None]) -> int:
    """Every kind of Python's file operations of a run fails once; returns how many there were."""
    recorded = folder / "recorded"
    arguments = inputs.arguments(recorded, method="sam_ft")
    code, said = jobs.run(inputs, arguments, before=Record(recorded, folder / "listing"))
    jobs.expect(code == 0, said)
    kills.compare(recorded, whole)
    found = points(folder / "listing")

    def attempt(number: int, fault: tuple[str, str, int], error: int | None) -> str:
        workdir = folder / f"fault_{number}"
        return survive(inputs, workdir, whole, Fault(workdir, *fault, error=error))

    tries = [(title, fault, None) for title, fault in found.items()]
    broken = [(f"{title} (EIO)", fault, errno.EIO) for title, fault in found.items() if fault[0] == "write"]
    tries += [entry for entry in broken if "orbax" not in entry[0]]
    _all(tries, attempt, workers, say)
    return len(tries)


def limited(inputs: jobs.Inputs, folder: Path, whole: Path, workers: int, say: Callable[[str], None]) -> int:
    """No file may be larger than a share of the largest of a whole run."""
    largest = max(path.stat().st_size for path in whole.rglob("*") if path.is_file())

    def attempt(number: int, size: int) -> str:
        return survive(inputs, folder / f"limit_{number}", whole, Limit(size))

    sizes = [largest * share // 8 for share in (6, 7)]  # below, what is printed is cut off too
    _all([(f"files of at most {size} bytes", size) for size in sizes], attempt, workers, say)
    return len(sizes)


def full(inputs: jobs.Inputs, folder: Path, whole: Path, say: Callable[[str], None]) -> int:
    """A file system that is full after some bytes, from none to nearly what a whole run needs; 0 without the right."""
    needed = sum(-(-path.stat().st_size // 4096) * 4096 for path in whole.rglob("*"))
    frees = [needed * share // 10 for share in range(10)]

    def attempt(number: int, free: int) -> str:
        with small_disk(folder / f"disk_{number}", 3 * needed) as disk:
            ballast = fill(disk, free)
            return survive(inputs, disk / "run", whole, int, ballast.unlink)

    try:
        _all([(f"{free} of {needed} bytes free", free) for free in frees], attempt, 1, say)
    except PermissionError as error:
        say(f"left out, a small file system cannot be mounted here: {error}")
        return 0
    return len(frees)


def reports(inputs: jobs.Inputs, folder: Path, run: Path, workers: int, say: Callable[[str], None]) -> int:
    """Each file of an evaluation cannot be written: one sentence, the earlier evaluation's files are whole."""
    arguments = [f"--runs={run}", f"--workdir={folder / 'evaluation'}"]
    code, said = jobs.run(inputs, arguments, script="launch.evaluate")
    jobs.expect(code == 0, said)
    before = {path.name: path.read_bytes() for path in (folder / "evaluation").iterdir()}

    def attempt(number: int, name: str, operation: str) -> str:
        workdir = folder / f"evaluation_{number}"
        shutil.copytree(folder / "evaluation", workdir)
        fault = Fault(workdir, operation, f"*{name}*")
        code, said = jobs.run(inputs, [arguments[0], f"--workdir={workdir}"], script="launch.evaluate", before=fault)
        sentences = [line for line in said.splitlines() if line.startswith("error: ")]
        jobs.expect(code == 1 and len(sentences) == 1 and name in sentences[0], f"{code}: {said[-1500:]}")
        after = {path.name: path.read_bytes() for path in workdir.iterdir()}
        jobs.expect(after.keys() == before.keys() and after[name] == before[name], f"{name} is not what it was")
        return sentences[0]

    operations = ("open", "write", "fsync", "rename")
    tries = [(f"{operations[i % 4]} {name}", name, operations[i % 4]) for i, name in enumerate(sorted(before))]
    _all(tries, attempt, workers, say)
    return len(tries)


def _all(tries: list[tuple], attempt: Callable[..., str], workers: int, say: Callable[[str], None]) -> None:
    """Make every attempt, ``(title, *arguments)``; all failures are raised together."""
    failures = []
    with futures.ThreadPoolExecutor(workers) as pool:
        running = [(title, pool.submit(attempt, i, *arguments)) for i, (title, *arguments) in enumerate(tries)]
        for title, future in running:
            try:
                say(f"{title}: {future.result()}")
            except jobs.Failure as failure:
                failures.append(f"{title}: {failure}")
    jobs.expect(not failures, "\n".join([f"{len(failures)} of {len(tries)} failed:", *failures]))


def main() -> None:
    """Run everything and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time")
    workers = parser.parse_args().workers
    start, say = time.monotonic(), functools.partial(print, flush=True)
    with tempfile.TemporaryDirectory(prefix="disk_") as name:
        folder = Path(name)
        inputs, whole = jobs.make_inputs(folder), folder / "whole"
        code, said = jobs.run(inputs, inputs.arguments(whole, method="sam_ft"))
        jobs.expect(code == 0, said)
        figures = {
            "file operations that failed": injected(inputs, folder, whole, workers, say),
            "limits on the size of files": limited(inputs, folder, whole, workers, say),
            "full file systems": full(inputs, folder, whole, say),
            "files of an evaluation": reports(inputs, folder, whole, workers, say),
        }
    for what, number in figures.items():
        print(f"{number:4d}  {what}")
    print(f"every run ended with one sentence and went on to the same end; {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
