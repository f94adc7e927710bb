"""Fill the feature cache: every case and view once through the frozen encoder.

Three things happen at once: a thread reads and prepares the next case, the device encodes the present one batch by
batch, and a thread writes the one before.  Host memory holds the images of at most three cases and the features of
two; the device holds two batches.
"""

import collections
import functools
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from types import TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from calsegx import features, sharding
from calsegx.data import frames, preprocessing
from calsegx.interfaces import Backbone, Case, DataError, InputError, UsageError
from calsegx.training import cache_jobs
from calsegx.training import progress as progress_bar

Prepare = Callable[[Case, np.random.Generator | None], "preprocessing.PreparedCase"]

# Tokens (cells of the feature grid) that one device encodes per call: 16 slices of the tiny SAM or 1 of SAM at 1024
# pixels on a CPU; 8 of the latter on an accelerator, whose attention weights then still fit a small one.
CPU_TOKENS = 4096
ACCELERATOR_TOKENS = 8 * CPU_TOKENS
MOST_SLICES = 16  # per device and call: a case's last batch is filled up with zeros, which cost as much as slices
SECONDS_BETWEEN_LOOKS = 0.5  # at what other processes compute
IN_FLIGHT = 2  # batches on the device: one is computed while the one before is copied


class CacheCounts(NamedTuple):
    """What ``fill_cache`` did."""

    computed: int  # views of cases that were encoded
    present: int  # views of cases that were there already, or were computed by another process meanwhile
    slices: int  # slices that were encoded


class _Prepared(NamedTuple):
    case: "preprocessing.PreparedCase"
    labels: np.ndarray | None  # at the decoder's resolution


class _Writer:
    """Calls ``write`` in a thread of its own, one call at a time; a context manager that waits for the last."""

    def __init__(self, write: Callable[..., None]):
        self._write = write
        self._thread = futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="write")
        self._running: futures.Future | None = None

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()  # a view that is being written is finished, also after Ctrl-C

    def submit(self, *args: Any, **options: Any) -> None:
        """Start a write, after the one before; raises that one's error."""
        self.finish()
        self._running = self._thread.submit(self._write, *args, **options)

    def check(self) -> None:
        """Raise the error of a write that failed; does not wait for one that goes on."""
        if self._running is not None and self._running.done():
            self._running.result()

    def finish(self) -> None:
        """Wait for the write that goes on; raises its error."""
        if self._running is not None:
            self._running.result()


def fill_cache(
    cache: features.FeatureCache,
    cases: Sequence[tuple[Case, int]],
    prepare: Prepare,
    backbone: Backbone,
    *,
    seed: int,
    num_classes: int,
    batch_size: int,
    mesh: Mesh,
    progress: bool = True,
    between: Callable[[], None] = lambda: None,
) -> CacheCounts:
    """Encode every slice of every view that the cache does not hold yet.

    What is there already, from the same files, is left alone, so an interrupted call is continued by the next
    one.  Of several processes that fill one cache, each computes what no other is at work on, and waits for the rest at
    the end.  View 0 is unaugmented; view v of a case draws from ``np.random.default_rng([seed, v,
    crc32(case_id)])``, which makes it independent of the other cases and of their order.

    Args:
        cache: where to write.
        cases: what to encode, each with its number of views, at least 1.
        prepare: ``(case, rng or None) -> PreparedCase``; ``rng`` None means unaugmented.
        backbone: its ``encode`` runs in float32 or as it was built; the result is stored as bfloat16.
        seed: of the augmentation.
        num_classes: classes without the background.
        batch_size: slices per encoder call, see ``encoder_batch``; 0: automatic.
        mesh: the devices, all of this process.
        progress: whether to print the size, and a progress bar.
        between: called before every batch; it may raise, and views that are written are kept.

    Returns:
        How many views were computed and how many were present.

    Raises:
        DataError: after the last case, when ``prepare`` refused some: the others are in the cache.
        InputError: when the disk refuses, before the next batch.  Every view is in the cache whole or not at all, also
            after Ctrl-C.
    """
    jobs, present = cache_jobs.missing(cache, cases, seed)
    if not jobs:
        return CacheCounts(0, present, 0)
    encode = case_encoder(backbone, batch_size, mesh)
    total, done, computed, slices, refused, waits = len(jobs), 0, 0, 0, {}, False

    def check() -> None:
        between()
        writer.check()

    def write(case_id: str, view: str, **content: Any) -> None:
        cache.write(case_id, view, **content)
        claims.give_back(case_id, view)

    with (
        progress_bar.Progress("Encoding", total, "views", quiet=not progress) as bar,
        cache_jobs.Claims(cache) as claims,
        futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="read") as reader,
        _Writer(write) as writer,
    ):
        while jobs:
            elsewhere: list[cache_jobs.Job] = []
            mine = claims.take(jobs, elsewhere)
            for job, prepared in _prepared_ahead(reader, mine, prepare, num_classes):
                done += 1
                bar.update(done, job.case.case_id)
                if isinstance(prepared, InputError):
                    if job.case.case_id not in refused:
                        bar.say(f"refused {job.case.case_id}: {prepared}")
                    refused[job.case.case_id] = prepared
                    claims.give_back(job.case.case_id, job.view)
                    continue
                count, start = len(prepared.case.slices), time.monotonic()
                if computed == 0:
                    bar.say(_size_line(cache, total, present, count, backbone.feature_shape))
                computed, slices = computed + 1, slices + count
                writer.submit(
                    job.case.case_id,
                    job.view,
                    features=encode(prepared.case, check),
                    labels=prepared.labels,
                    slices=prepared.case.slices,
                    prompts=prepared.case.prompts,
                    fingerprint=job.fingerprint,
                    intensities=prepared.case.intensities,
                )
                if computed == 2:  # the first included compilation
                    bar.say(_time_line(time.monotonic() - start, total - computed))
            writer.finish()
            # No claim is held here, so that processes never wait for each other in a circle.
            if elsewhere and not waits:
                bar.say(f"Waiting for {len(elsewhere)} views that other processes compute.")
                waits = True
            elif len(elsewhere) == len(jobs):
                check()
                time.sleep(SECONDS_BETWEEN_LOOKS)
            jobs = elsewhere
        if done < total:
            bar.update(total)
    if refused:
        name, error = next(iter(refused.items()))
        raise DataError(
            f"{len(refused)} of {len(cases)} cases cannot be used, the others are in the cache; the first is {name!r}: "
            f"{error}"
        ) from error
    return CacheCounts(computed, present + total - computed, slices)


