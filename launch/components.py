"""From a configuration to objects: the only place where names (of a dataset, backbone, loss) become things."""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from calsegx import config_checks, configs, files, losses, models, sharding
from calsegx.data import cases as case_tools
from calsegx.data import classes, examine, frames, images, intensity, preprocessing, prompts
from calsegx.data import clicks as click_tools
from calsegx.data import online as online_data
from calsegx.features import FeatureCache
from calsegx.interfaces import Backbone, Case, DataError, Dataset, UsageError, Volume
from calsegx.losses import expression
from calsegx.training import cache_jobs, caching, interruption, online
from calsegx.training import step as train_step

FRAME_SETTINGS = (
    *("intensity", "lower_percentile", "upper_percentile", "window_centre", "window_width"),
    *("slice_axis", "resample", "adjacent_slices"),
)
AUGMENTATION_SETTINGS = ("rotation_degrees", "intensity_fraction", "gamma", "noise", "low_resolution")
VIEW_SEED = 2024  # of the augmented views: the same for all training seeds, so that they share one cache


@dataclass(frozen=True)
class Components:
    """The dataset and the backbone of a configuration."""

    config: configs.TrainConfig
    dataset: Dataset
    class_map: classes.ClassMap
    channels: tuple[str, str, str]
    backbone: Backbone

    def prepare(
        self,
        case: Case,
        rng: np.random.Generator | None = None,
        clicks: Mapping[str, click_tools.Clicks] | None = None,
        count: int | None = None,
    ) -> preprocessing.PreparedCase:
        """``preprocessing.prepare_case`` with this configuration: one path for caching, evaluation and prediction."""
        return self.preparation(case, rng=rng, clicks=clicks, count=count)

    @property
    def preparation(self) -> Callable[..., preprocessing.PreparedCase]:
        """``prepare`` as a function that other processes can be given: it does not hold the backbone."""
        return functools.partial(
            preprocessing.prepare_case,
            channels=self.channels,
            class_map=self.class_map,
            config=self.config.data,
            protocol=self.config.protocol,
            image_size=self.backbone.image_size,
            logit_shape=self.backbone.logit_shape,
        )

    def geometry(self, volume: Volume) -> frames.FrameGeometry:
        """How slices on the grid of ``volume`` lie in the encoder's frame."""
        backbone, resampled = self.backbone, configs.resampled(self.config.data)
        return frames.frame_geometry(
            volume.voxels.shape, volume.spacing_mm, backbone.image_size, backbone.logit_shape, resampled
        )

    def count_slices(self, case: Case) -> int:
        """How many slices ``prepare`` takes of a case, from its label alone; of ``EVERY_SLICE`` black ones too.

        Raises:
            DataError: for an unusable label file.
        """
        label = preprocessing.read_label_volume(case, self.class_map, self.config.data.slice_axis)
        geometry = self.geometry(label)
        if self.config.protocol in configs.EVERY_SLICE:
            return geometry.depths[1]
        working = frames.labels_to_working_depth(label.voxels, geometry, len(self.class_map.names))
        return int(np.any(working, axis=(1, 2)).sum())

    def select(self, split: str) -> tuple[Case, ...]:
        """The cases of a split; training and validation are of the source domain."""
        return case_tools.select(self.dataset, self.config.data, split)


