"""What an evaluation says, in sentences that are computed from its numbers: the strongest first, and few of them.

Up to ``FEW`` methods and ``transfer.MOST_TARGETS`` targets everything is said in full.  More methods are grouped by
what was found of them, and of more targets the worst is described and the others are counted; the numbers then stand
under "Paired comparisons".
"""

import math
from collections.abc import Callable, Mapping, Sequence

from calsegx.evaluation import compare, evaluate, methods, transfer
from calsegx.evaluation import record as words
from calsegx.evaluation.record import DSC, ECE, ECE_FIXED, Record

FEW = 3  # methods beside SAM-FT that have a sentence each
SCALED = methods.BASELINE + methods.CALIBRATED
FINDINGS = ("helps", "mixed", "hurts", compare.NO_DIFFERENCE, compare.TOO_FEW)  # of a method, in the order of a verdict
Found = Mapping[tuple[str, ...], compare.Comparison]  # by domain, method, reference, metric and region


def verdict(record: Record) -> list[str]:
    """The findings as sentences, each ``subject: statement``."""
    if not record.rows:
        return ["Nothing to say: there are no results."]
    found = {(c.domain, c.method, c.reference, c.metric, c.region): c for c in record.comparisons}
    detailed = _detailed(record)
    targets = [domain for domain in detailed if domain != record.source]
    return [
        *(sentence for domain in detailed for sentence in _additions(record, found, domain)),
        *_counted(record, found, targets),
        *(_gap_sentence(record, target) for target in _described(record) if record.source),
        *(_beaten(record, domain) for domain in detailed),
        *(sentence for domain in detailed for sentence in _not_beaten(record, domain)),
        *_missing(record),
        *_unguessed(record),
        *_undefined(record),
        _seeds(record),
        "Evidence: mean difference paired by subject, whose cases are averaged first (the tables average cases, so "
        "their means may differ otherwise), 95 % bootstrap interval over subjects, two-sided Wilcoxon p without "
        "correction for the number of comparisons.",
    ]


def headline(record: Record) -> str:
    """The main result in one line."""
    rows, present = record.index, words.domains(record)
    names = {row.method for row in record.rows}
    if not present:
        return "There are no results."
    gaps = {target: _dice_gaps(record, target) for target in record.targets if target in present}
    domain = max(gaps, key=lambda target: gaps[target].get(methods.BASELINE, -math.inf)) if gaps else record.source
    among = ""
    if len(gaps) > 1 and not any(gaps.values()):  # nothing was measured on the source
        domain, among = _worst(record, list(gaps)), f", the worst of {len(gaps)} {record.domain_kind or 'domain'}s"
    method = next((name for name in ("calsam", "sam_fip", "sam_cmp") if name in names), None)
    parts = []
    for name in (methods.BASELINE, method):
        if name in gaps.get(domain, {}):
            parts.append(f"{methods.display(name)} {_loss(gaps[domain][name])}")
    if parts:
        parts = [f"{' and '.join(parts)} compared with {words.place(record, record.source)}"]
    if method and methods.BASELINE in names:
        both = [compare.compare(rows, method, methods.BASELINE, domain, *metric) for metric in (DSC, ECE)]
        changes = ", ".join(f"{words.label(c.metric, c.region)} {words.change(c)} ({c.verdict})" for c in both)
        parts.append(f"{methods.display(method)} against SAM-FT: {changes}")
        if SCALED in names:
            c = compare.compare(rows, method, SCALED, domain, *ECE)
            parts.append(f"against SAM-FT + TS: {words.label(c.metric, c.region)} {words.change(c)} ({c.verdict})")
    if not parts:
        parts = _dice_of_all(record, domain)
    short = [
        f"{methods.display(name)} is not measurably better than the {methods.display(guess).lower()}"
        for name in (methods.BASELINE, method)
        for guess in methods.PROMPT_ONLY
        if name in names and guess in names
        if compare.compare(rows, name, guess, domain, *DSC).verdict not in (compare.BETTER, compare.TOO_FEW)
    ]
    return f"On {words.place(record, domain)}{among}, {'; '.join(parts + short)}."


def _worst(record: Record, domains: Sequence[str]) -> str:
    """The domain of the lowest mean DSC of SAM-FT; without it of the first trained method, or of any."""
    means = transfer.means(record, *DSC)
    names = methods.order(row.method for row in record.rows)
    trained = [name for name in names if name not in (*methods.UNTRAINED, *record.external)]
    reference = methods.BASELINE if methods.BASELINE in names else (trained or names)[0]
    return min(domains, key=lambda domain: (math.isnan(mean := means.get((reference, domain), math.nan)), mean))


