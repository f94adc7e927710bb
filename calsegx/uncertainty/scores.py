"""From an uncertainty map to one number per image, and how well that predicts the error (Nguyen et al., 2023)."""

import numpy as np
import scipy.special

from calsegx.interfaces import Array, InputError


def otsu_threshold(image: Array, *, bins: int = 256) -> float:
    """Otsu's threshold (1979): the bin centre that splits a histogram into the two best separated classes.

    ``argmax_t w0 w1 (mu0 - mu1)^2`` over ``bins`` equal bins between minimum and maximum, the first of equal maxima;
    the bin ``t`` counts as lower.  Equals scikit-image's ``threshold_otsu``.

    Args:
        image: of any shape, e.g. a variance per voxel.
        bins: of the histogram, at least 2.

    Returns:
        In the units of ``image``; of a constant image (range below ``bins`` steps of float64) its maximum, which no
        value exceeds.

    Raises:
        InputError: for an empty image, values that are not finite, or fewer than two bins.
    """
    values = np.asarray(image, np.float64).ravel()
    if bins < 2 or not values.size or not np.isfinite(values).all():
        raise InputError(
            f"Otsu's threshold needs finite values and 2 bins or more; got {values.size} values, "
            f"{np.count_nonzero(~np.isfinite(values))} of them not finite, and {bins} bins; check the uncertainty map."
        )
    low, high = values.min(), values.max()
    if high - low <= bins * np.spacing(max(abs(low), abs(high))):
        return float(high)
    counts, edges = np.histogram(values, bins)
    centres = (edges[:-1] + edges[1:]) / 2
    masses = counts * centres
    # Neither is 0: the first and the last bin hold the extremes.
    lower, upper = np.cumsum(counts)[:-1], np.cumsum(counts[::-1])[::-1][1:]
    lower_mean, upper_mean = np.cumsum(masses)[:-1] / lower, np.cumsum(masses[::-1])[::-1][1:] / upper
    separation = lower.astype(np.float64) * upper * np.square(lower_mean - upper_mean)
    return float(centres[np.argmax(separation)])


def uncertain_area(image: Array, *, bins: int = 256) -> float:
    """``u = mean 1[U > otsu(U)]``: the share of uncertain voxels of an image, in ``[0, 1)``; 0 for a constant map.

    Nguyen et al. (2023), Table 4.  Otsu's threshold follows the map's own scale, so ``u`` measures the shape of the
    uncertainty's histogram, not its level: doubling all uncertainties changes nothing.

    Args:
        image: one image's uncertainty map, of any shape.
        bins: of Otsu's histogram.

    Raises:
        InputError: as ``otsu_threshold``.
    """
    return float(np.mean(np.asarray(image, np.float64) > otsu_threshold(image, bins=bins)))


def predictive_entropy(foreground: Array) -> np.ndarray:
    """``H = -(sum_k p_k log p_k) / log(K + 1)`` over background and classes: 0 where certain, 1 where all are equal.

    The entropy of one deterministic prediction, as ``sampling.statistics`` has that of a mean, divided by its largest
    value so that models of different K share a scale.

    Args:
        foreground: ``[*spatial, K]`` probabilities of the classes; the background's is one minus their sum.

    Returns:
        float32 ``[*spatial]`` in ``[0, 1]``.
    """
    foreground = np.asarray(foreground, np.float32)
    background = np.clip(1 - foreground.sum(axis=-1), 0, 1)
    nats = scipy.special.entr(background) + scipy.special.entr(foreground).sum(axis=-1)
    return np.clip(nats / np.log(foreground.shape[-1] + 1, dtype=np.float32), 0, 1)


def quality_error(predicted: Array, actual: Array) -> float:
    """``mean_i (u_i - e_i)^2``: how far predicted errors are from actual ones, in ``[0, 1]`` for shares.

    Nguyen et al. (2023), Table 4, without saying what the actual error is: take ``1 - IoU`` of each image (our choice),
    or its share of wrong voxels.

    Args:
        predicted: one number per image, e.g. ``uncertain_area``.
        actual: of the same images.

    Raises:
        InputError: when they differ in shape, are empty or not finite.
    """
    predicted, actual = np.asarray(predicted, np.float64), np.asarray(actual, np.float64)
    if predicted.shape != actual.shape or not predicted.size or not np.isfinite([predicted, actual]).all():
        raise InputError(
            f"Predicted and actual errors must be finite, one per image; got shapes {predicted.shape} and "
            f"{actual.shape}; leave out images without an error, such as an IoU of two empty masks."
        )
    return float(np.mean(np.square(predicted - actual)))
