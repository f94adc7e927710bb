"""Pretraining on drawings: batches, losses, and a run of a few steps that is interrupted and goes on."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from calsegx.data import drawings, prompted_drawings
from calsegx.interfaces import DataError, UsageError
from calsegx.models import sam
from calsegx.models.sam import presets
from launch import pretrain_tiny

SMALL = dataclasses.replace(presets.TINY, embed_dim=16, depth=1, num_heads=2, out_chans=16, decoder_mlp_dim=16)


@pytest.fixture(scope="module")
def pool():
    return drawings.make_pool(12, 128, 3, 1)


def make(pool, augment=True, prompts=2):
    rng = np.random.default_rng(5)
    mean, std = presets.TINY.pixel_mean, presets.TINY.pixel_std
    return prompted_drawings.make_step(
        pool, np.arange(12), rng, prompts, pixel_mean=mean, pixel_std=std, augment=augment
    )


def test_prompts_lie_on_their_targets(pool):
    step = make(pool)
    assert step.images.shape == (12, 128, 128, 3) and step.targets.shape == (48, 64, 64)
    for (x, y), target in zip(step.points[:, 0], step.targets[:24], strict=True):
        assert target[int(y) // 2, int(x) // 2] > 0
    for (x0, y0, x1, y1), target in zip(step.boxes / 2, step.targets[24:], strict=True):
        rows, columns = np.nonzero(target)
        jitter = 0.13 * max(x1 - x0, y1 - y0) + 2
        corners = [columns.min(), rows.min(), columns.max(), rows.max()]
        np.testing.assert_allclose([x0, y0, x1, y1], corners, atol=jitter)


def test_padding_is_zero_after_normalisation(pool):
    step = make(pool, augment=False)
    padded = [i for i, extent in enumerate(pool[3]) if extent.min() < 128]
    assert padded
    for i in padded:
        h, w = pool[3][i]
        assert not step.images[i, h:].any() and not step.images[i, :, w:].any()
        assert (step.labels[i, h // 2 + 1 :] == prompted_drawings.PADDING_LABEL).all()


def test_small_labels_are_drawn_as_often_as_large_ones(pool):
    labels = np.zeros((64, 64), int)
    labels[0, :4] = 1
    picked = prompted_drawings._balanced_pixels(labels, 20_000, np.random.default_rng(0))
    # Half uniform over labels, half over pixels.
    assert (labels.ravel()[picked] == 1).mean() == pytest.approx(0.25 + 0.5 * 4 / 4096, abs=0.02)


def test_mask_losses_of_a_perfect_and_an_empty_mask(pool):
    targets = jnp.asarray(make(pool).targets[:4] > 0.5, jnp.float32)
    perfect = pretrain_tiny.mask_losses(40 * (2 * targets[:, None] - 1), targets, jnp.zeros(()))
    empty = pretrain_tiny.mask_losses(jnp.full((4, 1, 64, 64), -40.0), targets, jnp.zeros(()))
    assert float(perfect.max()) < 0.01 < 0.9 < float(empty.min())
    # Class-balanced BCE makes the empty mask expensive, which is what it is there for.
    balanced = pretrain_tiny.mask_losses(jnp.full((4, 1, 64, 64), -4.0), targets, jnp.ones(()))
    plain = pretrain_tiny.mask_losses(jnp.full((4, 1, 64, 64), -4.0), targets, jnp.zeros(()))
    assert (balanced > plain).all()


@pytest.mark.slow
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    monkeypatch.setattr(presets, "TINY", SMALL)
    sizes = {"steps": 3, "pool": 16, "held_out_images": 2, "images": 2, "prompts": 1, "save_every": 1}
    options = {**sizes, "seed": 1, "processes": 1, "learning_rate": 1e-3}
    result = pretrain_tiny.pretrain(tmp_path / "whole", **options)
    config, _ = sam.load(tmp_path / "whole")
    assert config == SMALL and set(result) == {"points", "box"}
    assert "Not a medical device" in (tmp_path / "whole" / "README.md").read_text()

    original = pretrain_tiny.batches

    def stop(*arguments):
        steps = original(*arguments)
        yield next(steps)
        yield next(steps)
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain_tiny, "batches", stop)
    with pytest.raises(KeyboardInterrupt):
        pretrain_tiny.pretrain(tmp_path / "parts", **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["parts.state.safetensors", "whole"]
    with pytest.raises(DataError, match="is of a run with .*seed=1.*not .*seed=2"):
        pretrain_tiny.pretrain(tmp_path / "parts", **{**options, "seed": 2})
    monkeypatch.setattr(pretrain_tiny, "batches", original)
    pretrain_tiny.pretrain(tmp_path / "parts", **options)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]
    with pytest.raises(UsageError, match="exists already"):
        pretrain_tiny.pretrain(tmp_path / "whole", **options)