def _dice_of_all(record: Record, domain: str) -> list[str]:
    """The DSC of every method; of more than a few only the highest and SAM-FT's."""
    means = transfer.means(record, *DSC)
    found = {name: means.get((name, domain), math.nan) for name in methods.order(row.method for row in record.rows)}
    if len(found) > 2 * FEW:
        plain = [name for name, mean in found.items() if not math.isnan(mean) and not methods.calibrated(name)]
        best = max(plain, key=lambda name: found[name], default="")
        found = {name: found[name] for name in dict.fromkeys((best, methods.BASELINE)) if name in found}
    shown = {n: "undefined" if math.isnan(mean) else f"{100 * mean:.1f} points" for n, mean in found.items()}
    return [f"{methods.display(name)} has DSC {text}" for name, text in shown.items()]


def _described(record: Record) -> Sequence[str]:
    """The targets with sentences of their own: all, or of many the worst."""
    if len(record.targets) <= transfer.MOST_TARGETS:
        return record.targets
    lines = transfer.matrix(record, *DSC)
    line = next((line for line in lines if line.method == methods.BASELINE), lines[0] if lines else None)
    return [line.worst] if line and line.worst else []


def _detailed(record: Record) -> list[str]:
    described = _described(record)
    return [domain for domain in words.domains(record) if domain == record.source or domain in described]


def _additions(record: Record, found: Found, domain: str) -> list[str]:
    """What the additions to SAM-FT, and the trainings in its place, do on one domain."""
    names = [name for d, name, *rest in found if d == domain and tuple(rest) == (methods.BASELINE, *DSC)]
    pairs = {name: [found[domain, name, methods.BASELINE, *metric] for metric in (DSC, ECE)] for name in names}
    if len(names) <= FEW:
        return [_addition(record, found, domain, name) for name in sorted(names, key=lambda n: -_strength(pairs[n]))]
    where = words.where(record, domain)
    scaled = {n: [found[domain, n, SCALED, *ECE]] for n in names if (domain, n, SCALED, *ECE) in found}
    key = {name: (domain, name + methods.CALIBRATED, SCALED, *ECE) for name in names}
    both = {name: [found[key[name]]] for name in names if key[name] in found}
    return [
        *_grouped(pairs, f"Against SAM-FT on {where}", lambda name: methods.ADDITIONS.get(name, methods.display(name))),
        *_grouped(scaled, f"Against SAM-FT + TS on {where}", methods.display),
        *_grouped(both, f"With TS on both sides on {where}", methods.display),
    ]


def _grouped(pairs: Mapping[str, Sequence[compare.Comparison]], lead: str, name: Callable[[str], str]) -> list[str]:
    """One sentence: the methods by what was found of them, those with the largest effect first; none for none."""
    groups: dict[str, list[str]] = {}
    for method in sorted(pairs, key=lambda method: -_strength(pairs[method])):
        groups.setdefault(_overall(pairs[method]), []).append(method)
    said = []
    for finding in (finding for finding in FINDINGS if finding in groups):
        parts = []
        for method in groups[finding]:
            measured = [c for c in pairs[method] if c.verdict in (compare.BETTER, compare.WORSE)]
            numbers = ", ".join(f"{words.label(c.metric, c.region)} {words.change(c)}" for c in measured)
            parts.append(f"{name(method)} ({numbers})" if numbers else name(method))
        said.append(f"{finding}: {', '.join(parts)}")
    return [f"{lead}: {'; '.join(said)}."] if said else []


def _strength(pair: Sequence[compare.Comparison]) -> float:
    """How large the largest effect is, in widths of its interval; 0 where nothing was measured."""
    measured = [c for c in pair if c.verdict in (compare.BETTER, compare.WORSE)]
    return max((abs(c.difference) / max(c.high - c.low, 1e-12) for c in measured), default=0.0)


def _counted(record: Record, found: Found, described: Sequence[str]) -> list[str]:
    """Of many targets: on how many a method differs from SAM-FT; nothing where all are described anyway."""
    targets = [domain for domain in words.domains(record) if domain != record.source]
    if len(targets) <= len(described):
        return []
    groups: dict[tuple[int, ...], list[str]] = {}
    for method in dict.fromkeys(name for _, name, *rest in found if tuple(rest) == (methods.BASELINE, *DSC)):
        counts = []
        for metric in (DSC, ECE):
            of_metric = [found[domain, method, methods.BASELINE, *metric].verdict for domain in targets]
            counts += [of_metric.count(compare.BETTER), of_metric.count(compare.WORSE)]
        groups.setdefault(tuple(counts), []).append(methods.ADDITIONS.get(method, methods.display(method)))
    lead = f"Over {len(targets)} targets against SAM-FT"
    return [
        f"{lead}: {', '.join(names)}: better {words.label(*DSC)} on {c[0]} and worse on {c[1]}, better "
        f"{words.label(*ECE)} on {c[2]} and worse on {c[3]}."
        for c, names in sorted(groups.items(), key=lambda item: -(item[0][0] - item[0][1] + item[0][2] - item[0][3]))
    ]


