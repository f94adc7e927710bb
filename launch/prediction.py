"""Predict a batch of cases with one model: which are done, read ahead, encode, decode, calibrate, write."""

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from calsegx import calibrators
from calsegx.data import cases as case_tools
from calsegx.data import clicks as click_tools
from calsegx.data import pipeline, preprocessing
from calsegx.evaluation import case_report, prediction_files, study
from calsegx.evaluation import predict as case_prediction
from calsegx.interfaces import Case, InputError, Params
from calsegx.training import caching, encode_stream, interruption, progress
from launch import components


@dataclass(frozen=True)
class Batch:
    """What is predicted with, and where it goes."""

    parts: components.Components
    params: Params
    calibrator: tuple[str, Mapping[str, Any]] | None
    clicks: Mapping[str, click_tools.Clicks] | None  # None: prompts are placed on the labels, or there are none
    training_domain: Mapping[str, Any] | None  # of the model's record; None: of an earlier version
    model: Mapping[str, Any]  # what tells it from others
    output: Path
    planned: Mapping[str, prediction_files.CaseFiles]

    def made_from(self, case: Case) -> dict[str, Any]:
        """What the case's predictions depend on; reads its files."""
        table = self.clicks[case.case_id] if self.clicks else None
        return prediction_files.made_from(self.model, case_tools.fingerprint(case), table)

    def prepare(self, case: Case) -> tuple[preprocessing.PreparedCase, dict[str, Any]] | InputError:
        """The prepared case and ``made_from``, or why it cannot be used."""
        try:
            return self.parts.prepare(case, clicks=self.clicks), self.made_from(case)
        except InputError as error:
            return error


def done_before(batch: Batch, cases: Sequence[Case]) -> dict[str, Path]:
    """The masks of cases that need not be predicted again."""
    masks = {}
    for case in cases:
        planned = batch.planned[case.case_id]
        if not planned.record.is_file():
            continue
        try:
            wanted = batch.made_from(case)
        except InputError:  # a file that cannot be read: said when the case is prepared
            continue
        if mask := prediction_files.whole(batch.output, planned, wanted):
            masks[case.case_id] = mask
    return masks


def predict_cases(batch: Batch, cases: Sequence[Case]) -> tuple[dict[str, Path], dict[str, InputError]]:
    """Predict and write the cases, one read ahead; their masks, and why cases failed."""
    parts, started = batch.parts, time.monotonic()
    mesh = components.encoder_mesh(parts.config)
    encode = encode_stream.stream_encoder(parts.backbone, parts.config.model.encoder_batch, mesh)
    decode = jax.jit(parts.backbone.decode)
    weights = jax.device_put((batch.params, parts.backbone.frozen))  # once, not for every batch
    masks: dict[str, Path] = {}
    failed: dict[str, InputError] = {}
    sources: dict[str, dict[str, Any]] = {}
    slices = 0

    def fail(case_id: str, error: InputError) -> None:
        failed[case_id] = error
        bar.say(f"failed: {case_id}: {error}")
        bar.update(len(masks) + len(failed), case_id)

    def kept() -> str:
        return f"{len(masks)} of {len(cases)} cases are predicted; the same command goes on with the rest."

    def usable() -> Iterator[preprocessing.PreparedCase]:
        for case, found in caching.ahead(reader, batch.prepare, cases):
            stop.check(kept())
            if isinstance(found, InputError):
                fail(case.case_id, found)
            else:
                prepared, sources[case.case_id] = found
                yield prepared

    with (
        interruption.Stop() as stop,
        progress.Progress("Predicting", len(cases), "cases", quiet=not cases) as bar,
        futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="read") as reader,
    ):
        for prepared, features in encode(usable()):
            case_id = prepared.case.case_id
            try:
                probabilities = _probabilities(parts, weights, prepared, features, decode, batch.calibrator)
            except InputError as error:
                fail(case_id, error)
                continue
            record = _record(batch, prepared, probabilities, features) | {"made_from": sources.pop(case_id)}
            for warning in record["report"]["warnings"]:
                bar.say(f"warning: {case_id}: {warning['message']}")
            masks[case_id] = prediction_files.write(
                batch.output, batch.planned[case_id], probabilities, prepared.reference, parts.class_map, record
            )
            slices += len(prepared.slices)
            bar.update(len(masks) + len(failed), case_id)
            stop.check(kept())
    if masks:
        seconds = time.monotonic() - started
        print(
            f"Predicted {len(masks)} cases, {slices} slices, in {seconds:.1f} s: {slices / seconds:.1f} slices/s, "
            f"{seconds / len(masks):.2f} s per case, compilation included"
        )
    return masks, failed


def _probabilities(
    parts: components.Components,
    weights: tuple[Params, Params],
    prepared: preprocessing.PreparedCase,
    features: np.ndarray,
    decode: Any,
    calibrator: tuple[str, Mapping[str, Any]] | None,
) -> np.ndarray:
    """Foreground probabilities ``[D, H, W, K]``; ``weights`` trained and frozen."""
    asked = pipeline.protocol_prompts(prepared.prompts, parts.config.protocol)
    low_res = case_prediction.predict_slices(decode, *weights, features, asked, study.DECODER_BATCH)
    logits = case_prediction.case_logits(low_res, prepared.geometry)
    if calibrator is not None:
        name, params = calibrator
        logits = calibrators.get(name).apply(params, logits, study.calibrator_image(prepared))
    native = case_prediction.probabilities(logits)
    return case_prediction.to_native(native, prepared.slices, prepared.geometry)


def _record(
    batch: Batch, prepared: preprocessing.PreparedCase, probabilities: np.ndarray, features: np.ndarray
) -> dict[str, Any]:
    """What a case's JSON says beside its files."""
    protocol = batch.parts.config.protocol
    source = "of a file" if batch.clicks else "none" if protocol == "none" else "on reference labels"
    return {
        "case_id": prepared.case.case_id,
        "prompts": {"protocol": protocol, "source": source},
        "calibrator": batch.calibrator[0] if batch.calibrator else None,
        "uncertainty": prediction_files.UNCERTAINTY,
        "report": case_report.case_report(
            probabilities, batch.parts.class_map.names, prepared, protocol, features, batch.training_domain
        ),
    }
