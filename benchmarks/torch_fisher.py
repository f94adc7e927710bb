"""The training step in PyTorch: SAM loss, confidence and Fisher penalty, and their gradients, as a user would write it.

The formulas are those of ``calsegx.losses``; the code is its own, so that an agreement of the two is a check of both.
``step`` is eager, with autograd's double backward.  ``compiled_step`` is the same mathematics through ``torch.func``
(``torch.compile`` refuses the double backward of a compiled graph, but can trace nested ``torch.func.grad``).
"""

import contextlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.torch_decoder import MaskDecoder

MODES = ("plain", "exact", "finite_difference", "cmp")
CMP_WEIGHT, CMP_THRESHOLD, CMP_TEMPERATURE = 0.5, math.log(2), 0.1
# Of the features' norm. On SAM's decoder in float32 the gradient is then off by 1 to 2 %: from 1e-5 on, ReLU units that
# switch between the shifted features make it useless (error 0.6 to 50), below 1e-7 rounding does.
SHIFT = 1e-6
Gradients = dict[str, Tensor]
Result = tuple[Tensor, Tensor, Gradients]  # loss (without the penalty), penalty, gradients under Meta's names


class Inputs(NamedTuple):
    """What a step works on, all on one device."""

    z: Tensor  # features [B, C, h, w]
    position: Tensor  # [1, C, h, w]
    sparse: Tensor  # [B, T, C]
    dense: Tensor  # [B, C, h, w]
    labels: Tensor  # class indices [B, 4h, 4w]


def class_logits(masks: Tensor) -> Tensor:
    """Mask logits ``[B, K, H, W]``; for K > 1 with the background's constant 0 in front."""
    masks = masks.float() if masks.dtype == torch.bfloat16 else masks
    return masks if masks.shape[1] == 1 else torch.cat([torch.zeros_like(masks[:, :1]), masks], dim=1)


