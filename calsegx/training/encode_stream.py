"""Encode prepared cases one after the other, in batches that are filled across cases.

A case's last slices share their batch with the first of the next case, so that many small cases cost no more than their
slices.  Each slice's features are what ``caching.case_encoder`` gives of the case alone.
"""

import collections
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from calsegx import features, sharding
from calsegx.data import frames, preprocessing
from calsegx.interfaces import Backbone
from calsegx.training import caching

Encoded = tuple[preprocessing.PreparedCase, np.ndarray]  # and its features [n, h, w, C] bfloat16


@dataclass
class _Waiting:
    """A case, some of whose slices are not encoded yet."""

    prepared: preprocessing.PreparedCase
    features: np.ndarray
    missing: int


class _Part(NamedTuple):
    """The slices ``first`` to ``first + count`` of a case, in a batch."""

    case: _Waiting
    first: int
    count: int


def stream_encoder(
    backbone: Backbone, batch_size: int, mesh: Mesh
) -> Callable[[Iterable[preprocessing.PreparedCase]], Iterator[Encoded]]:
    """Compile ``cases -> (case, features [n, h, w, C] bfloat16)`` of each, in their order.

    A case is given out as soon as its slices are encoded; a case without slices has none.  Held are the cases of at
    most ``caching.IN_FLIGHT`` batches and of the one that is being filled; the very last batch is filled up with zeros.

    Args:
        backbone: whose encoder is used.
        batch_size: slices per call, see ``caching.encoder_batch``; 0: automatic.
        mesh: the devices, all of this process.
    """
    batch_size = caching.encoder_batch(batch_size, backbone.feature_shape, mesh)
    place, compiled = caching.batch_encoder(backbone, mesh)
    params = jax.device_put(backbone.encoder, place)

    def encode(cases: Iterable[preprocessing.PreparedCase]) -> Iterator[Encoded]:
        waiting: collections.deque[_Waiting] = collections.deque()
        running: collections.deque[tuple[jax.Array, list[_Part]]] = collections.deque()

        def complete() -> Iterator[Encoded]:
            while waiting and not waiting[0].missing:
                done = waiting.popleft()
                yield done.prepared, done.features

        for batch, parts in _batches(backbone, batch_size, cases, waiting):
            running.append((compiled(params, sharding.shard_batch(mesh, batch)), parts))
            if len(running) == caching.IN_FLIGHT:
                _copy(*running.popleft())
                yield from complete()
        while running:
            _copy(*running.popleft())
        yield from complete()

    return encode


def _batches(
    backbone: Backbone,
    batch_size: int,
    cases: Iterable[preprocessing.PreparedCase],
    waiting: collections.deque[_Waiting],
) -> Iterator[tuple[np.ndarray, list[_Part]]]:
    """Full batches of frames ``[b, S, S, 3]`` and what they hold; every case that is begun is put into ``waiting``."""
    size = backbone.image_size
    batch, parts, filled = np.zeros((batch_size, size, size, 3), np.float32), [], 0
    for prepared in cases:
        total, first = len(prepared.slices), 0
        case = _Waiting(prepared, np.empty((total, *backbone.feature_shape), features.BFLOAT16), total)
        waiting.append(case)
        while first < total:
            count = min(batch_size - filled, total - first)
            images = prepared.images[first : first + count]
            batch[filled : filled + count] = frames.to_frame(
                images, prepared.geometry, backbone.pixel_mean, backbone.pixel_std
            )
            parts.append(_Part(case, first, count))
            first, filled = first + count, filled + count
            if filled == batch_size:
                yield batch, parts
                batch, parts, filled = np.zeros_like(batch), [], 0  # the device may still read the one before
    if parts:
        yield batch, parts


def _copy(encoded: jax.Array, parts: list[_Part]) -> None:
    values, start = np.asarray(encoded), 0
    for case, first, count in parts:
        case.features[first : first + count] = values[start : start + count]
        case.missing -= count
        start += count
