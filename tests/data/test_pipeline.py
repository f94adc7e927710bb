"""Training batches: deterministic, from any step on, every slice once per epoch, shared out to processes."""

import functools

import ml_dtypes
import numpy as np
import pytest

from calsegx import features
from calsegx.data import pipeline, prompts
from calsegx.interfaces import InputError, Prompts, UsageError

CASES = ["a", "b"]
VIEWS = ["view0", "view1"]


@pytest.fixture
def cache(tmp_path):
    """Features say which case, view and slice they are: 100 * case + 10 * view + slice."""
    made = features.FeatureCache.open(tmp_path / "cache", {})
    for number, case_id in enumerate(CASES):
        for view in range(2):
            names = 100 * number + 10 * view + np.arange(5)
            made.write(
                case_id,
                f"view{view}",
                features=np.broadcast_to(names[:, None, None, None], (5, 2, 2, 3)),
                labels=np.full((5, 8, 8), number, np.uint8),
                slices=np.arange(5),
                prompts={
                    "gt_points": Prompts(points=np.zeros((5, 2, 2)), labels=np.ones((5, 2))),
                    "gt_box": Prompts(boxes=np.zeros((5, 4))),
                },
                fingerprint="f",
            )
    return made


def data(cache, seed=0, batch_size=4, protocol="gt_points", views=VIEWS, **options):
    return pipeline.training_data(cache, CASES, views, batch_size, seed, protocol, **options)


def stream(cache, start=0, **options):
    return iter(data(cache, **options).batches(start))