def per_voxel(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of every voxel ``[B, H, W]``."""
    if logits.shape[1] == 1:
        return functional.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype), reduction="none")
    return functional.cross_entropy(logits, labels, reduction="none")


def dice(logits: Tensor, labels: Tensor, smooth: float = 1e-5) -> Tensor:
    """Soft Dice loss ``[B]``, the mean over classes."""
    if logits.shape[1] == 1:
        probabilities, targets = torch.sigmoid(logits), labels[:, None].to(logits.dtype)
    else:
        probabilities = torch.softmax(logits, dim=1)
        targets = functional.one_hot(labels, logits.shape[1]).movedim(-1, 1).to(logits.dtype)
    intersection = (probabilities * targets).sum((2, 3))
    size = probabilities.sum((2, 3)) + targets.sum((2, 3))
    return (1 - (2 * intersection + smooth) / (size + smooth)).mean(1)


def terms(masks: Tensor, labels: Tensor, with_cmp: bool) -> tuple[Tensor, Tensor]:
    """Task loss and penalised loss ``[B]``, from one forward pass."""
    logits = class_logits(masks)
    voxels = per_voxel(logits, labels)
    penalised = voxels.mean((1, 2))
    task = dice(logits, labels) + penalised
    if with_cmp:
        excess = (voxels - CMP_THRESHOLD) / CMP_TEMPERATURE
        task = task + CMP_WEIGHT * torch.sigmoid(excess).mean((1, 2))
    return task, penalised


def step(
    decoder: MaskDecoder, inputs: Inputs, mode: str, weight: float, autocast: bool = False
) -> Callable[[], Result]:
    """The eager step of ``mode``: a call computes loss, penalty and the gradient of ``loss + weight * penalty``.

    Args:
        decoder: its parameters are what is differentiated for.
        inputs: on the decoder's device.
        mode: ``plain``, ``exact``, ``finite_difference`` or ``cmp``.
        weight: of the penalty, relative normalisation.
        autocast: run the forward passes in bfloat16 where PyTorch holds that safe.
    """
    names, parameters = zip(*decoder.named_parameters(), strict=True)
    loss = _loss_of(inputs, mode == "cmp", lambda *arguments: decoder(*arguments)[0], autocast)

    def gradients(value: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(value, parameters, allow_unused=True)  # the IoU head has no part in the loss
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]

    def plain() -> Result:
        value = loss(inputs.z)[0].mean()
        return value.detach(), torch.zeros(()), dict(zip(names, gradients(value), strict=True))

    def exact() -> Result:
        z = inputs.z.detach().requires_grad_()
        task, penalised = loss(z)
        (g,) = torch.autograd.grad(penalised.sum(), z, create_graph=True)
        value, penalty = task.mean(), _relative_penalty(z.detach(), g)
        return value.detach(), penalty.detach(), dict(zip(names, gradients(value + weight * penalty), strict=True))

    def finite_difference() -> Result:
        z = inputs.z.detach().requires_grad_()
        task, penalised = loss(z)
        (g,) = torch.autograd.grad(penalised.sum(), z, retain_graph=True)
        value, first = task.mean(), gradients(task.mean())
        ahead, behind, scale = _shifted(inputs.z, g)
        second = gradients((scale * (loss(ahead)[1] - loss(behind)[1])).mean())
        both = [a + weight * b for a, b in zip(first, second, strict=True)]
        return value.detach(), _relative_penalty(inputs.z, g), dict(zip(names, both, strict=True))

    return {"plain": plain, "cmp": plain, "exact": exact, "finite_difference": finite_difference}[mode]


def compiled_step(
    decoder: MaskDecoder, inputs: Inputs, mode: str, weight: float, autocast: bool = False
) -> Callable[[], Result]:
    """The step under ``torch.compile``, its derivatives by ``torch.func.grad``; arguments as in ``step``."""
    parameters = {name: p.detach() for name, p in decoder.named_parameters()}

    def total(parameters: Gradients, inputs: Inputs) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        def forward(*arguments: Any) -> Tensor:
            return torch.func.functional_call(decoder, parameters, arguments)[0]

        loss = _loss_of(inputs, mode == "cmp", forward, autocast)
        if mode in ("plain", "cmp"):
            value = loss(inputs.z)[0].mean()
            return value, (value, torch.zeros_like(value))

        def penalised(z: Tensor) -> tuple[Tensor, Tensor]:
            task, penalised = loss(z)
            return penalised.sum(), task

        g, task = torch.func.grad(penalised, has_aux=True)(inputs.z)
        value = task.mean()
        if mode == "exact":
            penalty = _relative_penalty(inputs.z, g)
            return value + weight * penalty, (value, penalty)
        g = g.detach()
        ahead, behind, scale = _shifted(inputs.z, g)
        slope = (scale * (loss(ahead)[1] - loss(behind)[1])).mean()
        return value + weight * slope, (value, _relative_penalty(inputs.z, g))

    torch.compiler.reset()  # other sizes would turn into dynamic shapes
    compiled = torch.compile(torch.func.grad(total, has_aux=True), dynamic=False)

    def call() -> Result:
        gradients, (value, penalty) = compiled(parameters, inputs)
        return value, penalty, gradients

    return call


def _loss_of(
    inputs: Inputs, with_cmp: bool, forward: Callable[..., Tensor], autocast: bool
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """``z -> (task [B], penalised [B])``."""
    cast = torch.autocast(inputs.z.device.type, torch.bfloat16) if autocast else contextlib.nullcontext()

    def loss(z: Tensor) -> tuple[Tensor, Tensor]:
        with cast:
            masks = forward(z, inputs.position, inputs.sparse, inputs.dense)
        return terms(masks, inputs.labels, with_cmp)

    return loss


def _squared_norm(x: Tensor) -> Tensor:
    return x.square().sum((1, 2, 3))


def _relative_penalty(z: Tensor, g: Tensor) -> Tensor:
    """``1/2 mean_i |z_i|^2 |g_i|^2``."""
    return 0.5 * (_squared_norm(z) * _squared_norm(g)).mean()


def _shifted(z: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features shifted both ways along ``g``, and the scale that turns the losses' difference into the penalty's slope.

    The penalty's gradient is ``mean_i |z_i|^2 (d/dz grad L_i) g_i``: a directional derivative along ``|z_i|^2 g_i``.
    """
    length = SHIFT * torch.sqrt(_squared_norm(z) / _squared_norm(g))
    shift = length[:, None, None, None] * g
    return z + shift, z - shift, _squared_norm(z) / (2 * length)
