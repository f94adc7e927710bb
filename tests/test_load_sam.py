"""A bundle as parameters of `sam`: the masks are those of the run's own decoder, for one class and for several."""

import jax
import numpy as np
import pytest

from calsegx import bundle, configs, models
from calsegx.interfaces import DataError
from calsegx.models import sam
from calsegx.models.sam import weights
from calsegx.training import model_folder
from tests.models import test_backbone
from tests.models.test_whole import PROMPTS

folder = test_backbone.folder


@pytest.fixture(autouse=True)
def user_cache(tmp_path, monkeypatch):
    """Where zips are unpacked."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user_cache"))


def write(path, backbone, name, classes):
    """A bundle of a decoder that is not as it came."""
    rng = np.random.default_rng(1)
    trained = jax.tree.map(lambda x: x + 0.05 * rng.normal(size=x.shape).astype(np.float32), backbone.trainable)
    config = configs.replace(configs.TrainConfig(), {"model": {"backbone": name, "weights": bundle.ENCODER}})
    names = [f"class{k}" for k in range(classes)]
    record = {
        "config": configs.to_dict(config),
        "backbone": backbone.fingerprint,
        "class_names": names,
        "class_ids": [[k + 1] for k in range(classes)],
        "known_ids": list(range(classes + 1)),
        "channels": ["T1", "T2", "FLAIR"],
        "cases": [],
    }
    model_folder.save(path / "run", trained, record)
    manifest = {"format": 1, "license": "mit", "derived_from": "nothing", "encoder": "include", "calibrator": None}
    content = {n: path / "run" / "model" / n for n in ("decoder.safetensors", "model.json")}
    content |= {"README.md": b"card", "LICENSE": b"mit", bundle.MANIFEST: bundle.to_json(manifest)}
    content |= {n: bundle.to_json(d) for n, d in bundle.describe(record).items()}
    return trained, content


@pytest.mark.parametrize(("name", "classes"), [("sam", 1), ("sam", 3), ("sam_whole", 2)])
def test_masks_are_those_of_the_runs_decoder(folder, tmp_path, name, classes):
    backbone = models.registry.get(name)(folder, classes)
    trained, content = write(tmp_path, backbone, name, classes)
    bundle.write(tmp_path / "made.zip", content | {f"{bundle.ENCODER}/{p.name}": p for p in folder.iterdir()})
    config, params = sam.load(tmp_path / "made.zip")
    images = test_backbone.images()
    z = jax.jit(lambda params, images: sam.encode(config, params, images))(params, images)
    decoder, features = (trained, z) if name == "sam" else (trained["decoder"], images)
    jax.tree.map(np.testing.assert_array_equal, params["class_decoder"], decoder)
    wanted = jax.jit(backbone.decode)(trained, backbone.frozen, features, PROMPTS)
    for multimask in (True, False):
        found, iou = jax.jit(lambda p, z, m=multimask: sam.decode(config, p, z, PROMPTS, multimask=m))(params, z)
        assert found.shape == (2, classes, 16, 16) and iou.shape == (2, classes)
        np.testing.assert_array_equal(np.moveaxis(found, 1, -1), wanted[..., -classes:])


def test_a_bundle_of_another_network_or_other_weights_is_refused(folder, tmp_path, monkeypatch):
    backbone = models.registry.get("sam")(folder, 1)
    _, content = write(tmp_path, backbone, "unet", 1)
    encoder = {f"{bundle.ENCODER}/{p.name}": p for p in folder.iterdir()}
    bundle.write(tmp_path / "other", content | encoder)
    with pytest.raises(DataError, match="of the backbone 'unet'; only a SAM"):
        bundle.load_sam(tmp_path / "other")
    _, content = write(tmp_path, backbone, "sam", 1)
    bundle.write(tmp_path / "made", content | encoder)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="or a bundle of launch.export"):
        sam.load(tmp_path / "nothing")
    monkeypatch.setattr(weights, "fingerprint", lambda folder: "0" * 64)
    with pytest.raises(DataError, match="restore those weights"):
        bundle.load_sam(tmp_path / "made")
