"""Files that appear whole or not at all, and JSON that knows when it was changed."""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calsegx.interfaces import InputError, UsageError


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
            f"{path} cannot be written ({error.strerror}); free some space or check the folder, then run again."
        ) from error


def seal(content: Mapping[str, Any]) -> str:
    """``content`` (JSON values) as JSON text that ends with the SHA-256 of the rest."""
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=2) + "\n"


def unseal(text: bytes) -> dict[str, Any]:
    """What was sealed.

    Raises:
        ValueError: when ``text`` is not, to the byte, what ``seal`` makes of its content.
    """
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, dict) or content.pop("sha256", None) is None or seal(content).encode() != text:
        raise ValueError("its content and its SHA-256 differ")
    return content


def split_page(page: Path, marks: tuple[str, str]) -> tuple[str, str]:
    """The page's text before the first and after the second marker comment.

    Raises:
        InputError: when there is no page, or it does not have both, in their order.
    """
    text = page.read_text() if page.is_file() else ""
    before, begin, rest = text.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not (begin and end):
        raise InputError(f"{page} is no page with the lines {marks[0]!r} and {marks[1]!r}; add them for the tables.")
    return before, after


def write_between(page: Path, marks: tuple[str, str], text: str) -> None:
    """Replace what stands between the page's marker comments; errors as of ``split_page``."""
    before, after = split_page(page, marks)
    write_atomically(page, f"{before}{marks[0]}\n\n{text}\n\n{marks[1]}{after}")


def check_outside(place: Path, dataset: Path, flag: str) -> None:
    """Refuse an output inside the dataset's folder, before the work.

    Raises:
        UsageError: naming ``flag``.
    """
    if place.resolve().is_relative_to(dataset.resolve()):
        raise UsageError(f"{flag}={place} lies inside the dataset, which is never written to; name another folder.")
