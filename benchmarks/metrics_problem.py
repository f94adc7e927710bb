"""What ``benchmarks.metrics`` compares: the same volumes and images for calsegx, MONAI, torchmetrics and PyTorch."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jaxtyping import Array, Float, Int, UInt8
from monai import metrics as monai_metrics
from scipy import ndimage
from torch import Tensor
from torch.nn import functional
from torchmetrics.functional import classification

from benchmarks import measure, torch_losses
from calsegx import losses
from calsegx.losses import augmented_lagrangian
from calsegx.metrics import calibration, overlap, surface

CLASSES = 4
SPACING_MM = (1.0, 1.0, 1.0)
Call = Callable[[], Any]
CRAC = "crac"  # the penalty of augmented_lagrangian, which has a state and so is no registered loss


class Comparison(NamedTuple):
    """One row in the making: two blocking calls with the same results."""

    what: str
    ours: Call
    theirs: Call
    results: tuple[Sequence[np.ndarray], Sequence[np.ndarray]]  # of ours and theirs
    floor_bytes: int  # inputs read once and results written once
    compile_seconds: float | None = None
    other_error: float | None = None  # relative (L2), of theirs as they are called: in float32


def volumes(shape: Sequence[int]) -> tuple[UInt8[np.ndarray, "D H W"], UInt8[np.ndarray, "D H W"]]:
    """Prediction and truth: nested uneven blobs (oedema, core, enhancing), shifted and deformed, and a stray object."""
    rng = np.random.default_rng(0)
    side = min(shape)
    axes = np.ogrid[tuple(slice(n) for n in shape)]

    def bumps(width: float) -> np.ndarray:
        coarse = ndimage.gaussian_filter(rng.normal(size=[max(n // 4, 2) for n in shape]), width)
        fine = ndimage.zoom(coarse, [n / m for n, m in zip(shape, coarse.shape, strict=True)], order=1)
        return (fine / fine.std()).astype(np.float32)

    def labels(shift: float, unevenness: np.ndarray) -> np.ndarray:
        found = np.zeros(shape, np.uint8)
        for label, share in ((2, 0.29), (1, 0.18), (3, 0.12)):
            distance = np.sqrt(sum((a - n / 2 - shift) ** 2 for a, n in zip(axes, shape, strict=True)))
            found[distance < share * side * (1 + 0.25 * unevenness)] = label
        return found

    common = bumps(side / 50)
    prediction, truth = labels(side / 100, common + 0.5 * bumps(side / 80)), labels(0, common)
    corner = side // 10
    prediction[(slice(corner, corner + max(side // 40, 1)),) * 3] = 1
    return prediction, truth


def surfaces(shape: Sequence[int], with_background: bool) -> Comparison:
    """DSC, HD95 and ASSD of every class: ours from label maps, MONAI's from one-hot tensors made beforehand."""
    prediction, truth = volumes(shape)
    first = 0 if with_background else 1
    ours = lambda: _surface_scores(prediction, truth, first)
    one_hot = [
        functional.one_hot(torch.from_numpy(x).long(), CLASSES).movedim(-1, 0)[None] for x in (prediction, truth)
    ]
    tensors = [x.contiguous().float() for x in one_hot]
    options = {"include_background": with_background}

    def theirs() -> np.ndarray:
        dsc = monai_metrics.compute_dice(*tensors, **options)
        hd95 = monai_metrics.compute_hausdorff_distance(*tensors, percentile=95, spacing=SPACING_MM, **options)
        assd = monai_metrics.compute_average_surface_distance(*tensors, symmetric=True, spacing=SPACING_MM, **options)
        return torch.stack([dsc[0], hd95[0], assd[0]], dim=1).numpy()

    what = f"DSC + HD95 + ASSD, {CLASSES - first} classes" + (" (with background)" if with_background else "")
    return Comparison(what, ours, theirs, ([ours()], [theirs()]), prediction.nbytes + truth.nbytes)


def _surface_scores(prediction: np.ndarray, truth: np.ndarray, first: int) -> Float[np.ndarray, "classes 3"]:
    matrix = overlap.confusion(prediction, truth, CLASSES)
    scores = []
    for k in range(first, CLASSES):
        dsc = overlap.counts_of(matrix, (k,)).finalise(SPACING_MM).dsc
        distances = surface.surface_distances(prediction == k, truth == k, SPACING_MM)
        scores.append([dsc.value, distances.hausdorff(percentile=95).value, distances.assd().value])
    return np.array(scores)


def probabilities(shape: Sequence[int]) -> tuple[Float[np.ndarray, "D H W K"], UInt8[np.ndarray, "D H W"]]:
    """A softmax that is mostly sure, as on a brain, and the truth."""
    prediction, truth = volumes(shape)
    logits = 2 * np.random.default_rng(1).standard_normal((*shape, CLASSES), np.float32)
    np.put_along_axis(logits, prediction[..., None], 8 + np.take_along_axis(logits, prediction[..., None], -1), -1)
    return torch.softmax(torch.from_numpy(logits), -1).numpy(), truth


