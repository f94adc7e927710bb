"""CRaC: NACL's constraint with a weight per class and region that validation data sets (Murugesan et al., MICCAI 2024).

Every voxel's logits ``z`` should equal ``m tau``, ``tau`` the class proportions of its patch (``neighbourhood.prior``).
A voxel is outer where its patch holds more than one class, else inner.  The violation ``h`` of the constraint costs
``P(h, lambda, rho)`` with a multiplier ``lambda`` and a penalty weight ``rho`` per region and class.  They are not
trained: ``sums`` over the validation batches and one ``update`` after every epoch set them.

    state = init(classes)
    every step:   loss = ce(logits, labels) + crac(logits, labels, state)
    every epoch:  state = update(state, merge(*[sums(logits, labels, state) for each validation batch]))

The state is a tuple of arrays, saved with the checkpoint.  Rows are always ``[inner, outer]``, the paper's 0 and 1; the
published code has them the other way round.  All but ``init`` and ``summary`` work inside ``jit``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from calsegx.interfaces import InputError, UsageError
from calsegx.losses import cross_entropy, elementary, neighbourhood

FUNCTIONS = ("phr", "p2", "p3")
CONSTRAINTS = ("absolute", "signed")
AVERAGES = ("voxels", "region", "all")
MULTIPLIER_RANGE = (1e-6, 1e6)
RHO_RANGE = (0.1, 10.0)


class State(NamedTuple):
    """Multipliers and penalty weights, and what the next update compares with; rows are inner, outer."""

    multipliers: Float[Array, "2 K"]
    rho: Float[Array, "2 K"]
    violation: Float[Array, "2 K"]  # mean of the previous epoch
    epoch: Int[Array, ""]  # updates so far


class Sums(NamedTuple):
    """Sums over the voxels of each region (rows inner, outer); those of batches add up: ``merge``."""

    derivative: Float[Array, "2 K"]  # of dP/dh
    violation: Float[Array, "2 K"]  # of h
    voxels: Float[Array, " 2"]


def penalty(
    h: Float[Array, "*shape"], multiplier: Float[Array, "*#shape"], rho: Float[Array, "*#shape"], *, function: str
) -> Float[Array, "*shape"]:
    """``P(h, lambda, rho)``: the price of a violation ``h``, 0 at ``h = 0`` with the slope ``lambda``.

    * ``phr``: ``lambda h + rho h^2 / 2`` where ``lambda + rho h >= 0``, else ``-lambda^2 / 2 rho``;
    * ``p2``: ``lambda h + lambda rho h^2 + rho^2 h^3 / 6`` for ``h >= 0``, else ``lambda h / (1 - rho h)``;
    * ``p3``: ``lambda h + lambda rho h^2`` for ``h >= 0``, else as ``p2``.

    All three are differentiable at their joints.

    Args:
        h: the violation; what should hold is ``h <= 0``.
        multiplier: lambda, ``>= 0``.
        rho: ``> 0``.
        function: one of ``FUNCTIONS``.

    Raises:
        UsageError: for an unknown function.
    """
    _check("penalty function", function, FUNCTIONS)
    if function == "phr":
        rising = multiplier * h + rho * jnp.square(h) / 2
        return jnp.where(multiplier + rho * h >= 0, rising, -jnp.square(multiplier) / (2 * rho))
    above, below = jnp.where(h >= 0, h, 0), jnp.where(h >= 0, 0, h)  # each branch finite where it is not taken
    rising = multiplier * above + multiplier * rho * jnp.square(above)
    if function == "p2":
        rising += jnp.square(rho) * above**3 / 6
    return jnp.where(h >= 0, rising, multiplier * below / (1 - rho * below))


def penalty_derivative(
    h: Float[Array, "*shape"], multiplier: Float[Array, "*#shape"], rho: Float[Array, "*#shape"], *, function: str
) -> Float[Array, "*shape"]:
    """``dP/dh >= 0``, the next multiplier of a constraint; arguments and errors as of ``penalty``.

    * ``phr``: ``max(0, lambda + rho h)``;
    * ``p2``: ``lambda + 2 lambda rho h + rho^2 h^2 / 2`` for ``h >= 0``, else ``lambda / (1 - rho h)^2``;
    * ``p3``: ``lambda + 2 lambda rho h`` for ``h >= 0``, else as ``p2``.
    """
    _check("penalty function", function, FUNCTIONS)
    if function == "phr":
        return jax.nn.relu(multiplier + rho * h)
    above, below = jnp.where(h >= 0, h, 0), jnp.where(h >= 0, 0, h)
    rising = multiplier + 2 * multiplier * rho * above
    if function == "p2":
        rising += jnp.square(rho * above) / 2
    return jnp.where(h >= 0, rising, multiplier / jnp.square(1 - rho * below))


def init(classes: int, *, multiplier: float = MULTIPLIER_RANGE[0], rho: float = RHO_RANGE[0]) -> State:
    """The state before the first epoch: the same lambda and rho for all, no violation known.

    The numbers are the published code's; the paper gives none.  ``p2`` and ``p3`` multiply their multipliers, so with
    them start at 0.01 or more: from 1e-6 nothing happens for tens of epochs.

    Args:
        classes: K, at least 2; a single logit is two classes.
        multiplier: initial lambda, ``>= 0``.
        rho: initial rho, ``> 0``.

    Raises:
        UsageError: for a value out of range.
    """
    if classes < 2 or multiplier < 0 or rho <= 0:
        raise UsageError(
            f"CRaC needs 2 or more classes, an initial multiplier of at least 0 and a positive rho; got {classes}, "
            f"{multiplier} and {rho}."
        )
    start = jnp.zeros((2, classes))
    return State(start + multiplier, start + rho, start, jnp.zeros((), jnp.int32))


def crac(
    logits: Float[Array, "B *spatial L"],
    labels: Int[Array, " B *spatial"],
    state: State,
    *,
    function: str = "phr",
    constraint: str = "absolute",
    margin: float = 5.0,
    outer_margin: float = 1.0,
    size: int = 3,
    border: str = "replicate",
) -> Float[Array, " B"]:
    """CRaC's penalty ``1/(2K) sum_k mean_v P(h_kv, lambda_kr, rho_kr)``, ``r`` the region of voxel ``v`` (Eq. 6).

    Added to the cross-entropy.  The factor 1/2, and the mean over classes where the paper has a sum, are the published
    code's, whose ``lambda`` is therefore twice the weight of NACL at equal strength.  So is the inner target
    ``margin tau``, with which the "inner" logits aim at ``(5, 0, .., 0)`` (confidence .98 for K = 4); the paper has
    ``tau`` everywhere (``margin=1``).  The regions are exact; the published code finds them by rounding errors.

    Args:
        logits: one (taken as ``[-z/2, z/2]``) or several per voxel.
        labels: class indices.
        state: from ``init`` and ``update``.
        function: one of ``FUNCTIONS``.
        constraint: ``absolute``: ``h = |m tau - z| >= 0`` as in the published code, with which a ``phr`` multiplier
            never falls; ``signed``: ``h = m tau - z`` as in the paper's Eq. 7, which charges logits below their target
            alone and lets multipliers fall.
        margin: ``m`` of the inner region.
        outer_margin: ``m`` of the outer region; 1 in paper and code.
        size: voxels per axis of the patch.
        border: what lies outside the image, one of ``neighbourhood.BORDERS``; ``background`` in the published code.

    Returns:
        One value per sample, ``>= 0`` for ``absolute``.

    Raises:
        ValueError: when logits, labels and state do not fit.
        UsageError: for an unknown function, constraint or border, or an even size.
    """
    h, outer = _violation(logits, labels, state, constraint, margin, outer_margin, size, border)
    multipliers, rho = _of_voxels(state, outer)
    # The mean over 2K: each voxel is in one of the two regions and costs nothing in the other.
    return cross_entropy.voxel_mean(jnp.mean(penalty(h, multipliers, rho, function=function), axis=-1)) / 2


def sums(
    logits: Float[Array, "B *spatial L"],
    labels: Int[Array, " B *spatial"],
    state: State,
    *,
    function: str = "phr",
    constraint: str = "absolute",
    margin: float = 5.0,
    outer_margin: float = 1.0,
    size: int = 3,
    border: str = "replicate",
    multiplier_range: tuple[float, float] = MULTIPLIER_RANGE,
) -> Sums:
    """What ``update`` needs of one validation batch; the state and the options must be those of ``crac``.

    Args:
        logits: of a validation batch.
        labels: class indices.
        state: of this epoch.
        function: as of ``crac``, like all options but the last.
        constraint: see there.
        margin: see there.
        outer_margin: see there.
        size: see there.
        border: see there.
        multiplier_range: bounds of every voxel's ``dP/dh``, as of the multipliers in ``update``.

    Returns:
        The sums over all voxels of the batch.

    Raises:
        ValueError: as ``crac``.
        UsageError: as ``crac``.
    """
    h, outer = _violation(logits, labels, state, constraint, margin, outer_margin, size, border)
    multipliers, rho = _of_voxels(state, outer)
    derivative = jnp.clip(penalty_derivative(h, multipliers, rho, function=function), *multiplier_range)

    def per_region(values: Float[Array, "*shape n"]) -> Float[Array, "2 n"]:
        axes = tuple(range(outer.ndim))
        return jnp.stack([jnp.sum(jnp.where(mask[..., None], values, 0), axis=axes) for mask in (~outer, outer)])

    return Sums(per_region(derivative), per_region(h), per_region(jnp.ones_like(h[..., :1]))[:, 0])


def merge(*parts: Sums) -> Sums:
    """The sums of several batches, shards or volumes as one."""
    return jax.tree.map(lambda *arrays: sum(arrays[1:], start=arrays[0]), *parts)


def update(
    state: State,
    sums: Sums,
    *,
    average: str = "voxels",
    multiplier_range: tuple[float, float] = MULTIPLIER_RANGE,
    rho_range: tuple[float, float] = RHO_RANGE,
    growth: float = 1.2,
    improvement: float = 0.9,
    rho_step: int = 10,
) -> State:
    """The next epoch's state: ``lambda <- mean dP/dh`` (Eq. 8), ``rho <- growth rho`` where that did not help (Eq. 9).

    ``rho`` grows in every ``rho_step``-th epoch, where the mean violation exceeds ``improvement`` times that of the
    epoch before, as in the published code (the printed Eq. 9 compares the violation with itself).  The defaults are the
    code's; the paper gives no numbers.  Both stay in their ranges whatever the violations, even infinite ones.  Where
    there is nothing to average over (no validation voxels; an empty region) the multipliers stay as they are.

    Args:
        state: which ``sums`` were computed with.
        sums: of the whole validation set.
        average: ``voxels``: over all voxels, those of the other region with ``h = 0``, as in the published code, which
            makes small regions slow; ``region``: over the region's own voxels; ``all``: one multiplier for all classes
            and regions, the mean over both (the code's variant without adaptivity, whose margins are equal).
        multiplier_range: lowest and highest lambda.
        rho_range: lowest and highest rho.
        growth: gamma.
        improvement: mu.
        rho_step: epochs between two updates of rho.

    Raises:
        UsageError: for an unknown average, a range that is empty or not positive, growth below 1 or rho_step below 1.
    """
    _check("average", average, AVERAGES)
    positive = 0 <= multiplier_range[0] <= multiplier_range[1] and 0 < rho_range[0] <= rho_range[1]
    if not positive or growth < 1 or rho_step < 1:
        raise UsageError(
            "CRaC's update needs ranges (lowest, highest) of positive numbers, growth and rho_step of at least 1; got "
            f"multiplier_range={multiplier_range}, rho_range={rho_range}, growth={growth}, rho_step={rho_step}."
        )
    derivative, violation, counted = sums
    total = counted if average == "region" else jnp.full_like(counted, jnp.sum(counted))
    if average == "all":
        derivative, violation = (jnp.full_like(a, jnp.mean(jnp.sum(a, axis=0))) for a in (derivative, violation))
        counted = total
    total, counted = total[:, None], counted[:, None]
    # A voxel of the other region has h = 0, where dP/dh = lambda.
    multipliers = (derivative + (total - counted) * state.multipliers) / jnp.maximum(total, 1)
    multipliers = jnp.where(total > 0, jnp.clip(multipliers, *multiplier_range), state.multipliers)
    violation = violation / jnp.maximum(total, 1)

    epoch = state.epoch + 1
    grows = (violation > improvement * jax.nn.relu(state.violation)) & (epoch > 1) & (epoch % rho_step == 0)
    rho = jnp.clip(jnp.where(grows, growth * state.rho, state.rho), *rho_range)
    new = State(multipliers, rho, violation, epoch)
    return jax.tree.map(lambda after, before: after.astype(before.dtype), new, state)


def summary(state: State) -> dict[str, float]:
    """For the log: ``largest_multiplier``, ``mean_rho``, ``largest_violation`` (in logits).  Not inside ``jit``.

    Raises:
        InputError: when the state is not finite, i.e. the validation logits of the last update were not.
    """
    multipliers, rho, violation, epoch = (np.asarray(array) for array in state)
    if not all(np.isfinite(array).all() for array in (multipliers, rho, violation)):
        raise InputError(
            f"CRaC's multipliers are not finite after epoch {epoch}: the validation logits were not; lower the "
            "learning rate or look for a damaged validation case, and resume from the last good checkpoint."
        )
    return {
        "largest_multiplier": float(multipliers.max()),
        "mean_rho": float(rho.mean()),
        "largest_violation": float(violation.max()),
    }


def _violation(
    logits: Float[Array, "B *spatial L"],
    labels: Int[Array, " B *spatial"],
    state: State,
    constraint: str,
    margin: float,
    outer_margin: float,
    size: int,
    border: str,
) -> tuple[Float[Array, "B *spatial K"], Bool[Array, " B *spatial"]]:
    """``h`` of every voxel and class, and where the outer region is."""
    _check("constraint", constraint, CONSTRAINTS)
    logits, labels = cross_entropy.as_classes(logits, labels)
    classes = logits.shape[-1]
    if state.multipliers.shape != (2, classes):
        raise ValueError(f"CRaC's multipliers {state.multipliers.shape} need to be (2, {classes}), as the logits have.")
    outer = neighbourhood.outer_mask(labels, size=size, border=border)
    proportions = neighbourhood.prior(labels, classes, size=size, border=border).astype(logits.dtype)
    h = jnp.where(outer[..., None], outer_margin, margin) * proportions - logits
    return (elementary.absolute(h) if constraint == "absolute" else h), outer


def _of_voxels(state: State, outer: Bool[Array, " B *spatial"]) -> tuple[Float[Array, "B *spatial K"], ...]:
    """Multipliers and rho of every voxel's region."""
    return tuple(jnp.where(outer[..., None], rows[1], rows[0]) for rows in (state.multipliers, state.rho))


def _check(what: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise UsageError(f"CRaC has no {what} {name!r}; choose one of {', '.join(known)}.")
