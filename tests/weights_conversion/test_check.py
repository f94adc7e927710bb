"""``--check``: agreement with transformers for every kind of source, and a difference that is found."""

import numpy as np
import pytest

from calsegx.interfaces import DataError
from calsegx.models import sam
from calsegx.models.sam import weights
from tests.weights_conversion import checkpoints
from weights_conversion import check, convert_sam

pytest.importorskip("torch")
pytest.importorskip("transformers")


@pytest.mark.parametrize("kind", ["meta", "training", "transformers"])
def test_every_kind_of_source_agrees(tmp_path, capsys, kind):
    state = checkpoints.meta_state()
    if kind == "transformers":
        source = checkpoints.write_safetensors(tmp_path / "model.safetensors")
    else:
        source = checkpoints.write_torch(tmp_path / "x.pth", {"model": state} if kind == "training" else state)
    convert_sam.convert(source, tmp_path / "out", check=True)
    assert capsys.readouterr().out.count("agrees") == 3
    assert sam.load(tmp_path / "out")[0].embed_dim == checkpoints.CONFIG.embed_dim


def test_a_difference_is_an_error_and_nothing_is_written(tmp_path, capsys, monkeypatch):
    source = checkpoints.write_safetensors(tmp_path / "model.safetensors")
    monkeypatch.setattr(check, "META_EPSILON", 1e-6)  # transformers' default, wrong for the decoder
    with pytest.raises(DataError, match="gives other mask logits, predicted IoU here than in transformers"):
        convert_sam.convert(source, tmp_path / "out", check=True)
    assert "image embeddings: max abs" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


SOME = (
    "image_encoder.pos_embed",
    "image_encoder.blocks.3.attn.rel_pos_w",
    "prompt_encoder.not_a_point_embed",
    "prompt_encoder.point_embeddings.0",
    "prompt_encoder.point_embeddings.3",
    "prompt_encoder.no_mask_embed",
    "prompt_encoder.mask_downscaling.6.bias",
    "mask_decoder.mask_tokens",
    "mask_decoder.output_hypernetworks_mlps.0.layers.2.bias",
    "mask_decoder.iou_prediction_head.layers.3.bias",
)


def test_the_comparison_sees_every_part(tmp_path):
    plan = convert_sam.convert(checkpoints.write_safetensors(tmp_path / "s"), tmp_path / "out")
    read = plan.read
    assert all(row.agrees for row in check.check(tmp_path / "out", plan.read_meta))
    for number, name in enumerate(SOME):
        changed = lambda key, name=name: read(key) * np.float32(1.05 if key == name else 1)
        weights.write(tmp_path / str(number), plan.config, plan.shapes, changed, "card")
        assert not all(row.agrees for row in check.check(tmp_path / str(number), plan.read_meta)), name


def test_the_tolerance_is_the_stated_one_or_four_times_the_rounding_of_the_reference():
    stated = check.TOLERANCES["mask logits"]
    assert check.Row("mask logits", stated, 0.0).agrees and not check.Row("mask logits", 1.01 * stated, 0.0).agrees
    assert check.Row("mask logits", 4 * stated, stated).agrees
    assert not check.Row("mask logits", 4.1 * stated, stated).agrees


def test_the_reference_is_computed_in_float64(tmp_path):
    plan = convert_sam.convert(checkpoints.write_safetensors(tmp_path / "s"), tmp_path / "out")
    model = check.build(plan.config, plan.read_meta)
    inputs = check._inputs(plan.config, seed=0)
    single = check._theirs(model, inputs)
    double = check._theirs(model.double(), {name: check._widen(array) for name, array in inputs.items()})
    for name in check.TOLERANCES:
        assert {array.dtype for array in double[name]} == {np.dtype(np.float64)}
        assert 0 < check._difference(single[name], double[name]) < 1e-4
    # The tables pass through the softmax: one that is rounded to float32 hides this change, or magnifies it.
    model.vision_encoder.layers[0].attn.rel_pos_h.data *= 1 + 1e-12
    moved = check._theirs(model, {name: check._widen(array) for name, array in inputs.items()})
    assert 0 < check._difference(moved["image embeddings"], double["image embeddings"]) < 1e-10


def test_values_that_are_not_finite_do_not_agree():
    infinite = float("inf")
    assert not check.Row("mask logits", infinite, infinite).agrees
    assert not check.Row("mask logits", 0.0, infinite).agrees
    assert check._difference([np.ones(2)], [np.array([1, np.nan])]) == infinite
