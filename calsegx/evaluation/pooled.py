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
IN, OUT = "seen domains", "unseen domains"  # of a case, where folds are trained on different domains


@dataclass(frozen=True)
class Part:
    """What was evaluated alike on one fold."""

    fold: str
    training_subjects: int  # 0: all of the fold
    protocol: str
    images: str  # AS_THEY_ARE or CORRUPTED
    source: str  # the domain that gaps are measured from; empty: none
    rows: Sequence[evaluate.Row]
    reports: tuple[str, ...] = ()  # of the evaluations, as paths relative to the experiment's folder


@dataclass(frozen=True)
class Family:
    """Parts that differ in the fold alone."""

    training_subjects: int
    protocol: str
    images: str
    parts: Sequence[Part]

    @property
    def title(self) -> str:
        """What the parts have in common, for headings."""
        about = [f"prompts {self.protocol}"]
        about += [f"{self.training_subjects} training subjects"] if self.training_subjects else []
        return ", ".join(about + ([self.images] if self.images != AS_THEY_ARE else []))

    @property
    def folder(self) -> str:
        """Part of the path of its tables."""
        size = f"subjects{self.training_subjects}/" if self.training_subjects else ""
        return f"{size}{self.protocol}" + ("_corrupted" if self.images == CORRUPTED else "")


@dataclass(frozen=True)
class Pool:
    """All folds of a family together."""

    rows: Sequence[evaluate.Row]
    source: str
    targets: Sequence[str]
    kind: str  # what a domain is; empty where domains are not the dataset's


def joined(parts: Iterable[Part]) -> list[Part]:
    """Parts of one fold, size, protocol and kind of images as one, in the order in which they first appear."""
    found: dict[tuple[str, int, str, str, str], list[evaluate.Row]] = {}
    reports: dict[tuple[str, int, str, str, str], tuple[str, ...]] = {}
    for part in parts:
        key = (part.fold, part.training_subjects, part.protocol, part.images, part.source)
        found.setdefault(key, []).extend(part.rows)
        reports[key] = reports.get(key, ()) + part.reports
    return [Part(*key, rows, reports[key]) for key, rows in found.items()]


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


def families(parts: Iterable[Part]) -> list[Family]:
    """Parts that differ in the fold alone, in the order in which they first appear."""
    found: dict[tuple[int, str, str], list[Part]] = {}
    for part in parts:
        found.setdefault((part.training_subjects, part.protocol, part.images), []).append(part)
    return [Family(*key, members) for key, members in found.items()]


def pool(family: Family, kind: str) -> Pool:
    """All folds of a family as the rows of one evaluation.

    Where folds are trained on different domains, every case counts as of a seen or an unseen domain; where every fold
    tests other cases, all cases together are the test cases.  One fold stays as it is.

    Args:
        family: of ``families``.
        kind: what a domain is.
    """
    first, *others = family.parts
    rows = [row for part in family.parts for row in part.rows]
    if family.images == CORRUPTED or not others:
        targets = sorted({row.domain for row in rows} - {first.source})
        return Pool(rows, first.source, targets, kind if family.images == AS_THEY_ARE else "")
    if all(part.source for part in family.parts):
        named = [
            dataclasses.replace(row, domain=IN if row.domain == part.source else OUT)
            for part in family.parts
            for row in part.rows
        ]
        return Pool(named, IN, [OUT], "")
    return Pool([dataclasses.replace(row, domain="") for row in rows], "", [], "")


def overview(parts: Sequence[Part], kind: str) -> list[tables.Block]:
    """Methods by metrics: for every size, protocol and kind of images first all folds pooled, then fold by fold.

    Args:
        parts: ``joined``.
        kind: what a domain is, for the titles.
    """
    blocks = []
    for family in families(parts):
        if len(family.parts) > 1:
            found = pool(family, kind)
            pooled = tables.overview(found.rows, found.source, found.targets, found.kind)
            blocks += _titled(pooled, f"all {len(family.parts)} folds pooled, {family.title}")
        for part in family.parts:
            lead = ", ".join([*([f"fold {part.fold}"] if part.fold else []), family.title])
            targets = sorted({row.domain for row in part.rows} - {part.source})
            of_domains = kind if family.images == AS_THEY_ARE else ""
            blocks += _titled(tables.overview(part.rows, part.source, targets, of_domains), lead)
    return blocks


def _titled(blocks: Iterable[tables.Block], lead: str) -> list[tables.Block]:
    return [dataclasses.replace(block, title=f"{lead}; {block.title}") for block in blocks if block.rows]
