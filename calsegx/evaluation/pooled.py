"""The tables of an experiment: its evaluations put together, fold by fold and, where every fold tests others, as one.

``cases.csv`` has four columns more than an evaluation's: ``fold``, ``training_subjects`` (0: all), ``protocol`` (of the
prompts) and ``images`` (``as they are`` or ``corrupted``).
"""

import csv
import dataclasses
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from calsegx import files
from calsegx.evaluation import evaluate, tables

AS_THEY_ARE, CORRUPTED = "as they are", "corrupted"


@dataclass(frozen=True)
class Part:
    """What was evaluated alike on one fold."""

    fold: str
    training_subjects: int  # 0: all of the fold
    protocol: str
    images: str  # AS_THEY_ARE or CORRUPTED
    source: str  # the domain that gaps are measured from; empty: none
    rows: Sequence[evaluate.Row]


def joined(parts: Iterable[Part]) -> list[Part]:
    """Parts of one fold, size, protocol and kind of images as one, in the order in which they first appear."""
    found: dict[tuple[str, int, str, str, str], list[evaluate.Row]] = {}
    for part in parts:
        key = (part.fold, part.training_subjects, part.protocol, part.images, part.source)
        found.setdefault(key, []).extend(part.rows)
    return [Part(*key, rows) for key, rows in found.items()]


def write_cases(path: Path, parts: Sequence[Part]) -> None:
    """One line per number of all evaluations, atomically."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    own = ["fold", "training_subjects", "protocol", "images"]
    writer.writerow(own + ["class" if name == "class_name" else name for name in tables.FIELDS])
    for part in parts:
        labels = [getattr(part, name) for name in own]
        writer.writerows([*labels, *dataclasses.astuple(row)] for row in part.rows)
    files.write_atomically(path, buffer.getvalue())


def overview(parts: Sequence[Part], kind: str, pool: bool) -> list[tables.Block]:
    """Methods by metrics: for every size, protocol and kind of images first all folds pooled, then fold by fold.

    Args:
        parts: ``joined``.
        kind: what a domain is, for the titles.
        pool: whether no two folds test the same case, so that the mean over all cases of a seed means something.
    """
    families: dict[tuple[int, str, str], list[Part]] = {}
    for part in parts:
        families.setdefault((part.training_subjects, part.protocol, part.images), []).append(part)
    blocks = []
    for (subjects, protocol, images), members in families.items():
        about = [f"prompts {protocol}"]
        about += [f"{subjects} training subjects"] if subjects else []
        about += [images] if images != AS_THEY_ARE else []
        if pool and len(members) > 1 and images == AS_THEY_ARE:
            rows = [dataclasses.replace(row, domain="") for part in members for row in part.rows]
            found = tables.overview(rows, "", [])
            blocks += _titled(found, ", ".join([f"all {len(members)} folds pooled", *about]))
        for part in members:
            lead = ", ".join([*([f"fold {part.fold}"] if part.fold else []), *about])
            targets = sorted({row.domain for row in part.rows} - {part.source})
            of_domains = kind if images == AS_THEY_ARE else ""
            blocks += _titled(tables.overview(part.rows, part.source, targets, of_domains), lead)
    return blocks


def _titled(blocks: Iterable[tables.Block], lead: str) -> list[tables.Block]:
    return [dataclasses.replace(block, title=f"{lead}; {block.title}") for block in blocks if block.rows]
