r"""Pretrain the tiny promptable SAM that ships with calsegx, from scratch, on procedural drawings.

Command (once; the result is in ``calsegx/weights/sam_tiny``)::

    python -m launch.pretrain_tiny --output=weights/sam_tiny

About 45 minutes on two quiet cores (58 on the busy ones that made the weights here).  Expect, on held-out drawings of
objects of at least 120 pixels, mean IoU 0.66 for a box and 0.58 for two points; an ellipse in the box scores 0.54 and
the best fixed disc at the point 0.27 on the same objects.  The box falls short of the 0.70 that was aimed at.

The recipe: a convolutional stem; Muon on matrices and Adam on the rest; class-balanced BCE that fades into
Dice + 2 BCE (without it nothing is learned for hundreds of steps: the empty mask is a plateau); the best of three
masks; and a dense affinity loss, "do these two pixels belong to the same visible object", which is what makes the
frozen features useful. The affinity head is thrown away. Step ``i`` depends on ``(seed, i)`` alone, so a run that was
stopped goes on from ``<output>.state.safetensors`` (written every 500 steps) as if it had not been.
"""

import concurrent.futures
import functools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
from absl import flags

from calsegx import files
from calsegx.data import drawings, prompted_drawings
from calsegx.data.prompted_drawings import Step
from calsegx.interfaces import DataError, Prompts, UsageError
from calsegx.models import sam
from calsegx.models.sam import model, presets
from calsegx.training import progress
from launch import common

EMBEDDING, CELLS = 32, 4  # of the affinity loss: width, and sub-pixels along one side of a token
BALANCED_FRACTION = 0.3  # the class-balanced BCE fades out over this fraction of the steps
IMAGES_HELD_OUT = 300

CARD = """---
license: apache-2.0
library_name: calsegx
tags: [segmentation, sam, synthetic]
---
# Tiny promptable SAM of calsegx

SAM's architecture at a small size ({parameters:,} parameters, frames of 128 x 128 pixels, patches of 8, a
convolutional stem), trained from scratch by `python -m launch.pretrain_tiny` on procedural drawings only: no
medical images, no other people's weights. It exists so that calsegx can be tried and tested without downloads.

Origin: seed {seed}, {steps} steps of {images} drawings with {prompts} point and {prompts} box prompts each,
{minutes:.0f} minutes on {device}.

Held-out drawings, objects of at least {area} pixels, mask 0, mean IoU: box {box:.3f}, two points {points:.3f}.
Prompt-only guesses on the same objects: ellipse in the box {ellipse:.3f}, best fixed disc at the point {disc:.3f}.

Not a medical device. It is a toy-sized network: use converted SAM or MedSAM weights for real images.
"""


def mask_losses(logits: jax.Array, targets: jax.Array, balance: jax.Array) -> jax.Array:
    """Dice + BCE of every mask ``[N, M]``; ``balance`` in [0, 1] mixes plain (doubled) and class-balanced BCE."""
    targets = targets[:, None]
    bce = optax.sigmoid_binary_cross_entropy(logits, targets)
    foreground = (bce * targets).sum((2, 3)) / (targets.sum((2, 3)) + 1)
    background = (bce * (1 - targets)).sum((2, 3)) / ((1 - targets).sum((2, 3)) + 1)
    probabilities = jax.nn.sigmoid(logits)
    overlap = 2 * (probabilities * targets).sum((2, 3)) + 1
    dice = 1 - overlap / (probabilities.sum((2, 3)) + targets.sum((2, 3)) + 1)
    return dice + balance * (foreground + background) / 2 + (1 - balance) * 2 * bce.mean((2, 3))


