"""Checks of a bundle: every file against its checksum, and what the files say against each other."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from calsegx.bundle.contents import CALIBRATOR, ENCODER, FORMAT, INCLUDED, MANIFEST, REFERENCE, REQUIRED, SUMS, describe
from calsegx.calibrators import storage
from calsegx.interfaces import DataError
from calsegx.training import model_folder

NAME = re.compile(rf"(?!{ENCODER}$)({ENCODER}/)?[A-Za-z0-9_][A-Za-z0-9_.-]*")  # of files: none leads out of the bundle
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def verify(folder: Path, shown: Path | None = None) -> None:
    """Hold a bundle's files against its checksums, and what they say against each other.

    Hidden files at the top (``.gitattributes``) are not looked at, and never read.

    Args:
        folder: of the bundle.
        shown: what errors call it.

    Raises:
        DataError: naming the file that is missing, too many, damaged, or says something else than the model.
    """
    name = f"The bundle {shown or folder}"
    try:
        _verify_files(folder, name)
        _verify_content(folder, name)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{name} holds JSON that cannot be used ({error!r}); export it again.") from error


def _verify_files(folder: Path, name: str) -> None:
    sums, found = _read_sums(folder, name), _files(folder, name)
    manifest = _read(folder, MANIFEST, name) if MANIFEST in found else {}
    if manifest.get("format", FORMAT) not in range(1, FORMAT + 1):
        raise DataError(
            f"{name} has the format {manifest['format']!r}, but this calsegx knows {FORMAT} and older; update "
            f"calsegx (it was written by {manifest.get('calsegx')})."
        )
    # The user may add the encoder's weights where they were left out: their fingerprint is in model.json.
    added = {n for n in found if n.startswith(f"{ENCODER}/")} if manifest.get("encoder") == REFERENCE else set()
    for problem, names in (
        ("lacks", ({*sums, *REQUIRED} - found) | ({*REQUIRED} - sums.keys())),
        ("holds files that it does not list:", found - sums.keys() - {SUMS} - added),
        ("has damaged files:", {n for n in sums.keys() & found if sha256(folder / n) != sums[n]}),
    ):
        if names:
            raise DataError(f"{name} {problem} {', '.join(sorted(names))}; get the bundle again.")


def _verify_content(folder: Path, name: str) -> None:
    manifest, (_, record) = _read(folder, MANIFEST, name), model_folder.load(folder)
    for key in ("license", "derived_from"):
        if not isinstance(manifest[key], str) or not manifest[key].strip():
            raise DataError(f"{name} does not say its {key} in {MANIFEST}; export it again with it.")
    for document, described in describe(record).items():
        says = _read(folder, document, name)
        wrong = {key: says.get(key) for key, value in described.items() if says.get(key) != value}
        if wrong:
            raise DataError(
                f"{name} says {wrong} in {document}, but its model and this calsegx do "
                f"{ {key: described[key] for key in wrong} }; export it again."
            )
    config, calibrator = record["config"], None
    if (folder / CALIBRATOR).exists():
        calibrator, params = storage.load(folder / CALIBRATOR)
        if params["provenance"]["decoder_sha256"] != record["decoder_sha256"]:
            raise DataError(f"{name} has a calibrator that was fitted on another decoder; export it again.")
    if manifest["calibrator"] != calibrator:
        raise DataError(f"{name} should hold the calibrator {manifest['calibrator']}, but holds {calibrator}.")
    data, model = config["data"], config["model"]
    losses = config["loss"], config["fisher"]["loss"]
    for text in (model["backbone"], data.get("intensity", ""), data["layout"], *losses, calibrator or ""):
        if ":" in text:
            raise DataError(f"{name} asks for code from outside calsegx ({text}), which no bundle may choose.")
    own = str(folder / ENCODER)
    places = (own,) if manifest["encoder"] == INCLUDED else (own, "")
    if data["root"] or data["cache"] or model["weights"] not in places:
        raise DataError(f"{name} names files outside of it in model.json; export it again.")


def require_encoder(folder: Path, shown: Path) -> None:
    """Refuse a bundle, verified, whose encoder was left out and has not been put there.

    Raises:
        DataError: saying which it is.
    """
    name = f"The bundle {shown}"
    record = _read(folder, "model.json", name)
    weights = record["config"]["model"]["weights"]
    if weights and not (folder / weights).is_dir():
        raise DataError(
            f"{name} comes without its encoder; unpack it if it is a zip, and put the weights folder with "
            f"the fingerprint {record['backbone'][:12]} into it as {ENCODER}."
        )


def _read(folder: Path, file: str, name: str) -> dict[str, Any]:
    try:
        content = json.loads((folder / file).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{name} has a damaged {file} ({error}); get the bundle again.") from error
    if not isinstance(content, dict):
        raise DataError(f"{name} has a damaged {file} (it holds no object); get the bundle again.")
    return content


def _read_sums(folder: Path, name: str) -> dict[str, str]:
    path = folder / SUMS
    if not path.is_file() or path.is_symlink():
        raise DataError(f"{name} lacks {SUMS}; get the bundle again.")
    matches = [_LINE.fullmatch(line) for line in path.read_text(errors="replace").splitlines()]
    found = {match[2]: match[1] for match in matches if match and NAME.fullmatch(match[2])}
    if len(found) != len(matches):
        raise DataError(f"{name} has a damaged {SUMS}: a line is no checksum of a bundle's file, or repeats one.")
    return found


def _files(folder: Path, name: str) -> set[str]:
    """The names of all files, ``/`` between folders.

    Raises:
        DataError: for a link, or a folder other than the encoder's.
    """
    found = set()
    for path in _walk(folder):
        relative = path.relative_to(folder).as_posix()
        if path.is_symlink() or not NAME.fullmatch(relative) or not path.is_file():
            raise DataError(f"{name} holds {relative!r}, which is a link, a folder or a name that it cannot have.")
        found.add(relative)
    return found


def _walk(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name == ENCODER and path.is_dir() and not path.is_symlink():
            yield from path.iterdir()
        elif not path.name.startswith("."):
            yield path


def sha256(path: Path) -> str:
    """Checksum of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
