"""Training batches from the feature cache: a deterministic grain pipeline whose position is the number of the step.

source (cached slices) -> seed -> shuffle (anew every epoch) -> one of the slice's views at random -> repeat
-> batch -> this process's rows of it -> from the step where the run goes on.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

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


def protocol_prompts(prompts: Mapping[str, Prompts], protocol: str) -> Prompts:
    """The prompts of ``protocol``.

    Raises:
        InputError: when they were not prepared.
    """
    if protocol not in prompts:
        raise InputError(
            f"The feature cache holds no prompts for the protocol {protocol!r}, only for {', '.join(sorted(prompts))}; "
            "name another folder with --config.data.cache and compute the features again."
        )
    return prompts[protocol]


class Place(NamedTuple):
    """Where a training sample lies in the cache."""

    case_id: str
    view: str
    position: int
    seed: int = 0  # of what is drawn anew for this sample: the jitter of its prompts


class TrainingData(NamedTuple):
    """The order of the training samples, as a function of the arguments of ``training_data`` alone."""

    places: Any  # grain.MapDataset of lists of ``Place``, one list per step: this process's share of the batch
    read: Callable[[Place], Batch]
    steps_per_epoch: int

    def batches(self, start: int) -> grain.IterDataset:
        """An endless stream of ``Batch``es of numpy arrays, the first of them that of step ``start + 1``.

        ``features [b, h, w, C]`` bfloat16, ``labels [b, Hl, Wl]`` int32 and ``prompts`` of the protocol, ``b`` this
        process's share of the batch.  Every slice is seen once per epoch.  Raises InputError while reading, when a
        view is damaged or holds no labels.
        """
        return (
            self.places[start:].map(lambda places: _stack([self.read(p) for p in places])).to_iter_dataset(READ_OPTIONS)
        )


def training_data(
    cache: features.FeatureCache,
    case_ids: Sequence[str],
    views: Sequence[str],
    batch_size: int,
    seed: int,
    protocol: str,
    *,
    share: tuple[int, int] = (0, 1),
    paired: bool = False,
    jitter: Callable[[Prompts, np.random.Generator], Prompts] | None = None,
) -> TrainingData:
    """What is trained on, in which order.

    Args:
        cache: holds every view of every case.
        case_ids: the cases to draw from.
        views: e.g. ``["view0", "view1"]``.
        batch_size: slices per batch, over all processes; batches are always full.
        seed: of the order and of the choice of views.
        protocol: which prompts the model sees.
        share: which process of how many this is.  Together they see the batches that one process would see.
        paired: every slice comes as two samples, one after the other, in two of its views (``losses.consistency``).
        jitter: moves the prompts of a slice, anew for every sample (``prompts.jitter``); None: they stay.

    Raises:
        UsageError: when there are fewer slices than one batch needs, or slices without a second view for ``paired``.
        InputError: when a view is missing.
    """
    source = _Source(cache, case_ids, views)
    each = 2 if paired else 1
    if len(source) * each < batch_size:
        raise UsageError(
            f"--config.batch_size={batch_size} is more than the {len(source) * each} training slices of "
            f"{len(case_ids)} cases; make it smaller or add cases."
        )
    if paired and min(len(source[index].places) for index in range(len(source))) < 2:
        raise UsageError("A loss of paired views needs two views of every slice; set --config.data.views=2 or more.")

    def choose(record: _Slice, rng: np.random.Generator) -> list[Place]:
        chosen = rng.choice(len(record.places), each, replace=False) if paired else [rng.integers(len(record.places))]
        return [Place(record.case_id, *record.places[i], seed=int(rng.integers(2**32))) for i in chosen]

    def read(place: Place) -> Batch:
        item = _one(cache, place, protocol)
        moved = item.prompts if jitter is None else jitter(item.prompts, np.random.default_rng(place.seed))
        return item._replace(prompts=moved)

    slices = batch_size // each
    order = grain.MapDataset.source(source).seed(seed).shuffle().random_map(choose).repeat()
    # Nothing remains of an endless dataset, but grain would count it in floating point and fail at batches of one.
    batches = order.batch(slices, drop_remainder=True, batch_fn=_flatten).map(lambda places: own_rows(places, share))
    return TrainingData(batches, read, len(source) // slices)


def _flatten(groups: Sequence[Sequence[Place]]) -> list[Place]:
    return [place for group in groups for place in group]


def evaluation_batches(
    cache: features.FeatureCache,
    case_ids: Sequence[str],
    batch_size: int,
    protocol: str,
    maximum: int,
    share: tuple[int, int] = (0, 1),
) -> list[tuple[Batch, int]]:
    """At most ``maximum`` batches of unaugmented slices, drawn evenly from the cases; always the same ones.

    Returns:
        Pairs of a batch (the rows that ``share``, process of how many, has of it) and the number of slices of the whole
        batch that count: the last batch may be filled up with repetitions of its last slice, so that every batch has
        the same shape.

    Raises:
        InputError: when a view is missing or damaged, or holds no labels.
    """
    source = _Source(cache, case_ids, ["view0"])
    # Shuffled by a fixed seed: neighbouring slices of one case would say little about the others.
    order = np.random.default_rng(0).permutation(len(source))[: maximum * batch_size]
    batches = []
    for start in range(0, len(order), batch_size):
        chosen = [source[index] for index in order[start : start + batch_size]]
        filled = chosen + [chosen[-1]] * (batch_size - len(chosen))
        places = [Place(record.case_id, *record.places[0]) for record in filled]
        items = [_one(cache, place, protocol) for place in own_rows(places, share)]
        batches.append((_stack(items), len(chosen)))
    return batches


def own_rows(rows: Any, share: tuple[int, int]) -> Any:
    """The part of a whole batch's rows that belongs to process ``share[0]`` of ``share[1]``."""
    index, count = share
    return rows[index * len(rows) // count : (index + 1) * len(rows) // count]


def _one(cache: features.FeatureCache, place: Place, protocol: str) -> Batch:
    record = cache.read_slices(place.case_id, place.view, int(place.position))
    if record.labels is None:
        raise InputError(
            f"Case {place.case_id!r} has no labels in the feature cache {cache.root}; leave it out of the training "
            "and validation cases, or add its label file and compute its features again."
        )
    prompts = protocol_prompts(record.prompts, protocol)
    return Batch(record.features, record.labels.astype(np.int32), prompts)


def _stack(items: Sequence[Batch]) -> Batch:
    """Items without a batch axis -> one batch."""
    first, *others = (item.prompts for item in items)
    return Batch(
        np.stack([item.features for item in items]),
        np.stack([item.labels for item in items]),
        first.map(lambda *fields: np.stack(fields), *others),
    )
