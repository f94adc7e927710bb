"""Files that appear whole or not at all."""

import contextlib
import os
from pathlib import Path

from calsegx.interfaces import InputError


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file through a temporary one in the same folder, flushed to disk and then renamed; text is UTF-8.

    Raises:
        InputError: when the disk refuses; nothing is left behind, and what was there before is untouched.
    """
    content = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # a folder that is not there, or not ours
            temporary.unlink()
        raise InputError(
            f"{path} cannot be written ({error.strerror}); check the folder and the free space, then run again."
        ) from error
