"""Results in the layouts of the papers' tables (CalSAM 1 to 3, MbLS, NACL), as Markdown and LaTeX.

The layouts are the papers', the definitions are ours, and every caption says where the two differ.  A cell that the
experiment cannot fill is a rule, with a note below the table.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from calsegx.evaluation import evaluate, latex, methods, tables, transfer
from calsegx.evaluation import record as words
from calsegx.evaluation.record import DSC, ECE, Record
from calsegx.metrics import ranks, statistics

RULE = "—"  # a cell that cannot be filled
HD95 = (evaluate.HD95, evaluate.VOLUME)
CECE = (evaluate.CECE, "p>0.01")
PAPERS_ECE, PAPERS_CECE = ((metric, evaluate.PAPERS_REGION) for metric in (evaluate.ECE, evaluate.CECE))
CALSAM = (DSC, HD95, ECE)
MBLS = (DSC, HD95, ECE, CECE)


@dataclass(frozen=True)
class Table:
    """A table with two rows of headings."""

    name: str  # of its files
    caption: str
    groups: Sequence[tuple[str, int]]  # heading over how many columns; the first column has none
    heads: Sequence[str]  # of the columns, the first one's too
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]


class _Numbers:
    """Means of a record, and how many of their values are undefined."""

    def __init__(self, record: Record):
        self.record = record
        self._found = {
            (s.method, s.domain, s.metric, s.region): s
            for s in evaluate.summarise(row for row in record.rows if row.class_name == evaluate.ALL)
        }
        self.names = methods.order(row.method for row in record.rows)

    def mean(self, method: str, domain: str, metric: tuple[str, str]) -> float:
        found = self._found.get((method, domain, *metric))
        return found.mean if found else math.nan

    def text(self, method: str, domain: str, metric: tuple[str, str]) -> str:
        found = self._found.get((method, domain, *metric))
        return RULE if found is None or math.isnan(found.mean) else _shown(metric, found.mean, found.sd_seeds)

    def caption(self, lead: str, domains: Sequence[str], metrics: Sequence[tuple[str, str]]) -> str:
        """``lead`` with the definition of every metric and how many of its values are undefined in this table."""
        said = []
        for metric in metrics:
            found = [self._found.get((name, domain, *metric)) for name in self.names for domain in domains]
            undefined, values = (sum(getattr(s, key) for s in found if s) for key in ("undefined", "values"))
            said.append(f"{_title(metric)}: {_definition(metric)}; undefined {undefined} of {values} values.")
        return " ".join(
            [
                f"{lead} Mean over cases, then over seeds; ± is the standard deviation over seeds. Prompts: "
                f"{self.record.protocol}.",
                *said,
            ]
        )


def calsam_domains(record: Record) -> Table:
    """CalSAM's Table 1: every method in and out of its training domain, and the gap, by DSC, HD95 and ECE."""
    numbers = _Numbers(record)
    target = _target(record)
    rows = []
    for name in numbers.names:
        cells = []
        for metric in CALSAM:
            inside, outside = (numbers.mean(name, domain, metric) for domain in (record.source, target))
            gap = statistics.generalisation_gap(inside, outside, evaluate.higher_is_better(metric[0]))
            cells += [numbers.text(name, domain, metric) for domain in (record.source, target)]
            cells.append(RULE if math.isnan(gap) else _shown(metric, gap, None, True))
        rows.append([methods.display(name), *cells])
    here, there = (words.place(record, domain) for domain in (record.source, target))
    lead = (
        f"Layout of CalSAM's Table 1: {here} against {there}. The gap is the mean here minus the mean there, positive "
        'where the method degrades; the paper\'s column "Domain Gap" is not the difference of its own columns. The '
        "paper does not say on which voxels its ECE is."
    )
    return Table(
        "calsam_table1",
        numbers.caption(lead, (record.source, target), CALSAM),
        [(_title(metric), 3) for metric in CALSAM],
        ["Method", *["in", "out", "gap"] * len(CALSAM)],
        rows,
        _notes(rows),
    )


