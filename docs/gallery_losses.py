"""Value and gradient of every loss over the logit of one voxel, labelled right and labelled wrong."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from calsegx import losses
from calsegx.evaluation.figures import BLACK, BLUE, GREY, VERMILION
from calsegx.losses import augmented_lagrangian, fisher

Loss = Callable[[jax.Array, jax.Array], jax.Array]
STYLES = ("solid", "dashed", "dotted")
# Labels 1 and 0 of the voxel; the wide line stays visible under the narrow one where the label does not matter.
VOXELS = {1: (BLUE, 3.2, "label 1: right where z > 0"), 0: (VERMILION, 1.5, "label 0: wrong where z > 0")}


@dataclass(frozen=True)
class Scene:
    """An image of one row, whose logits are ``fixed + moves * z``; its loss times ``factor`` is one voxel's share."""

    labels: np.ndarray  # [n], for a voxel of label 1
    flips: np.ndarray  # [n] bool: which labels change with the voxel's
    fixed: np.ndarray  # [n]
    moves: np.ndarray  # [n]
    factor: int = 1
    from_least: bool = False  # show how far the loss is above its least value
    own: int = 3  # columns of the voxel's 3 x 3 patch that have its label

    def curves(self, loss: Loss, label: int, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The loss and its derivative at every z."""
        labels = np.where(self.flips & (label == 0), 1 - self.labels, self.labels)

        def value(z: jax.Array) -> jax.Array:
            logits = jnp.asarray(self.fixed) + self.moves * z
            return self.factor * loss(logits[None, None, :, None], jnp.asarray(labels)[None, None])[0]

        values, slopes = map(np.asarray, jax.jit(jax.vmap(jax.value_and_grad(value)))(z))
        return (values - values.min() if self.from_least else values), slopes


def _mirrored(labels: list[int], own: int) -> Scene:
    """A row whose voxels all have the same patch, up to the names of the classes, so that its mean is that of one."""
    found = np.array(labels)
    return Scene(found, found >= 0, np.zeros(len(found)), np.where(found == 1, 1.0, -1.0), own=own)


PURE, BORDER = _mirrored([1, 1], 3), _mirrored([0, 1], 2)


def _structure(voxels: int) -> Scene:
    """One voxel of an image of 100 whose others are right with p = 0.9; without it the structure is 1 smaller."""
    labels = (np.arange(100) < voxels).astype(int)
    first = np.arange(100) == 0
    fixed = np.where(first, 0, np.where(labels == 1, 1, -1) * np.log(9))
    return Scene(labels, first, fixed, first.astype(float), factor=100, from_least=True)


def _certain(index: int, own: int) -> Scene:
    """Voxel ``index`` of a row of two halves of 12; the others are certain, and so cost nothing."""
    labels = (np.arange(24) < 12).astype(int)
    moves = (np.arange(24) == index).astype(float)
    return Scene(labels, np.full(24, True), np.where(moves > 0, 0, np.inf), moves, factor=24, own=own)


def draw(
    rows: Mapping[str, Scene],
    variants: Mapping[str, Loss],
    *,
    scenes: Mapping[str, Scene] | None = None,
    what: str = "loss",
    unit: str = "nats",
    reach: float = 8.0,
    patches: bool = False,
) -> Figure:
    """One row of panels per scene, value and gradient; one line style per variant.

    Args:
        rows: title -> scene.
        variants: name -> loss; the empty name gets no entry in the legend.
        scenes: variant -> scene, where the variants differ in that.
        what: the name of the quantity.
        unit: of the quantity, empty for none.
        reach: the logits shown are from -reach to reach.
        patches: draw the 3 x 3 patch of the voxel beside it.
    """
    figure = Figure(figsize=(7.4, 2.45 * len(rows) + 0.45), layout="constrained")
    ratios = [0.55, 1, 1] if patches else [1, 1]
    panels = figure.subplots(len(rows), len(ratios), squeeze=False, width_ratios=ratios)
    z = np.linspace(-reach, reach, 481)
    for (title, scene), axes in zip(rows.items(), panels, strict=True):
        value, slope = axes[-2:]
        for (name, loss), style in zip(variants.items(), STYLES, strict=False):
            for label, (colour, width, _) in VOXELS.items():
                for panel, curve in zip(axes[-2:], (scenes or {}).get(name, scene).curves(loss, label, z), strict=True):
                    panel.plot(z, curve, color=colour, linewidth=width, linestyle=style)
        for panel in axes[-2:]:
            panel.axvline(0, color=GREY, linewidth=0.7)
            panel.axhline(0, color=GREY, linewidth=0.7)
            panel.set_xlabel("logit z of the voxel", fontsize=9)
            panel.set_xlim(-reach, reach)
            panel.locator_params(axis="x", nbins=5)
        value.set_ylabel(f"{what} ({unit})" if unit else what, fontsize=9)
        slope.set_ylabel("gradient (per logit)", fontsize=9)
        if patches:
            _patch(axes[0], scene.own)
            axes[0].set_title(title, fontsize=10)
    handles = [value.plot([], [], color=c, linewidth=w, label=text)[0] for c, w, text in VOXELS.values()]
    names = [name for name in variants if name]
    handles += [
        value.plot([], [], color=BLACK, linewidth=1.3, linestyle=style, label=name)[0]
        for name, style in zip(names, STYLES, strict=False)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 3), frameon=False, fontsize=9)
    return figure


def _patch(axes: Any, own: int) -> None:
    """The labels of the patch: ``own`` columns of the voxel's class, the rest of the other."""
    other = np.broadcast_to(np.arange(3) < 3 - own, (3, 3))
    axes.imshow(np.where(other, 0.95, 0.6), cmap="gray", vmin=0, vmax=1, extent=(0, 3, 0, 3))
    axes.plot([1.5], [1.5], "o", color=BLACK)
    for line in range(4):
        axes.axhline(line, color=BLACK, linewidth=0.7)
        axes.axvline(line, color=BLACK, linewidth=0.7)
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel("dark: label of the\nvoxel (dot), light: other", fontsize=8)


def _of(name: str, **options: Any) -> Loss:
    return losses.registry.bind(name, options)


def _options(name: str, **options: tuple[Any, ...]) -> dict[str, Loss]:
    """One variant per value of the only option given, called ``option = value``."""
    ((option, values),) = options.items()
    return {f"{option} = {value}": _of(name, **{option: value}) for value in values}


def _two_views(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """BWCR where the other view says z = 2 for the voxel, in an image whose other voxels are certain."""
    certain = jnp.where(labels == 1, 40.0, -40.0)[..., None]
    moving = jnp.isfinite(logits)
    views = jnp.concatenate([jnp.where(moving, logits, certain), jnp.where(moving, 2.0, certain)])
    return losses.get("bwcr")(views, jnp.concatenate([labels, labels]))


def _crac(**options: Any) -> Loss:
    state = augmented_lagrangian.init(2, multiplier=0.2, rho=0.1)
    return lambda logits, labels: augmented_lagrangian.crac(logits, labels, state, **options)


def _fisher(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The penalty of a decoder that multiplies a feature of size 1 by its only weight, the logit."""

    def loss(params: dict[str, jax.Array], feature: jax.Array) -> jax.Array:
        return losses.get("ce")((params["weight"] * feature)[:, None], labels[:, 0, :1])

    return fisher.penalty(loss, {"weight": logits[0, 0, 0]}, jnp.ones((1, 1)))[0][None]


LARGE, SMALL = "structure: 40 % of the image", "structure: 4 %"
SIZES = {LARGE: _structure(40), SMALL: _structure(4)}
ONE, IMAGE = {"": PURE}, {"": SIZES[LARGE]}
PATCHES = {"pure patch": PURE, "border voxel": BORDER}
PRICE = "n (loss − its least)"


def _by_size(name: str) -> Callable[[], Figure]:
    variants = {size: _of(name) for size in SIZES}
    return functools.partial(draw, IMAGE, variants, scenes=SIZES, what=PRICE, unit="")


PICTURES: dict[str, Callable[[], Figure]] = {
    "ce": functools.partial(draw, ONE, {"": _of("ce")}),
    "bce": functools.partial(draw, ONE, {"": _of("bce")}),
    "dice": _by_size("dice"),
    "dice_plus_plus": functools.partial(
        draw, IMAGE, _options("dice_plus_plus", gamma=(2.0, 1.0, 4.0)), what=PRICE, unit=""
    ),
    "sam": _by_size("sam"),
    "ce_dice": functools.partial(
        draw, IMAGE, {"CE + Dice": _of("ce_dice"), "CE": _of("ce"), "Dice": _of("dice")}, what=PRICE, unit=""
    ),
    "focal": functools.partial(draw, ONE, _options("focal", gamma=(2.0, 1.0, 3.0))),
    "label_smoothing": functools.partial(draw, ONE, _options("label_smoothing", smoothing=(0.1, 0.3))),
    "ecp": functools.partial(draw, ONE, _options("ecp", weight=(0.1, 0.5))),
    "mbls": functools.partial(draw, ONE, _options("mbls", weight=(0.1, 0.5)), reach=12.0),
    "mbls_penalty": functools.partial(
        draw,
        ONE,
        _options("mbls_penalty", distance=("l1", "l2", "l2_without_hinge")),
        what="penalty",
        unit="logits; l2: squared",
    ),
    "probability_margin": functools.partial(
        draw, ONE, _options("probability_margin", margin=(0.5, 0.0)), what="penalty", unit=""
    ),
    "cmp": functools.partial(
        draw, ONE, _options("cmp", variant=("sigmoid", "softplus", "focal")), what="penalty", unit="nats; sigmoid: none"
    ),
    "svls": functools.partial(draw, PATCHES, {"": _of("svls")}, patches=True),
    "nacl": functools.partial(draw, PATCHES, _options("nacl", weight=(0.1, 0.5)), patches=True),
    "nacl_penalty": functools.partial(
        draw,
        PATCHES,
        {"on logits": _of("nacl_penalty"), "on probabilities": _of("nacl_penalty", on="probabilities")},
        what="penalty",
        unit="logits",
        patches=True,
    ),
    "bwcr": functools.partial(
        draw, {"far inside": _certain(0, 3), "on a boundary": _certain(11, 2)}, {"": _two_views}, patches=True
    ),
    "crac": functools.partial(
        draw,
        PATCHES,
        {f"constraint = {kind}": _crac(constraint=kind) for kind in ("absolute", "signed")},
        what="penalty",
        unit="",
        patches=True,
    ),
    "fip": functools.partial(draw, ONE, {"": _fisher}, what="penalty", unit=""),
}
