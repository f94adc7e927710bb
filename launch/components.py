"""From a configuration to objects: the only place where names (of a dataset, backbone, loss) become things."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from calsegx import configs, losses, models, sharding
from calsegx.data import cases as case_tools
from calsegx.data import classes, preprocessing, prompts
from calsegx.features import FeatureCache
from calsegx.interfaces import Backbone, Case, DataError, Dataset, Loss, UsageError
from calsegx.training import caching

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
        clicks: Mapping[str, prompts.Clicks] | None = None,
    ) -> preprocessing.PreparedCase:
        """``preprocessing.prepare_case`` with this configuration: one path for caching, evaluation and prediction."""
        b = self.backbone
        return preprocessing.prepare_case(
            case,
            self.channels,
            self.class_map,
            self.config.data,
            self.config.protocol,
            b.image_size,
            b.logit_shape,
            rng,
            clicks,
        )

    def select(self, split: str) -> tuple[Case, ...]:
        """The cases of a split; training and validation are of the source domain."""
        return case_tools.select(self.dataset, self.config.data, split)


def build(config: configs.TrainConfig, class_map: classes.ClassMap | None = None) -> Components:
    """Load the dataset's index and the backbone.

    ``class_map`` is a trained model's; without it the classes are those that the configuration asks for.

    Raises:
        InputError: for any value of the configuration that does not fit, before any work is done.
    """
    configs.validate(config)
    task_loss = losses.get(config.loss)
    # A backbone that knows one dtype need not take the option.
    options = {} if config.model.dtype == configs.ModelConfig.dtype else {"dtype": config.model.dtype}
    load_backbone = models.registry.bind(config.model.backbone, options)
    dataset = case_tools.load(config.data)
    class_map = class_map or classes.parse(config.data.classes, dataset.labels)
    channels = case_tools.channels(config.data, dataset)
    weights = Path(config.model.weights) if config.model.weights else None
    if weights is not None and not weights.is_dir():
        raise UsageError(f"--config.model.weights={weights} is not a folder; give one that holds model.safetensors.")
    num_classes = len(class_map.names)
    logits = jax.ShapeDtypeStruct((1, 2, 2, 1 if num_classes == 1 else num_classes + 1), np.float32)
    jax.eval_shape(task_loss, logits, jax.ShapeDtypeStruct((1, 2, 2), np.int32))  # e.g. bce of several classes
    return Components(config, dataset, class_map, channels, load_backbone(weights, num_classes))


def feature_cache(components: Components, workdir: Path) -> FeatureCache:
    """The run's feature cache, opened only if it was made with the same weights and preprocessing."""
    data = components.config.data
    signature = {
        "preprocessing": preprocessing.VERSION,
        "backbone": components.backbone.fingerprint,
        "dtype": components.config.model.dtype,
        "image_size": components.backbone.image_size,
        "channels": components.channels,
        "classes": dict(zip(components.class_map.names, components.class_map.ids, strict=True)),
        "percentiles": (data.lower_percentile, data.upper_percentile),
        "augmentation": (data.rotation_degrees, data.intensity_fraction, VIEW_SEED),
    }
    return FeatureCache.open(Path(data.cache) if data.cache else workdir / "features", signature)


def fill_cache(components: Components, cache: FeatureCache, splits: Mapping[str, int]) -> None:
    """Encode what is missing of whole splits; ``splits`` gives the number of views of each."""
    encode(components, cache, [(case, views) for split, views in splits.items() for case in components.select(split)])


def encode(components: Components, cache: FeatureCache, cases: Sequence[tuple[Case, int]]) -> None:
    """Encode what the cache lacks of the labelled ``cases``, each with its number of views."""
    caching.fill_cache(
        cache,
        [(case, views) for case, views in cases if case.label is not None],
        components.prepare,
        components.backbone,
        seed=VIEW_SEED,
        num_classes=len(components.class_map.names),
        batch_size=components.config.model.encoder_batch,
        mesh=sharding.data_mesh(),
    )


def loss_terms(config: configs.TrainConfig, num_classes: int) -> tuple[Loss, Loss, Loss]:
    """Task loss, penalised loss (voxel-mean cross-entropy) and confidence penalty."""
    penalised = losses.get("bce" if num_classes == 1 else "ce")
    confidence = losses.registry.bind("cmp", {"threshold": config.cmp.threshold, "temperature": config.cmp.temperature})
    return losses.get(config.loss), penalised, confidence


def metadata(components: Components, cache: FeatureCache, seen: Mapping[str, Sequence[Case]]) -> dict[str, Any]:
    """What a trained model must know beside its configuration: its input, and by split the cases it has ``seen``."""
    return {
        "seen": {
            split: [
                {"case_id": c.case_id, "subject_id": c.subject_id, "fingerprint": cache.fingerprint(c.case_id, "view0")}
                for c in cases
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


def of_model(record: Mapping[str, Any], root: str) -> Components:
    """The components that a trained model needs, from the record saved beside its weights.

    ``root`` is another dataset, all of whose domains are new to the model; empty: the one it was trained on.
    Channels and classes are the model's own, whatever the other dataset declares.

    Raises:
        DataError, UsageError: when the dataset lacks a channel, or the backbone's weights are not the model's.
    """
    missing = {"config", "backbone", "class_names", "class_ids", "known_ids", "channels", "seen"} - record.keys()
    if missing:
        raise DataError(f"model.json lacks {', '.join(sorted(missing))}; train the model again with this version.")
    config = configs.from_dict(configs.TrainConfig, record["config"], "model.json")
    data = dataclasses.replace(config.data, channels=",".join(record["channels"]))
    if root:
        data = dataclasses.replace(data, root=root, layout="auto", source="", cache="")
    ids = tuple(tuple(values) for values in record["class_ids"])
    class_map = classes.ClassMap(tuple(record["class_names"]), ids, frozenset(record["known_ids"]))
    components = build(dataclasses.replace(config, data=data), class_map)
    if components.backbone.fingerprint != record["backbone"]:
        weights = config.model.weights or "the tiny SAM of this installation"
        raise UsageError(
            f"The model was trained on a backbone with fingerprint {record['backbone'][:12]}, but {weights} has "
            f"{components.backbone.fingerprint[:12]}; restore those weights or train again."
        )
    return components
