"""Second derivatives of the mask decoder against PyTorch's double backward through transformers' decoder.

The quantities of the Fisher penalty: the loss of each sample ``L_i`` (voxel-mean cross-entropy, background logit 0),
``g_i = grad_{z_i} L_i``, ``P = 1/2 mean_i |z_i|^2 |g_i|^2``, ``dP / d parameters``, and Hessian-vector products with
respect to the features ``z``.  Errors are relative to the norm of the expected array.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calsegx.models.sam import model, weights
from calsegx.models.sam.prompt_encoder import PromptEmbeddings
from tests.golden import detweights
from tests.models import test_transformers as oracle
from weights_conversion import meta_names, transformers_names

torch = pytest.importorskip("torch")

SEED = 5
BATCH, WIDTH = 2, 64
# (classes, prompt tokens, grid): heads of one and of four classes, few tokens and many, a square and a strip.
CASES = {"one_class": (1, 2, (8, 8)), "four_classes": (4, 24, (4, 16))}
# Measured: at most 2e-5 in float32 and 3e-14 in float64.
TOLERANCES = {"float32": 1e-4, "float64": 1e-12}


@functools.cache
def inputs(case: str) -> dict[str, np.ndarray]:
    """Features, prompt embeddings, a direction, ``[B, h, w, C]`` or ``[B, T, C]``; labels 0..K ``[B, 4h, 4w]``."""
    classes, tokens, (h, w) = CASES[case]
    rng = np.random.default_rng(SEED)
    drawn = {name: rng.normal(size=(BATCH, h, w, WIDTH)) for name in ("z", "direction", "dense")}
    drawn |= {"sparse": rng.normal(size=(BATCH, tokens, WIDTH)), "position": rng.normal(size=(h, w, WIDTH))}
    labels = rng.integers(0, classes + 1, (BATCH, 4 * h, 4 * w))
    return {name: value.astype(np.float32) for name, value in drawn.items()} | {"labels": labels}


def meta_names_of(decoder: Any) -> dict[str, str]:
    return transformers_names.to_meta(f"mask_decoder.{name}" for name, _ in decoder.named_parameters())


@functools.cache
def decoders(case: str) -> tuple[Any, Any, dict[str, Any]]:
    """transformers' mask decoder, our configuration, and our parameters with the same weights."""
    config = dataclasses.replace(oracle.CONFIGS["grid8"], num_multimask_outputs=CASES[case][0] - 1)
    decoder = oracle.build(config).mask_decoder.requires_grad_(True)
    meta, names = {}, meta_names_of(decoder)
    for name, parameter in decoder.named_parameters():
        renamed = names[f"mask_decoder.{name}"]
        meta[renamed] = detweights.make_tensor(renamed, tuple(parameter.shape), SEED)
        parameter.data = torch.from_numpy(meta[renamed])
    flat = {name.removeprefix("mask_decoder."): value for name, value in meta_names.convert(meta).items()}
    template = weights.template(config)["mask_decoder"]
    return decoder, config, weights.unflatten(template, flat, "drawn weights")