def calsam_shifts(record: Record) -> Table:
    """CalSAM's Table 2: every method under every shift: a corruption (mean over its levels) or a target domain."""
    numbers = _Numbers(record)
    levels = transfer.corruptions(words.domains(record))
    shifts = {name: [d for level, d in found.items() if level] for name, found in levels.items()}
    shifts = shifts or {words.place(record, d): [d] for d in words.domains(record) if d != record.source}
    rows = []
    for name in numbers.names:
        cells = []
        for domains in shifts.values():
            for metric in CALSAM:
                found = [numbers.mean(name, domain, metric) for domain in domains]
                one = numbers.text(name, domains[0], metric)
                mean = RULE if any(map(math.isnan, found)) else _shown(metric, float(np.mean(found)), None)
                cells.append(one if len(domains) == 1 else mean)
        rows.append([methods.display(name), *cells])
    lead = f"Layout of CalSAM's Table 2: results under {'corruption, mean over the levels' if levels else 'shift'}."
    return Table(
        "calsam_table2",
        numbers.caption(lead, [domain for found in shifts.values() for domain in found], CALSAM),
        [(name, len(CALSAM)) for name in shifts],
        ["Method", *[_title(metric) for metric in CALSAM] * len(shifts)],
        rows,
        _notes(rows),
    )


def calsam_ablation(record: Record) -> Table:
    """CalSAM's Table 3: SAM-FT with and without FIP and CMP; all four lines, whatever was trained."""
    numbers = _Numbers(record)
    domains = words.domains(record)
    kinds = {"sam_ft": (False, False), "sam_fip": (True, False), "sam_cmp": (False, True), "calsam": (True, True)}
    rows = [
        [
            *("yes" if term else "no" for term in terms),
            *(numbers.text(name, domain, metric) for domain in domains for metric in CALSAM),
        ]
        for name, terms in kinds.items()
    ]
    lead = "Layout of CalSAM's Table 3: what FIP and CMP add to SAM-FT, alone and together."
    absent = [f"{methods.display(name)} is not in the experiment." for name in kinds if name not in numbers.names]
    return Table(
        "calsam_table3",
        numbers.caption(lead, domains, CALSAM),
        [("", 1), *((words.place(record, domain), len(CALSAM)) for domain in domains)],
        ["FIP", "CMP", *[_title(metric) for metric in CALSAM] * len(domains)],
        rows,
        [*_notes(rows), *absent],
    )


def mbls(record: Record) -> Table:
    """The layout of MbLS: DSC, HD95, ECE and CECE of every method on every data set, here: on every domain."""
    numbers, domains = _Numbers(record), words.domains(record)
    metrics = (*MBLS, PAPERS_ECE, PAPERS_CECE)
    rows = [
        [methods.display(n), *(numbers.text(n, domain, metric) for domain in domains for metric in metrics)]
        for n in numbers.names
    ]
    lead = (
        "Layout of the tables of MbLS, a domain in the place of a data set. The paper measures calibration on the "
        f"voxels of the true foreground ({evaluate.PAPERS_REGION}), which favours over-confidence, and the distance in "
        "voxels; here it is in mm."
    )
    return Table(
        "mbls",
        numbers.caption(lead, domains, metrics),
        [(words.place(record, domain), len(metrics)) for domain in domains],
        ["Method", *[_title(metric) for metric in metrics] * len(domains)],
        rows,
        _notes(rows),
    )


def nacl(record: Record) -> Table:
    """The layout of NACL: as MbLS, with the sum of ranks, Friedman's rank over all columns, and the final rank."""
    numbers, domains = _Numbers(record), words.domains(record)
    columns = [(domain, metric) for domain in domains for metric in MBLS]
    means = np.array([[numbers.mean(name, *column) for column in columns] for name in numbers.names])
    higher = [evaluate.higher_is_better(metric) for _, (metric, _) in columns]
    ranked = ranks.mean_rank(means.reshape(len(numbers.names), len(columns)), higher, ties="min")
    rows = []
    for index, name in enumerate(numbers.names):
        value, final = ranked.value[index], ranked.final[index]
        known = not math.isnan(value)
        shown = [f"{value * ranked.columns:g}", f"{value:.2f}", f"{final:g}"] if known else [RULE] * 3
        rows.append([methods.display(name), *(numbers.text(name, *column) for column in columns), *shown])
    lead = (
        "Layout of the tables of NACL, a domain in the place of a data set. Ranks are of the means within each column, "
        f"ties share the smaller rank as in the papers, over the {ranked.columns} columns in which every method has a "
        f"value ({ranked.dropped} left out); Friedman rank: their mean; final rank: the rank of that mean."
    )
    return Table(
        "nacl",
        numbers.caption(lead, domains, MBLS),
        [*((words.place(record, domain), len(MBLS)) for domain in domains), ("Ranks", 3)],
        ["Method", *[_title(metric) for metric in MBLS] * len(domains), "sum", "Friedman", "final"],
        rows,
        _notes(rows),
    )


