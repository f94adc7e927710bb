"""What an evaluation says, in words that are computed from its numbers."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from calsegx import configs
from calsegx.evaluation import compare, evaluate, methods, review, robustness
from calsegx.metrics import calibration

MAIN_REGION, FIXED_REGION = "p>0.01", "dilated"
DSC = (evaluate.DSC, evaluate.VOLUME)
ECE = (evaluate.ECE, MAIN_REGION)
ECE_FIXED = (evaluate.ECE, FIXED_REGION)
BRIER = (evaluate.BRIER, FIXED_REGION)
COMPARED = (DSC, ECE, ECE_FIXED, BRIER)


@dataclass(frozen=True)
class Picture:
    """A figure of the gallery."""

    caption: str
    png: bytes


@dataclass(frozen=True)
class Record:
    """Everything that a report is made of."""

    title: str
    rows: Sequence[evaluate.Row]
    source: str  # the domain that was trained on
    targets: Sequence[str]  # the domains that were not; may be empty
    domain_kind: str = ""  # what a domain is: "scanner" or "centre"
    # What was run, as shown: dataset, counts, protocol, versions ...
    description: Mapping[str, str] = field(default_factory=dict)
    # (method, domain, region) -> pooled over cases and seeds
    statistics: Mapping[tuple[str, str, str], calibration.CalibrationStatistics] = field(default_factory=dict)
    # (method, domain) -> ``margins.histogram``, pooled likewise; methods without logits have none
    margins: Mapping[tuple[str, str], np.ndarray] = field(default_factory=dict)
    logs: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)  # run -> records of metrics.jsonl
    gallery: Sequence[Picture] = ()
    reviews: Sequence[review.Review] = ()  # the least confident first
    reviewed: str = ""  # the method (and seed) whose confidence it is
    protocol: str = "gt_points"  # how prompts were placed
    jittered: Sequence[robustness.Line] = ()  # with prompts that were moved at random; empty: not asked for
    external: Sequence[str] = ()  # methods that are other tools' predictions

    @property
    def every_slice(self) -> bool:
        """Whether every slice was prompted, so that no prompt-only guess can be made."""
        return self.protocol in configs.EVERY_SLICE

    @functools.cached_property
    def comparisons(self) -> list[compare.Comparison]:
        """Every other training (each without and with TS) against SAM-FT without and with TS, on ``COMPARED``.

        Other tools' predictions are compared like trainings.
        """
        rows = compare.index(self.rows)
        present = methods.order(row.method for row in self.rows)
        scaled = methods.BASELINE + methods.CALIBRATED
        pairs = [
            (method, reference)
            for method in present
            if methods.base(method) not in (*methods.UNTRAINED, methods.BASELINE)
            for reference in ((scaled,) if methods.calibrated(method) else (methods.BASELINE, scaled))
            if reference in present
        ]
        return [
            compare.compare(rows, *pair, domain, *metric)
            for domain in domains(self)
            for pair in pairs
            for metric in COMPARED
        ]


def where(record: Record, domain: str) -> str:
    """A domain's name in a sentence, e.g. ``scanner B (target)``."""
    role = "source" if domain == record.source else "target"
    return f"{place(record, domain)} ({role})" if record.targets else place(record, domain)


def place(record: Record, domain: str) -> str:
    """A domain's name without its role; the unnamed domain is ``the test cases``."""
    return f"{record.domain_kind} {domain}".strip() if domain else "the test cases"


def domains(record: Record) -> list[str]:
    """The domains that have rows, source first."""
    present = {row.domain for row in record.rows}
    return [domain for domain in (record.source, *record.targets) if domain in present]


