"""Training batches straight from the files: the counterpart of ``pipeline`` without a feature cache.

source (cases) -> seed -> shuffle (anew every epoch) -> a seed for what is drawn of the case -> repeat
-> batch of volumes -> this process's share -> from the step where the run goes on
-> read, draw slices, augment (in worker processes) -> encode (in the training process).

What a batch holds follows from the number of its step alone, whatever the number of workers.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import grain
import numpy as np

from calsegx.data import frames, pipeline, preprocessing
from calsegx.interfaces import Batch, Case, DataError, InputError, Prompts, UsageError

# A thread reads the volumes of one batch; slices travel as native pixels, a twentieth of SAM's frames, so that a
# container's 64 MB of shared memory hold some batches.
READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)


class Draw(NamedTuple):
    """One reading of a case: the seed decides which slices are taken, their augmentation and their prompts' jitter."""

    case_id: str
    seed: int


class Slices(NamedTuple):
    """Slices of one case, ready for the encoder."""

    images: np.ndarray  # float32 [n, H, W, 3], 0..255, native pixels
    geometry: frames.FrameGeometry
    labels: np.ndarray  # int32 [n, Hl, Wl] at the decoder's resolution
    prompts: Prompts


@dataclass(frozen=True)
class Reader:
    """Reads what a ``Draw`` asks for.  Goes to worker processes, so it holds no array of a device."""

    cases: Mapping[str, Case]
    prepare: Callable[..., preprocessing.PreparedCase]  # (case, rng=, count=)
    protocol: str
    num_classes: int
    count: int  # slices per volume
    jitter: Callable[..., Prompts] | None = None  # (prompts, rng, part=): prompts.jitter

    def __call__(self, draw: Draw) -> Slices:
        """Read a case and draw its slices.

        Raises:
            DataError: naming the case, when its files cannot be used, or no slice has foreground any more.
        """
        rng = np.random.default_rng(draw.seed)
        prepared = self.prepare(self.cases[draw.case_id], rng=rng, count=self.count)
        if prepared.labels is None or not len(prepared.slices):
            raise DataError(
                f"Case {draw.case_id!r} has foreground, but no slice that can be trained on; check its images and "
                "--config.data.resample, or leave it out."
            )
        prompts = prepared.prompts[self.protocol]
        labels = frames.labels_to_low_res(prepared.labels, prepared.geometry, self.num_classes)
        return Slices(
            prepared.images,
            prepared.geometry,
            labels.astype(np.int32),
            self.jitter(prompts, rng, part=prepared.geometry.resized_shape) if self.jitter else prompts,
        )


@dataclass(frozen=True)
class OnlineData:
    """The order of the training samples, as ``pipeline.TrainingData``; batches are encoded as they are asked for."""

    places: Any  # grain.MapDataset of lists of ``Draw``, one list per step: this process's share of the batch
    read: Reader
    encode: Callable[[Sequence[Slices]], np.ndarray]  # -> features [b, h, w, C] bfloat16
    workers: int
    steps_per_epoch: int
    fingerprint: str  # of the training cases' files

    def batches(self, start: int) -> Generator[Batch, None, None]:
        """An endless stream of ``Batch``es as from the cache, the first of them that of step ``start + 1``.

        Raises:
            InputError: while reading, for files that cannot be used; when a worker process was ended from outside.
        """
        read = self.read  # without the rest of this object, which stays in this process
        stream = self.places[start:].map(lambda draws: [read(draw) for draw in draws]).to_iter_dataset(READ_OPTIONS)
        if self.workers:
            stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=self.workers), _start_worker)
        reading = iter(stream)
        try:
            while True:
                volumes = _next(reading)
                yield Batch(self.encode(volumes), *_joined(volumes))
        finally:
            reading.close()

    def probe(self) -> Batch:
        """The first slices of the first batch, at most two, to try things out on."""
        volume = self.read(self.places[0][0])
        first = volume._replace(images=volume.images[:2])
        labels, prompts = _joined([volume])
        return Batch(self.encode([first]), labels[:2], prompts.map(lambda values: values[:2]))


def order(
    case_ids: Sequence[str], volumes: int, seed: int, share: tuple[int, int]
) -> tuple[Any, int]:  # a grain.MapDataset
    """Which cases are read in which step: ``places`` and ``steps_per_epoch`` of ``OnlineData``.

    Args:
        case_ids: in a fixed order; each is read once per epoch.
        volumes: per batch, over all processes.
        seed: of the order and of what is drawn.
        share: which process of how many this is.

    Raises:
        UsageError: when there are fewer cases than a batch takes, or the batch cannot be divided among the processes.
    """
    if len(case_ids) < volumes:
        raise UsageError(
            f"A batch takes slices of {volumes} volumes (--config.batch_size over --config.data.slices_per_volume) and "
            f"there are {len(case_ids)} training cases; make --config.batch_size smaller or "
            "--config.data.slices_per_volume larger."
        )
    if volumes % share[1]:
        raise UsageError(
            f"The {volumes} volumes of a batch cannot be dealt out evenly to {share[1]} processes; change "
            "--config.data.slices_per_volume, or --config.batch_size."
        )

    def draw(case_id: str, rng: np.random.Generator) -> Draw:
        return Draw(case_id, int(rng.integers(2**63)))

    cases = grain.MapDataset.source(list(case_ids)).seed(seed).shuffle().random_map(draw).repeat()
    batches = cases.batch(volumes, drop_remainder=True, batch_fn=list)
    return batches.map(lambda draws: pipeline.own_rows(draws, share)), len(case_ids) // volumes


def _next(reading: Any) -> list[Slices]:
    try:
        return next(reading)
    except RuntimeError as error:
        if "Worker process was terminated" not in str(error):
            raise
        raise InputError(
            "A process that reads training data was ended from outside, most likely for want of memory; lower "
            "--config.data.workers (0: no such processes) and go on with --resume."
        ) from error


def _joined(volumes: Sequence[Slices]) -> tuple[np.ndarray, Prompts]:
    labels = np.concatenate([volume.labels for volume in volumes])
    first, *others = (volume.prompts for volume in volumes)
    return labels, first.map(lambda *fields: np.concatenate(fields), *others)


def _start_worker(index: int, count: int) -> None:
    """A worker leaves signals to the training process, and ends with it, however that ends."""
    del index, count
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)