def _gap_sentence(record: Record, target: str) -> str:
    gaps = {name: gap for name, gap in _dice_gaps(record, target).items() if not methods.calibrated(name)}
    lead = f"From {words.place(record, record.source)} to {words.place(record, target)}"
    if not gaps:
        return f"{lead}: no method has results on both."
    shown = {methods.display(name): gap for name, gap in gaps.items()}
    if len(gaps) > 2 * FEW:
        least, most = (limit(gaps, key=lambda name: gaps[name]) for limit in (min, max))
        shown = {methods.display(n): gaps[n] for n in gaps if n == methods.BASELINE}
        shown[f"least of {len(gaps)} methods, {methods.display(least)}"] = gaps[least]
        shown[f"most, {methods.display(most)}"] = gaps[most]
    return f"{lead}: {'; '.join(f'{name} {_loss(gap)}' for name, gap in shown.items())}."


def _dice_gaps(record: Record, target: str) -> dict[str, float]:
    names = methods.order(method for method, _, *metric in record.index if tuple(metric) == DSC)
    rows = [r for n in names for d in (record.source, target) for r in record.index.get((n, d, *DSC), ())]
    gaps = {g.method: g.mean for g in evaluate.generalisation_gaps(rows, record.source, target)}
    return {name: gaps[name] for name in names if not math.isnan(gaps.get(name, math.nan))}


def _loss(gap: float) -> str:
    return f"{'loses' if gap >= 0 else 'gains'} {abs(100 * gap):.1f} DSC points"


def _missing(record: Record) -> list[str]:
    present = {row.method for row in record.rows}
    if methods.BASELINE not in present:
        return ["SAM-FT: not evaluated, so nothing can be said about what FIP and CMP add to it."]
    plain = {name.partition(":")[0] for name in present}
    absent = [word for name, word in methods.ADDITIONS.items() if name not in plain]
    sentences = [f"Not evaluated: {', '.join(absent)}."] if absent else []
    if SCALED not in present:
        sentences.append("Not evaluated: SAM-FT with temperature scaling, which alone often repairs most of the ECE.")
    return sentences


def _unguessed(record: Record) -> list[str]:
    if not record.every_slice:
        return []
    return [
        f"Prompt-only guesses: not made, because the protocol {record.protocol} prompts every slice, whether it has "
        "foreground or not."
    ]


def _addition(record: Record, found: Found, domain: str, method: str) -> str:
    """What one addition to SAM-FT, or another training in its place, does on one domain."""
    pair = [found[domain, method, methods.BASELINE, *metric] for metric in (DSC, ECE)]
    text = f"{_overall(pair)} against SAM-FT: {'; '.join(map(_evidence, pair))}."
    fixed = found[domain, method, methods.BASELINE, *ECE_FIXED]
    if fixed.verdict != pair[1].verdict:
        text += f" On the same voxels for every method it says otherwise: {_evidence(fixed)}."
    if (domain, method, SCALED, *ECE) in found:
        # Where TS leaves the labels as they are, the DSC has just been said.
        same_labels = found[domain, method, SCALED, *DSC].difference == pair[0].difference
        pair = [found[domain, method, SCALED, *metric] for metric in ((ECE,) if same_labels else (DSC, ECE))]
        text += f" Against SAM-FT + TS it {_judgement(pair)}: {'; '.join(map(_evidence, pair))}."
    both = found.get((domain, method + methods.CALIBRATED, SCALED, *ECE))
    if both is not None:
        text += f" With TS on both sides: {_evidence(both)}."
    return f"{methods.ADDITIONS.get(method, methods.display(method))} on {words.where(record, domain)}: {text}"


def _judgement(pair: Sequence[compare.Comparison]) -> str:
    overall = _overall(pair)
    phrases = {"mixed": "is mixed", compare.NO_DIFFERENCE: f"makes {overall}", compare.TOO_FEW: f"has {overall}"}
    return phrases.get(overall, overall)


def _overall(pair: Sequence[compare.Comparison]) -> str:
    """One of ``FINDINGS``."""
    verdicts = {c.verdict for c in pair}
    if {compare.BETTER, compare.WORSE} <= verdicts:
        return "mixed"
    if compare.BETTER in verdicts:
        return "helps"
    if compare.WORSE in verdicts:
        return "hurts"
    return compare.TOO_FEW if compare.TOO_FEW in verdicts else compare.NO_DIFFERENCE


