"""From cached features to probabilities on a case's own grid.

The chain is ``predict_slices`` (decoder) -> ``case_logits`` (native pixels) -> ``probabilities`` -> ``to_native`` ->
``segment``.  A calibrator acts on the logits, between the second and the third step.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8

from calsegx.data import frames
from calsegx.interfaces import Params, Prompts


def predict_slices(
    decode_jit: Callable[[Params, Params, Any, Prompts], Any],
    trainable: Params,
    frozen: Params,
    features: Float[np.ndarray, "n h w C"],
    prompts: Prompts,
    batch_size: int,
) -> Float[np.ndarray, "n Hl Wl L"]:
    """Low-resolution logits of ``n`` slices, decoded in batches of one fixed size.

    The last batch is padded with repeats of its last slice, so that ``decode_jit`` is compiled for one shape only; the
    padding is dropped again.

    Args:
        decode_jit: ``Backbone.decode`` under ``jax.jit``.
        trainable: the decoder's parameters.
        frozen: the parameters that are not trained.
        features: the frozen encoder's output, bfloat16 or float32, one row per slice.
        prompts: as many rows as ``features``.
        batch_size: slices per call, at least 1.

    Returns:
        float32 logits; an empty array of the right trailing shape for ``n = 0``.

    Raises:
        ValueError: when features and prompts differ in length, or ``batch_size`` is below 1.
    """
    count = len(features)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
    for name, value in prompts._asdict().items():
        if value is not None and len(value) != count:
            raise ValueError(f"features and prompts.{name} must agree on n; got {count} and {len(value)}.")
    if count == 0:
        return _no_logits(decode_jit, trainable, frozen, features, prompts, batch_size)
    outputs = []
    for start in range(0, count, batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), count - 1)
        batch = prompts.map(lambda values, rows=rows: np.asarray(values)[rows])
        # float32, as the decoder was validated in training; the cache keeps bfloat16.
        z = np.asarray(features[start : start + batch_size])[rows - start].astype(np.float32)
        logits = decode_jit(trainable, frozen, z, batch)
        outputs.append(np.asarray(logits, dtype=np.float32)[: count - start])
    return np.concatenate(outputs)


def _no_logits(decode_jit, trainable, frozen, features, prompts, batch_size) -> np.ndarray:
    def padded(value: Any) -> jax.ShapeDtypeStruct:
        value = np.asarray(value)
        return jax.ShapeDtypeStruct((batch_size, *value.shape[1:]), value.dtype)

    batch = prompts.map(padded)
    z = jax.ShapeDtypeStruct((batch_size, *features.shape[1:]), np.float32)
    shape = jax.eval_shape(decode_jit, trainable, frozen, z, batch).shape
    return np.zeros((0, *shape[1:]), np.float32)


def case_logits(
    low_res_logits: Float[np.ndarray, "n Hl Wl L"], geometry: frames.FrameGeometry
) -> Float[np.ndarray, "n H W L"]:
    """Logits of the prompted slices on the case's own pixel grid (bilinear in the logits, as in SAM)."""
    return frames.from_low_res(low_res_logits, geometry)


def probabilities(logits: Float[np.ndarray, "*spatial L"]) -> Float[np.ndarray, "*spatial P"]:
    """Probabilities of logits, float32.

    ``L = 1``: the sigmoid, one channel, the foreground.  ``L >= 2``: the softmax, channel 0 is the background.
    """
    values = np.asarray(logits, dtype=np.float32)
    if values.shape[-1] == 1:
        decay = np.exp(-np.abs(values))  # never overflows
        return np.where(values >= 0, 1 / (1 + decay), decay / (1 + decay))
    exponentials = np.exp(values - values.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def to_volume(
    slice_probabilities: Float[np.ndarray, "n H W P"],
    slices: Int[np.ndarray, " n"] | Sequence[int],
    depth: int,
) -> Float[np.ndarray, "D H W K"]:
    """Foreground probabilities of the whole volume from those of its prompted slices.

    A slice without a prompt is background by protocol: its probability is 0.

    Args:
        slice_probabilities: output of ``probabilities``: one channel (foreground), or background and K classes.
        slices: the prompted slices' indices, in ``[0, depth)``, each at most once.
        depth: D, the number of slices of the volume.

    Raises:
        ValueError: for indices that do not fit the array or the volume.
    """
    indices = np.asarray(slices, dtype=np.int64)
    if indices.shape != slice_probabilities.shape[:1] or len(np.unique(indices)) != len(indices):
        raise ValueError(
            f"slices must hold one distinct index for each of the {len(slice_probabilities)} predicted slices; "
            f"got {indices.tolist()}."
        )
    if len(indices) and not 0 <= indices.min() <= indices.max() < depth:
        raise ValueError(f"slices must lie in [0, {depth}); got {indices.min()} to {indices.max()}.")
    foreground = slice_probabilities if slice_probabilities.shape[-1] == 1 else slice_probabilities[..., 1:]
    volume = np.zeros((depth, *foreground.shape[1:]), np.float32)
    volume[indices] = foreground
    return volume


def to_native(
    slice_probabilities: Float[np.ndarray, "n H W P"],
    slices: Int[np.ndarray, " n"] | Sequence[int],
    geometry: frames.FrameGeometry,
) -> Float[np.ndarray, "D H W K"]:
    """``to_volume`` on the working grid's slices, then ``frames.from_working_depth``: the slices of the file."""
    volume = to_volume(slice_probabilities, slices, geometry.depths[1])
    return frames.from_working_depth(volume, geometry, np.asarray(slices))


def segment(foreground: Float[np.ndarray, "*spatial K"]) -> UInt8[np.ndarray, "*spatial"]:
    """Class indices of foreground probabilities: the likeliest of background and the K classes.

    The background's probability is one minus the sum; ties go to the lower index, so with one class a voxel is
    foreground exactly when its probability is above one half.
    """
    background = 1 - foreground.sum(axis=-1)
    best = foreground.argmax(axis=-1)
    winner = np.take_along_axis(foreground, best[..., None], axis=-1)[..., 0]
    return np.where(winner > background, best + 1, 0).astype(np.uint8)
