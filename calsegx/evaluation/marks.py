"""Best, second and stars of a table: what every method is tested against, and how it is said."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from calsegx.evaluation import compare, evaluate, methods

CALIBRATION_ERRORS = (evaluate.ECE, evaluate.CECE, evaluate.MCE, evaluate.TACE)
STARS = ((0.001, "***"), (0.01, "**"), (0.05, "*"))  # corrected p below which they are given


def strongest(rows: Sequence[evaluate.Row], source: str, targets: Sequence[str]) -> tuple[str, str] | None:
    """The strongest baseline, against which every method is tested, and the domain that it is the strongest on.

    Every method without FIP or CMP that gives probabilities is a baseline.  The domain is the source, or the first
    target where the source was not evaluated.  None when no baseline has a DSC and an ECE there.
    """
    evaluated, masks = {row.domain for row in rows}, certain(rows)
    domain = next((name for name in (source, *targets) if name in evaluated), None)
    candidates = [n for n in methods.order(row.method for row in rows) if not methods.is_ours(n) and n not in masks]
    if domain is None:
        return None
    dice, ece = (evaluate.DSC, evaluate.VOLUME), (evaluate.ECE, evaluate.REGIONS[0])
    found = compare.strongest_baseline(compare.index(rows), candidates, domain, dice, ece)
    return (found, domain) if found else None


def certain(rows: Sequence[evaluate.Row]) -> frozenset[str]:
    """Methods that give masks, of which every voxel is certain: all fall into one bin, so that ECE and MCE are one.

    On p>0.01 such an ECE is 1 - precision: it sees no voxel that was missed, unlike a probability's.  The prompt-only
    guesses have one bin too, but give it the probability that the training labels show, so theirs is measured.
    """
    both = evaluate.ECE, evaluate.MCE
    errors: dict[tuple[str, int, str], dict[str, float]] = {}
    for row in rows:
        asked = row.class_name == evaluate.ALL and row.region == evaluate.REGIONS[0] and row.metric in both
        if asked and row.method not in methods.PROMPT_ONLY:
            errors.setdefault((row.method, row.seed, row.case_id), {})[row.metric] = row.value
    alike: dict[str, set[bool]] = {}
    for (method, *_), found in errors.items():
        ece, mce = (found.get(metric, math.nan) for metric in both)
        if not math.isnan(ece):
            alike.setdefault(method, set()).add(math.isclose(ece, mce, rel_tol=1e-9, abs_tol=1e-12))
    return frozenset(method for method, each in alike.items() if each == {True})


def legend(rows: Sequence[evaluate.Row], source: str, targets: Sequence[str]) -> list[str]:
    """How the numbers of the overview are to be read, as sentences."""
    found = strongest(rows, source, targets)
    if found is None:
        tests = "No stars: no method without FIP and CMP has a DSC and an ECE to be tested against."
    else:
        name, domain = found
        on = f"{'the source, ' if targets and domain == source else ''}{domain or 'the test cases'}"
        tests = (
            f"Stars: differs, for better or worse, from {methods.display(name)}, two-sided Wilcoxon over subjects, "
            "Holm-corrected over the methods of the column and domain: * p < 0.05, ** p < 0.01, *** p < 0.001; with "
            f"fewer than 6 common subjects there is no test. {methods.display(name)} is the strongest baseline: of the "
            "methods without FIP and CMP that give probabilities it has the least sum of ranks by DSC and by "
            f"ECE [{evaluate.REGIONS[0]}] on {on}."
        )
    return [
        "Mean over cases, then over seeds; ± is the standard deviation over seeds, absent with one seed. Brackets: "
        "95 % bootstrap interval of the mean over subjects, after averaging a subject's cases and seeds.",
        "Bold: best of the column in its domain; underlined: second. No marks on gt_fg, which the label selects; a "
        "mask, which is certain of every voxel, has none for calibration errors.",
        tests,
        "undef. u/n: of n values (cases times trainings that tested them) u are undefined: left out of the mean, or "
        "given the value that the metric's definition says. Gap: positive is degradation from source to target, in the "
        "column's unit.",
    ]


@dataclass(frozen=True)
class Marks:
    """What is marked in one column of one domain."""

    best: float = math.nan
    second: float = math.nan
    p_values: Mapping[str, float] = field(default_factory=dict)  # corrected, by method

    def stars(self, method: str) -> str:
        """Of a method's difference from the strongest baseline."""
        p = self.p_values.get(method, math.nan)
        return next((stars for limit, stars in STARS if p < limit), "")


def of(
    summaries: Sequence[evaluate.Summary | None],
    rows: compare.Index,
    baseline: tuple[str, str] | None,
    masks: frozenset[str] = frozenset(),
) -> Marks:
    """The marks of one column (one metric, region and domain); none where the label selects the region.

    ``masks``: the methods that are ``certain``.
    """
    known = [s for s in summaries if s is not None and not math.isnan(s.mean)]
    known = [s for s in known if s.method not in masks or s.metric not in CALIBRATION_ERRORS]
    if len(known) < 2 or known[0].region == evaluate.PAPERS_REGION:
        return Marks()
    _, domain, _, metric, region = dataclasses.astuple(known[0])[:5]
    means = sorted({s.mean for s in known}, reverse=evaluate.higher_is_better(metric))
    p_values: dict[str, float] = {}
    if baseline:
        p_values = compare.corrected_p_values(rows, [s.method for s in known], baseline[0], domain, metric, region)
    second = means[1] if len(means) > 2 else math.nan  # the worse of two is no second
    return Marks(means[0] if len(means) > 1 else math.nan, second, p_values)
