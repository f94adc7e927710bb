"""The losses of ``calsegx.losses`` in PyTorch, as a user would write them: channels first, vectorised, autograd.

The formulas and default options are those of ``calsegx``, the code is its own, so that an agreement of the two is a
check of both.  ``logits`` are ``[B, K, H, W]`` (``bce``: ``[B, 1, H, W]``), ``labels`` int64 ``[B, H, W]``; a loss is
the mean over the batch.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from calsegx.losses import neighbourhood

Loss = Callable[[Tensor, Tensor], Tensor]


def one_hot(labels: Tensor, like: Tensor) -> Tensor:
    """One-hot targets ``[B, K, H, W]`` of the logits' type."""
    return functional.one_hot(labels, like.shape[1]).movedim(-1, 1).to(like.dtype)


def proportions(labels: Tensor, like: Tensor) -> Tensor:
    """NACL's mean prior: class proportions of the 3 x 3 patch, the border replicated."""
    return functional.avg_pool2d(functional.pad(one_hot(labels, like), (1, 1, 1, 1), mode="replicate"), 3, stride=1)


def bce(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy."""
    return functional.binary_cross_entropy_with_logits(logits[:, 0], (labels > 0).to(logits.dtype))


def dice(logits: Tensor, labels: Tensor) -> Tensor:
    """Soft Dice with the background."""
    p, q = torch.softmax(logits, dim=1), one_hot(labels, logits)
    return (1 - (2 * (p * q).sum((2, 3)) + 1e-5) / (p.sum((2, 3)) + q.sum((2, 3)) + 1e-5)).mean()


def dice_plus_plus(logits: Tensor, labels: Tensor) -> Tensor:
    """DSC++ with gamma = 2."""
    p, q = torch.softmax(logits, dim=1), one_hot(labels, logits)
    hits = (p * q).sum((2, 3))
    errors = ((q * (1 - p)) ** 2).sum((2, 3)) + (((1 - q) * p) ** 2).sum((2, 3))
    return (1 - (2 * hits + 1e-7) / (2 * hits + errors + 1e-7)).mean()


def ce_dice(logits: Tensor, labels: Tensor) -> Tensor:
    """CE + Dice."""
    return functional.cross_entropy(logits, labels) + dice(logits, labels)


def focal(logits: Tensor, labels: Tensor) -> Tensor:
    """Focal loss with gamma = 2."""
    per_voxel = functional.cross_entropy(logits, labels, reduction="none")
    return ((1 - torch.exp(-per_voxel)) ** 2 * per_voxel).mean()


def label_smoothing(logits: Tensor, labels: Tensor) -> Tensor:
    """CE with smoothed labels."""
    return functional.cross_entropy(logits, labels, label_smoothing=0.1)


def ecp(logits: Tensor, labels: Tensor) -> Tensor:
    """CE minus a tenth of the entropy."""
    log_p = torch.log_softmax(logits, dim=1)
    return functional.nll_loss(log_p, labels) + 0.1 * (log_p.exp() * log_p).sum(1).mean()


def svls(logits: Tensor, labels: Tensor) -> Tensor:
    """Spatially varying label smoothing with sigma = 2: a depthwise convolution of the one-hot labels."""
    classes = logits.shape[1]
    kernel = torch.from_numpy(neighbourhood.svls_kernel(2, 2.0) / 2).to(logits.dtype).expand(classes, 1, 3, 3)
    padded = functional.pad(one_hot(labels, logits), (1, 1, 1, 1), mode="replicate")
    targets = functional.conv2d(padded, kernel, groups=classes)
    return -(targets * torch.log_softmax(logits, dim=1)).sum(1).mean()


def mbls_penalty(logits: Tensor, labels: Tensor) -> Tensor:
    """Logit distances beyond the margin 5."""
    del labels
    return functional.relu(logits.max(dim=1, keepdim=True).values - logits - 5.0).mean()


def nacl_penalty(logits: Tensor, labels: Tensor) -> Tensor:
    """Distance of the logits to the class proportions."""
    return (proportions(labels, logits) - logits).abs().mean()


def cmp(logits: Tensor, labels: Tensor) -> Tensor:
    """Confidence misalignment, equation 4."""
    return torch.sigmoid((functional.cross_entropy(logits, labels, reduction="none") - math.log(2)) / 0.1).mean()


def probability_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Gap of the two largest probabilities beyond 0.5."""
    del labels
    first, second = torch.topk(torch.softmax(logits, dim=1), 2, dim=1).values.unbind(1)
    return functional.relu(first - second - 0.5).mean()


def bwcr(logits: Tensor, labels: Tensor) -> Tensor:
    """Two views' CE and their boundary-weighted distance; the distances by scipy, for PyTorch has none."""
    supervised = functional.cross_entropy(logits, labels)  # half of the sum over the views
    weights = torch.from_numpy(np.stack([_boundary_weights(x, logits.shape[1]) for x in labels[::2].numpy()]))
    difference = (weights[:, None] * (logits[::2] - logits[1::2]) ** 2).mean()
    return (2 * supervised + difference) / 3


def _boundary_weights(labels: np.ndarray, classes: int, radius: float = 10, lowest: float = 0.01) -> np.ndarray:
    steps = np.full(labels.shape, radius)
    for k in range(1, classes):
        mask = labels == k
        if mask.any() and not mask.all():
            inside, outside = ndimage.distance_transform_edt(mask), ndimage.distance_transform_edt(~mask)
            steps = np.minimum(steps, np.where(mask, np.floor(inside) - 1, np.ceil(outside)))
    return (np.maximum(radius - steps, 0) / radius + lowest).astype(np.float32)


def crac(logits: Tensor, labels: Tensor, multipliers: Tensor, rho: Tensor) -> Tensor:
    """CRaC's penalty: PHR of the absolute constraint; multipliers and rho are ``[2, K]``, rows inner, outer."""
    index = functional.pad(labels[:, None].to(logits.dtype), (1, 1, 1, 1), mode="replicate")
    outer = functional.max_pool2d(index, 3, stride=1) != -functional.max_pool2d(-index, 3, stride=1)
    tau = proportions(labels, logits)
    h = (torch.where(outer, tau, 5.0 * tau) - logits).abs()
    of_voxels = lambda rows: torch.where(outer, rows[1].view(1, -1, 1, 1), rows[0].view(1, -1, 1, 1))
    lagrange, weight = of_voxels(multipliers), of_voxels(rho)
    slope = lagrange + weight * h
    return torch.where(slope >= 0, lagrange * h + weight * h**2 / 2, -(lagrange**2) / (2 * weight)).mean() / 2


def plus(weight: float, penalty: Loss) -> Loss:
    """``CE + weight * penalty``."""
    return lambda logits, labels: functional.cross_entropy(logits, labels) + weight * penalty(logits, labels)


LOSSES: dict[str, Loss] = {
    "bce": bce,
    "bwcr": bwcr,
    "ce": functional.cross_entropy,
    "ce_dice": ce_dice,
    "cmp": cmp,
    "dice": dice,
    "dice_plus_plus": dice_plus_plus,
    "ecp": ecp,
    "focal": focal,
    "label_smoothing": label_smoothing,
    "mbls": plus(0.1, mbls_penalty),
    "mbls_penalty": mbls_penalty,
    "nacl": plus(0.1, nacl_penalty),
    "nacl_penalty": nacl_penalty,
    "probability_margin": probability_margin,
    "sam": ce_dice,
    "svls": svls,
}