def of(record: Record) -> list[Table]:
    """Every layout that the record has the domains for; none without results."""
    if not record.rows:
        return []
    if transfer.corruptions(words.domains(record)):
        return [calsam_shifts(record)]
    found = [calsam_ablation(record), mbls(record), nacl(record)]
    targets = [domain for domain in words.domains(record) if domain != record.source]
    with_source = [calsam_domains(record)] if record.source in words.domains(record) and targets else []
    return [*with_source, *([calsam_shifts(record)] if targets else []), *found]


def markdown(table: Table) -> str:
    """A table in Markdown, the groups in front of the headings, caption above and notes below."""
    groups = [title for title, count in table.groups for _ in range(count)]
    heads = [table.heads[0], *(f"{g}: {h}" if g else h for g, h in zip(groups, table.heads[1:], strict=True))]
    lines = [f"| {' | '.join(tables.escape(h) for h in heads)} |", "|---|" + "---:|" * len(groups)]
    lines += [f"| {' | '.join(map(tables.escape, row))} |" for row in table.rows]
    return "\n".join([table.caption, "", *lines, "", *(f"* {note}" for note in table.notes)]).rstrip() + "\n"


def tex(table: Table) -> str:
    r"""A table as a ``table`` environment (booktabs, graphicx), to be included with ``\input``."""
    groups, column = [], 2
    for title, count in table.groups:
        groups.append((rf"\multicolumn{{{count}}}{{c}}{{{_tex(title)}}}", column, column + count - 1, bool(title)))
        column += count
    rules = "".join(rf"\cmidrule(lr){{{first}-{last}}}" for _, first, last, titled in groups if titled)
    return "\n".join(
        [
            r"% \usepackage{booktabs,graphicx}",
            r"\begin{table}",
            rf"\caption{{{_tex(table.caption)}}}",
            r"\resizebox{\linewidth}{!}{%",
            rf"\begin{{tabular}}{{l{'r' * (len(table.heads) - 1)}}}",
            r"\toprule",
            " & ".join(["", *(text for text, *_ in groups)]) + rf" \\ {rules}",
            " & ".join(map(_tex, table.heads)) + r" \\",
            r"\midrule",
            *(" & ".join(map(_tex, row)) + r" \\" for row in table.rows),
            r"\bottomrule",
            r"\end{tabular}}",
            *([r"\par\smallskip\footnotesize"] if table.notes else []),
            *(_tex(note) + r"\par" for note in table.notes),
            r"\end{table}",
            "",
        ]
    )


def _tex(text: str) -> str:
    return latex.escape(text).replace(RULE, "---")


def _notes(rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"{RULE}: not evaluated, or undefined in every case."] if any(RULE in row for row in rows) else []


def _target(record: Record) -> str:
    """The one target, or of several the worst for SAM-FT (for the first method where that is missing)."""
    lines = transfer.matrix(record, *DSC)
    line = next((line for line in lines if line.method == methods.BASELINE), lines[0])
    return line.worst or next(iter(line.targets))


def _columns() -> Mapping[tuple[str, str], tables.Column]:
    return {(c.metric, c.region): c for c in (*tables.COLUMNS, *tables.MORE_COLUMNS)}


def _shown(metric: tuple[str, str], mean: float, sd: float | None, signed: bool = False) -> str:
    column = _columns().get(metric) or tables.Column(*metric, "", "")
    return tables.number(column, mean, sd, signed)


def _title(metric: tuple[str, str]) -> str:
    name = metric[0].partition("[")[0]
    return f"{name} (mm)" if metric == HD95 else "DSC (points)" if metric == DSC else words.label(name, metric[1])


def _definition(metric: tuple[str, str]) -> str:
    known = _columns()
    if metric == PAPERS_CECE:
        return f"as CECE [{CECE[1]}], on the voxels of the true foreground alone"
    return known[metric].definition
