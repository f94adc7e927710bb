"""Parts of the report that look into a method's calibration: reliability by domain, region and class, and margins.

All are ``(method, image)`` for every method that has what they show.
"""

from collections.abc import Callable, Mapping

import numpy as np

from calsegx.evaluation import calibration_figures, evaluate, figures, methods
from calsegx.evaluation import record as findings
from calsegx.evaluation.calibration_figures import Panel
from calsegx.evaluation.record import Record
from calsegx.metrics import binning, calibration

MOST_PANELS = 4  # domains side by side in a figure of margins; of more, the targets are shown as one

ByRegion = Mapping[str, calibration.CalibrationStatistics]


def reliability(record: Record) -> list[tuple[str, str]]:
    """Source and targets side by side, on the main region."""
    return [
        (title, figures.data_uri(calibration_figures.reliability(curves, title, findings.MAIN_REGION)))
        for title, rows in _by_method(record)
        if (curves := {domain: s[findings.MAIN_REGION] for domain, s in rows.items() if findings.MAIN_REGION in s})
    ]


def reliability_by_region(record: Record) -> list[tuple[str, str]]:
    """Domains by regions."""

    def panels(found: ByRegion) -> dict[str, Panel]:
        return {region: (s.reliability_curve(), s.ece()) for region, s in found.items()}

    return _grids(record, panels, "Confidence (top label)", "Accuracy")


def reliability_by_class(record: Record) -> list[tuple[str, str]]:
    """Domains by background and classes, each against the rest, on the main region; none for a single class."""
    classes = dict.fromkeys(row.class_name for row in record.rows if row.class_name != evaluate.ALL)

    def panels(found: ByRegion) -> dict[str, Panel]:
        s = found[findings.MAIN_REGION]
        curves, errors = s.class_reliability_curves(), s.class_ece()
        each = zip(["background", *classes], zip(*curves, strict=True), errors, strict=True)
        return {name: (binning.ReliabilityCurve(*curve), float(error)) for name, curve, error in each}

    if len(classes) < 2:
        return []
    return _grids(
        record, panels, "Probability of the class", "Frequency of the class", f", region {findings.MAIN_REGION}"
    )


def margin_histograms(record: Record) -> list[tuple[str, str]]:
    """Source and targets side by side."""
    limit = calibration_figures.margin_limit(list(record.margins.values()))
    images = []
    for name in methods.order(method for method, _ in record.margins):
        title = methods.display(name)
        found = {d: record.margins[name, d] for d in findings.domains(record) if (name, d) in record.margins}
        panels = {findings.where(record, domain): counts for domain, counts in found.items()}
        if len(found) > MOST_PANELS:
            targets = [counts for domain, counts in found.items() if domain != record.source]
            source = [domain for domain in found if domain == record.source]
            panels = {findings.where(record, domain): found[domain] for domain in source}
            panels[f"{len(targets)} targets together"] = np.sum(targets, axis=0)
        if panels:
            png = calibration_figures.margin_histograms(panels, title, limit)
            images.append((title, figures.data_uri(png)))
    return images


def without_margins(record: Record) -> str:
    """The methods that have no logits, for a sentence."""
    known = {method for method, _ in record.margins}
    names = methods.order(row.method for row in record.rows if row.method not in known)
    return ", ".join(methods.display(name) for name in names)


def _grids(
    record: Record, panels: Callable[[ByRegion], dict[str, Panel]], xlabel: str, ylabel: str, region: str = ""
) -> list[tuple[str, str]]:
    images = []
    for title, rows in _by_method(record):
        grid = {domain: panels(found) for domain, found in rows.items()}
        png = calibration_figures.reliability_grid(grid, title + region, xlabel, ylabel)
        images.append((title, figures.data_uri(png)))
    return images


def _by_method(record: Record) -> list[tuple[str, dict[str, ByRegion]]]:
    """``(method, {domain: {region: statistics}})`` as they are displayed."""
    regions = dict.fromkeys(region for _, _, region in record.statistics)
    found = []
    for name in methods.order(method for method, _, _ in record.statistics):
        rows = {
            findings.where(record, domain): {
                region: record.statistics[name, domain, region]
                for region in regions
                if (name, domain, region) in record.statistics
            }
            for domain in findings.domains(record)
        }
        if any(rows.values()):
            found.append((methods.display(name), {domain: regions for domain, regions in rows.items() if regions}))
    return found