def _prepared_ahead(
    reader: futures.Executor, jobs: Iterable[cache_jobs.Job], prepare: Prepare, num_classes: int
) -> Iterator[tuple[cache_jobs.Job, _Prepared | InputError]]:
    """Prepare one case ahead in the reader's thread; a case that cannot be used comes as the error that says why."""

    def prepared(job: cache_jobs.Job) -> _Prepared | InputError:
        try:
            case = prepare(job.case, job.rng)
            return _Prepared(case, _low_resolution(case, num_classes))
        except InputError as error:
            return error

    return ahead(reader, prepared, jobs)


def ahead(reader: futures.Executor, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """``(item, function(item))``, in order; the reader's thread is at work on the next one meanwhile."""
    waiting = None
    for item in items:
        following = item, reader.submit(function, item)
        if waiting is not None:
            yield waiting[0], waiting[1].result()
        waiting = following
    if waiting is not None:
        yield waiting[0], waiting[1].result()


def encoder_batch(asked: int, feature_shape: Sequence[int], mesh: Mesh) -> int:
    """Slices per encoder call: ``asked``, or for 0 the automatic choice; rounded up to a multiple of the devices.

    Automatic: per device as many slices as fit ``CPU_TOKENS`` or ``ACCELERATOR_TOKENS`` tokens (the cells ``h * w``
    of ``feature_shape``), from 1 to ``MOST_SLICES``.  It depends on nothing else, so that an encoder compiles once.
    """
    height, width, _ = feature_shape
    tokens = CPU_TOKENS if mesh.devices.flat[0].platform == "cpu" else ACCELERATOR_TOKENS
    batch = asked or min(MOST_SLICES, max(1, tokens // (height * width))) * mesh.size
    return -(-batch // mesh.size) * mesh.size


def case_encoder(backbone: Backbone, batch_size: int, mesh: Mesh) -> Callable[..., np.ndarray]:
    """Compile ``(prepared case, between) -> features [n, h, w, C]`` bfloat16, as the cache holds them.

    Prediction uses it too.  As ``frame_encoder``, to which ``batch_size`` (0: automatic) and ``between`` go.
    """
    batch_size = encoder_batch(batch_size, backbone.feature_shape, mesh)
    encode = frame_encoder(backbone, batch_size, mesh)

    def encode_case(prepared: "preprocessing.PreparedCase", between: Callable[[], None] = lambda: None) -> np.ndarray:
        def framed(first: int) -> np.ndarray:
            images = prepared.images[first : first + batch_size]
            return frames.to_frame(images, prepared.geometry, backbone.pixel_mean, backbone.pixel_std)

        return encode(len(prepared.slices), framed, between)

    return encode_case


def frame_encoder(backbone: Backbone, batch_size: int, mesh: Mesh) -> Callable[..., np.ndarray]:
    """Compile ``(n, framed, between) -> features [n, h, w, C]`` bfloat16; ``framed(first)`` gives a batch of frames.

    Slices go through the encoder in batches of one shape (``batch_size`` of ``encoder_batch``), split over the devices;
    the last is filled up with zeros.  A batch starts before the one before it is copied to the host, and no more than
    ``IN_FLIGHT`` are on the device.  ``between`` is called before each batch; it may raise.
    """
    place, compiled = batch_encoder(backbone, mesh)
    params = jax.device_put(backbone.encoder, place)

    def start(framed: np.ndarray) -> jax.Array:
        filled = np.zeros((batch_size, *framed.shape[1:]), np.float32)
        filled[: len(framed)] = framed
        return compiled(params, sharding.shard_batch(mesh, filled))

    def encode(
        count: int, framed: Callable[[int], np.ndarray], between: Callable[[], None] = lambda: None
    ) -> np.ndarray:
        encoded = np.empty((count, *backbone.feature_shape), features.BFLOAT16)
        running: collections.deque[tuple[np.ndarray, jax.Array]] = collections.deque()
        for first in range(0, count, batch_size):
            between()
            running.append((encoded[first : first + batch_size], start(framed(first))))
            if len(running) == IN_FLIGHT:
                _copy(*running.popleft())
        while running:
            _copy(*running.popleft())
        return encoded

    return encode


def batch_encoder(backbone: Backbone, mesh: Mesh) -> tuple[Any, Any]:
    """Where the encoder's parameters lie, and the compiled ``(params, frames [b, S, S, 3]) -> features`` bfloat16.

    ``b`` is a multiple of the devices; each encodes its own frames.

    Raises:
        UsageError: where the backbone cannot store its encoder in parts, and the mesh asks for that.
    """
    if mesh.shape["model"] == 1:
        place = sharding.replicated(mesh)
        return jax.tree.map(lambda leaf: place, backbone.encoder), _with_whole_encoder(backbone.encode, mesh)
    in_parts = backbone.encode_in_parts
    if in_parts is None:
        raise UsageError(
            f"The backbone {backbone.name!r} cannot store its encoder in parts; set --config.model.shards=1."
        )
    place = sharding.split_parameters(mesh, backbone.encoder)

    def whole(path: tuple[str, ...], part: Any, after: Any) -> Any:
        placements = functools.reduce(lambda level, name: level[name], path, place)
        return sharding.gather(part, placements, after)

    return place, _per_device(lambda params, frames: in_parts(params, frames, whole), place, mesh)


@functools.lru_cache(maxsize=8)
def _with_whole_encoder(encode: Callable[[Any, Any], Any], mesh: Mesh) -> Any:
    """The same for the same function and devices, so that it is traced and compiled once a process."""
    return _per_device(encode, sharding.replicated(mesh), mesh)


def _per_device(forward: Callable[[Any, Any], Any], place: Any, mesh: Mesh) -> Any:
    split = sharding.batch_sharded(mesh)
    # A view per device: the compiler would gather the whole batch where the encoder loops over blocks of it.
    per_device = jax.shard_map(
        lambda params, frames: forward(params, frames).astype(jnp.bfloat16),
        mesh=mesh,
        in_specs=(jax.tree.map(lambda leaf: leaf.spec, place), split.spec),
        out_specs=split.spec,
        check_vma=False,
    )
    return jax.jit(per_device, in_shardings=(place, split), out_shardings=split)


def _copy(rows: np.ndarray, batch: jax.Array) -> None:
    rows[...] = np.asarray(batch)[: len(rows)]


def _low_resolution(prepared: "preprocessing.PreparedCase", num_classes: int) -> np.ndarray | None:
    if prepared.labels is None:
        return None
    return frames.labels_to_low_res(prepared.labels, prepared.geometry, num_classes)


def _size_line(
    cache: features.FeatureCache, missing: int, present: int, slices: int, feature_shape: Sequence[int]
) -> str:
    estimate = features.size_bytes(missing * slices, feature_shape) / 1e9
    free = shutil.disk_usage(cache.root).free / 1e9
    return (
        f"Feature cache {cache.root}: {missing} views of cases to compute ({present} are there), about "
        f"{slices} slices each: about {estimate:.2f} GB of {free:.1f} GB free."
    )


def _time_line(seconds: float, left: int) -> str:
    return (
        f"A view takes about {seconds:.1f} s, the {left} that are left about {progress_bar.duration(seconds * left)}."
    )
