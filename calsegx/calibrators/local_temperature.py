"""Local and image-based temperature scaling: a small convolutional network predicts the temperature of each voxel."""

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from calsegx import calibrators
from calsegx.calibrators import temperature, voxels
from calsegx.interfaces import DataError, UsageError

Weights = Mapping[str, Array]
Chunk = tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]

_KERNEL, _DILATION, _PADDING = 5, 2, 4
# Temperature at raw values x: LOWEST + softplus(x - 1 + _SHIFT), which is 1 at x = 1.
_SHIFT = math.log(math.expm1(1 - temperature.LOWEST))
_GATE_SCALE = 0.1  # of the gates' initial weights, relative to 1 / sqrt(fan-in): far from saturation


def initial(
    classes: int, channels: int, dimensions: int, *, leaves: int = 4, original: bool = False, seed: int = 0
) -> dict[str, Array]:
    """Weights at which every leaf is 1, and so the temperature 1 (2 in the original form), whatever the gates.

    The original starts with zeros everywhere, where all leaves receive the same gradient and stay equal for ever.
    Here the gates start with small random weights instead, which tells the leaves apart.

    Args:
        classes: logits per voxel.
        channels: of the image; 0: the temperature is predicted from the logits alone.
        dimensions: 2 or 3 spatial axes.
        leaves: 4, or 2 for the light-weight variant.
        original: zeros everywhere.
        seed: of the gates.

    Returns:
        ``kernel`` ``[5.., classes, outputs]`` and ``bias`` ``[outputs]`` of the convolutions of the logits, whose
        outputs are the leaves, the gates between them and, with an image, the gate of the image; with an image also
        ``image_kernel`` ``[5.., channels, 1]`` and ``image_bias`` ``[1]``.
    """
    size = (_KERNEL,) * dimensions
    gates = leaves - 1 + (channels > 0)
    scale = 0 if original else _GATE_SCALE / math.sqrt(_KERNEL**dimensions * classes)
    drawn = scale * np.random.default_rng(seed).normal(size=(*size, classes, gates))
    kernel = np.concatenate([np.zeros((*size, classes, leaves)), drawn], axis=-1)
    weights = {"kernel": kernel, "bias": np.zeros(leaves + gates)}
    if channels:
        weights |= {"image_kernel": np.zeros((*size, channels, 1)), "image_bias": np.zeros(1)}
    return {name: jnp.asarray(value) for name, value in weights.items()}


def temperatures(
    weights: Weights,
    logits: Float[Array, "n *spatial L"],
    image: Float[Array, "n *spatial C"] | None = None,
    *,
    whole_image: bool = False,
    original: bool = False,
) -> Float[Array, " n *spatial"]:
    """The temperature of every voxel (Ding et al., 2021), or of every image.

    Convolutions of 5 voxels per axis, dilation 2, reflected borders.  Leaves ``T_j = 1 + conv_j(z)``, gates ``a =
    sigmoid(conv_a(z))``, and ``m(a, x, y) = a x + (1 - a) y``::

        x = m(b, m(a3, m(a1, T1, T2), m(a2, T3, T4)), 1 + conv(image))

    Light-weight: ``m(a1, T1, T2)`` instead of the inner three.  Without image: without the outermost.  ``T = 0.05 +
    softplus(x - 1 + c)``, with c such that x = 1 gives T = 1; the authors' code has ``T = relu(x + 1) + 1e-8``, which
    starts at 2, and multiplies the logits by 1e8, without a gradient, where x < -1.

    Args:
        weights: see ``initial``; the number of leaves is read from their shapes.
        logits: 2D or 3D, as the weights.
        image: of the scale it had in the fit; needed if the weights have an image kernel.
        whole_image: the mean of x over the image's voxels, i.e. one temperature per image (IBTS).
        original: the authors' map from x to T.
    """
    values = _convolve(logits, weights["kernel"], weights["bias"])
    outputs = values.shape[-1]
    leaves = outputs // 2 if "image_kernel" in weights else (outputs + 1) // 2
    mixed = [1 + values[..., i] for i in range(leaves)]
    gates = iter(jnp.moveaxis(jax.nn.sigmoid(values[..., leaves:]), -1, 0))
    while len(mixed) > 1:
        mixed = [_mix(next(gates), *mixed[i : i + 2]) for i in range(0, len(mixed), 2)]
    raw = mixed[0]
    if "image_kernel" in weights:
        if image is None:
            raise ValueError("these weights predict the temperature from the image too, but image is None")
        of_image = 1 + _convolve(image, weights["image_kernel"], weights["image_bias"])[..., 0]
        raw = _mix(next(gates), raw, of_image)
    if whole_image:
        raw = jnp.broadcast_to(jnp.mean(raw, axis=tuple(range(1, raw.ndim)), keepdims=True), raw.shape)
    if original:
        return jax.nn.relu(raw + 1) + 1e-8
    return temperature.LOWEST + jax.nn.softplus(raw - 1 + _SHIFT)


