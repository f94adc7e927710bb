"""Side tables: which subject was scanned where, on what; BIDS' participants.tsv is one."""

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path

from calsegx.interfaces import DataError

SUBJECT = ("participant_id", "subject_id", "subject")
COLUMNS: Mapping[str, tuple[str, ...]] = {  # field of a case -> its column's names, the first that is filled counts
    "centre": ("centre", "center", "site", "institution_id"),
    "scanner": ("scanner", "manufacturer"),
    "field_strength": ("field_strength",),
}
_EMPTY = ("", "n/a")  # BIDS writes n/a


def read(path: Path) -> dict[str, dict[str, str]]:
    """Subject (without ``sub-``) -> ``centre``, ``scanner`` and ``field_strength``, those that the table gives.

    The table is separated by tabs or commas; upper and lower case of its columns do not matter, others are ignored.
    Several lines of a subject must say the same.

    Raises:
        DataError: naming the file, the line and the column.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text ({error}); save it again.") from error
    lines = text.splitlines()
    reader = csv.DictReader(lines, delimiter="\t" if lines and "\t" in lines[0] else ",", restval="")
    reader.fieldnames = [name.strip().casefold() for name in reader.fieldnames or ()]
    subject_column = next((name for name in SUBJECT if name in reader.fieldnames), None)
    if subject_column is None:
        raise DataError(
            f"{path}, line 1: no column names the subject; expected one of {', '.join(SUBJECT)}, separated by tabs or "
            f"commas; the columns are {', '.join(reader.fieldnames) or 'none'}."
        )
    found: dict[str, dict[str, str]] = {}
    for row in _rows(path, reader):
        if not row[subject_column].strip():
            raise DataError(f"{path}, line {reader.line_num}: no subject; name one, or remove the line.")
        cells = {name: (row.get(name) or "").strip() for names in COLUMNS.values() for name in names}
        values = {
            field: next(cells[name] for name in names if cells[name] not in _EMPTY)
            for field, names in COLUMNS.items()
            if any(cells[name] not in _EMPTY for name in names)
        }
        subject = plain(row[subject_column].strip())
        if found.setdefault(subject, values) != values:
            raise DataError(
                f"{path}, line {reader.line_num}: subject {subject!r} has {values}, but {found[subject]} further up; "
                "give every subject one centre, scanner and field strength."
            )
    return found


def _rows(path: Path, reader: csv.DictReader) -> Iterator[dict[str, str]]:
    try:
        yield from reader
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not readable as a table ({error}); save it again.") from error


def plain(subject: str) -> str:
    """The subject's name without BIDS' ``sub-``."""
    return subject.removeprefix("sub-")
