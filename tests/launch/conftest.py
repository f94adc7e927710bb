"""A phantom dataset and a very small SAM, made once for all tests of the launch scripts."""

import contextlib
import dataclasses
import io

import pytest
from PIL import Image

from calsegx import configs
from calsegx.data import phantoms
from calsegx.evaluation import figures
from calsegx.models.sam import presets
from tests import random_sam

# One two-way block in the decoder instead of two: they are most of what is compiled.
SMALL = dataclasses.replace(
    presets.TINY,
    image_size=64,
    embed_dim=16,
    depth=2,
    num_heads=2,
    window_size=4,
    out_chans=16,
    decoder_depth=1,
    decoder_mlp_dim=16,
)


@pytest.fixture(scope="module", autouse=True)
def drawn():
    """Reports have a white pixel for every figure: drawing takes longer than the rest of an evaluation, and
    tests/evaluation looks at what is drawn.  Within ``drawn()`` the figures are drawn."""
    pixel, original = io.BytesIO(), figures.to_png
    Image.new("RGB", (1, 1), "white").save(pixel, "PNG")

    @contextlib.contextmanager
    def drawing():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(figures, "to_png", original)
            yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "to_png", lambda figure: pixel.getvalue())
        yield drawing


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """Three training, one validation and two test patients of two scanners, at a third of the resolution."""
    root = tmp_path_factory.mktemp("data") / "Dataset001_Phantom"
    phantoms.write_dataset(root, train=3, val=1, test=2, scale=0.35, processes=1)
    return root


@pytest.fixture(scope="session")
def small_sam(tmp_path_factory):
    """A weights folder with random numbers: the wiring is SAM's, the segmentations mean nothing."""
    folder = tmp_path_factory.mktemp("weights") / "sam_small"
    random_sam.save(folder, SMALL)
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """One feature cache for all runs on ``dataset``."""
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="session")
def config(dataset, small_sam, cache):
    """A run of a few steps."""
    return configs.TrainConfig(
        method="sam_ft",
        steps=4,
        batch_size=4,
        log_every=1,
        validate_every=2,
        save_every=2,
        data=configs.DataConfig(
            root=str(dataset),
            channels="T1c,T2,FLAIR",
            classes="whole_tumour=1+2+3",
            source="A",
            cache=str(cache / "binary"),
        ),
        model=configs.ModelConfig(weights=str(small_sam)),
    )