def by_torch(case: str, dtype: str) -> dict[str, np.ndarray]:
    decoder, config, _ = decoders(case)
    decoder = decoder.to(getattr(torch, dtype))
    cast = {n: torch.from_numpy(v).to(getattr(torch, dtype)) for n, v in inputs(case).items() if n != "labels"}
    z = cast["z"].permute(0, 3, 1, 2).requires_grad_(True)
    labels = torch.from_numpy(inputs(case)["labels"])
    position = cast["position"].permute(2, 0, 1).expand(BATCH, -1, -1, -1)

    # Fused attention kernels have no second derivative; eager attention rounds the softmax to float32.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        masks = [
            decoder(z, position, cast["sparse"][:, None], cast["dense"].permute(0, 3, 1, 2), multimask)[0][:, 0]
            for multimask in ([False, True] if config.num_multimask_outputs else [False])  # mask 0, masks 1..
        ]
        logits = torch.cat([torch.zeros_like(masks[0][:, :1]), *masks], dim=1)
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none").mean((1, 2))
        (gradient,) = torch.autograd.grad(loss.sum(), z, create_graph=True)
        penalty = 0.5 * (z.detach().square().sum((1, 2, 3)) * gradient.square().sum((1, 2, 3))).mean()
        parameters = dict(decoder.named_parameters())
        penalty_gradient = torch.autograd.grad(penalty, list(parameters.values()), retain_graph=True, allow_unused=True)
        direction = cast["direction"].permute(0, 3, 1, 2)
        (product,) = torch.autograd.grad((gradient * direction).sum(), z)

    result = {"loss": loss, "gradient": gradient.permute(0, 2, 3, 1), "penalty": penalty}
    result["hessian_product"] = product.permute(0, 2, 3, 1)
    names = meta_names_of(decoder)
    meta = {
        names[f"mask_decoder.{name}"]: np.zeros(parameter.shape) if g is None else g.numpy()
        for (name, parameter), g in zip(parameters.items(), penalty_gradient, strict=True)
    }
    return {name: value.detach().numpy() for name, value in result.items()} | meta_names.convert(meta)


def by_jax(case: str, dtype: str) -> dict[str, np.ndarray]:
    _, config, params = decoders(case)
    labels = inputs(case)["labels"]

    def losses(params: Any, z: jax.Array, embeddings: Any) -> jax.Array:
        masks, _ = model.decode_tokens(config, params, z, embeddings)
        logits = jnp.concatenate([jnp.zeros_like(masks[:, :1]), masks], axis=1)
        likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=1), labels[:, None], axis=1)
        return -likelihood.mean((1, 2, 3))

    def penalty(params: Any, z: jax.Array, embeddings: Any) -> tuple[jax.Array, Any]:
        gradient = jax.grad(lambda z: losses(params, z, embeddings).sum())(z)
        norms = [jnp.square(x).sum((1, 2, 3)) for x in (z, gradient)]
        return 0.5 * jnp.mean(norms[0] * norms[1]), gradient

    @jax.jit
    def everything(params: Any, z: jax.Array, direction: jax.Array, embeddings: Any) -> dict[str, Any]:
        (value, gradient), parameters = jax.value_and_grad(penalty, has_aux=True)(params, z, embeddings)
        along = lambda z: jax.grad(lambda z: losses(params, z, embeddings).sum())(z)
        product = jax.jvp(along, (z,), (direction,))[1]
        result = {"loss": losses(params, z, embeddings), "gradient": gradient, "penalty": value}
        return result | {"hessian_product": product, "parameters": parameters}

    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        arrays = jax.tree.map(lambda x: jnp.asarray(x, dtype), (params, {**inputs(case), "labels": np.zeros(())}))
        embeddings = PromptEmbeddings(*(arrays[1][name] for name in ("sparse", "dense", "position")))
        result = jax.device_get(everything(arrays[0], arrays[1]["z"], arrays[1]["direction"], embeddings))
    parameters = {f"mask_decoder.{name}": g for name, g in weights.flatten(result.pop("parameters")).items()}
    return result | parameters


# Each takes ten seconds to compile: the other two combinations only with -m slow.
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("one_class", "float32"),
        ("four_classes", "float64"),
        pytest.param("one_class", "float64", marks=pytest.mark.slow),
        pytest.param("four_classes", "float32", marks=pytest.mark.slow),
    ],
)
def test_double_backward(case, dtype):
    expected, actual = by_torch(case, dtype), by_jax(case, dtype)
    assert actual.keys() == expected.keys()
    parameters = [name for name in expected if name.startswith("mask_decoder.")]
    overall = np.sqrt(sum(np.square(expected[name]).sum() for name in parameters))
    assert overall > 0
    for name, value in expected.items():
        assert actual[name].dtype == dtype, name
        # A key bias has no gradient but rounding, the IoU head none at all: both are measured against all parameters.
        vanishes = name.endswith("k_proj.bias") or not value.any()
        norm = overall if vanishes else np.linalg.norm(value)
        error = np.linalg.norm(actual[name] - value) / norm
        assert error <= TOLERANCES[dtype], (name, error)