def build(
    config: configs.TrainConfig, class_map: classes.ClassMap | None = None, dataset: Dataset | None = None
) -> Components:
    """Load the dataset's index and the backbone.

    ``class_map`` is a trained model's; without it the classes are those that the configuration asks for.  ``dataset``
    takes the place of the one that the configuration names.

    Raises:
        InputError: for any value of the configuration that does not fit, before any work is done.
    """
    config_checks.validate(config)
    # A backbone that knows one dtype need not take the option.
    options = {} if config.model.dtype == configs.ModelConfig.dtype else {"dtype": config.model.dtype}
    load_backbone = models.registry.bind(config.model.backbone, options)
    dataset = dataset or case_tools.load(config.data)
    class_map = class_map or classes.parse(config.data.classes or dataset.default_classes, dataset.labels)
    channels = case_tools.channels(config.data, dataset)
    intensity.registry.get(config.data.intensity)
    if config.data.adjacent_slices and len(set(channels)) > 1:
        raise UsageError(
            f"--config.data.adjacent_slices takes the place of the channels {', '.join(channels)}; name one with "
            "--config.data.channels."
        )
    weights = Path(config.model.weights) if config.model.weights else None
    if weights is not None and not weights.is_dir():
        raise UsageError(f"--config.model.weights={weights} is not a folder; give one that holds model.safetensors.")
    num_classes = len(class_map.names)
    objective(config, num_classes)
    return Components(config, dataset, class_map, channels, load_backbone(weights, num_classes))


def note_coarse_axis(components: Components, cases: Sequence[Case]) -> None:
    """Say on stderr where another slice axis is clearly the coarser one, from headers alone.

    A file without a readable header is passed over here; it is refused by name when it is encoded.
    """
    asked, found = components.config.data.slice_axis, []
    for case in cases:
        with contextlib.suppress(DataError):
            spacing_mm = images.read_grid(case.images[components.channels[0]])[1]
            distances = dict(zip(configs.SLICE_AXES, spacing_mm, strict=True))  # axial slices, coronal rows, ...
            coarsest = max(distances, key=distances.__getitem__)
            if distances[coarsest] >= examine.ANISOTROPIC * distances[asked]:
                found.append((case.case_id, distances, coarsest))
    if found:
        case_id, distances, coarsest = found[0]
        spacing = ", ".join(f"{axis} {distance:.3g} mm" for axis, distance in distances.items())
        print(
            f"note: in {len(found)} of {len(cases)} training cases voxels are at least {examine.ANISOTROPIC:g} times "
            f"as long along another axis as from one {asked} slice to the next (case {case_id!r}: {spacing}), so "
            f"slices are seen in coarse pixels; --config.data.slice_axis={coarsest} takes them as they were measured",
            file=sys.stderr,
        )


def feature_cache(components: Components, workdir: Path) -> FeatureCache:
    """The run's feature cache, opened only if it was made with the same weights and preprocessing."""
    data = components.config.data
    root = Path(data.cache) if data.cache else workdir / "features"
    files.check_outside(root, components.dataset.root, "--config.data.cache" if data.cache else "--workdir")
    signature = {
        "preprocessing": preprocessing.VERSION,
        "backbone": components.backbone.fingerprint,
        "dtype": components.config.model.dtype,
        "image_size": components.backbone.image_size,
        "channels": components.channels,
        "classes": dict(zip(components.class_map.names, components.class_map.ids, strict=True)),
        "slices": "every" if components.config.protocol in configs.EVERY_SLICE else "with foreground",
        "frames": {name: getattr(data, name) for name in FRAME_SETTINGS},
        "augmentation": {"seed": VIEW_SEED, **{name: getattr(data, name) for name in AUGMENTATION_SETTINGS}},
    }
    return FeatureCache.open(root, signature)


def fill_cache(
    components: Components, cache: FeatureCache, splits: Mapping[str, int], stop: interruption.Stop | None = None
) -> None:
    """Encode what is missing of whole splits; ``splits`` gives the number of views of each."""
    cases = [(case, views) for split, views in splits.items() for case in components.select(split)]
    encode(components, cache, cases, stop)


