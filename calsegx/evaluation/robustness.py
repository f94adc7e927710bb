"""How much a result hangs on exact prompts: the test cases again, with prompts that were moved at random."""

import csv
import dataclasses
import io
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calsegx import files
from calsegx.data import pipeline, prompts
from calsegx.evaluation import evaluate, methods, study
from calsegx.interfaces import UsageError

SEED = 2024  # of the jitter: the same for all runs, so that they are compared on the same prompts
REGION = "p>0.01"  # of the ECE
MEASURED = ((evaluate.DSC, evaluate.VOLUME), (evaluate.ECE, REGION))


@dataclass(frozen=True)
class Line:
    """One metric (class ``all``) of one method in one domain, at one amount of jitter."""

    domain: str
    method: str
    amount: float  # of the encoder frame's side; 0: the prompts as they are
    metric: str
    region: str
    mean: float  # over cases, then over seeds and draws; NaN when no case has a value
    sd_draws: float | None  # sample standard deviation of the draws' means; None for a single draw
    draws: int
    cases: int
    undefined: int  # of cases x seeds x draws


def check(amounts: Sequence[float], draws: int, protocol: str) -> None:
    """Before any work.

    Raises:
        UsageError: for amounts that are not in (0, 1) or repeated, no draw, and a protocol without prompts.
    """
    if not amounts:
        return
    if len(set(amounts)) < len(amounts) or not all(0 < amount < 1 for amount in amounts):
        given = ",".join(f"{amount:g}" for amount in amounts)
        raise UsageError(f"--prompt_jitter={given} must list different fractions of the frame's side, in (0, 1).")
    if draws < 1:
        raise UsageError(f"--prompt_draws={draws} must be at least 1.")
    if protocol == "none":
        raise UsageError("--prompt_jitter moves prompts, and the runs have none (protocol none); leave it out.")


def score(
    work: study.Study,
    subject: study.Subject,
    models: Sequence[study.Model],
    fits: study.Fits,
    amounts: Sequence[float],
    draws: int,
    image: Callable[[], np.ndarray] | None = None,
) -> dict[float, list[evaluate.Row]]:
    """Rows of ``MEASURED`` of one case by amount, for every method that looks at the image.

    The cached features are decoded again for every draw; all methods see the same prompts.  A row's ``seed`` is the
    number of the draw: the rows of several trainings have the same.
    """
    case, found = subject.case, {}
    for amount in amounts:
        rows = found[amount] = []
        for draw in range(draws):
            moved = jittered(work, subject, amount, draw)
            for method, _, probabilities, _ in study.predictions(work, moved, models, fits, {}, image):
                key = evaluate.CaseKey(method, draw, case.case_id, case.subject_id, work.domain(case), case.split)
                scored, _ = evaluate.evaluate_case(
                    probabilities, subject.truth, subject.spacing_mm, work.class_map.names, key, [REGION]
                )
                rows += [row for row in scored if _is_measured(row)]
    return found


def jittered(work: study.Study, subject: study.Subject, amount: float, draw: int) -> study.Subject:
    """The case with prompts moved by ``prompts.jitter``, seeded by case, slice, amount and draw.

    A volume's one pair of points moves alike on all slices.
    """
    given = pipeline.protocol_prompts(subject.cached.prompts, work.protocol)
    size, part = work.backbone.image_size, subject.geometry.resized_shape
    rows = []
    for row, number in enumerate(subject.cached.slices):
        place = 0 if work.protocol == "volume_points" else int(number)
        seed = [SEED, zlib.crc32(subject.case.case_id.encode()), place, round(amount * 1e6), draw]
        of_slice = given.map(lambda values, row=row: values[row])
        rows.append(prompts.jitter(of_slice, np.random.default_rng(seed), amount, size, part))
    moved = rows[0].map(lambda *fields: np.stack(fields), *rows[1:]) if rows else given
    return dataclasses.replace(subject, cached=subject.cached._replace(prompts={work.protocol: moved}))


def lines(rows: Iterable[evaluate.Row], moved: Mapping[float, Sequence[evaluate.Row]]) -> list[Line]:
    """The table: the evaluation's own ``rows`` are amount 0, ``moved`` those of ``score`` of all cases."""
    plain = [dataclasses.replace(row, seed=0) for row in rows if _is_measured(row)]
    found = []
    for amount, given in ({0.0: plain} | dict(moved)).items():
        for s in evaluate.summarise(row for row in given if row.method not in methods.PROMPT_ONLY):
            values = s.mean, s.sd_seeds, s.seeds, s.cases, s.undefined
            found.append(Line(s.domain, s.method, amount, s.metric, s.region, *values))
    order = {method: place for place, method in enumerate(methods.order(line.method for line in found))}
    measured = [metric for metric, _ in MEASURED]
    return sorted(found, key=lambda x: (x.domain, order[x.method], measured.index(x.metric), x.amount))


def write(path: Path, table: Sequence[Line]) -> None:
    """``prompt_jitter.csv``: one line per number; what does not exist is ``nan``."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(field.name for field in dataclasses.fields(Line))
    writer.writerows([math.nan if value is None else value for value in dataclasses.astuple(line)] for line in table)
    files.write_atomically(path, buffer.getvalue())


def _is_measured(row: evaluate.Row) -> bool:
    return row.class_name == evaluate.ALL and (row.metric, row.region) in MEASURED
