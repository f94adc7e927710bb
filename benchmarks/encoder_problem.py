"""One size of the encoder benchmark: weights, frames, the implementations in both frameworks, and what they cost."""

import dataclasses
import functools
import importlib.util
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # before jax: both frameworks share one GPU

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import attention_forms, measure
from calsegx.interfaces import Params, UsageError
from calsegx.models import sam
from calsegx.models.sam import presets, weights

TORCH = importlib.util.find_spec("torch") is not None
TRANSFORMERS = TORCH and importlib.util.find_spec("transformers") is not None
REFERENCE = "meta"  # PyTorch eager in Meta's formulation: everything is compared with it
TRANSFORMERS_SDPA = "transformers sdpa"
_FORMS: dict[str, Callable[..., Any]] = {
    "naive": attention_forms.naive,
    "biased xla": functools.partial(attention_forms.biased, implementation="xla"),
    "biased cudnn": functools.partial(attention_forms.biased, implementation="cudnn"),
    "folded xla": functools.partial(attention_forms.folded, implementation="xla"),
    "folded cudnn": functools.partial(attention_forms.folded, implementation="cudnn"),
}
JAX = ("calsegx", *_FORMS)
PYTORCH = (REFERENCE, "sdpa", "sdpa compiled", TRANSFORMERS_SDPA)


class Problem(NamedTuple):
    """A model, its image encoder's parameters (numpy, float32), and frames ``[B, S, S, 3]``."""

    config: sam.SamConfig
    params: Params
    images: np.ndarray
    dtype: str


class Case(NamedTuple):
    """An implementation that is ready to run: ``call`` blocks until the embeddings are there and returns them."""

    call: Callable[[], Any]
    compile_seconds: float | None


def check(model: str, image_size: int, dtype: str, depth: int | None = None) -> sam.SamConfig:
    """The configuration of a size; ``depth`` keeps only the first blocks, for a quick look.

    Raises:
        UsageError: for an unknown model or type, or a size that is no multiple of the patch.
    """
    known = [name for name, config in presets.PRESETS.items() if config.stem == "patch"]
    if model not in known:
        raise UsageError(f"--models has {model!r}, which is none of {', '.join(known)}.")
    if dtype not in ("float32", "bfloat16"):
        raise UsageError(f"--dtypes has {dtype!r}, which is neither float32 nor bfloat16.")
    config = presets.PRESETS[model]
    if image_size <= 0 or image_size % config.patch_size:
        raise UsageError(f"--image_size={image_size} must be a positive multiple of {config.patch_size}.")
    if depth is not None and depth < config.depth:
        kept = tuple(i for i in config.global_attn_indexes if i < depth) or (depth - 1,)
        config = dataclasses.replace(config, depth=depth, global_attn_indexes=kept)
    return dataclasses.replace(config, image_size=image_size)


def make(model: str, image_size: int, batch: int, dtype: str, depth: int | None = None) -> Problem:
    """Random weights and frames from fixed seeds.

    Every leaf is normal(0, 0.02), norms are shifted to 1: drawn from one pool of a million, because a ViT-H has
    six hundred times as many.
    """
    config = check(model, image_size, dtype, depth)
    shapes = weights.template(config)["image_encoder"]
    rng = np.random.default_rng(0)
    pool = rng.normal(0, 0.02, 1_000_003).astype(np.float32)  # a prime: rows of a matrix differ

    def draw(path: Any, leaf: Any) -> np.ndarray:
        values = np.resize(np.roll(pool, -int(rng.integers(len(pool)))), leaf.shape)
        return values + 1 if path[-1].key == "scale" else values

    params = {"image_encoder": jax.tree_util.tree_map_with_path(draw, shapes)}
    images = rng.normal(size=(batch, image_size, image_size, 3)).astype(np.float32)
    return Problem(config, params, images, dtype)


def on_gpu() -> bool:
    """Whether JAX computes on something else than the CPU."""
    return jax.devices()[0].platform != "cpu"


def default_implementations() -> list[str]:
    """What can be compared here: on a GPU also the fused kernels and ``torch.compile``."""
    names = list(JAX) if on_gpu() else ["calsegx", "naive"]
    if TORCH:
        names += [REFERENCE, "sdpa", *(["sdpa compiled"] if on_gpu() else [])]
    return names + ([TRANSFORMERS_SDPA] if TRANSFORMERS else [])


def check_implementations(names: list[str]) -> None:
    """Refuse, before any work, what is unknown or cannot run here.

    Raises:
        UsageError: naming the implementation and the reason.
    """
    for name in names:
        if name not in (*JAX, *PYTORCH):
            raise UsageError(f"--implementations has {name!r}, which is none of {', '.join((*JAX, *PYTORCH))}.")
        if name in PYTORCH and not (TRANSFORMERS if name == TRANSFORMERS_SDPA else TORCH):
            package = "transformers" if name == TRANSFORMERS_SDPA else "torch"
            raise UsageError(f"--implementations has {name!r}, but {package} is not installed.")
        if not on_gpu() and (name == "sdpa compiled" or name.endswith("cudnn")):
            raise UsageError(f"--implementations has {name!r}, which is only measured on a GPU.")