def nll(
    weights: Weights,
    logits: Float[Array, "n *spatial L"],
    labels: Int[Array, " n *spatial"],
    image: Float[Array, "n *spatial C"] | None,
    region: Bool[Array, " n *spatial"],
    *,
    whole_image: bool = False,
    original: bool = False,
) -> Float[Array, ""]:
    """Mean negative log-likelihood of ``z / T`` over the region, in nats; labels outside it are not looked at."""
    scale = temperatures(weights, logits, image, whole_image=whole_image, original=original)
    if logits.shape[-1] == 1:
        logits = jnp.concatenate([jnp.zeros_like(logits), logits], axis=-1)
    # The largest is 0 before the division: z/T of the original form reaches 1e9, where subtracting it rounds to +-100.
    scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / scale[..., None]
    truth = jnp.where(region, labels, 0)[..., None]
    losses = jnp.log(jnp.sum(jnp.exp(scaled), axis=-1)) - jnp.take_along_axis(scaled, truth, axis=-1)[..., 0]
    return jnp.sum(jnp.where(region, losses, 0)) / jnp.sum(region)


def fit(
    logits: Array | Iterable[Chunk],
    labels: Array | None = None,
    image: Array | None = None,
    region: Array | None = None,
    *,
    whole_image: bool = False,
    use_image: bool = True,
    leaves: int = 4,
    original: bool = False,
    learning_rate: float = 1e-4,
    epochs: int = 50,
    max_voxels: int = 20_000_000,
    seed: int = 0,
    provenance: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Trains the weights of ``temperatures`` on the region's negative log-likelihood with Adam, one image per step.

    The weights with the least likelihood after an epoch are returned, the initial ones included: it never rises (the
    authors' code returns the last ones).  Where even one temperature for all is not identifiable, the logits stay as
    they are.  The same seed gives the same result on the same device.

    Args:
        logits: ``[n, *spatial, L]`` with two or three spatial axes; or, without ``labels``, an iterable of chunks
            ``(logits, labels, image or None, region)``, read once.  Images without a voxel in the region are left out.
        labels: class indices ``[n, *spatial]``.
        image: ``[n, *spatial, C]``; None: the logits alone.
        region: bool ``[n, *spatial]``; None: all voxels.
        whole_image: one temperature per image (IBTS) instead of per voxel (LTS).
        use_image: False predicts from the logits alone.
        leaves: 4, or 2 for the light-weight variant.
        original: the authors' positive map and initial weights, for parity.
        learning_rate: of Adam.
        epochs: passes over the sampled images.
        max_voxels: a uniform random sample of images with at most so many voxels altogether is kept.
        seed: of the sample, the order of the images and the initial weights.
        provenance: as in ``temperature.fit``.

    Returns:
        ``weights`` (nested lists), ``whole_image``, ``original``, ``images`` and ``images_seen``, and the record of
        every calibrator, whose voxels are those in the region.

    Raises:
        DataError: as in ``temperature.fit``, and for images that are missing or whose shapes do not fit.
        UsageError: for an option outside its range.
    """
    if leaves not in (2, 4) or epochs < 1 or not 0 < learning_rate < math.inf:
        raise UsageError(
            "Local temperature scaling needs 2 or 4 leaves, at least 1 epoch and a positive learning rate, got "
            f"leaves={leaves}, epochs={epochs}, learning_rate={learning_rate}."
        )
    chunks: Any = logits
    if labels is not None:
        inside = np.ones(np.shape(labels), bool) if region is None else np.asarray(region)
        chunks = [(np.asarray(logits), np.asarray(labels), None if image is None else np.asarray(image), inside)]
        use_image = use_image and image is not None
    counted = [0]
    (items, _), images_seen = voxels.sample(_rows(chunks, use_image, counted), max_voxels, seed, sized=True)
    images: list[Chunk] = list(items)
    differences = np.concatenate([temperature.margins(z[r], y[r]) for z, y, _, r in images])
    _, reason = temperature.solve(differences)
    before = temperature.likelihood(differences, 1.0)

    first, _, seen_image, _ = images[0]
    channels = 0 if seen_image is None else seen_image.shape[-1]
    weights = initial(first.shape[-1], channels, first.ndim - 2, leaves=leaves, original=original, seed=seed)
    after = before
    if not reason:
        likelihood = functools.partial(nll, whole_image=whole_image, original=original)
        weights, after = _train(likelihood, weights, images, learning_rate, epochs, seed)
    return voxels.record(
        "image_temperature" if whole_image else "local_temperature",
        {
            "weights": {name: np.asarray(value).tolist() for name, value in weights.items()},
            "whole_image": whole_image,
            "original": original,
            "images": len(images),
            "images_seen": images_seen,
        },
        reason=reason,
        nll=(before, after),
        voxels=(len(differences), counted[0]),
        provenance=provenance,
    )


def apply(params: Mapping[str, Any], logits: Any, image: Any = None) -> Any:
    """``z / T`` of ``logits`` ``[n, *spatial, L]`` with the temperatures that the weights predict; same shape.

    Raises:
        DataError: for logits or an image of another kind than the params were fitted on.
    """
    if not params["identifiable"]:
        return logits
    weights = {name: jnp.asarray(value) for name, value in params["weights"].items()}
    kernel, of_image = weights["kernel"], weights.get("image_kernel")
    if logits.ndim != kernel.ndim or logits.shape[-1] != kernel.shape[-2]:
        raise DataError(
            f"The local temperature was fitted on {kernel.ndim - 2} spatial axes and {kernel.shape[-2]} logits per "
            f"voxel, got logits {logits.shape}; expected [n, *spatial, {kernel.shape[-2]}]."
        )
    if of_image is not None and (image is None or image.shape != (*logits.shape[:-1], of_image.shape[-2])):
        raise DataError(
            f"The local temperature needs the image with {of_image.shape[-2]} channels on the logits' grid, got "
            f"{'none' if image is None else image.shape} for logits {logits.shape}."
        )
    options = {"whole_image": params["whole_image"], "original": params["original"]}
    scale = _one_by_one(weights, jnp.asarray(logits), None if of_image is None else jnp.asarray(image), **options)
    return logits / logits.__array_namespace__().asarray(scale, dtype=logits.dtype)[..., None]


@calibrators.registry.register("local_temperature")
class LocalTemperature:
    """Local temperature scaling (LTS; Ding et al., 2021) as a registered calibrator."""

    spatial = True
    fit = staticmethod(fit)
    apply = staticmethod(apply)


@calibrators.registry.register("image_temperature")
class ImageTemperature:
    """Image-based temperature scaling (IBTS; Ding et al., 2021) as a registered calibrator."""

    spatial = True
    fit = staticmethod(functools.partial(fit, whole_image=True))
    apply = staticmethod(apply)


@functools.partial(jax.jit, static_argnames=("whole_image", "original"))
def _one_by_one(weights: Weights, logits: Array, image: Array | None, **options: bool) -> Array:
    """``temperatures`` image by image: the shifted copies of a whole volume would take many times its memory."""
    one_of_each = jax.tree.map(lambda values: values[:, None], (logits, image))
    return jax.lax.map(lambda pair: temperatures(weights, *pair, **options)[0], one_of_each)


def _mix(share: Array, first: Array, second: Array) -> Array:
    return share * first + (1 - share) * second


def _convolve(values: Array, kernel: Array, bias: Array) -> Array:
    """The convolution as products: for each offset along all axes but the last, a row of the kernel by shifted copies.

    XLA's dilated convolution with so few channels, and above all the gradient of its kernel, is several times slower on
    the CPU.  In 3D the rows come one after the other, and the gradient makes the copies again: all together they take
    125 times the memory of the values.  The five of 2D are unrolled, which is faster.
    """
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    images, *leading, width, channels = values.shape
    border = [(0, 0), *[(_PADDING, _PADDING)] * (len(leading) + 1), (0, 0)]
    padded = jnp.moveaxis(jnp.pad(values, border, mode="reflect"), -1, 0)
    taps = range(0, _KERNEL * _DILATION, _DILATION)
    offsets = jnp.asarray(list(itertools.product(taps, repeat=len(leading))))
    rows = kernel.astype(values.dtype).reshape(len(offsets), -1, kernel.shape[-1])

    def add(total: Array, row: tuple[Array, Array]) -> tuple[Array, None]:
        offset, weights = row
        sizes = (channels, images, *leading, padded.shape[-1])
        part = jax.lax.dynamic_slice(padded, (0, 0, *offset, 0), sizes)
        shifted = jnp.concatenate([part[..., tap : tap + width].reshape(channels, -1) for tap in taps])
        return total + jnp.matmul(weights.T, shifted, precision="highest"), None

    start = jnp.zeros((kernel.shape[-1], math.prod(values.shape[:-1])), values.dtype)
    flat = len(leading) == 1
    total, _ = jax.lax.scan(add if flat else jax.checkpoint(add), start, (offsets, rows), unroll=flat)
    return bias + jnp.moveaxis(total.reshape(kernel.shape[-1], *values.shape[:-1]), 0, -1)


def _rows(chunks: Iterable[Chunk], use_image: bool, counted: list[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images as rows for ``voxels.sample``, with their sizes; adds the region's voxels to ``counted``."""
    kinds = set()
    for logits, labels, image, region in chunks:
        logits, labels, region = np.asarray(logits), np.asarray(labels), np.asarray(region)
        image = np.asarray(image) if use_image and image is not None else None
        grid = logits.shape[:-1]
        if (
            logits.ndim not in (4, 5)
            or labels.shape != grid
            or region.shape != grid
            or region.dtype != bool
            or (use_image and (image is None or image.shape[:-1] != grid))
        ):
            raise DataError(
                "Local temperature scaling needs logits [n, *spatial, L] in 2D or 3D, labels and region (bool) [n, "
                f"*spatial] and an image [n, *spatial, C], or use_image=False; got {logits.shape}, {labels.shape}, "
                f"{region.dtype} {region.shape} and {'no image' if image is None else image.shape}."
            )
        kinds.add((logits.ndim, logits.shape[-1], None if image is None else image.shape[-1]))
        if len(kinds) > 1:
            raise DataError(
                "Local temperature scaling got images with different numbers of axes, logits or channels; "
                "fit one model at a time."
            )
        logits = voxels.check(logits.reshape(-1, logits.shape[-1]), np.zeros(labels.size, int))[0].reshape(logits.shape)
        if image is not None:
            image = image.astype(logits.dtype)
            if not np.isfinite(image).all():
                raise DataError("Local temperature scaling got an image that is not finite; check the preprocessing.")
        chosen = [i for i in range(len(logits)) if region[i].any()]
        items = np.empty(len(chosen), object)
        for row, i in enumerate(chosen):
            # copies, as a view would keep the whole chunk in memory
            items[row] = tuple(a if a is None else a[i : i + 1].copy() for a in (logits, labels, image, region))
        counted[0] += int(region.sum())
        yield items, np.full(len(chosen), region[0].size if len(region) else 0)


def _train(
    likelihood: Any, weights: Any, images: list[Chunk], learning_rate: float, epochs: int, seed: int
) -> tuple[Any, float]:
    """The weights of the epoch, or the initial ones, with the least likelihood over all images, and that."""
    optimizer = optax.adam(learning_rate)
    counts = [int(region.sum()) for *_, region in images]
    evaluate = jax.jit(likelihood)

    @jax.jit
    def step(weights: Any, state: Any, image: Chunk) -> tuple[Any, Any]:
        updates, state = optimizer.update(jax.grad(likelihood)(weights, *image), state)
        return optax.apply_updates(weights, updates), state

    def mean(weights: Any) -> float:
        return float(np.average([evaluate(weights, *image) for image in images], weights=counts))

    state = optimizer.init(weights)
    best, least = weights, mean(weights)
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        for i in rng.permutation(len(images)):
            weights, state = step(weights, state, images[i])
        current = mean(weights)
        if current < least:  # never of a likelihood that is not finite
            best, least = weights, current
    return best, least
