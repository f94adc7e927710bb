import numpy as np
import pytest

from calsegx.interfaces import InputError
from calsegx.metrics import margins


def voxels(classes, seed=0, shape=(4, 9, 7)):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 12, (*shape, 1 if classes == 2 else classes)).astype(np.float32)
    return logits, rng.integers(0, classes, shape)


def test_margins_by_hand():
    logits = np.array([[2.0], [2.0], [-3.0]])
    assert margins.true_class_margins(logits, np.array([1, 0, 0])).tolist() == [2, -2, 3]
    logits = np.array([[1.0, 4.0, 2.5], [1.0, 4.0, 2.5], [1.0, 4.0, 2.5]])
    assert margins.true_class_margins(logits, np.array([0, 1, 2])).tolist() == [-3, 1.5, -1.5]


@pytest.mark.parametrize("classes", [2, 4])
def test_two_logits_of_a_binary_problem_or_more_agree_with_the_definition(classes):
    logits, labels = voxels(classes)
    full = logits if classes > 2 else np.concatenate([np.zeros_like(logits), logits], axis=-1)
    of_rivals = np.where(np.arange(full.shape[-1]) == labels[..., None], -np.inf, full).max(axis=-1)
    expected = np.take_along_axis(full, labels[..., None], axis=-1)[..., 0] - of_rivals
    np.testing.assert_array_equal(margins.true_class_margins(logits, labels), expected)
    np.testing.assert_array_equal(margins.true_class_margins(full, labels), expected)


@pytest.mark.parametrize("classes", [2, 4])
def test_histograms_of_parts_add_up_to_that_of_the_whole(classes):
    logits, labels = voxels(classes)
    whole = margins.histogram(logits, labels)
    parts = [margins.histogram(logits[i], labels[i]) for i in range(len(labels))]
    assert whole.shape == (2, margins.BINS)
    assert np.array_equal(whole, sum(parts))
    assert whole.sum(axis=1).tolist() == [(labels == 0).sum(), (labels > 0).sum()]
    found = margins.true_class_margins(logits, labels)
    counted, _ = np.histogram(found[labels > 0].clip(-margins.LIMIT, margins.LIMIT - 0.1), margins.EDGES)
    assert np.array_equal(whole[1], counted)
    assert abs(found).max() > margins.LIMIT  # so that the end bins were used
    np.testing.assert_allclose(margins.wrong(whole)[0], np.mean(found[labels == 0] < 0))


def test_a_margin_of_zero_is_not_wrong_but_any_below_is_and_no_voxel_has_no_share():
    counts = margins.histogram(np.zeros((3, 1)), np.zeros(3, int))
    shares = margins.wrong(counts)
    assert shares[0] == 0 and np.isnan(shares[1])
    assert margins.wrong(margins.histogram(np.full((3, 1), 1e-7), np.zeros(3, int)))[0] == 1
    assert margins.histogram(np.zeros((0, 5, 5, 3), np.float32), np.zeros((0, 5, 5), int)).sum() == 0


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((3, 2)), np.zeros(4, int), "do not fit"),
        (np.zeros((3, 1)), np.array([0, 1, 2]), r"Labels span 0\.\.2, expected 0\.\.1"),
        (np.full((1, 1), np.nan), np.zeros(1, int), "NaN or infinity"),
    ],
)
def test_bad_input_is_named(logits, labels, message):
    with pytest.raises(InputError, match=message):
        margins.histogram(logits, labels)
