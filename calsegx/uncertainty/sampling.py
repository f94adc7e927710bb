"""Statistics of several predictions of one image: test-time augmentation, dropout, ensembles."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import scipy.special

from calsegx.interfaces import Array, InputError


class Statistics(NamedTuple):
    """What T predictions ``[*shape, L]`` of one image say together."""

    mean: np.ndarray  # [*shape, L]: the predictive probabilities
    variance: np.ndarray  # [*shape]: unbiased over the passes, the mean over the L channels
    entropy: np.ndarray  # [*shape]: of the mean, in nats
    mutual_information: np.ndarray  # [*shape]: entropy less the mean entropy of the passes, in nats


def statistics(passes: Iterable[Array]) -> Statistics:
    """Mean, variance, entropy and mutual information of the probabilities of T passes.

    ``variance = 1/(T-1) sum_t (p_t - mean)^2`` (the uncertainty of TTDAp, TTDAc and dropout in Nguyen et al., 2023, and
    in BayesCap), ``entropy = H(mean)`` in ``[0, log K]``, ``mutual_information = H(mean) - mean_t H(p_t)``, which is 0
    where the passes agree.  Passes are read one by one, so that memory does not grow with T.  The published code joins
    them along the batch axis, which mixes samples where there is more than one.

    Args:
        passes: probabilities ``[*shape, L]`` of each pass, or all of them as one array ``[T, *shape, L]``; ``L = 1`` is
            the foreground's, ``L >= 2`` sum to 1.

    Returns:
        Arrays in float32, or in the passes' own precision where that is higher.

    Raises:
        InputError: for fewer than two passes, passes of different shapes, or values that are not probabilities.
    """
    count = 0
    mean = squares = entropies = np.zeros((), np.float32)
    for one in passes:
        probabilities = np.asarray(one)
        probabilities = probabilities.astype(np.promote_types(probabilities.dtype, np.float32))
        if count and probabilities.shape != mean.shape:
            raise InputError(
                f"Pass {count} has the shape {probabilities.shape}, those before {mean.shape}; map every pass back "
                "to the image's own grid."
            )
        if not ((probabilities >= 0) & (probabilities <= 1)).all():
            raise InputError(f"Pass {count} holds values outside [0, 1]; give probabilities, not logits.")
        count += 1
        change = probabilities - mean
        mean = mean + change / count
        squares = squares + change * (probabilities - mean)  # Welford: no difference of large sums
        entropies = entropies + _entropy(probabilities)
    if count < 2:
        raise InputError(f"A variance over passes needs at least two, got {count}; take more samples.")
    entropy = _entropy(mean)
    # Rounding alone can make it negative.
    information = np.maximum(entropy - entropies / count, 0)
    return Statistics(mean, np.mean(squares, axis=-1) / (count - 1), entropy, information)


def _entropy(probabilities: np.ndarray) -> np.ndarray:
    """``-sum_k p_k log p_k`` over the classes, in nats; one probability is that of two classes."""
    if probabilities.shape[-1] == 1:
        probabilities = np.concatenate([1 - probabilities, probabilities], axis=-1)
    return np.sum(scipy.special.entr(probabilities), axis=-1)