def verdict(record: Record) -> list[str]:
    """The findings as sentences, each ``subject: statement``."""
    if not record.rows:
        return ["Nothing to say: there are no results."]
    found = {(c.domain, c.method, c.reference, c.metric, c.region): c for c in record.comparisons}
    return [
        *(_gap_sentence(record, target) for target in record.targets if record.source),
        *_missing(record),
        *(
            _addition(record, found, domain, method)
            for domain in domains(record)
            for method in dict.fromkeys(c.method for c in record.comparisons)
            if (domain, method, methods.BASELINE, *DSC) in found
        ),
        *_unguessed(record),
        *(_beaten(record, domain) for domain in domains(record)),
        *(sentence for domain in domains(record) for sentence in _not_beaten(record, domain)),
        *_undefined(record),
        _seeds(record),
        "Evidence: mean difference paired by subject, 95 % bootstrap interval over subjects, two-sided Wilcoxon p "
        "without correction for the number of comparisons.",
    ]


def headline(record: Record) -> str:
    """The main result in one line."""
    rows, present = compare.index(record.rows), domains(record)
    names = {row.method for row in record.rows}
    if not present:
        return "There are no results."
    gaps = {target: _dice_gaps(record, target) for target in record.targets if target in present}
    domain = max(gaps, key=lambda target: gaps[target].get(methods.BASELINE, -math.inf)) if gaps else record.source
    method = next((name for name in ("calsam", "sam_fip", "sam_cmp") if name in names), None)
    parts = []
    for name in (methods.BASELINE, method):
        if name in gaps.get(domain, {}):
            parts.append(f"{methods.display(name)} {_loss(gaps[domain][name])}")
    if parts:
        parts = [f"{' and '.join(parts)} compared with {place(record, record.source)}"]
    if method and methods.BASELINE in names:
        both = [compare.compare(rows, method, methods.BASELINE, domain, *metric) for metric in (DSC, ECE)]
        changes = ", ".join(f"{label(c.metric, c.region)} {_change(c)} ({c.verdict})" for c in both)
        parts.append(f"{methods.display(method)} against SAM-FT: {changes}")
        scaled = methods.BASELINE + methods.CALIBRATED
        if scaled in names:
            c = compare.compare(rows, method, scaled, domain, *ECE)
            parts.append(f"against SAM-FT + TS: {label(c.metric, c.region)} {_change(c)} ({c.verdict})")
    if not parts:
        parts = [f"{methods.display(name)} has DSC {_mean_dice(record, name, domain)}" for name in methods.order(names)]
    short = [
        f"{methods.display(name)} is not measurably better than the {methods.display(guess).lower()}"
        for name in (methods.BASELINE, method)
        for guess in methods.PROMPT_ONLY
        if name in names and guess in names
        if compare.compare(rows, name, guess, domain, *DSC).verdict not in (compare.BETTER, compare.TOO_FEW)
    ]
    return f"On {place(record, domain)}, {'; '.join(parts + short)}."


def _gap_sentence(record: Record, target: str) -> str:
    gaps = _dice_gaps(record, target)
    lead = f"From {place(record, record.source)} to {place(record, target)}"
    if not gaps:
        return f"{lead}: no method has results on both."
    parts = [f"{methods.display(name)} {_loss(gap)}" for name, gap in gaps.items() if not methods.calibrated(name)]
    return f"{lead}: {'; '.join(parts)}."


def _dice_gaps(record: Record, target: str) -> dict[str, float]:
    gaps = {
        g.method: g.mean
        for g in evaluate.generalisation_gaps(record.rows, record.source, target)
        if (g.class_name, g.metric, g.region) == (evaluate.ALL, *DSC) and not math.isnan(g.mean)
    }
    return {name: gaps[name] for name in methods.order(gaps)}


def _loss(gap: float) -> str:
    return f"{'loses' if gap >= 0 else 'gains'} {abs(100 * gap):.1f} DSC points"


def _mean_dice(record: Record, method: str, domain: str) -> str:
    for s in evaluate.summarise(row for row in record.rows if (row.method, row.domain) == (method, domain)):
        if (s.class_name, s.metric, s.region) == (evaluate.ALL, *DSC) and not math.isnan(s.mean):
            return f"{100 * s.mean:.1f} points"
    return "undefined"


