"""Training batches from the feature cache: a deterministic grain pipeline whose position is a few integers.

source (cached slices) -> seed -> shuffle (anew every epoch) -> one of the slice's views at random -> repeat
-> batch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np

from calsegx import features
from calsegx.interfaces import Batch, InputError, Prompts, UsageError

# A batch of ViT features is tens of megabytes; grain's own default would buffer 500 of them.
READ_OPTIONS = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)


class _Slice(NamedTuple):
    case_id: str
    places: tuple[tuple[str, int], ...]  # (view, position in the view) of every view that holds this slice


class _Source:
    """The slices of the training cases, as a random-access source of records (not of arrays)."""

    def __init__(self, cache: features.FeatureCache, case_ids: Sequence[str], views: Sequence[str]):
        self._slices = []
        for case_id in case_ids:
            places: dict[int, list[tuple[str, int]]] = {}
            for view in views:
                for position, number in enumerate(cache.slices(case_id, view)):
                    places.setdefault(int(number), []).append((view, position))
            self._slices += [_Slice(case_id, tuple(places[number])) for number in sorted(places)]

    def __len__(self) -> int:
        return len(self._slices)

    def __getitem__(self, index: int) -> _Slice:
        return self._slices[index]

    def __repr__(self) -> str:
        # Grain compares this text when an iterator is restored.
        return f"slices of {len(self._slices)}"


def protocol_prompts(prompts: Prompts, protocol: str) -> Prompts:
    """Only those prompts that ``protocol`` gives to the model (``gt_points``: points, ``gt_box``: boxes).

    Raises:
        InputError: when the cache does not hold them.
    """
    if protocol == "gt_points":
        chosen = Prompts(points=prompts.points, labels=prompts.labels)
        missing = prompts.points is None or prompts.labels is None
    elif protocol == "gt_box":
        chosen = Prompts(boxes=prompts.boxes)
        missing = prompts.boxes is None
    else:
        raise UsageError(f"--config.protocol={protocol!r} is not one of gt_points, gt_box.")
    if missing:
        raise InputError(
            f"The feature cache holds no prompts for the protocol {protocol!r}; name another folder with "
            "--config.data.cache and compute the features again."
        )
    return chosen


def training_batches(
    cache: features.FeatureCache,
    case_ids: Sequence[str],
    views: Sequence[str],
    batch_size: int,
    seed: int,
    protocol: str,
) -> grain.IterDataset:
    """An endless, shuffled stream of ``Batch``es of numpy arrays.

    Every slice is seen once per epoch, in a new order and in a randomly chosen view.  The stream is a
    function of the arguments alone, and its iterator's state resumes it exactly.

    Args:
        cache: holds every view of every case.
        case_ids: the cases to draw from.
        views: e.g. ``["view0", "view1"]``.
        batch_size: slices per batch; batches are always full.
        seed: of the order and of the choice of views.
        protocol: which prompts the model sees, ``gt_points`` or ``gt_box``.

    Returns:
        ``features [B, h, w, C]`` bfloat16, ``labels [B, Hl, Wl]`` int32 and ``prompts`` of the protocol.

    Raises:
        UsageError: when there are fewer slices than one batch needs.
        InputError: when a view is missing or damaged, or holds no labels (the latter two while reading).
    """
    source = _Source(cache, case_ids, views)
    if len(source) < batch_size:
        raise UsageError(
            f"--config.batch_size={batch_size} is more than the {len(source)} training slices of "
            f"{len(case_ids)} cases; make it smaller or add cases."
        )

    def read(record: _Slice, rng: np.random.Generator) -> Batch:
        view, position = record.places[rng.integers(len(record.places))]
        return _one(cache, record.case_id, view, position, protocol)

    return (
        grain.MapDataset.source(source)
        .seed(seed)
        .shuffle()
        .random_map(read)
        .repeat()
        .batch(batch_size, drop_remainder=True)
        .to_iter_dataset(READ_OPTIONS)
    )


def evaluation_batches(
    cache: features.FeatureCache,
    case_ids: Sequence[str],
    batch_size: int,
    protocol: str,
    maximum: int,
) -> list[tuple[Batch, int]]:
    """At most ``maximum`` batches of unaugmented slices, drawn evenly from the cases; always the same ones.

    Returns:
        Pairs of a batch and the number of its slices that count: the last batch may be filled up with
        repetitions of its last slice, so that every batch has the same shape.

    Raises:
        InputError: when a view is missing or damaged, or holds no labels.
    """
    source = _Source(cache, case_ids, ["view0"])
    # Shuffled by a fixed seed: neighbouring slices of one case would say little about the others.
    order = np.random.default_rng(0).permutation(len(source))[: maximum * batch_size]
    batches = []
    for start in range(0, len(order), batch_size):
        chosen = [source[index] for index in order[start : start + batch_size]]
        items = [_one(cache, record.case_id, *record.places[0], protocol) for record in chosen]
        filled = items + [items[-1]] * (batch_size - len(items))
        batches.append((_stack(filled), len(items)))
    return batches


def _one(cache: features.FeatureCache, case_id: str, view: str, position: int, protocol: str) -> Batch:
    record = cache.read_slices(case_id, view, int(position))
    if record.labels is None:
        raise InputError(
            f"Case {case_id!r} has no labels in the feature cache {cache.root}; leave it out of the training "
            "and validation cases, or add its label file and compute its features again."
        )
    prompts = protocol_prompts(record.prompts, protocol)
    return Batch(record.features, record.labels.astype(np.int32), prompts)


def _stack(items: Sequence[Batch]) -> Batch:
    """Items without a batch axis -> one batch."""
    first = items[0]
    prompts = {
        field: None if getattr(first.prompts, field) is None else np.stack([getattr(i.prompts, field) for i in items])
        for field in Prompts._fields
    }
    return Batch(
        np.stack([item.features for item in items]),
        np.stack([item.labels for item in items]),
        Prompts(**prompts),
    )
