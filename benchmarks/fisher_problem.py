"""One size of the Fisher benchmark: the same features, weights, prompts and labels for JAX and for PyTorch."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # before jax: both frameworks share one GPU

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jaxtyping import Array, Float, Int
from torch.utils import _python_dispatch as python_dispatch
from torch.utils import flop_counter

from benchmarks import measure, torch_decoder, torch_fisher
from calsegx import losses
from calsegx.interfaces import Params, Prompts
from calsegx.losses import fisher
from calsegx.models import sam
from calsegx.models.sam import model, presets
from calsegx.models.sam.prompt_encoder import PromptEmbeddings

WEIGHT = 0.1  # of the penalty, relative normalisation
FRACTION, EVERY = 1 / 8, 8  # of the modes stochastic and every_k
PRECISIONS = {"float32": "highest", "tfloat32": "tensorfloat32", "bfloat16": "BF16_BF16_F32"}
MODES = ("plain", "exact", "exact_remat", "finite_difference", "stochastic", "every_k", "perturbed", "cmp")
CYCLES = {"every_k": EVERY}  # steps whose mean is the price of one
CHANGING = ("stochastic", "every_k")  # their gradient differs from step to step; its mean is the exact one
UNCOUNTED = ("exact_remat", "every_k")  # XLA counts the body of a loop once, and both branches of a condition
BATCHED_ARGS = (0, 1, 3)  # sparse, dense and labels; the positional encoding is the same for all samples


class Problem(NamedTuple):
    """Arguments of the step, on the device, and what they were made for."""

    config: sam.SamConfig
    grid: str
    batch: int
    classes: int
    params: Params  # a mask decoder with one token per class
    z: Float[Array, "b h w c"]
    sparse: Float[Array, "b t c"]
    dense: Float[Array, "b h w c"]
    position: Float[Array, "h w c"]
    labels: Int[Array, "b H W"]


def make(grid: str, batch: int, classes: int) -> Problem:
    """Random parameters, features, two point prompts and labels, from fixed seeds.

    Args:
        grid: features along one side (SAM's decoder, width 256), or ``tiny`` for the preset of the demo.
        batch: samples.
        classes: foreground classes: 1 is a sigmoid, more a softmax with a background of constant 0.
    """
    sizes = {"num_multimask_outputs": classes - 1, "depth": 0}  # no encoder: features are given
    if grid == "tiny":
        config = dataclasses.replace(presets.TINY, **sizes)
    else:
        config = dataclasses.replace(presets.VIT_B, image_size=16 * int(grid), **sizes)
    params = jax.jit(lambda rng: sam.init(config, rng))(jax.random.key(0))
    rng = np.random.default_rng(0)
    z = jnp.asarray(rng.normal(size=(batch, config.grid, config.grid, config.out_chans)), jnp.float32)
    prompts = Prompts(
        points=jnp.asarray(rng.uniform(0, config.image_size, (batch, 2, 2)), jnp.float32),
        labels=jnp.tile(jnp.array([1, 0]), (batch, 1)),
    )
    embed = jax.jit(lambda p, z, prompts: model.embed_prompts(config, p, z, prompts))
    sparse, dense, position, _ = embed(params["prompt_encoder"], z, prompts)
    # Blobs, not noise: a mask that the Dice loss can work on.
    labels = jnp.asarray(_blobs(rng, batch, 4 * config.grid, classes))
    return Problem(config, grid, batch, classes, params["mask_decoder"], z, sparse, dense, position, labels)


def _blobs(rng: np.random.Generator, batch: int, side: int, classes: int) -> np.ndarray:
    """One disc per class, a third of the side wide, over background."""
    y, x = np.mgrid[:side, :side]
    labels = np.zeros((batch, side, side), np.int32)
    for sample in labels:
        for k in range(1, classes + 1):
            centre_y, centre_x = rng.uniform(0.2 * side, 0.8 * side, 2)
            sample[np.hypot(y - centre_y, x - centre_x) < side / 6] = k
    return labels


def jax_step(problem: Problem, mode: str, dtype: str = "float32") -> Callable[..., Any]:
    """The jitted ``(params, z, *args, rng, step) -> ((total, measurements), gradients)`` of ``mode``."""
    task, penalised = losses.get("sam"), losses.get("bce" if problem.classes == 1 else "ce")
    confidence = losses.get("cmp")

    def loss_fn(params: Params, z: Array, sparse: Array, dense: Array, position: Array, labels: Array) -> Any:
        masks, _ = model.decode_tokens(problem.config, params, z, PromptEmbeddings(sparse, dense, position))
        logits = jnp.moveaxis(masks, 1, -1)
        if problem.classes > 1:
            logits = jnp.concatenate([jnp.zeros_like(logits[..., :1]), logits], axis=-1)
        terms = {"task": task(logits, labels)}
        if mode == "cmp":
            terms["cmp"] = torch_fisher.CMP_WEIGHT * confidence(logits, labels)
        return terms, penalised(logits, labels)

    if mode in ("plain", "cmp"):
        step = fisher.value_and_grad(loss_fn, weight=0.0)
    else:
        step = fisher.value_and_grad(loss_fn, weight=WEIGHT, batched_args=BATCHED_ARGS, **_options(mode))

    def with_precision(*args: Any, **options: Any) -> Any:
        with jax.default_matmul_precision(PRECISIONS[dtype]):
            return step(*args, **options)

    return jax.jit(with_precision)


def _options(mode: str) -> dict[str, Any]:
    """Options of ``fisher.value_and_grad`` for a row of the table."""
    if mode == "exact_remat":
        return {"mode": "exact", "microbatch": 1}
    if mode == "stochastic":
        return {"mode": mode, "fraction": FRACTION}
    if mode == "every_k":
        return {"mode": mode, "every": EVERY}
    return {"mode": mode}


def jax_arguments(problem: Problem, index: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the ``index``-th step."""
    positional = (problem.params, problem.z, problem.sparse, problem.dense, problem.position, problem.labels)
    return positional, {"rng": jax.random.key(index), "step": jnp.asarray(index, jnp.int32)}


def torch_inputs(problem: Problem) -> torch_fisher.Inputs:
    """The same arrays as tensors, channels first, on the GPU where JAX has one."""
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    tensor = lambda x: torch.from_numpy(np.array(x)).to(device)
    image = lambda x: tensor(x).movedim(-1, -3).contiguous()
    return torch_fisher.Inputs(
        image(problem.z),
        image(problem.position)[None],
        tensor(problem.sparse),
        image(problem.dense),
        tensor(problem.labels).long(),
    )


def torch_module(problem: Problem) -> torch_decoder.MaskDecoder:
    """The decoder in PyTorch with the problem's parameters, on the device of ``torch_inputs``."""
    decoder = torch_decoder.from_params(problem.config, problem.params)
    return decoder.to("cpu" if jax.default_backend() == "cpu" else "cuda")


def torch_step(problem: Problem, framework: str, mode: str, dtype: str = "float32") -> Callable[[], Any]:
    """A blocking call of the step of ``torch`` (eager) or ``torch.compile``, to loss, penalty, gradients."""
    make_step = torch_fisher.compiled_step if framework == "torch.compile" else torch_fisher.step
    step = make_step(torch_module(problem), torch_inputs(problem), mode, WEIGHT, autocast=dtype == "bfloat16")

    def call() -> torch_fisher.Result:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = dtype != "float32"
        result = step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return result

    return call


def torch_peak(step: Callable[[], Any]) -> int | None:
    """Bytes that one call adds at its peak, in a fresh process; None where nothing tells."""
    if not torch.cuda.is_available():
        return measure.rss_growth(step)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


class _CountFlops(python_dispatch.TorchDispatchMode):
    """PyTorch's formulas without ``FlopCounterMode``, whose bookkeeping of modules breaks on a double backward."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_counter.flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def torch_flops(step: Callable[[], Any]) -> float:
    """PyTorch's own count (matrix products and convolutions only) of one eager step, backward passes included."""
    with _CountFlops() as counter:
        step()
    return float(counter.total)


def peak_bytes(framework: str, mode: str, dtype: str, grid: str, batch: int, classes: int) -> int | None:
    """What one step adds to its arguments at its peak; call it in a fresh process."""
    problem = make(grid, batch, classes)
    if framework == "jax":
        positional, keywords = jax_arguments(problem)
        compiled = jax_step(problem, mode, dtype).lower(*positional, **keywords).compile()
        call = lambda: jax.block_until_ready(compiled(*positional, **keywords))
        on_cpu = jax.default_backend() == "cpu"
        return measure.rss_growth(call) if on_cpu else measure.device_peak(call)
    small = make("tiny", 1, classes)  # loads what the first step of a process loads
    torch_step(small, "torch", "plain", dtype)()
    return torch_peak(torch_step(problem, framework, mode, dtype))
