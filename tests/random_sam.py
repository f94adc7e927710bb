"""SAMs with random numbers: drawn by numpy, as every operation that JAX draws them with is compiled first."""

import math

import jax
import numpy as np

from calsegx.models import sam
from calsegx.models.sam import weights

LICENCE = "Random numbers. Not a medical device."


def params(config):
    """Parameters of about the size of ``sam.init``'s; nothing is 0, so that every part has a say."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        part, name = path[0].key, path[-1].key
        size = {"kernel": 1 / math.sqrt(math.prod(leaf.shape[:-1])), "bias": 0.02, "scale": 0.02}
        values = rng.normal(0, size.get(name, 0.02 if part == "image_encoder" else 1), leaf.shape)
        return (values + (name == "scale")).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, weights.template(config))


def save(folder, config):
    """A weights folder."""
    sam.save(folder, config, params(config), LICENCE)