def _missing(record: Record) -> list[str]:
    present = {row.method for row in record.rows}
    if methods.BASELINE not in present:
        return ["SAM-FT: not evaluated, so nothing can be said about what FIP and CMP add to it."]
    plain = {name.partition(":")[0] for name in present}
    absent = [word for name, word in methods.ADDITIONS.items() if name not in plain]
    sentences = [f"Not evaluated: {', '.join(absent)}."] if absent else []
    if methods.BASELINE + methods.CALIBRATED not in present:
        sentences.append("Not evaluated: SAM-FT with temperature scaling, which alone often repairs most of the ECE.")
    return sentences


def _unguessed(record: Record) -> list[str]:
    if not record.every_slice:
        return []
    return [
        f"Prompt-only guesses: not made, because the protocol {record.protocol} prompts every slice, whether it has "
        "foreground or not."
    ]


def _addition(record: Record, found: Mapping, domain: str, method: str) -> str:
    """What one addition to SAM-FT, or another training in its place, does on one domain."""
    scaled = methods.BASELINE + methods.CALIBRATED
    pair = [found[domain, method, methods.BASELINE, *metric] for metric in (DSC, ECE)]
    text = f"{_overall(pair)} against SAM-FT: {'; '.join(map(_evidence, pair))}."
    fixed = found[domain, method, methods.BASELINE, *ECE_FIXED]
    if fixed.verdict != pair[1].verdict:
        text += f" On the same voxels for every method it says otherwise: {_evidence(fixed)}."
    if (domain, method, scaled, *ECE) in found:
        # Where TS leaves the labels as they are, the DSC has just been said.
        same_labels = found[domain, method, scaled, *DSC].difference == pair[0].difference
        pair = [found[domain, method, scaled, *metric] for metric in ((ECE,) if same_labels else (DSC, ECE))]
        text += f" Against SAM-FT + TS it {_judgement(pair)}: {'; '.join(map(_evidence, pair))}."
    both = found.get((domain, method + methods.CALIBRATED, scaled, *ECE))
    if both is not None:
        text += f" With TS on both sides: {_evidence(both)}."
    return f"{methods.ADDITIONS.get(method, methods.display(method))} on {where(record, domain)}: {text}"


def _judgement(pair: Sequence[compare.Comparison]) -> str:
    overall = _overall(pair)
    phrases = {"mixed": "is mixed", compare.NO_DIFFERENCE: f"makes {overall}", compare.TOO_FEW: f"has {overall}"}
    return phrases.get(overall, overall)


def _overall(pair: Sequence[compare.Comparison]) -> str:
    verdicts = {c.verdict for c in pair}
    if {compare.BETTER, compare.WORSE} <= verdicts:
        return "mixed"
    if compare.BETTER in verdicts:
        return "helps"
    if compare.WORSE in verdicts:
        return "hurts"
    return compare.TOO_FEW if compare.TOO_FEW in verdicts else compare.NO_DIFFERENCE


def label(metric: str, region: str) -> str:
    """A metric's name with its region."""
    return metric if region == evaluate.VOLUME else f"{metric} [{region}]"


def _change(c: compare.Comparison) -> str:
    return signed(c, c.difference) + (" points" if c.metric == evaluate.DSC else "")


def signed(c: compare.Comparison, value: float) -> str:
    """A difference in the unit in which it is read: DSC in points, everything else as it is."""
    if math.isnan(value):
        return "undefined"
    text = f"{100 * value:+.1f}" if c.metric == evaluate.DSC else f"{value:+.3f}"
    return text.lstrip("+-") if float(text) == 0 else text


def _evidence(c: compare.Comparison) -> str:
    return f"{label(c.metric, c.region)} {_change(c)}, {c.verdict} ({', '.join(uncertainty(c))})"


def uncertainty(c: compare.Comparison) -> list[str]:
    """Interval, test, number of subjects and spread over seeds of a comparison, as phrases."""
    if c.verdict == compare.TOO_FEW:
        return [f"n = {c.subjects}"]
    phrases = [
        f"95 % CI {signed(c, c.low)} to {signed(c, c.high)}",
        "p < 0.001" if c.p_value < 0.001 else f"p = {c.p_value:.3f}",
        f"n = {c.subjects}",
    ]
    return phrases if c.sd_seeds is None else [*phrases, f"seed sd {signed(c, c.sd_seeds).lstrip('+')}"]


