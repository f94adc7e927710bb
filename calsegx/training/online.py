"""Training without a feature cache: what is checked before, and the frozen encoder in the training process."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures

import jax
import numpy as np
from jax.sharding import Mesh

from calsegx import configs, sharding
from calsegx.data import cases as case_tools
from calsegx.data import frames, online, preprocessing
from calsegx.interfaces import Backbone, Case, DataError, Prompts
from calsegx.training import caching
from calsegx.training import progress as progress_bar


def survey(
    cases: Sequence[Case],
    count_slices: Callable[[Case], int],
    *,
    progress: bool = True,
    between: Callable[[], None] = lambda: None,
) -> dict[str, str]:
    """Read every file of the training cases before the first step: ``{case id: fingerprint}`` of those with slices.

    Args:
        cases: with labels.
        count_slices: how many slices a case can give; raises for unusable label files.
        progress: whether to show progress and say what is left out.
        between: called after every case; it may raise.

    Raises:
        DataError: for a file that cannot be used, and when no case has slices.
    """

    def look(case: Case) -> str | None:
        return case_tools.fingerprint(case) if count_slices(case) else None

    found: dict[str, str | None] = {}
    with (
        progress_bar.Progress("Reading training files", len(cases), "cases", quiet=not progress) as bar,
        futures.ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="survey") as readers,
    ):
        try:
            for done, (case, fingerprint) in enumerate(zip(cases, readers.map(look, cases), strict=True), start=1):
                found[case.case_id] = fingerprint
                bar.update(done, case.case_id)
                between()
        except BaseException:
            readers.shutdown(wait=False, cancel_futures=True)
            raise
        usable = {case_id: fingerprint for case_id, fingerprint in found.items() if fingerprint is not None}
        empty = [case_id for case_id in found if case_id not in usable]
        if empty:
            bar.say(f"Left out {len(empty)} cases without foreground: {', '.join(empty)}.")
    if not usable:
        raise DataError("No training case has foreground; check --config.data.classes and the label files.")
    return usable


def training_data(
    config: configs.TrainConfig,
    cases: Mapping[str, Case],
    fingerprints: Mapping[str, str],
    prepare: Callable[..., preprocessing.PreparedCase],
    backbone: Backbone,
    num_classes: int,
    mesh: Mesh,
    jitter: Callable[..., Prompts] | None = None,
) -> online.OnlineData:
    """What is trained on, in which order.

    Args:
        config: batch size, slices per volume, workers, protocol and seed.
        cases: by id.
        fingerprints: of ``survey``: the cases to draw from.
        prepare: ``(case, rng=, count=) -> PreparedCase``; goes to worker processes, so it must not hold the backbone.
        backbone: whose encoder runs in this process.
        num_classes: without the background.
        mesh: of this process's devices, for the encoder.
        jitter: moves the prompts of a volume's slices; None: they stay.

    Raises:
        UsageError: for a batch that does not fit the cases, processes or devices.
    """
    share, each = sharding.process(), config.data.slices_per_volume
    places, steps_per_epoch = online.order(list(fingerprints), config.batch_size // each, config.seed, share)
    read = online.Reader(
        {case_id: cases[case_id] for case_id in fingerprints}, prepare, config.protocol, num_classes, each, jitter
    )
    content = json.dumps(list(fingerprints.items())).encode()
    return online.OnlineData(
        places,
        read,
        _encoder(config, backbone, mesh),
        config.data.workers,
        steps_per_epoch,
        hashlib.sha256(content).hexdigest(),
    )


def _encoder(
    config: configs.TrainConfig, backbone: Backbone, mesh: Mesh
) -> Callable[[Sequence[online.Slices]], np.ndarray]:
    rows = config.batch_size // jax.process_count()
    batch = min(rows, caching.encoder_batch(config.model.encoder_batch, backbone.feature_shape, mesh))
    encode = caching.frame_encoder(backbone, batch, mesh)

    def encode_volumes(volumes: Sequence[online.Slices]) -> np.ndarray:
        owners = [(volume, row) for volume in volumes for row in range(len(volume.images))]

        def framed(first: int) -> np.ndarray:
            return np.concatenate(
                [
                    frames.to_frame(
                        volume.images[row : row + 1], volume.geometry, backbone.pixel_mean, backbone.pixel_std
                    )
                    for volume, row in owners[first : first + batch]
                ]
            )

        return encode(len(owners), framed)

    return encode_volumes
