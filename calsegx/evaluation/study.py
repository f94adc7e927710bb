"""Evaluate trained decoders and the guesses that keep them honest, case by case, on every domain.

One case is loaded at a time and seen by all models; what is kept are rows and additive statistics.  Only fitting the
prompt-only guesses holds all training labels at once.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from calsegx import calibrators, configs, features
from calsegx.data import cases as case_tools
from calsegx.data import classes, frames, pipeline, preprocessing
from calsegx.evaluation import baselines, evaluate, methods, predict
from calsegx.interfaces import Backbone, Case, Params, Prompts
from calsegx.metrics import calibration, margins, regions

DECODER_BATCH = 16
NO_SEED = 0  # of methods that nothing was trained for

Statistics = dict[tuple[str, str, str], calibration.CalibrationStatistics]
Margins = dict[tuple[str, str], np.ndarray]  # (method, domain) -> ``margins.histogram``
Fits = Mapping[tuple[str, int], Mapping[str, Mapping[str, Any]]]  # (method, seed) -> calibrator -> its params


@dataclass(frozen=True)
class Model:
    """A trained decoder of a run."""

    method: str
    seed: int
    params: Params
    decoder_sha256: str  # of the weights' file


@dataclass(frozen=True)
class Study:
    """What an evaluation works with: cached features of the cases, and the frozen network they came from."""

    cache: features.FeatureCache
    backbone: Backbone
    class_map: classes.ClassMap
    protocol: str
    domain_column: str  # scanner or centre; empty when the training used all domains, which then count as one
    data: configs.DataConfig  # of the models: slice axis and working grid

    def domain(self, case: Case) -> str:
        """The case's domain; empty when the study has one domain only."""
        return case_tools.domain(case, self.domain_column) if self.domain_column else ""

    @functools.cached_property
    def frozen(self) -> Params:
        """The frozen parameters, on the device once."""
        return jax.device_put(self.backbone.frozen)

    @functools.cached_property
    def decode(self) -> Callable[..., Any]:
        """The backbone's decoder, compiled."""
        return jax.jit(self.backbone.decode)

    @functools.cached_property
    def zero_shot(self) -> Callable[..., Any]:
        """The backbone's own decoder as it came, with the signature of ``decode``; its parameters are frozen."""
        zero_shot = self.backbone.zero_shot
        if zero_shot is None:
            raise ValueError(f"the backbone {self.backbone.name} has no zero-shot decoder")
        return _like_decode(zero_shot)


@functools.lru_cache(maxsize=8)
def _like_decode(zero_shot: Callable[..., Any]) -> Callable[..., Any]:
    return jax.jit(lambda trainable, frozen, z, prompts: zero_shot(frozen, z, prompts))


@dataclass(frozen=True)
class Subject:
    """A case as the evaluation sees it."""

    case: Case
    truth: np.ndarray  # [D, H, W] class indices of the file
    spacing_mm: tuple[float, float, float]
    geometry: frames.FrameGeometry
    cached: features.CachedSlices
    working_truth: np.ndarray  # [D', H, W] on the slices of the working grid
    prompted: baselines.PromptedTruth  # on the slices of the working grid


def load(study: Study, case: Case) -> Subject:
    """The reference on the native grid and the cached features of the prompted slices."""
    label = preprocessing.read_label_volume(case, study.class_map, study.data.slice_axis)
    b = study.backbone
    geometry = frames.frame_geometry(
        label.voxels.shape, label.spacing_mm, b.image_size, b.logit_shape, configs.resampled(study.data)
    )
    cached = study.cache.read_case(case.case_id, "view0")
    working = replace(
        label,
        voxels=frames.labels_to_working_depth(label.voxels, geometry, len(study.class_map.names)),
        spacing_mm=frames.working_spacing(label.spacing_mm, geometry),
    )
    prompted = baselines.prompted_truth(_placed_on_labels(cached.prompts), geometry, cached.slices, working)
    return Subject(case, label.voxels, label.spacing_mm, geometry, cached, working.voxels, prompted)


def _placed_on_labels(prompts: Mapping[str, Prompts]) -> Prompts:
    """What the prompt-only guesses are made from: CalSAM's points and MedSAM's boxes, where the cache has them."""
    points, boxes = prompts.get("gt_points", Prompts()), prompts.get("gt_box", Prompts())
    return Prompts(points=points.points, labels=points.labels, boxes=boxes.boxes)


def slice_logits(study: Study, decode: Callable[..., Any], params: Params, subject: Subject) -> np.ndarray:
    """Logits ``[n, H, W, L]`` of the prompted slices on the native grid."""
    prompts = pipeline.protocol_prompts(subject.cached.prompts, study.protocol)
    low_res = predict.predict_slices(decode, params, study.frozen, subject.cached.features, prompts, DECODER_BATCH)
    return predict.case_logits(low_res, subject.geometry)


def foreground(subject: Subject, logits: np.ndarray) -> np.ndarray:
    """Foreground probabilities ``[D, H, W, K]`` of the whole volume."""
    return predict.to_native(predict.probabilities(logits), subject.cached.slices, subject.geometry)


def calibrator_image(prepared: preprocessing.PreparedCase) -> np.ndarray:
    """What spatial calibrators see of a case, in the fit as in prediction: float32 ``[n, H, W, 3]``, 0 to 1.

    The prompted slices on the native grid, where the logits are, normalised as for the encoder.
    """
    return prepared.images / np.float32(255)


