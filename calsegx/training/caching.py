"""Fill the feature cache: every case and view once through the frozen encoder."""

import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from calsegx import features, sharding
from calsegx.data import cases as case_tools
from calsegx.data import preprocessing
from calsegx.interfaces import Backbone, Case
from calsegx.training import progress as progress_bar

Prepare = Callable[[Case, np.random.Generator | None], "preprocessing.PreparedCase"]


class CacheCounts(NamedTuple):
    """What ``fill_cache`` did."""

    computed: int  # views of cases that were encoded
    present: int  # views of cases that were there already
    slices: int  # slices that were encoded


class _Job(NamedTuple):
    case: Case
    view: str
    fingerprint: str
    rng: np.random.Generator | None


def view_names(count: int) -> list[str]:
    """``["view0", ...]``: the first is unaugmented."""
    return [f"view{index}" for index in range(count)]


def fill_cache(
    cache: features.FeatureCache,
    cases: Sequence[Case],
    prepare: Prepare,
    backbone: Backbone,
    *,
    views: int,
    seed: int,
    num_classes: int,
    batch_size: int,
    mesh: Mesh,
    progress: bool = True,
) -> CacheCounts:
    """Encode every slice of every view that the cache does not hold yet.

    What is there already, from the same files, is left alone, so an interrupted call is continued by the next
    one. View 0 is unaugmented; view v of a case draws from ``np.random.default_rng([seed, v,
    crc32(case_id)])``, which makes it independent of the other cases and of their order.

    Args:
        cache: where to write.
        cases: what to encode.
        prepare: ``(case, rng or None) -> PreparedCase``; ``rng`` None means unaugmented.
        backbone: its ``encode`` runs in float32 or as it was built; the result is stored as bfloat16.
        views: views per case, at least 1.
        seed: of the augmentation.
        num_classes: classes without the background.
        batch_size: slices per encoder call; rounded up to a multiple of the number of devices.
        mesh: the devices.
        progress: whether to print the size, and a progress bar.

    Returns:
        How many views were computed and how many were present.

    Raises:
        InputError: from ``prepare`` for a bad case, or when the disk refuses.
    """
    jobs, present = _missing(cache, cases, views, seed)
    if not jobs:
        return CacheCounts(0, present, 0)
    encode = case_encoder(backbone, batch_size, mesh)
    slices = 0
    with progress_bar.Progress("Encoding", len(jobs), "views", quiet=not progress) as bar:
        for done, (job, prepared) in enumerate(_prepared_ahead(jobs, prepare)):
            if done == 0:
                bar.say(_size_line(cache, len(jobs), present, len(prepared.slices), backbone.feature_shape))
            cache.write(
                job.case.case_id,
                job.view,
                features=encode(prepared),
                labels=_low_resolution(prepared, num_classes),
                slices=prepared.slices,
                prompts=prepared.prompts,
                fingerprint=job.fingerprint,
            )
            slices += len(prepared.slices)
            bar.update(done + 1, job.case.case_id)
    return CacheCounts(len(jobs), present, slices)


def _missing(cache: features.FeatureCache, cases: Sequence[Case], views: int, seed: int) -> tuple[list[_Job], int]:
    jobs, present = [], 0
    for case in cases:
        fingerprint = case_tools.fingerprint(case)
        for index, view in enumerate(view_names(views)):
            if cache.has(case.case_id, view, fingerprint):
                present += 1
                continue
            key = [seed, index, zlib.crc32(case.case_id.encode())]
            jobs.append(_Job(case, view, fingerprint, np.random.default_rng(key) if index else None))
    return jobs, present


def _prepared_ahead(jobs: Iterable[_Job], prepare: Prepare) -> Iterator[tuple[_Job, "preprocessing.PreparedCase"]]:
    """Prepare one case ahead in a thread, so that reading files and encoding overlap."""
    with futures.ThreadPoolExecutor(max_workers=1) as executor:
        waiting = None
        for job in jobs:
            following = job, executor.submit(prepare, job.case, job.rng)
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = following
        if waiting is not None:
            yield waiting[0], waiting[1].result()


def case_encoder(
    backbone: Backbone, batch_size: int, mesh: Mesh
) -> Callable[["preprocessing.PreparedCase"], np.ndarray]:
    """Compile ``prepared case -> features [n, h, w, C]`` bfloat16, as the cache holds them; prediction uses it too.

    Slices go through the encoder in batches of one shape (``batch_size``, rounded up to a multiple of the devices);
    the last is filled up with zeros.
    """
    batch_size = -(-batch_size // mesh.size) * mesh.size
    frozen = sharding.replicate(mesh, backbone.frozen)
    compiled = jax.jit(lambda frozen, frames: backbone.encode(frozen, frames).astype(jnp.bfloat16))

    def encode(prepared: "preprocessing.PreparedCase") -> np.ndarray:
        encoded = [np.zeros((0, *backbone.feature_shape), features.BFLOAT16)]
        for start in range(0, len(prepared.slices), batch_size):
            images = prepared.images[start : start + batch_size]
            frames = preprocessing.to_frame(images, prepared.geometry, backbone.pixel_mean, backbone.pixel_std)
            filled = np.zeros((batch_size, *frames.shape[1:]), np.float32)
            filled[: len(frames)] = frames
            encoded.append(np.asarray(compiled(frozen, sharding.shard_batch(mesh, filled)))[: len(frames)])
        return np.concatenate(encoded)

    return encode


def _low_resolution(prepared: "preprocessing.PreparedCase", num_classes: int) -> np.ndarray | None:
    if prepared.labels is None:
        return None
    return preprocessing.labels_to_low_res(prepared.labels, prepared.geometry, num_classes)


def _size_line(
    cache: features.FeatureCache, missing: int, present: int, slices: int, feature_shape: Sequence[int]
) -> str:
    estimate = features.size_bytes(missing * slices, feature_shape) / 1e9
    free = shutil.disk_usage(cache.root).free / 1e9
    return (
        f"Feature cache {cache.root}: {missing} views of cases to compute ({present} are there), about "
        f"{slices} slices each: about {estimate:.2f} GB of {free:.1f} GB free."
    )
