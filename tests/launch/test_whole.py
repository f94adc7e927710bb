"""SAM trained as a whole through every script, and MedSAM's recipe: boxes with jitter and AdamW."""

import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from calsegx import bundle, configs, experiment, features
from calsegx.data import frames, images, pipeline
from calsegx.evaluation import predict as case_prediction
from calsegx.interfaces import InputError
from calsegx.models import sam
from calsegx.models.sam import weights
from calsegx.training import model_folder
from launch import components, export, predict, train

pytestmark = pytest.mark.slow  # compiling the gradient of an encoder takes a while
WHAT = {"license_name": "apache-2.0", "origin": "random numbers, trained on phantoms"}


@pytest.fixture(scope="module")
def made(config, tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("frames") / "cache")
    changes = {"steps": 8, "save_every": 4, "data": {"cache": cache}, "optimizer": {"learning_rate": 3e-3}}
    recipe = configs.replace(config, experiment.METHODS["medsam_whole"])
    return configs.replace(recipe, changes)


@pytest.fixture(scope="module")
def run(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    train.train(made, folder)
    return folder


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_encoder_is_trained_with_the_decoder(run, made, small_sam):
    params, record = model_folder.load(run)
    before = sam.load(small_sam)[1]["image_encoder"]
    unchanged = [
        name
        for name, leaf in weights.flatten(params["encoder"]["image_encoder"]).items()
        if np.array_equal(leaf, weights.flatten(before)[name])
    ]
    assert unchanged == [] and record["config"]["optimizer"]["weight_decay"] == 0.01
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert len(losses) == 4 and losses[-1] < losses[0]
    cache = features.FeatureCache(pathlib.Path(made.data.cache))
    assert cache.read_slices("subject001_A", "view0", 0).features.shape == (64, 64, 3)
    assert "Backbone: sam_whole" in (run / "model" / "README.md").read_text()


def test_a_resumed_run_is_an_uninterrupted_one(run, made, tmp_path):
    again = shutil.copytree(run, tmp_path / "again")
    shutil.rmtree(again / "model")
    shutil.rmtree(again / "checkpoints" / "8")
    train.train(made, again, resume=True)
    name = "model/decoder.safetensors"
    assert (again / name).read_bytes() == (run / name).read_bytes()


def test_a_cache_of_the_frozen_encoder_is_refused(run, made, tmp_path):
    with pytest.raises(InputError, match="made for another setting: backbone is '.*-whole'"):
        train.train(configs.replace(made, {"model": {"backbone": "sam"}}), tmp_path / "other")


def test_the_bundle_predicts_as_the_run_and_loads_as_a_sam(run, dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user_cache"))
    predict.predict(run, tmp_path / "wanted", limit=1)
    folder = export.export(run, tmp_path / "whole.zip", **WHAT)
    predict.predict(folder, tmp_path / "found", str(dataset), split="test", limit=1)
    assert content(tmp_path / "found") == content(tmp_path / "wanted")
    card = (bundle.open_bundle(folder) / "README.md").read_text()
    assert "whose image encoder and mask decoder were trained. The SAM that the training started from" in card

    config, params = bundle.load_sam(folder)
    parts = components.of_model(model_folder.load(run)[1], "")
    case = parts.select("test")[0]
    prepared = parts.prepare(case)
    framed = frames.to_frame(prepared.images, prepared.geometry, config.pixel_mean, config.pixel_std)
    z = sam.encode(config, params, jnp.asarray(framed, jnp.bfloat16).astype(jnp.float32))
    logits, _ = sam.decode(config, params, z, pipeline.protocol_prompts(prepared.prompts, "gt_box"))
    native = case_prediction.case_logits(np.moveaxis(np.asarray(logits), 1, -1), prepared.geometry)
    found = case_prediction.to_native(case_prediction.probabilities(native), prepared.slices, prepared.geometry)
    volume = images.read(tmp_path / "wanted" / f"{case.case_id}_prob-whole_tumour.nii.gz", None, "axial").voxels
    inside = volume > 0
    assert inside.any() and found.shape[:3] == volume.shape
    np.testing.assert_allclose(found[..., 0][inside], volume[inside], atol=1e-5)
