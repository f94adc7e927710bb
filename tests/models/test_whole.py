"""SAM trained as a whole: the same network as `sam`, with the encoder among what is trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calsegx import config_checks, configs, models
from calsegx.interfaces import Prompts, UsageError
from calsegx.models import sam
from calsegx.models.sam import model
from tests.models import test_backbone

folder = test_backbone.folder
PROMPTS = Prompts(points=np.full((2, 1, 2), 20.0, np.float32), labels=np.ones((2, 1), np.int32))


@pytest.fixture(scope="module")
def pair(folder):
    """`sam` and `sam_whole` of the same weights, with two classes."""
    return tuple(models.registry.get(name)(folder, 2) for name in ("sam", "sam_whole"))


def test_it_is_sam_until_it_is_trained(pair):
    plain, whole = pair
    images = test_backbone.images()
    z = jax.jit(plain.encode)(plain.encoder, images)
    np.testing.assert_array_equal(jax.jit(whole.encode)(whole.encoder, images), images)
    for name, of_sam, of_whole in (
        ("decode", (plain.trainable, plain.frozen, z), (whole.trainable, whole.frozen, images)),
        ("zero_shot", (plain.frozen, z), (whole.frozen, images)),
    ):
        wanted = jax.jit(getattr(plain, name))(*of_sam, PROMPTS)
        found = jax.jit(getattr(whole, name))(*of_whole, PROMPTS)
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert whole.feature_shape == (64, 64, 3) and whole.logit_shape == plain.logit_shape
    assert whole.fingerprint.startswith(plain.fingerprint) and whole.fingerprint != plain.fingerprint


def test_zero_shot_keeps_the_encoder_as_it_came(pair):
    plain, whole = pair
    assert whole.encoder == {} and whole.frozen["image_encoder"] is whole.trainable["encoder"]["image_encoder"]
    assert whole.frozen.keys() == plain.frozen.keys() | {"image_encoder"}


def test_every_parameter_that_masks_depend_on_has_a_gradient(pair):
    """Not the predicted IoU's, nor the bias of keys, which a softmax ignores."""
    _, whole = pair
    images = test_backbone.images()

    def loss(trainable):
        return jnp.mean(jnp.square(whole.decode(trainable, whole.frozen, images, PROMPTS)))

    gradients = jax.jit(jax.grad(loss))(whole.trainable)
    flat = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(gradients)[0]}
    without = {name for name, leaf in flat.items() if not np.any(leaf)}
    assert {name for name in without if "iou_prediction_head" not in name and "k_proj" not in name} == set()
    assert any("image_encoder" in name for name in flat)


def test_a_backward_pass_computes_the_blocks_again(folder):
    """As the program reaches the compiler; on a CPU that merges the two computations, so no memory would show it."""
    config, params = sam.load(folder)
    encoder, images = {"image_encoder": params["image_encoder"]}, test_backbone.images(4)

    def flops(function, checkpoint):
        def loss(encoder):
            return jnp.mean(jnp.square(model.encode(config, encoder, images, checkpoint=checkpoint)))

        return jax.jit(function(loss)).lower(encoder).cost_analysis()["flops"]

    forward, again = flops(lambda loss: loss, False), flops(lambda loss: loss, True)
    assert forward == again
    added = flops(jax.grad, True) - flops(jax.grad, False)
    assert 0.2 * forward < added <= forward  # the neck is not computed again


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"method": "calsam"}, "calsam penalises the frozen encoder's features, .* trains the encoder; train the dec"),
        ({"method": "sam_fip"}, "sam_fip penalises the frozen encoder's features"),
        ({"model": {"shards": 2}}, "shards=2 takes a frozen encoder apart, .* set --config.model.shards=1"),
    ],
)
def test_what_needs_a_frozen_encoder_is_refused(changes, sentence):
    whole = {"method": "sam_ft", "model": {"backbone": "sam_whole"}}
    config = configs.replace(configs.TrainConfig(), whole)
    config_checks.validate(config)
    with pytest.raises(UsageError, match=sentence):
        config_checks.validate(configs.replace(config, changes))
