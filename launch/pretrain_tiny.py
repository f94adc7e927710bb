r"""Pretrain the tiny promptable SAM that ships with calsegx, from scratch, on procedural drawings.

Command (once; the result is in ``calsegx/weights/sam_tiny``)::

    python -m launch.pretrain_tiny --output=weights/sam_tiny

The recipe: a convolutional stem; Muon on matrices and Adam on the rest; class-balanced BCE that fades into
Dice + 2 BCE (without it nothing is learned for hundreds of steps: the empty mask is a plateau); the best of three
masks; and a dense affinity loss, "do these two pixels belong to the same visible object", which is what makes the
frozen features useful. The affinity head is thrown away. Step ``i`` depends on ``(seed, i)`` alone, so a run that was
stopped goes on from ``<output>.state.safetensors`` (written every 500 steps) as if it had not been.
"""

import concurrent.futures
import functools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
from absl import flags
from rich import progress

from calsegx.data import drawings
from calsegx.interfaces import DataError, Prompts, UsageError
from calsegx.models import sam
from calsegx.models.sam import model, presets
from launch import common

OUTPUT = flags.DEFINE_string("output", None, "Folder to write the weights to; must not exist.", required=True)
STEPS = flags.DEFINE_integer("steps", 4000, "Training steps.", lower_bound=1)
POOL = flags.DEFINE_integer("pool", 8000, "Number of drawings.", lower_bound=16)
IMAGES = flags.DEFINE_integer("images", 8, "Images per step.", lower_bound=1)
PROMPTS = flags.DEFINE_integer("prompts", 3, "Point prompts and box prompts per image, each.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 42, "Seed of drawings, initialisation and batches.")
PROCESSES = flags.DEFINE_integer("processes", 2, "Processes that draw the pool.", lower_bound=1)
LEARNING_RATE = flags.DEFINE_float("learning_rate", 2.5e-3, "Peak learning rate of Muon and Adam.")

MINIMUM_AREA = 120  # pixels at 128 x 128: smaller targets are a few pixels of the 64 x 64 masks
ANCHORS, PIXELS, EMBEDDING, CELLS = (
    160,
    1024,
    32,
    4,
)  # affinity: pairs per image, width, sub-pixels per token side
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


class Step(NamedTuple):
    """One batch: I images with P point prompts and P box prompts each."""

    images: np.ndarray  # [I, 128, 128, 3] normalised
    labels: np.ndarray  # [I, 64, 64] visible object, 255 in the padding
    points: np.ndarray  # [I * P, 2, 2]
    point_labels: np.ndarray  # [I * P, 2]
    boxes: np.ndarray  # [I * P, 4]
    targets: np.ndarray  # [2 * I * P, 64, 64] in [0, 1]; the point prompts' first
    anchors: np.ndarray  # [I, ANCHORS] flat indices into labels
    pixels: np.ndarray  # [I, PIXELS]


def make_step(pool: Any, indices: np.ndarray, rng: np.random.Generator, prompts: int, augment: bool) -> Step:
    """Assemble a batch from drawings of the pool."""
    config = presets.TINY
    images, labels, anchors, pixels = [], [], [], []
    samples: dict[str, list] = {"points": [], "box": []}
    for index in indices:
        drawing = drawings.pool_item(pool, int(index))
        if augment:
            drawing = _augment(drawing, rng)
        h, w = drawing.extent
        image = (drawing.image - np.float32(config.pixel_mean)) / np.float32(config.pixel_std)
        image[h:] = image[:, w:] = 0
        images.append(image)
        label = drawing.labels.copy()
        label[h:] = label[:, w:] = 255
        labels.append(label[1::2, 1::2])
        anchors.append(_balanced_pixels(labels[-1], ANCHORS, rng))
        pixels.append(_balanced_pixels(labels[-1], PIXELS, rng))
        masks = drawings.targets(drawing, MINIMUM_AREA) or [labels[-1].repeat(2, 0).repeat(2, 1) == 0]
        for kind, fraction in (("points", 0.0), ("box", 1.0)):
            for mask in (
                rng.permutation(len(masks))[:prompts].tolist()
                + rng.integers(len(masks), size=max(0, prompts - len(masks))).tolist()
            ):
                sample = drawings.sample_prompt(masks[mask], rng, box_fraction=fraction, extent=drawing.extent)
                samples[kind].append((*sample[:3], _halve(masks[mask])))
    points, boxes = samples["points"], samples["box"]
    return Step(
        np.stack(images),
        np.stack(labels).astype(np.int32),
        np.stack([s[0] for s in points]),
        np.stack([s[1] for s in points]),
        np.stack([s[2] for s in boxes]),
        np.stack([s[3] for s in points + boxes]),
        np.stack(anchors),
        np.stack(pixels),
    )


def _augment(drawing: drawings.Drawing, rng: np.random.Generator) -> drawings.Drawing:
    """Flips inside the picture, transposition, permuted and inverted channels."""
    h, w = drawing.extent
    image, labels = drawing.image.copy(), drawing.labels.copy()
    for axis in (0, 1):
        if rng.random() < 0.5:
            image[:h, :w] = np.flip(image[:h, :w], axis)
            labels[:h, :w] = np.flip(labels[:h, :w], axis)
    image = image[..., rng.permutation(3)]
    if rng.random() < 0.15:
        image = 255 - image
    if rng.random() < 0.5:
        image, labels, (h, w) = image.swapaxes(0, 1), labels.swapaxes(0, 1), (w, h)
    return drawings.Drawing(image, labels, drawing.parents, (h, w))


def _balanced_pixels(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Half of the pixels uniform over the image, half uniform over labels."""
    flat = labels.ravel()
    ids, inverse, counts = np.unique(flat, return_inverse=True, return_counts=True)
    weights = 0.5 / flat.size + 0.5 / (len(ids) * counts[inverse])
    return np.searchsorted(np.cumsum(weights / weights.sum()), rng.random(count)).clip(max=flat.size - 1)


def _halve(mask: np.ndarray) -> np.ndarray:
    return mask.reshape(mask.shape[0] // 2, 2, -1, 2).mean((1, 3), dtype=np.float32)


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


def save_state(path: Path, state: Any, step: int) -> None:
    """Write all leaves of ``state`` (and the step) atomically."""
    leaves = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    temporary = path.with_suffix(".tmp")
    safetensors.numpy.save_file({**leaves, "step": np.asarray(step)}, temporary)
    os.replace(temporary, path)


def load_state(path: Path, template: Any) -> tuple[Any, int]:
    """The inverse of ``save_state``, for a state of the same structure."""
    saved = safetensors.numpy.load_file(path)
    step = int(saved.pop("step"))
    leaves, structure = jax.tree.flatten(template)
    if [saved[str(i)].shape for i in range(len(saved))] != [np.shape(leaf) for leaf in leaves]:
        raise DataError(f"{path} was written by another version of this script: delete it to start afresh.")
    return jax.tree.unflatten(structure, [jnp.asarray(saved[str(i)]) for i in range(len(saved))]), step


def batches(pool: Any, first: int, steps: int, seed: int, images: int, prompts: int) -> Iterator[Step]:
    """Training batches ``first .. steps - 1``, assembled in the background a few steps ahead."""
    count = len(pool[0])

    def build(i: int) -> Step:
        rng = np.random.default_rng([seed, i])
        return make_step(pool, rng.integers(count, size=images), rng, prompts, augment=True)

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
    return [make_step(pool, chunk, rng, prompts, augment=False) for chunk in chunks]


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


def main(argv: Any) -> None:
    """Draw, train, evaluate, write."""
    del argv
    start = time.time()
    total, output = STEPS.value, Path(OUTPUT.value)
    if output.exists():
        raise UsageError(f"--output={output} exists already: choose another folder or delete it.")
    output.parent.mkdir(parents=True, exist_ok=True)
    state_file = output.with_suffix(".state.safetensors")
    pool = drawings.make_pool(POOL.value, 128, SEED.value, PROCESSES.value)
    test = held_out(drawings.make_pool(IMAGES_HELD_OUT, 128, SEED.value + 1, PROCESSES.value), PROMPTS.value)
    print(f"{POOL.value} drawings in {time.time() - start:.0f} s", flush=True)

    rng = jax.random.key(SEED.value)
    c = presets.TINY.out_chans
    head = jax.random.normal(jax.random.fold_in(rng, 1), (c, CELLS * CELLS * EMBEDDING)) * c**-0.5
    params = {"sam": sam.init(presets.TINY, rng), "affinity": {"kernel": head, "bias": jnp.zeros(())}}
    optimizer = make_optimizer(total, LEARNING_RATE.value)
    opt_state, first = optimizer.init(params), 0
    if state_file.exists():
        (params, opt_state), first = load_state(state_file, (params, opt_state))
        print(f"going on from step {first} in {state_file}")

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Any, opt_state: Any, step: Step, i: jax.Array) -> tuple[Any, Any, dict[str, jax.Array]]:
        balance = jnp.clip(1 - i / (BALANCED_FRACTION * total), 0, 1)
        (loss, measurements), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, step, balance)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, {"loss": loss, **measurements}

    columns = (*progress.Progress.get_default_columns(), progress.TextColumn("{task.fields[status]}"))
    with progress.Progress(*columns) as bar:
        task = bar.add_task("pretraining", total=total, completed=first, status="")
        steps = batches(pool, first, total, SEED.value, IMAGES.value, PROMPTS.value)
        for i, step in enumerate(steps, first):
            params, opt_state, measurements = update(params, opt_state, step, np.float32(i))
            if i % 50 == 0:
                values = {k: round(float(v), 3) for k, v in measurements.items()}
                bar.update(task, completed=i, status=json.dumps(values))
            if i % 500 == 499:
                save_state(state_file, (params, opt_state), i + 1)
                bar.console.print(f"step {i + 1}, {time.time() - start:.0f} s: {evaluate(params['sam'], test)}")
    result, baseline = evaluate(params["sam"], test), prompt_only(test)
    card = CARD.format(
        parameters=sum(x.size for x in jax.tree.leaves(params["sam"])),
        seed=SEED.value,
        steps=total,
        images=IMAGES.value,
        prompts=PROMPTS.value,
        minutes=(time.time() - start) / 60,
        device=f"{jax.local_devices()[0].device_kind} ({jax.device_count()})",
        area=MINIMUM_AREA,
        **result,
        **baseline,
    )
    sam.save(output, presets.TINY, jax.device_get(params["sam"]), card, jnp.bfloat16)
    state_file.unlink(missing_ok=True)
    print(f"held-out IoU: {result}; prompt-only: {baseline}; weights are in {output}")


if __name__ == "__main__":
    common.run(main)
