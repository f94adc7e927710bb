"""A toy backbone (8 x 8 x 8 features, 16 x 16 logits) and a small feature cache: everything runs in milliseconds."""

import jax
import jax.numpy as jnp
import numpy as np

from calsegx import configs, features, losses
from calsegx.interfaces import Backbone, Prompts
from calsegx.losses import expression
from calsegx.training import loop, step

IMAGE_SIZE, FEATURES, LOGITS = 32, (8, 8, 8), (16, 16)
CASES = ("case a", "case-b", "c")
SIGNATURE = {"weights": "toy", "image_size": IMAGE_SIZE}


def encode(encoder, images):
    patches = images.reshape(-1, 8, 4, 8, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 8, 8, 48)
    return jnp.tanh(patches @ encoder["kernel"])


def decode(params, frozen, z, prompts):
    grid = jnp.stack(jnp.meshgrid(jnp.arange(8) * 4.0, jnp.arange(8) * 4.0), axis=-1)  # (x, y)
    distance = jnp.sum((grid[None] - prompts.points[:, 0, None, None]) ** 2, axis=-1)
    z = z + frozen["prompt"] * jnp.exp(-distance / 50)[..., None]
    hidden = jnp.tanh(z @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    blocks = hidden @ params["output"]["kernel"]
    return blocks.reshape(-1, 8, 8, 2, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 16, 16, 1)


def backbone():
    keys = jax.random.split(jax.random.key(0), 4)
    return Backbone(
        name="toy",
        fingerprint="toy",
        image_size=IMAGE_SIZE,
        feature_shape=FEATURES,
        logit_shape=LOGITS,
        pixel_mean=(128.0, 128.0, 128.0),
        pixel_std=(64.0, 64.0, 64.0),
        encoder={"kernel": jax.random.normal(keys[0], (48, 8)) / 7},
        frozen={"prompt": jax.random.normal(keys[1], (8,))},
        trainable={
            "hidden": {"kernel": jax.random.normal(keys[2], (8, 16)) / 3, "bias": jnp.zeros(16)},
            "output": {"kernel": jax.random.normal(keys[3], (16, 4)) / 4},
        },
        encode=encode,
        decode=decode,
    )


def records(count, seed):
    """Random features and discs, with a point in the middle of each disc."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform(8, 24, (count, 2))
    rows, columns = np.mgrid[:16, :16] * 2.0
    inside = (columns - centres[:, :1, None]) ** 2 + (rows - centres[:, 1:, None]) ** 2 < 50
    points = np.stack([centres, np.full((count, 2), 1.0)], axis=1)
    z = rng.normal(size=(count, *FEATURES)) + inside[:, ::2, ::2, None]
    return {
        "features": z,
        "labels": inside.astype(np.uint8),
        "slices": 10 + np.arange(count),
        "prompts": {"gt_points": Prompts(points=points, labels=np.tile([1, 0], (count, 1)))},
    }


def fill(root, cases=CASES, views=2, count=5):
    cache = features.FeatureCache.open(root, SIGNATURE)
    for number, case_id in enumerate(cases):
        for view in range(views):
            content = records(count, [number, view])
            cache.write(case_id, f"view{view}", **content, fingerprint=f"files of {case_id}")
    return cache


def config(**changes):
    values = {"steps": 12, "batch_size": 4, "log_every": 1, "validate_every": 6, "save_every": 4, "seed": 3}
    made = configs.TrainConfig(**{**values, **changes})
    made.optimizer.learning_rate = 1e-2
    return made


def objective(made=None, task="sam"):
    made = made or config()
    options = {"threshold": made.cmp.threshold, "temperature": made.cmp.temperature}
    return step.Objective(expression.parse(task), losses.get("bce"), losses.registry.bind("cmp", options))


def train(made, cache, workdir, mesh, resume=False, **changes):
    return loop.train(
        made,
        changes.pop("backbone", backbone()),
        cache,
        CASES[:2],
        changes.pop("validation", CASES[2:]),
        workdir,
        mesh=mesh,
        resume=resume,
        metadata={"class_names": ["tumour"], "channels": ["t1", "t2", "flair"]},
        **{"objective": objective(made), **changes},
    )
