"""A case's metrics in long format, and their summary over cases and seeds.

A metric's full name is what it measures, its definition and its region, because each of them changes the number.
Every metric is per class (calibration: the class against the rest) and for the class ``all``: the mean over the
foreground classes for overlap and surface metrics, background and all classes together for calibration.  CECE and TACE
are of the class ``all`` alone.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Integer

from calsegx.evaluation import predict
from calsegx.metrics import adaptive, calibration, lesions, overlap, regions, statistics, surface

ALL = "all"
VOLUME = "volume"  # the region of overlap, surface and lesion metrics
BINS = 15
NSD_MM = 2.0  # tolerance of the normalised surface distance
DSC = "DSC"
HD95 = surface.hausdorff95_name("max_directed", "diagonal")
ASSD = "ASSD[pooled,empty=diagonal] (mm)"
NSD = f"NSD@{NSD_MM:g}mm"
PRECISION, RECALL, LESION_F1 = "precision", "recall", "lesion F1"
VOLUME_DIFFERENCE = "absolute volume difference (ml)"
OF_MASKS = (DSC, HD95, ASSD, NSD, PRECISION, RECALL, VOLUME_DIFFERENCE, LESION_F1)
# Of one class alone, for nnU-Net's summary: IoU and voxel counts.
IOU, COUNTS = "IoU", ("TP", "FP", "FN", "TN", "n_pred", "n_ref")
ECE, BRIER, NLL, MCE, CECE, TACE = "ECE", "Brier", "NLL", "MCE", "CECE", "TACE"
PAPERS_REGION = "gt_fg"  # chosen by the label: shown beside the others, never the one that a sentence is about
REGIONS = ("p>0.01", "dilated", "all", PAPERS_REGION)


@dataclass(frozen=True)
class CaseKey:
    """Whose numbers these are."""

    method: str
    seed: int
    case_id: str
    subject_id: str
    domain: str
    split: str


@dataclass(frozen=True)
class Row:
    """One number.  ``value`` is NaN where nothing can be said; such rows are left out of means, and counted.

    ``defined`` is False there, and also where a policy supplied the value (HD95 of a mask that one side misses).
    """

    method: str
    seed: int
    case_id: str
    subject_id: str
    domain: str
    split: str
    class_name: str
    metric: str
    region: str
    value: float
    defined: bool


@dataclass(frozen=True)
class Summary:
    """Mean over cases, then over seeds, of one metric of one method in one domain."""

    method: str
    domain: str
    class_name: str
    metric: str
    region: str
    mean: float  # NaN when no case has a value
    sd_seeds: float | None  # sample standard deviation of the seeds' means; None for a single seed
    seeds: int
    cases: int
    values: int  # cases x seeds
    undefined: int  # of those


@dataclass(frozen=True)
class Gap:
    """How much worse a metric is on the target than on the source; positive = degradation, whatever its direction."""

    method: str
    source: str
    target: str
    class_name: str
    metric: str
    region: str
    mean: float
    sd_seeds: float | None


def higher_is_better(metric: str) -> bool:
    """Whether a larger value of ``metric`` is the better one."""
    return metric in (DSC, IOU, NSD, PRECISION, RECALL, LESION_F1)


def evaluate_case(
    probabilities: Float[np.ndarray, "D H W K"],
    truth: Integer[np.ndarray, "D H W"],
    spacing_mm: tuple[float, float, float],
    class_names: Sequence[str],
    key: CaseKey,
    region_names: Sequence[str] = REGIONS,
) -> tuple[list[Row], dict[str, calibration.CalibrationStatistics]]:
    """All metrics of one case, and the additive calibration statistics of every region.

    Args:
        probabilities: foreground probabilities on the native grid, in [0, 1], summing to at most 1 over K.
        truth: class indices 0..K, 0 = background.
        spacing_mm: voxel size along D, H and W.
        class_names: K names, of the classes 1..K.
        key: whose case it is.
        region_names: of ``metrics.regions``, on which calibration is measured.

    Returns:
        Rows, and statistics by region.  A class that neither the truth nor the prediction has gets NaN for every metric
        of masks and counts as undefined; one that only one of them has gets DSC 0 and the volume's diagonal as HD95.

    Raises:
        ValueError: for shapes that disagree.
    """
    if probabilities.shape != (*truth.shape, len(class_names)):
        raise ValueError(
            f"probabilities, truth and class_names must agree on D H W K; got {probabilities.shape}, {truth.shape} "
            f"and {len(class_names)} classes."
        )
    labels = predict.segment(probabilities)
    counts = [overlap.overlap_counts(labels == i, truth == i) for i in range(1, len(class_names) + 1)]
    found = [
        _mask_scores(labels == index, truth == index, spacing_mm, of_class)
        for index, of_class in enumerate(counts, start=1)
    ]
    rows = [row for name, of_class in zip(class_names, counts, strict=True) for row in _counted(key, name, of_class)]
    for metric in OF_MASKS:
        scores = [of_class[metric] for of_class in found]
        for name, (value, defined) in zip(class_names, scores, strict=True):
            rows.append(_row(key, name, metric, VOLUME, value, defined))
        known = [value for value, _ in scores if not math.isnan(value)]
        mean = float(np.mean(known)) if known else math.nan
        # The mean is over the classes that have a value; a case of which a class has none is counted as undefined.
        rows.append(_row(key, ALL, metric, VOLUME, mean, all(defined for _, defined in scores)))
    of_probabilities, sums = _calibration(probabilities, truth, spacing_mm, class_names, key, region_names)
    return rows + of_probabilities, sums


def _mask_scores(
    prediction: np.ndarray,
    truth: np.ndarray,
    spacing_mm: tuple[float, float, float],
    counts: overlap.OverlapCounts,
) -> dict[str, overlap.Score]:
    """The metrics ``OF_MASKS`` of one class; all NaN and undefined where neither mask has a voxel."""
    if not (counts.predicted or counts.truth):
        return dict.fromkeys(OF_MASKS, overlap.Score(math.nan, False))
    areas = counts.finalise(spacing_mm)
    distances = surface.surface_scores(prediction, truth, spacing_mm, tolerance_mm=NSD_MM)
    return {
        DSC: areas.dsc,
        HD95: distances.hd95,
        ASSD: distances.assd,
        NSD: distances.nsd,
        PRECISION: areas.precision,
        RECALL: areas.recall,
        VOLUME_DIFFERENCE: overlap.Score(abs(areas.volume_difference_ml.value), True),
        LESION_F1: lesions.lesion_counts(prediction, truth, spacing_mm).finalise().f1,
    }


def _counted(key: CaseKey, class_name: str, counts: overlap.OverlapCounts) -> list[Row]:
    """``IOU`` and ``COUNTS`` of one class."""
    iou = counts.finalise((1, 1, 1), empty="nan").iou
    voxels = (counts.true_positive, counts.false_positive, counts.false_negative, counts.true_negative)
    values = zip(COUNTS, (*voxels, counts.predicted, counts.truth), strict=True)
    rows = [_row(key, class_name, name, VOLUME, float(value), True) for name, value in values]
    return [_row(key, class_name, IOU, VOLUME, *iou), *rows]


def _calibration(
    probabilities: np.ndarray,
    truth: np.ndarray,
    spacing_mm: tuple[float, float, float],
    class_names: Sequence[str],
    key: CaseKey,
    region_names: Sequence[str],
) -> tuple[list[Row], dict[str, calibration.CalibrationStatistics]]:
    total = np.minimum(probabilities.sum(axis=-1), 1)
    predicted = predict.segment(probabilities) > 0
    # A binary problem goes in as one probability, so that its Brier score is (p - y)^2 and not twice that.
    single = len(class_names) == 1
    distribution = total if single else np.concatenate([1 - total[..., None], probabilities], axis=-1)
    rows, sums = [], {}
    for region in region_names:
        inside = regions.region(region, total, truth > 0, spacing_mm, predicted)
        values, labels = distribution[inside], truth[inside]
        whole = calibration.calibration_statistics(values, labels, bins=BINS)
        sums[region] = whole
        tace = adaptive.adaptive_statistics(values, labels).tace(ranges=BINS)
        measured = [(ALL, metric, value) for metric, value in ((CECE, whole.cece()), (TACE, tace))]
        for index, name in enumerate((ALL, *class_names)):
            found = whole
            if index and not single:  # with one class, the class against the rest is the whole problem
                of_class = (labels == index).astype(np.uint8)
                found = calibration.calibration_statistics(values[:, index], of_class, bins=BINS)
            metrics = ((ECE, found.ece()), (BRIER, found.brier()), (NLL, found.nll()), (MCE, found.mce()))
            measured += [(name, metric, value) for metric, value in metrics]
        rows += [_row(key, name, metric, region, value, math.isfinite(value)) for name, metric, value in measured]
    return rows, sums


def _row(key: CaseKey, class_name: str, metric: str, region: str, value: float, defined: bool) -> Row:
    identity = (key.method, key.seed, key.case_id, key.subject_id, key.domain, key.split)
    return Row(*identity, class_name, metric, region, value if math.isfinite(value) else math.nan, bool(defined))


def summarise(rows: Iterable[Row]) -> list[Summary]:
    """One ``Summary`` per method, domain, class, metric and region, in the order in which they first appear."""
    groups: dict[tuple[str, str, str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.method, row.domain, row.class_name, row.metric, row.region].append(row)
    summaries = []
    for key, members in groups.items():
        means = list(_seed_means(members).values())
        mean, sd = _mean_and_sd(means)
        undefined = sum(not row.defined for row in members)
        cases = len({row.case_id for row in members})
        summaries.append(Summary(*key, mean, sd, len(means), cases, len(members), undefined))
    return summaries


def generalisation_gaps(rows: Iterable[Row], source: str, target: str) -> list[Gap]:
    """The degradation from ``source`` to ``target``: per seed, then mean and sample sd over the seeds of both."""
    groups: dict[tuple[str, str, str, str], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.domain in (source, target) and row.metric not in COUNTS:  # neither more nor fewer voxels are better
            groups[row.method, row.class_name, row.metric, row.region][row.domain].append(row)
    gaps = []
    for (method, class_name, metric, region), domains in groups.items():
        if source not in domains or target not in domains:
            continue
        there, here = _seed_means(domains[target]), _seed_means(domains[source])
        higher = higher_is_better(metric)
        found = [statistics.generalisation_gap(here[s], there[s], higher) for s in here if s in there]
        mean, sd = _mean_and_sd(found)
        gaps.append(Gap(method, source, target, class_name, metric, region, mean, sd))
    return gaps


def _seed_means(rows: Iterable[Row]) -> Mapping[int, float]:
    values: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        values[row.seed].append(row.value)
    return {seed: _mean_and_sd(found)[0] for seed, found in sorted(values.items())}


def _mean_and_sd(values: Sequence[float]) -> tuple[float, float | None]:
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return math.nan, None
    # Without numpy, which takes twenty times as long for a handful of numbers, and a report has many handfuls.
    mean = math.fsum(known) / len(known)
    squares = math.fsum((value - mean) ** 2 for value in known)
    return mean, math.sqrt(squares / (len(known) - 1)) if len(known) > 1 else None