def build(problem: Problem, name: str) -> Case:
    """The implementation ``name`` with its weights on the device, compiled but not yet run."""
    return _build_jax(problem, name) if name in JAX else _build_torch(problem, name)


def _build_jax(problem: Problem, name: str) -> Case:
    config, dtype = problem.config, jnp.dtype(problem.dtype)
    # By default a GPU rounds float32 factors to TensorFloat-32.
    jax.config.update("jax_default_matmul_precision", "highest" if dtype == jnp.float32 else None)
    form = _FORMS.get(name)

    def encode(params: Params, images: jax.Array) -> jax.Array:
        if form is None:
            return sam.encode(config, params, images, dtype)
        return attention_forms.encode(config, params, images, form, dtype)

    params, images = jax.block_until_ready(jax.device_put((problem.params, problem.images)))
    start = time.perf_counter()
    compiled = jax.jit(encode).lower(params, images).compile()
    return Case(lambda: jax.block_until_ready(compiled(params, images)), time.perf_counter() - start)


def _build_torch(problem: Problem, name: str) -> Case:
    import torch

    from benchmarks import torch_encoder

    device = "cuda" if on_gpu() else "cpu"
    torch.set_num_threads(measure.cores())
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    config, dtype = problem.config, getattr(torch, problem.dtype)
    state = torch_encoder.from_params(problem.params, dtype, device)
    images = torch.from_numpy(problem.images).to(device, dtype)
    attend = torch_encoder.meta if name == REFERENCE else torch_encoder.sdpa
    encode: Callable[[Any], Any] = lambda images: torch_encoder.encode(config, state, images, attend)
    if name == TRANSFORMERS_SDPA:
        encode = torch_encoder.transformers_encoder(config, state)
    if name == "sdpa compiled":
        encode = torch.compile(encode)

    def call() -> Any:
        with torch.inference_mode():
            out = encode(images)
        if device == "cuda":
            torch.cuda.synchronize()
        return out

    if name != "sdpa compiled":
        return Case(call, None)
    start = time.perf_counter()
    call()
    return Case(call, time.perf_counter() - start)


def to_numpy(out: Any) -> np.ndarray:
    """Embeddings of either framework, float32."""
    return np.asarray(out, np.float32) if isinstance(out, jax.Array) else out.float().cpu().numpy()


def peak_bytes(name: str, case: Case) -> int | None:
    """Bytes that one encoding adds at its peak to the weights and frames; in a fresh process, before any call."""
    if not on_gpu():
        return measure.rss_growth(case.call)
    if name in JAX:
        return measure.device_peak(case.call)
    import torch

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    case.call()
    return torch.cuda.max_memory_allocated() - before


def flops(config: sam.SamConfig, batch: int) -> float:
    """Operations of the matrix products and convolutions that the image encoder needs, a multiplication counting as 2.

    With T tokens of width C in a grid, n windows of side s (the grid itself in a global block), hidden width M:
    ``patch 3 p^2 T C``; per block ``T (4 C^2 + 2 C M)`` for the projections and ``n (2 s^4 C + 2 s^3 C)`` for attention
    and its relative positions; neck ``T (C O + 9 O^2)``.  Padded window tokens are not projected but are attended to.
    XLA's own count is no use here: it counts the body of a loop once.
    """
    c, tokens, out = config.embed_dim, config.grid**2, config.out_chans
    total = 3 * config.patch_size**2 * tokens * c + tokens * (c * out + 9 * out * out)
    for i in range(config.depth):
        side = config.grid if i in config.global_attn_indexes else config.window_size
        windows = (-(-config.grid // side)) ** 2
        total += tokens * (4 * c * c + 2 * c * int(config.embed_dim * config.mlp_ratio))
        total += windows * (2 * side**4 * c + (2 * side**3 * c if config.use_rel_pos else 0))
    return 2.0 * batch * total


def matmul_peak(dtype: str, rounds: int = 5) -> dict[str, float]:
    """Operations per second of a large square matrix product in each framework, at its best of ``rounds``."""
    side = 8192 if on_gpu() else 2048
    a = np.random.default_rng(0).normal(size=(side, side)).astype(np.float32)
    x = jnp.asarray(a, dtype)
    precision = "highest" if dtype == "float32" else None
    product = jax.jit(lambda x: jnp.matmul(x, x, precision=precision))
    functions: dict[str, Callable[[], Any]] = {"jax": lambda: jax.block_until_ready(product(x))}
    if TORCH:
        functions["torch"] = _torch_product(a, dtype)
    seconds = measure.interleave(functions, rounds)
    return {name: 2.0 * side**3 / min(times) for name, times in seconds.items()}


def _torch_product(a: np.ndarray, dtype: str) -> Callable[[], Any]:
    import torch

    y = torch.from_numpy(a).to("cuda" if on_gpu() else "cpu", getattr(torch, dtype))

    def call() -> None:
        torch.mm(y, y)
        if on_gpu():
            torch.cuda.synchronize()

    return call