def _beaten(record: Record, domain: str) -> str:
    """Whether the trained methods are worth their training: DSC against the guesses and zero-shot SAM."""
    rows = compare.index(row for row in record.rows if row.metric == evaluate.DSC)
    names = methods.order(row.method for row in record.rows if row.domain == domain)
    references = [name for name in (*methods.PROMPT_ONLY, methods.VANILLA) if name in names]
    trained = [name for name in names if name not in references and not methods.calibrated(name)]
    lead = f"Trained methods on {where(record, domain)}"
    if not references or not trained:
        return f"{lead}: nothing to compare them with."
    better = [
        name
        for name in trained
        if all(compare.compare(rows, name, other, domain, *DSC).verdict == compare.BETTER for other in references)
    ]
    others = ", ".join(methods.display(name) for name in references)
    if len(better) == len(trained):
        return f"{lead}: every one of them beats {others} in DSC."
    count = f"{len(better)} of {len(trained)}"
    return f"{lead}: {count} measurably beat all of {others} in DSC{': ' if better else ''}{_named(better)}."


def _named(names: Sequence[str]) -> str:
    return ", ".join(methods.display(name) for name in names)


def _not_beaten(record: Record, domain: str) -> list[str]:
    """Who does not beat the prompt-only guesses and vanilla SAM in DSC; calibrators leave labels as they are."""
    rows = compare.index(row for row in record.rows if row.metric == evaluate.DSC)
    names = methods.order(row.method for row in record.rows if row.domain == domain)
    sentences = []
    for reference in (*methods.PROMPT_ONLY, methods.VANILLA):
        rivals = [n for n in names if n not in (*methods.PROMPT_ONLY, reference) and not methods.calibrated(n)]
        if reference not in names or not rivals:
            continue
        found = [compare.compare(rows, name, reference, domain, *DSC) for name in rivals]
        lead = f"{methods.display(reference)} on {where(record, domain)}"
        if all(c.verdict == compare.TOO_FEW for c in found):
            sentences.append(f"{lead}: {compare.TOO_FEW} with it.")
            continue
        short = [f"{methods.display(c.method)} ({_change(c)})" for c in found if c.verdict != compare.BETTER]
        sentences.append(
            f"{lead}: not measurably beaten in DSC by {', '.join(short)}."
            if short
            else f"{lead}: beaten in DSC by every other method."
        )
    return sentences


def _undefined(record: Record) -> list[str]:
    """Metrics without a single value, and classes that never occur."""
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    for s in evaluate.summarise(record.rows):
        if math.isnan(s.mean) and s.domain in (record.source, *record.targets):
            groups.setdefault((s.domain, s.class_name, s.metric, s.region), []).append(methods.display(s.method))
    sentences = []
    together: dict[tuple[str, str], list[str]] = {}
    for (domain, class_name, metric, region), names in groups.items():
        if class_name != evaluate.ALL and metric == evaluate.DSC:
            sentences.append(
                f"Class {class_name} on {where(record, domain)}: in no case, neither in the truth nor in the "
                f"prediction of {', '.join(names)}."
            )
        elif class_name == evaluate.ALL:
            together.setdefault((domain, ", ".join(names)), []).append(label(metric, region))
    return sentences + [
        f"{', '.join(labels)} on {where(record, domain)}: undefined in every case of {names}."
        for (domain, names), labels in together.items()
    ]


def _seeds(record: Record) -> str:
    without = (*methods.UNTRAINED, *record.external)
    seeds = sorted({r.seed for r in record.rows if methods.base(r.method) not in without})
    if not seeds:
        return "Seeds: no trained method was evaluated."
    if len(seeds) == 1:
        return f"Seeds: one ({seeds[0]}), so nothing is known about the spread between trainings."
    return f"Seeds: {len(seeds)} ({', '.join(map(str, seeds))}); ± is the sample standard deviation over them."