def calibrations(shape: Sequence[int]) -> Comparison:
    """ECE, CECE, Brier score and NLL of one volume, 15 bins, torchmetrics' binning.

    Checked in float64: torchmetrics sums up float32 confidences in float32, one by one.  Its multi-class ECE always
    does; its binary one of the top label is the same number.
    """
    p, truth = probabilities(shape)
    ours, theirs = calibration_of("calsegx", p, truth), calibration_of("torchmetrics", p, truth)
    in_float32, in_float64 = theirs(), calibration_of("torchmetrics", p.astype(np.float64), truth)()
    confidence, label = torch.from_numpy(p).double().max(dim=-1)
    in_float64[0] = _binary_ece(confidence, (label == torch.from_numpy(truth)).long())
    error = float(np.linalg.norm(in_float32 - in_float64) / np.linalg.norm(in_float64))
    floor = p.nbytes + truth.nbytes
    return Comparison("ECE + CECE + Brier + NLL", ours, theirs, ([ours()], [in_float64]), floor, other_error=error)


def calibration_of(side: str, p: Float[np.ndarray, "D H W K"], truth: UInt8[np.ndarray, "D H W"]) -> Call:
    """The call of ``calsegx``, channels last, or of ``torchmetrics``, channels first as its users have them."""
    if side == "calsegx":
        return lambda: _our_calibration(p.reshape(-1, CLASSES), truth.ravel())
    tensors = torch.from_numpy(p).movedim(-1, 0)[None].contiguous(), torch.from_numpy(truth).long()[None]
    return lambda: _their_calibration(*tensors)


def _our_calibration(p: Float[np.ndarray, "V K"], truth: UInt8[np.ndarray, " V"]) -> np.ndarray:
    found = calibration.calibration_statistics(p, truth, binning="torchmetrics")
    return np.array([found.ece(), found.cece(), found.brier(), found.nll()])


def _their_calibration(p: Tensor, truth: Tensor) -> np.ndarray:
    """With what torchmetrics has; by hand: the mean over classes, the Brier score and the NLL of an image."""
    ece = classification.multiclass_calibration_error(p, truth, num_classes=CLASSES, n_bins=15, norm="l1")
    per_class = torch.stack([_binary_ece(p[:, k], (truth == k).long()) for k in range(CLASSES)])
    brier = (p - functional.one_hot(truth, CLASSES).movedim(-1, 1)).square().sum(1).mean()
    nll = functional.nll_loss(p.clamp_min(calibration.PROBABILITY_FLOOR).log(), truth)
    return torch.stack([ece, per_class.mean(), brier, nll]).numpy()


def _binary_ece(p: Tensor, hit: Tensor) -> Tensor:
    return classification.binary_calibration_error(p, hit, n_bins=15, norm="l1")


def calibration_peak(side: str, shape: Sequence[int]) -> int | None:
    """Bytes that one call adds at its peak to its inputs; call it in a fresh process."""
    calibration_of(side, *probabilities((16, 16, 16)))()  # loads what the first call of a process loads
    return measure.rss_growth(calibration_of(side, *probabilities(shape)))


def loss_names() -> list[str]:
    """All registered losses, and CRaC's penalty."""
    return [*losses.names(), CRAC]


def images(shape: Sequence[int], classes: int) -> tuple[Float[Array, "B H W L"], Int[Array, "B H W"]]:
    """Noisy logits of smooth regions, and their labels; ``classes = 1`` is a sigmoid."""
    rng = np.random.default_rng(0)
    field = ndimage.gaussian_filter(rng.normal(size=(*shape, max(classes, 2))), (0, *[s / 25 for s in shape[1:]], 0))
    field /= field.std()
    logits = (3 * field + 1.5 * rng.normal(size=field.shape)).astype(np.float32)
    return jnp.asarray(logits[..., -classes:]), jnp.asarray(field.argmax(-1), jnp.int32)


def loss(name: str, shape: Sequence[int]) -> Comparison:
    """Value and gradient of one loss, the mean over the batch; ``bce`` with one logit, the others with ``CLASSES``."""
    logits, labels = images(shape, 1 if name == "bce" else CLASSES)
    function, other = _crac(logits.shape[-1]) if name == CRAC else (losses.get(name), torch_losses.LOSSES[name])
    step = jax.jit(jax.value_and_grad(lambda z, y: jnp.mean(function(z, y))))
    start = time.perf_counter()
    compiled = step.lower(logits, labels).compile()
    seconds = time.perf_counter() - start
    ours = lambda: jax.block_until_ready(compiled(logits, labels))
    z = torch.from_numpy(np.moveaxis(np.asarray(logits), -1, 1).copy()).requires_grad_()
    y = torch.from_numpy(np.array(labels)).long()

    def theirs() -> tuple[Tensor, Tensor]:
        value = other(z, y)
        return value.detach(), torch.autograd.grad(value, z)[0]

    a, b = ours(), theirs()
    results = [np.asarray(x, np.float64) for x in a], [b[0].double().numpy(), b[1].movedim(1, -1).double().numpy()]
    return Comparison(name, ours, theirs, results, 2 * logits.nbytes + labels.nbytes, seconds)


def _crac(classes: int) -> tuple[Callable[..., Any], torch_losses.Loss]:
    """CRaC's penalty with multipliers as after some epochs."""
    multipliers = np.linspace(0.02, 0.1, 2 * classes, dtype=np.float32).reshape(2, classes)
    state = augmented_lagrangian.init(classes)._replace(multipliers=jnp.asarray(multipliers))
    rho = torch.from_numpy(np.array(state.rho))
    ours = lambda z, y: augmented_lagrangian.crac(z, y, state)
    return ours, lambda z, y: torch_losses.crac(z, y, torch.from_numpy(multipliers), rho)