def encode(
    components: Components,
    cache: FeatureCache,
    cases: Sequence[tuple[Case, int]],
    stop: interruption.Stop | None = None,
) -> None:
    """Encode what the cache lacks of the labelled ``cases``, each with its number of views.

    With several processes each encodes its share, on its own devices, and all wait for the last.
    """
    process, asked = sharding.process(), stop or interruption.Stop()
    share = _share(cases)
    advice = (
        "The device's memory does not hold the encoder and one batch of slices; set --config.model.encoder_batch=1, "
        "--config.model.dtype=bfloat16, or --config.model.shards to the number of devices that should share one encoder"
    )
    with sharding.out_of_memory(lambda: advice):
        caching.fill_cache(
            cache,
            share,
            components.prepare,
            components.backbone,
            seed=VIEW_SEED,
            num_classes=len(components.class_map.names),
            batch_size=components.config.model.encoder_batch,
            mesh=encoder_mesh(components.config),
            progress=process.index == 0,
            between=lambda: asked.check(f"what was encoded is kept in {cache.root}."),
        )
    sharding.wait_for_all("features encoded")


def verify_cache(
    components: Components, cache: FeatureCache, splits: Mapping[str, int], stop: interruption.Stop
) -> list[tuple[str, str]]:
    """Read all that the cache holds of whole splits: what is damaged is said, set aside and returned (case, view)."""
    process = sharding.process()
    damaged = cache_jobs.verify(
        cache,
        _share([(case, views) for split, views in splits.items() for case in components.select(split)]),
        progress=process.index == 0,
        between=lambda: stop.check("nothing was changed but what is said to be damaged."),
    )
    sharding.wait_for_all("features verified")
    return damaged


def _share(cases: Sequence[tuple[Case, int]]) -> list[tuple[Case, int]]:
    """Those with labels that fall to this process."""
    process = sharding.process()
    return [(case, views) for case, views in cases if case.label is not None][process.index :: process.count]


def encoder_mesh(config: configs.TrainConfig) -> Mesh:
    """The devices of this process, in groups that share one copy of the encoder."""
    return sharding.device_mesh(jax.local_devices(), config.model.shards)


