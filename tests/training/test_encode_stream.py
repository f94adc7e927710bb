"""Batches that are filled across cases give every case the features that it gets alone."""

import types

import jax
import numpy as np
import pytest

from calsegx import sharding
from calsegx.data import frames
from calsegx.training import caching, encode_stream
from tests.training import toy


@pytest.fixture(scope="module")
def mesh():
    return sharding.device_mesh(jax.devices()[:1])


def case_of(number, count):
    """Its slices have a shape of their own."""
    shape = (24, 20 + number)
    images = np.random.default_rng(number).uniform(0, 255, (count, *shape, 3)).astype(np.float32)
    geometry = frames.frame_geometry((count, *shape), (1.0, 1.0, 1.0), toy.IMAGE_SIZE, toy.LOGITS)
    return types.SimpleNamespace(case=number, slices=np.arange(count), images=images, geometry=geometry)


@pytest.mark.parametrize("counts", [(3, 2, 5, 1), (0, 1, 0), (0,), (), (9,), (1, 1, 1, 1, 1, 1, 1), (4, 0, 4)])
def test_features_are_those_of_the_case_alone(mesh, counts):
    cases = [case_of(number, count) for number, count in enumerate(counts)]
    alone = caching.case_encoder(toy.backbone(), 4, mesh)
    encoded = list(encode_stream.stream_encoder(toy.backbone(), 4, mesh)(cases))
    assert [prepared.case for prepared, _ in encoded] == list(range(len(counts)))
    for prepared, features in encoded:
        expected = alone(prepared)
        assert features.dtype == expected.dtype and features.shape == expected.shape
        np.testing.assert_array_equal(features, expected)


def test_batches_are_full_and_few_cases_are_held(mesh, monkeypatch):
    sent, begun, given = [], [], []
    original = sharding.shard_batch
    monkeypatch.setattr(sharding, "shard_batch", lambda m, batch: sent.append(batch) or original(m, batch))

    def cases():
        for number in range(20):
            begun.append(number)
            # In flight: the two batches on the device, of two slices each, and the case that is begun.
            assert len(begun) - len(given) <= caching.IN_FLIGHT * 2 + 1
            yield case_of(number, 1)

    for prepared, _ in encode_stream.stream_encoder(toy.backbone(), 2, mesh)(cases()):
        given.append(prepared.case)
    assert given == list(range(20))
    assert len(sent) == 10 and all(batch.any(axis=(1, 2, 3)).all() for batch in sent)  # 20 if each case had its own
