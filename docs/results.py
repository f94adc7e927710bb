"""docs/results/phantoms.md and the table of the README, from the phantoms' experiment: ``make results``.

``python docs/results.py EXPERIMENT "38 minutes on two CPU cores"`` reads the folder of an experiment of
``configs/phantoms.yaml``, which took that long, into ``docs/results/phantoms.json`` and writes both from it;
without arguments they are written from the JSON as it is.
"""

import dataclasses
import json
import math
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jinja2
import numpy as np

from calsegx import __version__, files
from calsegx.evaluation import compare, evaluate, methods, tables
from calsegx.metrics import statistics

ROOT = Path(__file__).parent.parent
CONTENT, PAGE, README = ROOT / "docs/results/phantoms.json", ROOT / "docs/results/phantoms.md", ROOT / "README.md"
MARKS = "<!-- docs/results.py: begin -->", "<!-- docs/results.py: end -->"
DSC, ECE = (evaluate.DSC, evaluate.VOLUME), (evaluate.ECE, "p>0.01")
SHOWN = (DSC, ECE, (evaluate.ECE, "dilated"), (evaluate.BRIER, "dilated"))
PROTOCOLS = {"gt_points": "at the centroid", "random_points": "at random"}
SCANNERS = {"A": "scanner A, which was trained on", "B": "scanner B, never seen"}
REFERENCES = ("sam_ft", "sam_ft+ts", "early_stopping", "early_stopping+ts")
OURS = ("sam_fip", "sam_cmp", "calsam")
README_SCALED = ("sam_ft", "sam_fip", "calsam")  # shown with temperature scaling too
README_COLUMNS = (("A", *DSC), ("B", *DSC), ("A", *ECE), ("B", *ECE), ("B", evaluate.ECE, "dilated"))


def read(experiment: Path, took: str) -> dict[str, Any]:
    """All that the page and the README say, JSON-able."""
    content: dict[str, Any] = {
        "took": took,
        "versions": f"calsegx {__version__}, jax {jax.__version__}, Python {platform.python_version()}",
        "selection": {},
        "summaries": {},
        "comparisons": {},
    }
    for protocol in PROTOCOLS:
        found = json.loads((experiment / "selection" / f"fold0_{protocol}.json").read_text())
        content["rule"] = found["rule"]
        content["selection"][protocol] = found["methods"]
        rows = tables.read_cases(experiment / "evaluation" / "fold0" / protocol / "cases.csv")
        content["subjects"] = len({row.subject_id for row in rows})
        content["summaries"][protocol] = _summaries(rows)
        content["comparisons"][protocol] = _comparisons(rows)
    return content


def _summaries(rows: Sequence[evaluate.Row]) -> list[dict[str, Any]]:
    indexed = compare.index(rows)
    found = []
    for s in evaluate.summarise(rows):
        if s.class_name == evaluate.ALL and (s.metric, s.region) in SHOWN:
            interval = compare.interval(indexed, s.method, s.domain, s.metric, s.region)
            found.append(dataclasses.asdict(s) | {"low": interval.low, "high": interval.high})
    return found


def _comparisons(rows: Sequence[evaluate.Row]) -> list[dict[str, Any]]:
    """Each of ours against each rival; p is Holm-corrected within a domain and metric."""
    indexed, present = compare.index(rows), {row.method for row in rows}
    pairs = [(ours + suffix, rival) for rival in REFERENCES for ours in OURS for suffix in ("", methods.CALIBRATED)]
    pairs = [(o, r) for o, r in pairs if {o, r} <= present and methods.calibrated(r) >= methods.calibrated(o)]
    found = []
    for domain in SCANNERS:
        for metric in SHOWN:
            compared = [compare.compare(indexed, *pair, domain, *metric) for pair in pairs]
            for c, p in zip(compared, statistics.holm(np.array([c.p_value for c in compared])), strict=True):
                unsure = c.verdict in (compare.BETTER, compare.WORSE) and not p < compare.SIGNIFICANCE
                verdict = compare.NO_DIFFERENCE if unsure else c.verdict
                found.append(dataclasses.asdict(c) | {"p_value": float(p), "verdict": verdict})
    return found


