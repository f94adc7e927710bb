"""Walking folders of NIfTI files: what the readers of fixed file names share."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from calsegx.data import nifti
from calsegx.interfaces import Case, DataError


def folders(root: Path, depth: int) -> Iterator[Path]:
    """The folders below ``root``, down to ``depth`` levels, sorted, without hidden ones."""
    for path in sorted(root.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            yield path
            if depth > 1:
                yield from folders(path, depth - 1)


def nifti_files(folder: Path) -> list[Path]:
    """The NIfTI files in ``folder``, sorted, without hidden ones."""
    return sorted(p for p in folder.iterdir() if not p.name.startswith(".") and p.name.endswith(nifti.ENDINGS))


def images(folder: Path, prefix: str) -> dict[str, Path]:
    """The NIfTI files in ``folder`` whose names start with ``prefix``, by what follows up to the ending.

    Raises:
        DataError: when one image is there twice, as ``.nii.gz`` and as ``.nii``.
    """
    found: dict[str, Path] = {}
    for path in sorted(path for path in folder.glob("*") if path.name.startswith(prefix)):
        ending = next((ending for ending in nifti.ENDINGS if path.name.endswith(ending)), None)
        if ending is None:
            continue
        name = path.name.removeprefix(prefix).removesuffix(ending)
        if name in found:
            raise DataError(f"{found[name]} and {path} are one image twice; move one of them away.")
        found[name] = path
    return found


def distinct(root: Path, cases: Sequence[Case]) -> tuple[Case, ...]:
    """The cases, sorted by name.

    Raises:
        DataError: when two folders hold the same case.
    """
    first: dict[str, Case] = {}
    for case in cases:
        other = first.setdefault(case.case_id, case)
        if other is not case:
            places = " and ".join(str(next(iter(c.images.values())).parent) for c in (other, case))
            raise DataError(f"Case {case.case_id!r} is twice in {root} ({places}); move one of them away.")
    return tuple(first[case_id] for case_id in sorted(first))