def names(batches):
    return np.concatenate([batch.features[:, 0, 0, 0].astype(int) for batch in batches])


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def test_batch_content(cache):
    batch = next(stream(cache))
    assert batch.features.shape == (4, 2, 2, 3) and batch.features.dtype == ml_dtypes.bfloat16
    assert batch.labels.shape == (4, 8, 8) and batch.labels.dtype == np.int32
    np.testing.assert_array_equal(batch.labels[:, 0, 0], names([batch]) // 100)
    assert batch.prompts.points.shape == (4, 2, 2) and batch.prompts.labels.shape == (4, 2)
    assert batch.prompts.boxes is None and batch.prompts.masks is None


def test_protocol_chooses_the_prompts(cache):
    prompts = next(stream(cache, protocol="gt_box")).prompts
    assert prompts.boxes.shape == (4, 4) and prompts.points is None and prompts.labels is None


def test_every_slice_once_per_epoch(cache):
    seen = names(take(stream(cache, batch_size=5), 20)).reshape(10, 10)
    slices = seen // 100 * 100 + seen % 10
    for epoch in slices:
        assert sorted(epoch) == [0, 1, 2, 3, 4, 100, 101, 102, 103, 104]
    assert len({tuple(epoch) for epoch in slices}) > 1  # a new order every epoch
    views = seen // 10 % 10
    assert 30 < views.sum() < 70  # 100 fair choices between two views; fixed by the seed
    assert len({tuple(epoch) for epoch in views}) > 1


def test_deterministic_and_seeded(cache):
    first = names(take(stream(cache), 8))
    np.testing.assert_array_equal(first, names(take(stream(cache), 8)))
    assert np.any(first != names(take(stream(cache, seed=1), 8)))


@pytest.mark.parametrize("done", [0, 1, 2, 3, 7])
def test_a_start_is_the_same_as_skipping(cache, done):
    whole = stream(cache)
    take(whole, done)
    np.testing.assert_array_equal(names(take(stream(cache, start=done), 6)), names(take(whole, 6)))


def test_places_say_what_a_step_sees(cache):
    found = data(cache)
    assert found.steps_per_epoch == 2
    for step, batch in enumerate(take(iter(found.batches(0)), 6)):
        told = [100 * CASES.index(place.case_id) + 10 * int(place.view[-1]) + place.position
                for place in found.places[step]]  # fmt: skip
        np.testing.assert_array_equal(names([batch]), told)


JITTER = functools.partial(prompts.jitter, amount=0.1, size=100)


@pytest.mark.parametrize("options", [{}, {"paired": True}])
def test_jitter_is_drawn_for_every_sample_and_changes_no_order(cache, options):
    plain, moved = (take(stream(cache, jitter=jitter, **options), 10) for jitter in (None, JITTER))
    np.testing.assert_array_equal(names(plain), names(moved))
    points = np.concatenate([batch.prompts.points for batch in moved])
    assert not np.concatenate([batch.prompts.points for batch in plain]).any()
    assert points.min() >= 0 and 9 < points.max() <= 10  # they lie at 0, and are clipped there
    drawn = points.reshape(len(points), -1)
    assert len(np.unique(drawn[drawn.any(axis=1)], axis=0)) == np.count_nonzero(drawn.any(axis=1))


@pytest.mark.parametrize("start", [1, 7])
def test_jitter_is_the_same_after_a_start_in_between_and_in_shares(cache, start):
    whole = take(stream(cache, jitter=JITTER), 12)[start:]
    again = take(stream(cache, start, jitter=JITTER), 12 - start)
    shares = [take(stream(cache, start, jitter=JITTER, share=(index, 2)), 12 - start) for index in range(2)]
    other = take(stream(cache, start, jitter=JITTER, seed=1), 12 - start)
    for batch, same, different, *parts in zip(whole, again, other, *shares, strict=True):
        np.testing.assert_array_equal(same.prompts.points, batch.prompts.points)
        np.testing.assert_array_equal(np.concatenate([part.prompts.points for part in parts]), batch.prompts.points)
        assert np.any(different.prompts.points != batch.prompts.points)


@pytest.mark.parametrize("options", [{}, {"paired": True}])
@pytest.mark.parametrize("start", [0, 3])
def test_shares_together_are_the_batches_of_one_process(cache, options, start):
    whole = take(stream(cache, start, **options), 6)
    shares = [take(stream(cache, start, share=(index, 2), **options), 6) for index in range(2)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert [len(part.features) for part in parts] == [2, 2]
        np.testing.assert_array_equal(names(parts), names([batch]))
        np.testing.assert_array_equal(np.concatenate([part.labels for part in parts]), batch.labels)


def test_pairs_are_two_views_of_one_slice(cache):
    found = names(take(stream(cache, batch_size=10, paired=True), 20)).reshape(20, 5, 2)
    case, view, position = found // 100, found // 10 % 10, found % 10
    assert np.all(case[..., 0] == case[..., 1]) and np.all(position[..., 0] == position[..., 1])
    np.testing.assert_array_equal(np.sort(view), np.broadcast_to([0, 1], view.shape))
    assert 20 < view[..., 0].sum() < 80  # 100 fair choices of which comes first; fixed by the seed
    for epoch in found[..., 0].reshape(10, 10):
        assert len(set(epoch // 100 * 100 + epoch % 10)) == 10  # every slice once


def test_pairs_need_a_second_view(cache):
    with pytest.raises(UsageError, match=r"needs two views of every slice; set --config.data.views=2"):
        data(cache, views=["view0"], paired=True)


def test_slice_that_one_view_lacks(cache):
    cache.write(
        "a",
        "view1",
        features=np.full((1, 2, 2, 3), 13.0),
        labels=np.zeros((1, 8, 8), np.uint8),
        slices=np.array([3]),
        prompts={"gt_points": Prompts(points=np.zeros((1, 2, 2)), labels=np.ones((1, 2)))},
        fingerprint="f",
    )
    seen = set(names(take(stream(cache, batch_size=10), 20)))
    assert {0, 1, 2, 3, 4, 13} == {name for name in seen if name < 100}


def test_fewer_slices_than_a_batch(cache):
    with pytest.raises(UsageError, match=r"--config.batch_size=11 is more than the 10 training slices of 2 cases"):
        data(cache, batch_size=11)


def test_missing_view(cache):
    with pytest.raises(InputError, match="'a' has no view2"):
        data(cache, views=["view0", "view2"])


def test_missing_prompts_and_labels(cache):
    content = {
        "features": np.zeros((5, 2, 2, 3)),
        "slices": np.arange(5),
        "prompts": {"gt_box": Prompts(boxes=np.zeros((5, 4)))},
        "fingerprint": "f",
    }
    cache.write("a", "view0", labels=np.zeros((5, 8, 8), np.uint8), **content)
    with pytest.raises(InputError, match="no prompts for the protocol 'gt_points'"):
        pipeline.evaluation_batches(cache, ["a"], 2, "gt_points", 1)
    cache.write("a", "view0", labels=None, **content)
    with pytest.raises(InputError, match="Case 'a' has no labels"):
        pipeline.evaluation_batches(cache, ["a"], 2, "gt_box", 1)


def test_evaluation_batches(cache):
    batches = pipeline.evaluation_batches(cache, CASES, 4, "gt_points", 10)
    assert [count for _, count in batches] == [4, 4, 2]
    assert all(batch.features.shape == (4, 2, 2, 3) for batch, _ in batches)
    real = np.concatenate([names([batch])[:count] for batch, count in batches])
    assert sorted(real) == [0, 1, 2, 3, 4, 100, 101, 102, 103, 104]  # unaugmented, each once
    assert len(pipeline.evaluation_batches(cache, CASES, 4, "gt_points", 2)) == 2
    assert pipeline.evaluation_batches(cache, [], 4, "gt_points", 2) == []
    shares = [pipeline.evaluation_batches(cache, CASES, 4, "gt_points", 10, (index, 2)) for index in range(2)]
    for (batch, count), *parts in zip(batches, *shares, strict=True):
        np.testing.assert_array_equal(names([part for part, _ in parts]), names([batch]))
        assert [of_whole for _, of_whole in parts] == [count, count]


def test_batches_of_one_slice(cache):
    assert [len(batch.features) for batch in take(stream(cache, batch_size=1), 3)] == [1, 1, 1]
