import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calsegx.data import frames
from calsegx.evaluation import predict
from calsegx.interfaces import Prompts


def decode(trainable, frozen, features, prompts):
    logits = trainable["w"] * features[..., :1] + frozen["b"] + prompts.points[:, :1, :1, None]
    return jnp.repeat(jnp.repeat(logits, 2, axis=1), 2, axis=2)


def test_cached_bfloat16_features_are_decoded_in_float32():
    features = jnp.full((1, 2, 2, 1), 1.25, jnp.bfloat16)
    prompts = Prompts(points=np.zeros((1, 1, 2), np.float32), labels=np.ones((1, 1), np.int32))
    weights = {"w": jnp.float32(1.001)}, {"b": jnp.float32(0)}
    logits = predict.predict_slices(jax.jit(decode), *weights, np.asarray(features), prompts, batch_size=1)
    np.testing.assert_allclose(logits, 1.25 * 1.001, rtol=1e-6)


@pytest.mark.parametrize("count", [1, 4, 7])
def test_slices_are_decoded_in_one_compiled_shape(count):
    traces = []

    @jax.jit
    def counted(*arguments):
        traces.append(arguments[2].shape)
        return decode(*arguments)

    rng = np.random.default_rng(0)
    features = rng.normal(size=(count, 3, 3, 2)).astype(np.float32)
    prompts = Prompts(points=rng.normal(size=(count, 2, 2)).astype(np.float32), labels=np.ones((count, 2), np.int32))
    trainable, frozen = {"w": jnp.float32(2)}, {"b": jnp.float32(1)}
    logits = predict.predict_slices(counted, trainable, frozen, features, prompts, batch_size=3)
    np.testing.assert_allclose(logits, decode(trainable, frozen, features, prompts), rtol=1e-6)
    assert traces == [(3, 3, 3, 2)]
    assert logits.dtype == np.float32


def test_no_slices_give_an_empty_array_of_the_right_shape():
    features = np.zeros((0, 3, 3, 2), np.float32)
    prompts = Prompts(points=np.zeros((0, 2, 2), np.float32), labels=np.zeros((0, 2), np.int32))
    weights = {"w": jnp.float32(2)}, {"b": jnp.float32(1)}
    logits = predict.predict_slices(jax.jit(decode), *weights, features, prompts, batch_size=4)
    assert logits.shape == (0, 6, 6, 1)
    volume = predict.to_volume(np.zeros((0, 5, 4, 1), np.float32), np.zeros(0, int), depth=3)
    assert volume.shape == (3, 5, 4, 1)
    assert not volume.any()


def test_features_and_prompts_must_agree():
    with pytest.raises(ValueError, match="prompts.points must agree on n; got 2 and 3"):
        predict.predict_slices(decode, {}, {}, np.zeros((2, 1, 1, 1)), Prompts(points=np.zeros((3, 1, 2))), 2)
    with pytest.raises(ValueError, match="batch_size"):
        predict.predict_slices(decode, {}, {}, np.zeros((2, 1, 1, 1)), Prompts(), 0)


def test_case_logits_lie_on_the_native_grid():
    geometry = frames.frame_geometry((5, 12, 16), (1.0, 1.0, 1.0), 32, (8, 8))
    logits = np.full((2, 8, 8, 3), 1.5, np.float32)
    assert predict.case_logits(logits, geometry).shape == (2, 12, 16, 3)
    np.testing.assert_allclose(predict.case_logits(logits, geometry), 1.5, rtol=1e-6)


def test_probabilities_of_sigmoid_and_softmax():
    logits = np.array([[-1000.0], [-1.0], [0.0], [2.0], [1000.0]])
    expected = [0, 1 / (1 + np.e), 0.5, 1 / (1 + np.exp(-2)), 1]
    np.testing.assert_allclose(predict.probabilities(logits)[:, 0], expected, rtol=1e-6)
    softmax = predict.probabilities(np.array([[0.0, np.log(2), np.log(5)], [1000.0, 0.0, -1000.0]]))
    np.testing.assert_allclose(softmax, [[1 / 8, 2 / 8, 5 / 8], [1, 0, 0]], rtol=1e-6)


def test_volume_has_zero_where_nothing_was_prompted():
    slices = np.stack([np.full((2, 2, 3), [0.2, 0.5, 0.3]), np.full((2, 2, 3), [0.8, 0.1, 0.1])])
    volume = predict.to_volume(slices, [3, 1], depth=5)
    assert volume.shape == (5, 2, 2, 2)
    np.testing.assert_allclose(volume[3, 0, 0], [0.5, 0.3])
    np.testing.assert_allclose(volume[1, 0, 0], [0.1, 0.1])
    assert not volume[[0, 2, 4]].any()


@pytest.mark.parametrize("slices", [[0], [1, 1], [0, 4], [-1, 0]])
def test_slices_must_fit_the_volume(slices):
    with pytest.raises(ValueError, match="slices must"):
        predict.to_volume(np.zeros((2, 2, 2, 1)), slices, depth=4)


def test_segment_takes_the_likeliest_class_and_background_on_ties():
    one = np.array([[0.5], [0.500001], [0.49]])
    np.testing.assert_array_equal(predict.segment(one), [0, 1, 0])
    two = np.array([[0.2, 0.3], [0.4, 0.35], [0.3, 0.45], [0.0, 0.0]])  # background: .5, .25, .25, 1
    labels = predict.segment(two)
    np.testing.assert_array_equal(labels, [0, 1, 2, 0])
    assert labels.dtype == np.uint8