def objective(config: configs.TrainConfig, num_classes: int) -> train_step.Objective:
    """What is minimised: the task loss, the penalised loss and the confidence penalty.

    Raises:
        UsageError: for a loss that cannot be read or used with so many classes, or not with these views.
    """
    texts = configs.loss_expressions(config, num_classes)
    task, penalised = (expression.parse(text) for text in texts)
    confidence = losses.registry.bind("cmp", {"threshold": config.cmp.threshold, "temperature": config.cmp.temperature})
    logits = jax.ShapeDtypeStruct((2, 4, 4, 1 if num_classes == 1 else num_classes + 1), np.float32)
    for loss in (task, penalised):
        try:
            jax.eval_shape(loss, logits, jax.ShapeDtypeStruct((2, 4, 4), np.int32))  # e.g. bce of several classes
        except (TypeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UsageError(f"The loss {loss.text!r} cannot be computed ({reason}); check its options.") from error
    if penalised.paired:
        raise UsageError(f"--config.fisher.loss={penalised.text!r} ties samples together; use one that does not.")
    if task.paired:
        _check_paired(config, task.text)
    return train_step.Objective(task, penalised, confidence)


def _check_paired(config: configs.TrainConfig, text: str) -> None:
    needs = f"--config.loss={text!r} compares two views of every slice"
    if config.data.online:
        raise UsageError(f"{needs}, which only a feature cache holds; leave --config.data.online out.")
    if config.data.views < 2 or config.data.rotation_degrees:
        raise UsageError(
            f"{needs} on one grid: set --config.data.views=2 or more and --config.data.rotation_degrees=0, so that the "
            "views differ in intensity alone."
        )
    if config.batch_size % 2 or config.microbatch % 2:
        raise UsageError(f"{needs}; make --config.batch_size and --config.microbatch even.")
    if configs.METHODS[config.method].fisher and config.fisher.mode == "stochastic":
        raise UsageError(f"{needs}, which --config.fisher.mode=stochastic would take apart; use exact or every_k.")


def train_online(
    components: Components, cases: Sequence[Case], stop: interruption.Stop
) -> tuple[online_data.OnlineData, dict[str, str]]:
    """What a run without a cache is trained on, and the fingerprints of its cases; reads all of their files once.

    Raises:
        DataError: for label files that cannot be used, or hold no foreground.
        UsageError: for a batch that does not fit the cases, processes or devices.
    """
    config = components.config
    fingerprints = online.survey(
        cases,
        components.count_slices,
        progress=sharding.process().index == 0,
        between=lambda: stop.check("nothing was written yet."),
    )
    data = online.training_data(
        config,
        {case.case_id: case for case in cases},
        fingerprints,
        components.preparation,
        components.backbone,
        len(components.class_map.names),
        encoder_mesh(config),
        prompts.jitter_of(config.prompt_jitter, components.backbone.image_size),
    )
    return data, fingerprints


def metadata(
    components: Components, fingerprint: Callable[[str], str], seen: Mapping[str, Sequence[Case]]
) -> dict[str, Any]:
    """What a trained model must know beside its configuration: its input, and by split the cases it has ``seen``.

    ``fingerprint`` gives that of the files of a case, by its id.
    """
    return {
        "seen": {
            split: [
                {"case_id": c.case_id, "subject_id": c.subject_id, "fingerprint": fingerprint(c.case_id)} for c in cases
            ]
            for split, cases in seen.items()
        },
        "class_names": list(components.class_map.names),
        "class_ids": [list(ids) for ids in components.class_map.ids],
        "known_ids": sorted(components.class_map.known),
        "channels": list(components.channels),
        "dataset": components.dataset.root.name,
        "device_kind": jax.devices()[0].device_kind,
    }


def of_model(record: Mapping[str, Any], root: str, dataset: Dataset | None = None) -> Components:
    """The components that a trained model needs, from the record saved beside its weights.

    ``root`` is another dataset, all of whose domains are new to the model; empty: the one it was trained on.
    ``dataset``, if given, is what was read of it.  Channels and classes are the model's own, whatever the other dataset
    declares.

    Raises:
        DataError, UsageError: when the dataset lacks a channel, or the backbone's weights are not the model's.
    """
    missing = {"config", "backbone", "class_names", "class_ids", "known_ids", "channels", "seen"} - record.keys()
    if missing:
        raise DataError(f"model.json lacks {', '.join(sorted(missing))}; train the model again with this version.")
    config = configs.from_dict(configs.TrainConfig, record["config"], "model.json")
    data = dataclasses.replace(config.data, channels=",".join(record["channels"]))
    if not (root or data.root or dataset):
        raise UsageError(
            "A model bundle knows no dataset: name one with --data to predict or evaluate; to calibrate, take the run "
            "that it was exported from."
        )
    if root:
        data = dataclasses.replace(data, root=root, layout="auto", source="", splits="", fold=0, cache="")
    ids = tuple(tuple(values) for values in record["class_ids"])
    class_map = classes.ClassMap(tuple(record["class_names"]), ids, frozenset(record["known_ids"]))
    # The training's devices may have been others; what they shared is no property of the model.
    shards = config.model.shards if len(jax.local_devices()) % config.model.shards == 0 else 1
    model = dataclasses.replace(config.model, shards=shards)
    components = build(dataclasses.replace(config, data=data, model=model), class_map, dataset)
    check_backbone(record, components.backbone)
    return components


def check_backbone(record: Mapping[str, Any], backbone: Backbone) -> None:
    """Raise a UsageError when ``backbone`` is not the one that the model was trained on."""
    if backbone.fingerprint != record["backbone"]:
        weights = record["config"]["model"]["weights"] or "the tiny SAM of this installation"
        raise UsageError(
            f"The model was trained on a backbone with fingerprint {record['backbone'][:12]}, but {weights} has "
            f"{backbone.fingerprint[:12]}; restore those weights or train again."
        )