def page(content: Mapping[str, Any]) -> str:
    """docs/results/phantoms.md."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    results = [
        (
            words,
            _results(content["summaries"][protocol]),
            [(where, _differences(content["comparisons"][protocol], domain)) for domain, where in SCANNERS.items()],
        )
        for protocol, words in PROTOCOLS.items()
    ]
    text = environment.from_string(PAGE.with_suffix(".md.j2").read_text()).render(
        content=content,
        findings=_findings(content),
        smallest_p=f"{2 * 0.5 ** content['subjects']:.1g}",
        selections=[(words, _selection(content["selection"][protocol])) for protocol, words in PROTOCOLS.items()],
        results=results,
    )
    return text.rstrip() + "\n"


def _findings(content: Mapping[str, Any]) -> str:
    """One line per protocol, scanner, addition and rival."""
    lines = ["| | | DSC | ECE [p>0.01] | ECE [dilated] | Brier [dilated] |", "|---|---|---|---|---|---|"]
    for protocol, words in PROTOCOLS.items():
        for domain in SCANNERS:
            lines.append(f"| **Scanner {domain}, points {words}** | | | | | |")
            found = {
                (c["method"], c["reference"], c["metric"], c["region"]): c["verdict"]
                for c in content["comparisons"][protocol]
                if c["domain"] == domain
            }
            for method, reference in dict.fromkeys(key[:2] for key in found):
                if not methods.calibrated(method):
                    cells = [found[method, reference, *metric] for metric in SHOWN]
                    cells = [f"**{cell}**" if cell in (compare.BETTER, compare.WORSE) else "no diff." for cell in cells]
                    lines.append(
                        f"| {methods.display(method)} | against {methods.display(reference)} | {' | '.join(cells)} |"
                    )
    return "\n".join(lines)


def _selection(selection: Mapping[str, Any]) -> str:
    lines = ["| Method | Candidate | DSC (points) | ECE [p>0.01] | |", "|---|---|---:|---:|---|"]
    for method, found in selection.items():
        for candidate in found["candidates"]:
            weights = ", ".join(f"{key} {value:g}" for key, value in candidate["weights"].items()) or "as it is"
            chosen = "chosen" if len(found["candidates"]) > 1 and candidate["weights"] == found["chosen"] else ""
            scores = f"{100 * candidate['dsc']:.1f} | {candidate['value']:.3f}"
            lines.append(f"| {methods.display(method)} | {weights} | {scores} | {chosen} |")
    return "\n".join(lines)


def _results(summaries: Iterable[Mapping[str, Any]]) -> str:
    columns = [(domain, *metric) for domain in SCANNERS for metric in SHOWN]
    found = {(s["method"], s["domain"], s["metric"], s["region"]): s for s in summaries}
    lines = [
        "| | " + " | ".join(f"{_column(*column[1:]).title} {column[0]}" for column in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for method in methods.order(key[0] for key in found):
        cells = [_number(found[method, *column], True) for column in columns]
        lines.append(f"| {methods.display(method)} | {' | '.join(cells)} |")
    undefined = sum(s["undefined"] for s in found.values())
    return "\n".join([*lines, "", f"Undefined values: {undefined}."])


def _differences(comparisons: Iterable[Mapping[str, Any]], domain: str) -> str:
    found = {(c["method"], c["reference"], c["metric"], c["region"]): c for c in comparisons if c["domain"] == domain}
    lines = [
        "| Method | against | " + " | ".join(_column(*metric).title for metric in SHOWN) + " |",
        "|---|---|" + "---:|" * 4,
    ]
    for method, reference in dict.fromkeys(key[:2] for key in found):
        cells = [_difference(found[method, reference, *metric]) for metric in SHOWN]
        lines.append(f"| {methods.display(method)} | {methods.display(reference)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _difference(c: Mapping[str, Any]) -> str:
    column = _column(c["metric"], c["region"])
    number, low, high = (tables.number(column, c[key], None, True) for key in ("difference", "low", "high"))
    p = "" if math.isnan(c["p_value"]) else f", p = {c['p_value']:.2g}"
    return f"{number} [{low}, {high}]{p}, {c['verdict']}"


def _column(metric: str, region: str) -> tables.Column:
    return next(column for column in tables.COLUMNS if (column.metric, column.region) == (metric, region))


def _number(summary: Mapping[str, Any], interval: bool = False) -> str:
    column = _column(summary["metric"], summary["region"])
    text = tables.number(column, summary["mean"], summary["sd_seeds"])
    if not interval:
        return text
    return f"{text} [{tables.number(column, summary['low'], None)}, {tables.number(column, summary['high'], None)}]"


def readme_table(content: Mapping[str, Any]) -> str:
    """The README's table: centroid points."""
    found = {(s["method"], s["domain"], s["metric"], s["region"]): s for s in content["summaries"]["gt_points"]}
    titles = [f"{_column(*column[1:]).title.removesuffix(' (points)')} on {column[0]}" for column in README_COLUMNS]
    lines = [f"| | {' | '.join(titles)} |", "|---|" + "---:|" * len(titles)]
    for method in methods.order(key[0] for key in found):
        if methods.calibrated(method) and methods.base(method) not in README_SCALED:
            continue
        cells = [_number(found[method, *column]) for column in README_COLUMNS]
        lines.append(f"| {methods.display(method)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write(content: Mapping[str, Any]) -> None:
    """The page and the README's table."""
    files.write_atomically(PAGE, page(content))
    files.write_between(README, MARKS, readme_table(content))
    print(f"Wrote {PAGE} and the table of {README}.")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        read_content = read(Path(sys.argv[1]), sys.argv[2])
        files.write_atomically(CONTENT, json.dumps(read_content, indent=1) + "\n")
    write(json.loads(CONTENT.read_text()))
