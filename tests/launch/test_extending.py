"""docs/extending.md: the files of the page do what it says, and a run uses them together."""

import dataclasses
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calsegx import calibrators, configs, losses, models
from calsegx.data import intensity, layouts
from calsegx.interfaces import Prompts, UsageError
from calsegx.losses import expression
from calsegx.training import model_folder
from launch import calibrate, export, predict, train
from tests import snippets
from tests.data.layouts import fake

FILES = {
    found[1]: snippet.text
    for snippet in snippets.of("docs/extending.md")
    if snippet.language == snippets.PYTHON and (found := re.match(r"# (\w+\.py)\n", snippet.text))
}


@pytest.fixture(autouse=True, scope="module")
def files_of_the_page(tmp_path_factory):
    """The page's files, where they can be imported."""
    folder = tmp_path_factory.mktemp("page")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))
    for name in FILES:
        sys.modules.pop(name.removesuffix(".py"), None)


def test_every_registry_has_its_row():
    page = (snippets.ROOT / "docs" / "extending.md").read_text()
    kinds = {registry.kind for registry in (losses.registry, layouts.registry, models.registry, calibrators.registry)}
    for kind in kinds | {intensity.registry.kind, "corruption"}:
        assert re.search(rf"^\| {kind} \|", page, re.MULTILINE), kind


def test_the_loss_is_right_and_can_be_penalised():
    loss = expression.parse("my_loss:tversky(beta=0.8)")
    labels = jnp.zeros((1, 4, 4), int).at[:, :2].set(1)
    sure = 40.0 * (2 * labels[..., None] - 1)
    np.testing.assert_allclose(loss(sure, labels), [0], atol=1e-6)
    np.testing.assert_allclose(loss(jnp.full_like(sure, -40.0), labels), [1 - 1 / (0.8 * 8 + 1)], rtol=1e-5)
    np.testing.assert_allclose(loss(jnp.concatenate([0 * sure, sure], -1), labels), loss(sure, labels), atol=1e-6)
    second = jax.grad(lambda z: (jax.grad(lambda x: loss(x, labels).sum())(z) ** 2).sum())(0.1 * sure)
    assert np.isfinite(second).all() and np.abs(second).max() > 0


def test_the_layout_is_read(tmp_path):
    for name in ("graz/p1", "graz/p2", "lund/p1"):
        fake.write(tmp_path / name, "t1.nii.gz", "lesion.nii.gz")
    dataset = layouts.detect(tmp_path, "my_layout:read")
    assert [(c.case_id, c.centre) for c in dataset.cases] == [
        *(("graz_p1", "graz"), ("graz_p2", "graz"), ("lund_p1", "lund"))
    ]
    assert all(case.images["T1"].is_file() and case.label.is_file() for case in dataset.cases)


def test_the_backbone_sees_the_points_and_any_number_of_classes():
    points = Prompts(points=jnp.array([[[98.0, 18.0], [0.0, 0.0]]]), labels=jnp.array([[1, -1]]))
    for count, channels in ((1, 1), (3, 4)):
        found = models.registry.get("my_backbone:load")(None, count)
        z = found.encode(found.encoder, jnp.zeros((1, found.image_size, found.image_size, 3)))
        assert z.shape == (1, *found.feature_shape)
        logits = found.decode(found.trainable, found.frozen, z, points)
        assert logits.shape == (1, *found.logit_shape, channels)
        changed = np.abs(logits - logits[:, -1:, :1]).max(axis=(0, 3))
        assert np.unravel_index(changed.argmax(), changed.shape) == (4, 24)  # in cells of 4 pixels, row first
    assert len(found.fingerprint) == 64


@pytest.mark.parametrize("channels", [1, 3])
def test_the_calibrator_bounds_what_was_too_sure(channels):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4000, channels)) * 8
    labels = rng.integers(0, max(2, channels), 4000)
    bounded = calibrators.get("my_calibrator:Bounded")
    params = json.loads(json.dumps(bounded.fit(logits, labels)))
    assert params["nll_after"] < params["nll_before"] and params["bound"] == 0.5
    after = bounded.apply(params, logits)
    np.testing.assert_array_equal(after.argmax(-1), logits.argmax(-1))
    assert (
        after.shape == logits.shape
        and (np.abs(after).max() if channels == 1 else np.ptp(after, axis=-1).max()) <= 0.5001
    )


def test_the_normalisation_keeps_its_range():
    rule = intensity.registry.get("my_intensity:square_root")
    found = rule(np.array([0.0, 1, 4, 100], np.float32), configs.DataConfig())
    assert found.dtype == np.float32 and found.min() == 0 and found.max() == 255
    with pytest.raises(ValueError, match="no voxel above 0"):
        rule(np.zeros(4, np.float32), configs.DataConfig())


def test_a_run_uses_them_together(config, tmp_path):
    data = dataclasses.replace(config.data, intensity="my_intensity:square_root", cache="", views=1)
    made = dataclasses.replace(
        config,
        method="calsam",
        loss="sam + 0.5*my_loss:tversky(beta=0.8)",
        steps=2,
        data=data,
        model=configs.ModelConfig(backbone="my_backbone:load"),
    )
    run = tmp_path / "run"
    train.train(made, run)
    params, record = model_folder.load(run)
    start = models.registry.get("my_backbone:load")(None, 1)
    assert record["backbone"] == start.fingerprint and np.any(params["first"] != np.asarray(start.trainable["first"]))
    fitted = calibrate.calibrate(run, "my_calibrator:Bounded(max_voxels=5000)")
    assert fitted.params["calibrator"] == "bounded" and fitted.params["nll_after"] <= fitted.params["nll_before"] + 1e-6
    (mask,) = predict.predict(run, tmp_path / "out", limit=1)
    assert mask.is_file() and (tmp_path / "out" / mask.name.replace(".nii", "_prob-whole_tumour.nii")).is_file()
    with pytest.raises(UsageError, match="code from outside calsegx"):
        export.export(run, tmp_path / "bundle", "apache-2.0", "ours")


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        ("my_loss:tverski", "has no attribute 'tverski'"),
        ("my_lost:tversky", "No module named 'my_lost'"),
        ("my_loss:tversky(gamma=2)", "has no option 'gamma'; it has: beta"),
        ("my_loss:jnp", "expected a function"),
    ],
)
def test_what_is_wrong_is_said(loss, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        expression.parse(loss)
