"""Bundles as folders and zips: written whole or not at all, and unpacked only where nothing is wrong with them."""

import os
import shutil
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from calsegx.bundle.check import NAME, require_encoder, sha256, verify
from calsegx.bundle.contents import ENCODER, MANIFEST, SUMS
from calsegx.interfaces import DataError, InputError, UsageError

_MOST_FILES, _HIGHEST_RATIO = 100, 100  # of a zip
_BROKEN_ZIP = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError)
_EPOCH = (1980, 1, 1, 0, 0, 0)  # a zip's earliest date: the same input gives the same bytes


def is_bundle(path: Path) -> bool:
    """Whether there is a zip, or a folder with a bundle's manifest or checksums."""
    return path.is_file() or any((path / name).exists() for name in (MANIFEST, SUMS))


def resolve(path: Path) -> Path:
    """The folder to load a model from: a run as it is, a bundle as ``open_bundle`` gives it."""
    return open_bundle(path) if is_bundle(path) else path


def open_bundle(path: Path) -> Path:
    """Check every file of a bundle; a zip is unpacked once, into the user's cache folder.

    Returns:
        The folder, for ``model_folder.load``.

    Raises:
        InputError: when anything about it is not as ``write`` left it.
    """
    folder = path
    if path.is_file():
        folder = _unpack(path)
    else:
        verify(path)
    require_encoder(folder, path)
    return folder


def check_output(output: Path) -> None:
    """Refuse an output that exists, unless it is an empty folder where a folder is to be written.

    Raises:
        UsageError: saying what to do.
    """
    empty = output.suffix != ".zip" and output.is_dir() and not output.is_symlink() and not any(output.iterdir())
    if os.path.lexists(output) and not empty:
        raise UsageError(f"--output={output} exists already; choose another name or delete it first.")


def write(output: Path, content: Mapping[str, bytes | Path]) -> None:
    """Write a bundle of these files, bytes or files to copy; a ``.zip`` or a folder, whole or not at all.

    Raises:
        UsageError: when ``output`` exists.
        InputError: when the bundle would be refused by ``open_bundle``, or the disk refuses.
    """
    check_output(output)
    temporary = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
        folder = temporary / "bundle"
        sums = []
        for name, source in sorted(content.items()):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(source, Path):
                shutil.copyfile(source, target)
            else:
                target.write_bytes(source)
            sums.append(f"{sha256(target)}  {name}\n")
        (folder / SUMS).write_text("".join(sums))
        verify(folder, output)
        if output.suffix == ".zip":
            _pack(folder, [*content, SUMS], temporary / "zip")
            folder = temporary / "zip"
        os.replace(folder, output)
    except OSError as error:
        raise InputError(
            f"The bundle {output} cannot be written ({error.strerror or error}); check the folder and the free space."
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _pack(folder: Path, names: Iterable[str], path: Path) -> None:
    """Weights do not compress, so nothing is compressed."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in sorted(names):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.external_attr = (stat.S_IFREG | 0o644) << 16
            entry.file_size = (folder / name).stat().st_size
            with (folder / name).open("rb") as stream, archive.open(entry, "w") as target:
                shutil.copyfileobj(stream, target, 1 << 20)


def _unpack(path: Path) -> Path:
    """The checked folder with the zip's content, named after the zip's SHA-256; one that was damaged is made again."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "calsegx" / "bundles"
    try:
        folder = base / sha256(path)
        if folder.is_dir():
            try:
                verify(folder)
                return folder
            except DataError:
                shutil.rmtree(folder)
        base.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory(prefix=".unpacking.", dir=base) as temporary:
            unpacked = Path(temporary) / "bundle"
            for entry in _checked_entries(path, archive):
                target = unpacked / entry.filename
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as source, target.open("xb") as stream:
                    shutil.copyfileobj(source, stream, 1 << 20)  # never more than the size that was checked
            verify(unpacked, path)
            _publish(unpacked, folder)
    except (*_BROKEN_ZIP, ValueError) as error:
        raise DataError(f"{path} is no whole zip of a model bundle ({error}); get the bundle again.") from error
    except OSError as error:
        raise InputError(f"The bundle {path} cannot be unpacked into {base} ({error.strerror or error}).") from error
    return folder


def _publish(unpacked: Path, folder: Path) -> None:
    try:
        os.replace(unpacked, folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster
            raise


def _checked_entries(path: Path, archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The files of a zip, after everything that can be wrong with them.

    Raises:
        DataError: for names that lead elsewhere or stand there twice, links, and sizes that only a bomb has.
    """
    entries = [entry for entry in archive.infolist() if entry.filename != f"{ENCODER}/"]
    names = [entry.filename for entry in entries]
    for entry in entries:
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if not NAME.fullmatch(entry.filename) or kind not in (0, stat.S_IFREG):
            raise DataError(
                f"{path} holds {entry.filename!r}, which does not belong into a bundle (a link, a folder, or a way "
                "out of it); the bundle's files must lie at the top of the zip."
            )
    if len({name.casefold() for name in names}) != len(names):
        raise DataError(f"{path} holds a file twice; get the bundle again.")
    size = path.stat().st_size
    packed, unpacked = sum(e.compress_size for e in entries), sum(e.file_size for e in entries)
    if len(entries) > _MOST_FILES or packed > size or unpacked > _HIGHEST_RATIO * size:
        raise DataError(
            f"{path} would unpack {len(entries)} files with {unpacked} bytes from {size}, which no bundle does; it is "
            "refused unopened."
        )
    return entries
