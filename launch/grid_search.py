"""The weights of the penalties and the margin by a written rule, on the validation cases of the source alone."""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from calsegx import experiment, files
from calsegx.evaluation import evaluate as case_metrics
from calsegx.evaluation import study
from calsegx.training import model_folder
from launch import components, trained_runs


@dataclass(frozen=True)
class Candidate:
    """A trained run and what it scores on the validation cases."""

    weights: Mapping[str, float]  # lambda1, lambda2, margin
    dsc: float  # 0 to 1, mean over cases; NaN where it is undefined in all of them
    value: float  # of the rule's metric, lower is better; NaN likewise


def choose(candidates: Sequence[Candidate], baseline_dsc: float, rule: experiment.Rule) -> Candidate:
    """``rule`` on a method's candidates; of equal ones the first."""
    floor = baseline_dsc - rule.within_dsc_points / 100
    able = [c for c in candidates if c.dsc >= floor and not math.isnan(c.value)]
    if able:
        return min(able, key=lambda c: c.value)
    return max(candidates, key=lambda c: -math.inf if math.isnan(c.dsc) else c.dsc)


def score(run: Path, weights: Mapping[str, float], rule: experiment.Rule) -> Candidate:
    """A run's candidate; the scores are kept in ``<run>/validation.json`` and computed once for these weights."""
    params, record = model_folder.load(run)
    asked = {"decoder_sha256": record["decoder_sha256"], "metric": rule.lowest, "region": rule.region}
    path = run / "validation.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if {key: known.get(key) for key in asked} != asked:
        rows = _rows(run, params, record, rule.region)
        dsc = _mean(rows, case_metrics.DSC, case_metrics.VOLUME)
        known = {**asked, "dsc": dsc, "value": _mean(rows, rule.lowest, rule.region)}
        files.write_atomically(path, json.dumps(known, indent=2) + "\n")
    return Candidate(weights, known["dsc"], known["value"])


def _rows(run: Path, params: Any, record: Mapping[str, Any], region: str) -> list[case_metrics.Row]:
    parts = components.of_model(record, "")
    config, val = parts.config, parts.select("val")
    trained_runs.check_validation(record, val)
    cache = components.feature_cache(parts, run)
    components.fill_cache(parts, cache, {"val": 1})
    work = study.Study(cache, parts.backbone, parts.class_map, config.protocol, "", config.data)
    logits = functools.partial(study.slice_logits, work, work.decode, jax.device_put(params))
    rows = []
    for case in val:
        subject = study.load(work, case)
        volume: np.ndarray = study.foreground(subject, logits(subject))
        key = case_metrics.CaseKey("", config.seed, case.case_id, case.subject_id, "", case.split)
        rows += case_metrics.evaluate_case(
            volume, subject.truth, subject.spacing_mm, parts.class_map.names, key, [region]
        )[0]
    return rows


def _mean(rows: Sequence[case_metrics.Row], metric: str, region: str) -> float:
    (found,) = [
        summary
        for summary in case_metrics.summarise(rows)
        if (summary.class_name, summary.metric, summary.region) == (case_metrics.ALL, metric, region)
    ]
    return found.mean