def fit_calibrator(
    study: Study,
    model: Model,
    cases: Sequence[Case],
    calibrator: str = "temperature",
    options: Mapping[str, Any] | None = None,
    region: str = "all",
    image: Callable[[Case], np.ndarray] | None = None,
) -> dict[str, Any]:
    """A registered calibrator's params, fitted on validation cases, one in memory at a time.

    Args:
        study: where the cases' features are.
        model: whose logits are calibrated.
        cases: of the source domain's validation split.
        calibrator: its name.
        options: of its ``fit``.
        region: a name of ``metrics.regions``: of the voxels of the prompted slices, on the native grid.
        image: a case's ``calibrator_image``; spatial calibrators need it.
    """
    component = calibrators.get(calibrator)

    def chunks() -> Iterator[tuple[np.ndarray, ...]]:
        for case in cases:
            subject = load(study, case)
            if not len(subject.cached.slices):
                continue
            logits = slice_logits(study, study.decode, model.params, subject)
            labels = subject.working_truth[subject.cached.slices]
            inside = _inside(region, logits, labels, subject.prompted.spacing_mm)
            if not component.spatial:
                yield logits[inside], labels[inside]
            elif image is None:
                raise ValueError(f"the calibrator {calibrator} is spatial: it needs the cases' images")
            else:
                yield logits, labels, image(case), inside

    provenance = {
        "split": "val",
        "region": region,
        "cases": [
            {
                "case_id": case.case_id,
                "subject_id": case.subject_id,
                "fingerprint": study.cache.fingerprint(case.case_id, "view0"),
            }
            for case in cases
        ],
        "backbone": study.backbone.fingerprint,
        "decoder_sha256": model.decoder_sha256,
    }
    return component.fit(chunks(), provenance=provenance, **(options or {}))


def _inside(region: str, logits: np.ndarray, labels: np.ndarray, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """The region of prompted slices, bool ``[n, H, W]``."""
    volume = predict.to_volume(predict.probabilities(logits), np.arange(len(logits)), len(logits))
    total = np.minimum(volume.sum(axis=-1), 1)
    return regions.region(region, total, labels > 0, spacing_mm, predict.segment(volume) > 0)


def fit_guesses(study: Study, cases: Sequence[Case]) -> dict[str, Callable[[baselines.PromptedTruth], np.ndarray]]:
    """The prompt-only guesses, fitted on the source domain's training labels; none where prompts know no labels."""
    if study.protocol in configs.EVERY_SLICE:
        return {}
    truths = [load(study, case).prompted for case in cases]
    count = len(study.class_map.names)
    return {
        "prompt_only_disc": baselines.fit_disc(truths, count),
        "prompt_only_ellipse": baselines.fit_ellipse(truths, count),
    }


def predictions(
    study: Study,
    subject: Subject,
    models: Iterable[Model],
    fits: Fits,
    guesses: Mapping[str, Callable[[baselines.PromptedTruth], np.ndarray]],
    image: Callable[[], np.ndarray] | None = None,
) -> Iterator[tuple[str, int, np.ndarray, np.ndarray | None]]:
    """``(method, seed, foreground probabilities [D, H, W, K], logits)`` of all that is compared, for one case.

    The logits ``[n, H, W, L]`` are those of the prompted slices; guesses have none.  Zero-shot SAM knows no classes,
    so it takes part in binary problems only.  ``image`` gives spatial calibrators the case's ``calibrator_image``.
    """
    for name, guess in guesses.items():
        guessed = guess(subject.prompted)
        yield name, NO_SEED, frames.from_working_depth(guessed, subject.geometry, subject.prompted.slices), None
    if len(study.class_map.names) == 1 and study.backbone.zero_shot is not None:
        logits = slice_logits(study, study.zero_shot, {}, subject)
        yield methods.VANILLA, NO_SEED, foreground(subject, logits), logits
    for model in models:
        logits = slice_logits(study, study.decode, model.params, subject)
        yield model.method, model.seed, foreground(subject, logits), logits
        for name, params in fits.get((model.method, model.seed), {}).items():
            component = calibrators.get(name)
            calibrated = logits
            if len(logits):  # a case without foreground has no prompted slice
                calibrated = component.apply(params, logits, image() if component.spatial and image else None)
            yield model.method + methods.suffix_of(name), model.seed, foreground(subject, calibrated), calibrated


def score(
    study: Study, subject: Subject, method: str, seed: int, probabilities: np.ndarray, statistics: Statistics
) -> list[evaluate.Row]:
    """Rows of one case and method; calibration statistics are added to ``statistics`` by method, domain and region."""
    case, domain = subject.case, study.domain(subject.case)
    key = evaluate.CaseKey(method, seed, case.case_id, case.subject_id, domain, case.split)
    rows, sums = evaluate.evaluate_case(probabilities, subject.truth, subject.spacing_mm, study.class_map.names, key)
    for region, value in sums.items():
        slot = (method, domain, region)
        statistics[slot] = statistics[slot] + value if slot in statistics else value
    return rows


def add_margins(study: Study, subject: Subject, method: str, logits: np.ndarray | None, found: Margins) -> None:
    """Add the voxels of a case's prompted slices to the method's histogram; nothing without logits."""
    if logits is not None:
        slot = method, study.domain(subject.case)
        counts = margins.histogram(logits, subject.working_truth[subject.cached.slices])
        found[slot] = found[slot] + counts if slot in found else counts
