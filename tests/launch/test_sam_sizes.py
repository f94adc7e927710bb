"""A SAM of another size, as converted from a checkpoint, goes the whole way: cache, training, prediction."""

import dataclasses
import json

import numpy as np
import pytest

from calsegx import configs, features
from calsegx.interfaces import InputError
from calsegx.training import model_folder
from launch import components, predict, train
from tests.models.test_backbone import PATCH16, save_random
from weights_conversion import convert_sam


def test_another_sam_goes_the_whole_way(config, tmp_path):
    """Everything is another than in the other tests: stem, patch, window, width, input range, dtype, batch."""
    save_random(tmp_path / "weights", dataclasses.replace(PATCH16, **convert_sam.PREPROCESSING["medsam"]))
    model = configs.ModelConfig(weights=str(tmp_path / "weights"), dtype="bfloat16", encoder_batch=3)
    data = dataclasses.replace(config.data, cache=str(tmp_path / "cache"), views=1)
    config = dataclasses.replace(config, model=model, data=data, steps=2, protocol="gt_box")
    train.train(config, tmp_path / "run")

    params, record = model_folder.load(tmp_path / "run")
    assert params["mask_tokens"].shape == (1, 32)
    assert record["config"]["model"] == dataclasses.asdict(model)
    assert json.loads((tmp_path / "cache" / "signature.json").read_text())["dtype"] == "bfloat16"
    parts = components.build(config)
    cached = components.feature_cache(parts, tmp_path).read_case(parts.select("train")[0].case_id, "view0")
    assert cached.features.shape[1:] == (4, 4, 32) and cached.features.dtype == features.BFLOAT16
    assert np.ptp(cached.features.astype(np.float32)) > 0.1

    parts = components.build(dataclasses.replace(config, model=dataclasses.replace(model, dtype="float32")))
    with pytest.raises(InputError, match="made for another setting: dtype is 'bfloat16', this run has 'float32'"):
        components.feature_cache(parts, tmp_path)

    written = predict.predict(tmp_path / "run", tmp_path / "predictions", limit=1)
    assert len(written) == 1 and written[0].is_file()
