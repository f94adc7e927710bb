"""Dataset layouts: ``read(root) -> Dataset``, or None when the folder is of another layout.

A new layout is one new file here that registers its reader.  The first line of the reader's docstring says
what it looks for; it is shown when no layout matches.
"""

import difflib
from collections.abc import Callable
from pathlib import Path

from calsegx.interfaces import DataError, Dataset
from calsegx.registry import Registry

registry: Registry[Callable[[Path], Dataset | None]] = Registry("dataset layout", "calsegx.data.layouts")

HAND_WRITTEN = "table"  # what a person wrote counts for more than what a layout guesses


def detect(root: Path, name: str = "auto") -> Dataset:
    """Read the dataset in ``root``; see ``recognise``."""
    return recognise(root, name)[1]


def recognise(root: Path, name: str = "auto") -> tuple[str, Dataset]:
    """The layout's name, and the dataset; layout ``auto``: a cases.tsv if there is one, else the first match.

    Raises:
        UsageError: for an unknown layout.
        DataError: for a missing or empty folder, or one that no layout recognises.
    """
    if name != "auto":
        _check_folder(root)
        dataset = registry.get(name)(root)
        if dataset is None:
            raise DataError(f"{root} is not of the layout {_describe(name)}; try --config.data.layout=auto.")
        return name, dataset
    found = first_match(root)
    if found is None:
        looked_for = "; ".join(_describe(candidate) for candidate in _order())
        raise DataError(f"{root} is of no known layout; looked for: {looked_for}; write a cases.tsv to describe it.")
    return found


def first_match(root: Path) -> tuple[str, Dataset] | None:
    """The first layout that recognises ``root``, and the dataset; None when there is none.

    Raises:
        DataError: for a missing or empty folder.
    """
    _check_folder(root)
    for candidate in _order():
        dataset = registry.get(candidate)(root)
        if dataset is not None:
            return candidate, dataset
    return None


def _order() -> list[str]:
    return [HAND_WRITTEN, *(other for other in registry.names() if other != HAND_WRITTEN)]


def _check_folder(root: Path) -> None:
    if not root.is_dir():
        raise DataError(f"The dataset folder {root} does not exist or is a file; check its name{_nearest(root)}.")
    if not any(root.iterdir()):
        raise DataError(f"The dataset folder {root} is empty; put the dataset there or name another.")


def _nearest(root: Path) -> str:
    names = [entry.name for entry in root.parent.iterdir() if entry.is_dir()] if root.parent.is_dir() else []
    near = difflib.get_close_matches(root.name, names, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _describe(name: str) -> str:
    lines = (registry.get(name).__doc__ or "").strip().splitlines()
    return f"{name} ({lines[0].rstrip('.')})" if lines else name
