"""One process at a time in a folder, or at a piece of work."""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import filelock

from calsegx import files
from calsegx.interfaces import InputError

_LOCK, _HOLDER = ".lock", ".lock.json"


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system releases when the process ends, however it ends.

    ``.lock.json`` beside it says who holds it, for the message to others; what a dead process left there does not
    count.

    Raises:
        InputError: when another process holds it; at once, without waiting.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / _LOCK, timeout=0):
            holder = {"pid": os.getpid(), "host": socket.gethostname()}
            files.write_atomically(folder / _HOLDER, json.dumps(holder) + "\n")
            yield
            (folder / _HOLDER).unlink(missing_ok=True)
    except filelock.Timeout as error:
        raise InputError(
            f"{folder} is in use by another process{_holder(folder / _HOLDER)}; wait until it has ended or stop it, or "
            "name another folder."
        ) from error


def claim(path: Path) -> filelock.BaseFileLock | None:
    """Lock a file, which is created, without waiting: the lock, for any thread to release, or None if it is taken.

    The system frees it when the process ends, however it ends; the file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path, blocking=False, thread_local=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        return None
    return lock


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f" ({holder['pid']} on {holder['host']})"
    except (OSError, ValueError, KeyError, TypeError):  # it is being written, or was never
        return ""