def mask_iou(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """IoU of thresholded masks ``[N, M]``."""
    prediction, truth = logits > 0, targets[:, None] > 0.5
    intersection = (prediction & truth).sum((2, 3))
    return intersection / jnp.maximum((prediction | truth).sum((2, 3)), 1)


def affinity_loss(z: jax.Array, head: dict[str, jax.Array], step: Step) -> jax.Array:
    """Balanced BCE on "same visible object" of anchor and pixel pairs, from sub-pixel embeddings of the features."""
    e = einops.rearrange(z @ head["kernel"], "b h w (i j e) -> b (h i) (w j) e", i=CELLS, j=CELLS, e=EMBEDDING).reshape(
        z.shape[0], -1, EMBEDDING
    )
    labels = step.labels.reshape(z.shape[0], -1)
    take = lambda x, index: jnp.take_along_axis(x, index[..., None] if x.ndim == 3 else index, axis=1)
    anchors, pixels = take(e, step.anchors), take(e, step.pixels)
    same = take(labels, step.anchors)[:, :, None] == take(labels, step.pixels)[:, None]
    logits = jnp.einsum("bae,bpe->bap", anchors, pixels) / EMBEDDING**0.5 + head["bias"]
    bce = optax.sigmoid_binary_cross_entropy(logits, same)
    return (bce * same).sum() / same.sum() / 2 + (bce * ~same).sum() / (~same).sum() / 2


def predict(params: Any, step: Step) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Features, logits ``[2 * I * P, 4, 64, 64]`` and predicted IoU of a batch."""
    config = presets.TINY
    z = sam.encode(config, params, step.images)
    repeated = jnp.repeat(z, step.boxes.shape[0] // z.shape[0], axis=0)
    outputs = []
    for prompts in (Prompts(points=step.points, labels=step.point_labels), Prompts(boxes=step.boxes)):
        embeddings = model.embed_prompts(config, params["prompt_encoder"], repeated, prompts)
        outputs.append(model.decode_tokens(config, params["mask_decoder"], repeated, embeddings))
    logits, iou = (jnp.concatenate(parts) for parts in zip(*outputs, strict=True))
    return z, logits, iou


def loss_fn(params: Any, step: Step, balance: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mask 0 + 0.3 best of masks 1..3 + 0.1 IoU regression + affinity."""
    z, logits, predicted_iou = predict(params["sam"], step)
    losses = mask_losses(logits, step.targets, balance)
    iou = mask_iou(logits, step.targets)
    affinity = affinity_loss(z, params["affinity"], step)
    total = losses[:, 0].mean() + 0.3 * losses[:, 1:].min(1).mean()
    total += 0.1 * jnp.square(predicted_iou - iou).mean() + affinity
    half = iou.shape[0] // 2
    return total, {"affinity": affinity, "points": iou[:half, 0].mean(), "box": iou[half:, 0].mean()}


def make_optimizer(steps: int, learning_rate: float) -> optax.GradientTransformation:
    """Muon on kernels that are matrices, Adam on the rest; the Fourier matrix of the prompts stays as drawn."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 40, steps, learning_rate * 0.03)

    def group(path: Any, leaf: Any) -> str:
        name = path[-1].key
        if "gaussian" in name:
            return "fixed"
        return "muon" if name == "kernel" and leaf.ndim == 2 else "adam"

    groups = {
        "muon": optax.contrib.muon(schedule, consistent_rms=0.2),
        "adam": optax.adam(schedule, b2=0.98),
        "fixed": optax.set_to_zero(),
    }
    labels = functools.partial(jax.tree_util.tree_map_with_path, group)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.partition(groups, labels))


def save_state(path: Path, state: Any, step: int, settings: str) -> None:
    """Write all leaves of ``state`` atomically, with the step and the run's settings."""
    leaves = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    meta = {"step": np.asarray(step), "settings": np.frombuffer(settings.encode(), np.uint8)}
    files.write_atomically(path, safetensors.numpy.save({**leaves, **meta}))


def load_state(path: Path, template: Any, settings: str) -> tuple[Any, int]:
    """The inverse of ``save_state``.

    Raises:
        DataError: when it was written by a run with other settings.
    """
    saved = safetensors.numpy.load(path.read_bytes())
    step, theirs = int(saved.pop("step")), saved.pop("settings").tobytes().decode()
    if theirs != settings:
        raise DataError(f"{path} is of a run with {theirs}, not {settings}: use those flags or delete it.")
    leaves = [jnp.asarray(saved[key]) for key in sorted(saved, key=int)]
    return jax.tree.unflatten(jax.tree.structure(template), leaves), step


def batches(pool: Any, first: int, steps: int, seed: int, images: int, prompts: int) -> Iterator[Step]:
    """Training batches ``first .. steps - 1``, assembled in the background a few steps ahead."""
    count = len(pool[0])

    def build(i: int) -> Step:
        rng = np.random.default_rng([seed, i])
        return _make_step(pool, rng.integers(count, size=images), rng, prompts, augment=True)

    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        queue = [executor.submit(build, i) for i in range(first, min(first + 4, steps))]
        for i in range(first, steps):
            if i + 4 < steps:
                queue.append(executor.submit(build, i + 4))
            yield queue.pop(0).result()


def held_out(pool: Any, prompts: int) -> list[Step]:
    """Fixed evaluation batches, not augmented."""
    rng = np.random.default_rng(0)
    chunks = np.array_split(np.arange(len(pool[0])), max(1, len(pool[0]) // 10))
    return [_make_step(pool, chunk, rng, prompts, augment=False) for chunk in chunks]


def _make_step(pool: Any, indices: np.ndarray, rng: np.random.Generator, prompts: int, augment: bool) -> Step:
    mean, std = presets.TINY.pixel_mean, presets.TINY.pixel_std
    return prompted_drawings.make_step(pool, indices, rng, prompts, pixel_mean=mean, pixel_std=std, augment=augment)


def prompt_only(steps: list[Step]) -> dict[str, float]:
    """Mean IoU of guesses that never look at the image: an ellipse in the box, the best fixed disc at the point."""
    y, x = np.mgrid[:64, :64] * 2 + 0.5
    truth = np.concatenate([s.targets[: len(s.points)] for s in steps]) > 0.5
    centre = np.concatenate([s.points[:, 0] for s in steps])
    distance = np.hypot(x - centre[:, 0, None, None], y - centre[:, 1, None, None])
    disc = max(_iou(distance < radius, truth) for radius in range(6, 40, 2))
    box = np.concatenate([s.boxes for s in steps])[:, :, None, None]
    semi_x, semi_y = np.maximum(box[:, 2] - box[:, 0], 1) / 2, np.maximum(box[:, 3] - box[:, 1], 1) / 2
    ellipse = ((x - (box[:, 0] + box[:, 2]) / 2) / semi_x) ** 2 + ((y - (box[:, 1] + box[:, 3]) / 2) / semi_y) ** 2
    truth = np.concatenate([s.targets[len(s.points) :] for s in steps]) > 0.5
    return {"disc": disc, "ellipse": _iou(ellipse <= 1, truth)}


def _iou(prediction: np.ndarray, truth: np.ndarray) -> float:
    union = (prediction | truth).sum((1, 2))
    return float(((prediction & truth).sum((1, 2)) / np.maximum(union, 1)).mean())


def evaluate(params: Any, steps: list[Step]) -> dict[str, float]:
    """Mean IoU of mask 0 on held-out drawings, for two points and for a box."""
    rows = [_evaluate_step(params, step) for step in steps]
    weights = [len(step.images) for step in steps]
    return {kind: float(np.average([row[kind] for row in rows], weights=weights)) for kind in ("points", "box")}


@jax.jit
def _evaluate_step(params: Any, step: Step) -> dict[str, jax.Array]:
    _, logits, _ = predict(params, step)
    iou = mask_iou(logits, step.targets)[:, 0]
    half = iou.shape[0] // 2
    return {"points": iou[:half].mean(), "box": iou[half:].mean()}


def pretrain(
    output: Path,
    *,
    steps: int,
    pool: int,
    held_out_images: int,
    images: int,
    prompts: int,
    seed: int,
    processes: int,
    learning_rate: float,
    save_every: int = 500,
) -> dict[str, float]:
    """Draw, train, evaluate, write; returns the mean IoU on held-out drawings."""
    if output.exists():
        raise UsageError(f"--output={output} exists already: choose another folder or delete it.")
    output.parent.mkdir(parents=True, exist_ok=True)
    state_file = output.with_suffix(".state.safetensors")
    settings = f"steps={steps} pool={pool} images={images} prompts={prompts} seed={seed} learning_rate={learning_rate}"
    start, size = time.time(), presets.TINY.image_size
    drawn = drawings.make_pool(pool, size, seed, processes)
    test = held_out(drawings.make_pool(held_out_images, size, seed + 1, processes), prompts)
    print(f"{pool} drawings in {time.time() - start:.0f} s", flush=True)

    rng, c = jax.random.key(seed), presets.TINY.out_chans
    head = jax.random.normal(jax.random.fold_in(rng, 1), (c, CELLS * CELLS * EMBEDDING)) * c**-0.5
    params = {"sam": sam.init(presets.TINY, rng), "affinity": {"kernel": head, "bias": jnp.zeros(())}}
    optimizer = make_optimizer(steps, learning_rate)
    opt_state, first = optimizer.init(params), 0
    if state_file.exists():
        (params, opt_state), first = load_state(state_file, (params, opt_state), settings)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Any, opt_state: Any, step: Step, i: jax.Array) -> tuple[Any, Any, dict[str, jax.Array]]:
        balance = jnp.clip(1 - i / (BALANCED_FRACTION * steps), 0, 1)
        (loss, measurements), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, step, balance)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, {"loss": loss, **measurements}

    with progress.Progress("Pretraining", steps, "steps") as bar:
        if first:
            bar.say(f"going on from step {first} in {state_file}")
        for i, step in enumerate(batches(drawn, first, steps, seed, images, prompts), first + 1):
            params, opt_state, measurements = update(params, opt_state, step, np.float32(i - 1))
            if i % 50 == 0 or i == steps:
                bar.update(i, ", ".join(f"{name} {float(value):.2f}" for name, value in measurements.items()))
            if i % save_every == 0:
                save_state(state_file, (params, opt_state), i, settings)
                bar.say(f"step {i}: held-out IoU {evaluate(params['sam'], test)}")
    result = evaluate(params["sam"], test)
    card = CARD.format(
        parameters=sum(x.size for x in jax.tree.leaves(params["sam"])),
        seed=seed,
        steps=steps,
        images=images,
        prompts=prompts,
        minutes=(time.time() - start) / 60,
        device=f"{os.cpu_count()} cores, {jax.devices()[0].device_kind}",
        area=prompted_drawings.MINIMUM_AREA,
        **result,
        **prompt_only(test),
    )
    sam.save(output, presets.TINY, jax.device_get(params["sam"]), card, jnp.bfloat16)
    state_file.unlink(missing_ok=True)
    return result


def define_flags() -> None:
    """Output folder, length, size of a batch."""
    common.define_folder("output", "Folder to write the weights to; must not exist.")
    flags.DEFINE_integer("steps", 5000, "Training steps.", lower_bound=1)
    flags.DEFINE_integer("pool", 10000, "Number of drawings.", lower_bound=16)
    flags.DEFINE_integer("images", 8, "Images per step.", lower_bound=1)
    flags.DEFINE_integer("prompts", 3, "Point prompts and box prompts per image, each.", lower_bound=1)
    flags.DEFINE_integer("seed", 42, "Seed of drawings, initialisation and batches.")
    flags.DEFINE_integer("processes", 2, "Processes that draw.", lower_bound=1)
    flags.DEFINE_float("learning_rate", 2.5e-3, "Peak learning rate of Muon and Adam.")


def main() -> None:
    """Pretrain, and say what it reached."""
    f = flags.FLAGS
    names = ("steps", "pool", "images", "prompts", "seed", "processes", "learning_rate")
    output = Path(f.output)
    result = pretrain(output, held_out_images=IMAGES_HELD_OUT, **{name: f[name].value for name in names})
    print(f"Held-out IoU: box {result['box']:.3f}, two points {result['points']:.3f}; the weights are in {output}")


if __name__ == "__main__":
    common.run(main, define_flags)
