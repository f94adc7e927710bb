"""Every registered loss, and CRaC, in a run of the tiny main job, chosen by name; and runs with different losses in one
report.

The SAM here has no two-way blocks in its decoder: every loss is compiled anew, and they are most of the compilation.
"""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from calsegx import configs, losses
from calsegx.interfaces import UsageError
from calsegx.training import model_folder
from launch import components, evaluate, train, trained_runs
from tests import random_sam
from tests.launch.conftest import SMALL

PENALTIES = ("cmp", "mbls_penalty", "nacl_penalty", "probability_margin")  # they ask for doubt alone, so for no labels


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    """A function that trains for two steps with a method and a task loss, once, and returns the run folder."""
    folder = tmp_path_factory.mktemp("losses")
    small = dataclasses.replace(SMALL, depth=1, global_attn_indexes=(0,), decoder_depth=0, decoder_heads=1)
    random_sam.save(folder / "sam", small)
    found = {}

    def run(loss, method="sam_ft", **changes):
        key = str((method, loss, changes))
        if key not in found:
            # BWCR compares two views on one grid, so that theirs is another cache.
            rotation = 0.0 if loss == "bwcr" else config.data.rotation_degrees
            data = dataclasses.replace(config.data, rotation_degrees=rotation, cache=str(folder / f"views {rotation}"))
            model = configs.ModelConfig(weights=str(folder / "sam"))
            found[key] = (
                folder / str(len(found)),
                dataclasses.replace(config, method=method, loss=loss, steps=2, data=data, model=model, **changes),
            )
            train.train(found[key][1], found[key][0])
        return found[key]

    return run


def check(run, config):
    """The run ended, its losses are finite, and every weight of the decoder's heads that has a gradient moved."""
    params, record = model_folder.load(run)
    assert (record["config"]["method"], record["config"]["loss"]) == (config.method, config.loss)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [line["loss"] for line in lines if "loss" in line]
    assert len(logged) == 2 and all(map(math.isfinite, logged))
    assert [math.isfinite(line["validation_loss"]) for line in lines if "validation_loss" in line] == [True]
    start = components.build(config).backbone.trainable
    assert np.abs(params["mask_tokens"] - np.asarray(start["mask_tokens"])).max() > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("name", losses.names())
def test_a_run_with_each_loss(name, trained):
    check(*trained(f"sam + 0.1*{name}" if name in PENALTIES else name))


def test_a_run_of_crac(trained):
    check(*trained("", method="crac"))


def test_runs_with_different_losses_are_told_apart_in_one_report(trained, tmp_path):
    runs = [
        trained(""),
        trained("ce"),
        trained("sam + 0.1*cmp"),
        *(trained("", "sam_cmp", cmp=configs.CmpConfig(weight=weight)) for weight in (0.25, 0.5)),
    ]
    record = evaluate.evaluate([run for run, _ in runs], tmp_path)
    names = {"sam_ft", "sam_ft:ce", "sam_ft:sam + 0.1*cmp", "sam_cmp:CMP 0.25", "sam_cmp:CMP 0.5"}
    assert {row.method.removesuffix("+ts") for row in record.rows} == names | {
        *("prompt_only_disc", "prompt_only_ellipse", "vanilla_sam")
    }
    html = (tmp_path / "report.html").read_text()
    for text in ("SAM-FT (ce) + TS", "SAM-FT (sam + 0.1*cmp)", "SAM-FT + CMP (CMP 0.25)", "ECE [gt_fg]"):
        assert text in html
    assert "sam, ce, sam + 0.1*cmp; FIP weight not used" in record.description["Loss"]
    assert {c.method for c in record.comparisons if c.reference == "sam_ft"} == names - {"sam_ft"}

    (_, first), model = runs[0], json.loads((runs[0][0] / "model" / "model.json").read_text())
    fitted = json.loads((tmp_path / "temperatures.json").read_text())
    (own,) = (entry for entry in fitted if (entry["method"], entry["seed"]) == ("sam_ft", first.seed))
    assert (own["provenance"]["split"], own["provenance"]["region"]) == ("val", "all")
    assert own["provenance"]["cases"] == model["seen"]["val"]
    assert own["provenance"]["decoder_sha256"] == model["decoder_sha256"]

    with pytest.raises(UsageError, match="repeats sam_ft:ce with seed 42; runs are told apart by method, loss"):
        trained_runs.read_runs([runs[1][0], runs[1][0]], "")