def _evidence(c: compare.Comparison) -> str:
    numbers = ", ".join(words.uncertainty(c))
    return f"{words.label(c.metric, c.region)} {words.change(c)}, {c.verdict} ({numbers})"


def _beaten(record: Record, domain: str) -> str:
    """Whether the trained methods are worth their training: DSC against the guesses and zero-shot SAM."""
    names = methods.order(row.method for row in record.rows if row.domain == domain)
    references = [name for name in (*methods.PROMPT_ONLY, methods.VANILLA) if name in names]
    apart = (*references, *record.external)
    trained = [name for name in names if name not in apart and not methods.calibrated(name)]
    lead = f"Trained methods on {words.where(record, domain)}"
    if not references or not trained:
        return f"{lead}: nothing to compare them with."
    found = {
        name: [compare.compare(record.index, name, other, domain, *DSC).verdict for other in references]
        for name in trained
    }
    better = [name for name, verdicts in found.items() if all(verdict == compare.BETTER for verdict in verdicts)]
    others = ", ".join(methods.display(name) for name in references)
    if all(verdict == compare.TOO_FEW for verdicts in found.values() for verdict in verdicts):
        return f"{lead}: {compare.TOO_FEW} with {others}."
    if len(better) == len(trained):
        return f"{lead}: every one of them beats {others} in DSC."
    count = f"{len(better)} of {len(trained)}"
    return f"{lead}: {count} measurably beat all of {others} in DSC{': ' if better else ''}{_named(better)}."


def _named(names: Sequence[str]) -> str:
    return ", ".join(methods.display(name) for name in names)


def _not_beaten(record: Record, domain: str) -> list[str]:
    """Who does not beat the prompt-only guesses and vanilla SAM in DSC; calibrators leave labels as they are."""
    names = methods.order(row.method for row in record.rows if row.domain == domain)
    sentences = []
    for reference in (*methods.PROMPT_ONLY, methods.VANILLA):
        rivals = [n for n in names if n not in (*methods.PROMPT_ONLY, reference) and not methods.calibrated(n)]
        if reference not in names or not rivals:
            continue
        found = [compare.compare(record.index, name, reference, domain, *DSC) for name in rivals]
        lead = f"{methods.display(reference)} on {words.where(record, domain)}"
        if all(c.verdict == compare.TOO_FEW for c in found):
            sentences.append(f"{lead}: {compare.TOO_FEW} with it.")
            continue
        short = [f"{methods.display(c.method)} ({words.change(c)})" for c in found if c.verdict != compare.BETTER]
        sentences.append(
            f"{lead}: not measurably beaten in DSC by {', '.join(short)}."
            if short
            else f"{lead}: beaten in DSC by every other method."
        )
    return sentences


def _undefined(record: Record) -> list[str]:
    """Metrics without a single value, and classes that never occur."""
    groups: dict[tuple[str, str, str, str], list[str]] = {}  # domain, class, metric and region -> methods
    for s in evaluate.summarise(record.rows):
        if math.isnan(s.mean) and s.domain in (record.source, *record.targets):
            groups.setdefault((s.domain, s.class_name, s.metric, s.region), []).append(methods.display(s.method))
    labels: dict[tuple[str, str], list[str]] = {}  # domain and methods -> metrics
    places: dict[tuple[str, str], list[str]] = {}  # subject and statement of a sentence -> domains
    for (domain, class_name, metric, region), names in groups.items():
        of = ", ".join(names) if len(names) <= 2 * FEW else f"{len(names)} methods"
        if class_name != evaluate.ALL and metric == evaluate.DSC:
            said = (f"Class {class_name}", f"in no case, neither in the truth nor in the prediction of {of}")
            places.setdefault(said, []).append(words.where(record, domain))
        elif class_name == evaluate.ALL:
            labels.setdefault((domain, of), []).append(words.label(metric, region))
    for (domain, of), metrics in labels.items():
        said = (", ".join(metrics), f"undefined in every case of {of}")
        places.setdefault(said, []).append(words.where(record, domain))
    return [
        f"{subject} on {place}: {statement}."
        for (subject, statement), found in places.items()
        for place in (found if len(found) <= transfer.MOST_TARGETS else [f"{len(found)} domains"])
    ]


def _seeds(record: Record) -> str:
    without = (*methods.UNTRAINED, *record.external)
    seeds = sorted({r.seed for r in record.rows if methods.base(r.method) not in without})
    if not seeds:
        return "Seeds: no trained method was evaluated."
    if len(seeds) == 1:
        return f"Seeds: one ({seeds[0]}), so nothing is known about the spread between trainings."
    return f"Seeds: {len(seeds)} ({', '.join(map(str, seeds))}); ± is the sample standard deviation over them."
