"""Train, evaluate and predict under every prompt protocol; clicks of every kind; evaluation with moved prompts."""

import csv
import dataclasses
import json
import shutil

import nibabel
import numpy as np
import pytest

from calsegx import config_checks, configs
from calsegx.evaluation import evaluate as case_metrics
from calsegx.evaluation import methods, report
from calsegx.interfaces import DataError, UsageError
from launch import evaluate, predict, train


def trained(config, cache, folder, protocol, **changes):
    """A run of two steps on eight slices a case; protocols that take the same slices share a cache."""
    kind = "every" if protocol in configs.EVERY_SLICE else "some"
    data = dataclasses.replace(config.data, cache=str(cache / kind), views=1, resample="8x64x64")
    train.train(dataclasses.replace(config, data=data, protocol=protocol, steps=2, **changes), folder)
    return folder


@pytest.fixture(scope="module")
def unprompted(config, cache, tmp_path_factory):
    return trained(config, cache, tmp_path_factory.mktemp("runs") / "none", "none")


@pytest.fixture(scope="module")
def pointed(config, cache, tmp_path_factory):
    return trained(config, cache, tmp_path_factory.mktemp("runs") / "random", "random_points", prompt_jitter=0.05)


def scored(run, folder, protocol, **options):
    record = evaluate.evaluate([run], folder, **options)
    names = {row.method for row in record.rows}
    assert {"sam_ft", "sam_ft+ts", "vanilla_sam"} <= names
    assert names.isdisjoint(methods.PROMPT_ONLY) == (protocol in configs.EVERY_SLICE)
    page = (folder / "report.html").read_text()
    assert ("Every slice is prompted" in page) == (protocol in configs.EVERY_SLICE)
    assert ("The prompt leaks the answer" in page) == (protocol != "none")
    said = [s for s in report.verdict(record) if s.startswith("Prompt-only guesses: not made")]
    assert len(said) == (protocol in configs.EVERY_SLICE)
    return record


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["class_points", "gt_box", "volume_points"])
def test_train_evaluate_predict(protocol, config, cache, tmp_path):
    run = trained(config, cache, tmp_path / "run", protocol, prompt_jitter=0.02)
    scored(run, tmp_path / "evaluation", protocol)
    assert len(predict.predict(run, tmp_path / "out", limit=1)) == 1


def one_case(dataset, folder):
    """A dataset of one test case without a label."""
    shutil.copytree(dataset / "imagesTs", folder / "imagesTs")
    header, *lines = (dataset / "cases.tsv").read_text().splitlines()
    cells = next(line for line in lines if "\ttest\t" in line).split("\t")
    cells[header.split("\t").index("label")] = ""
    (folder / "cases.tsv").write_text(f"{header}\n" + "\t".join(cells) + "\n")
    return folder, cells[0], nibabel.load(folder / cells[2])


def test_a_model_without_prompts_needs_neither_labels_nor_clicks(unprompted, dataset, tmp_path, capsys):
    bare, case_id, image = one_case(dataset, tmp_path / "data")
    (written,) = predict.predict(unprompted, tmp_path / "out", str(bare))
    assert nibabel.load(written).shape == image.shape
    probabilities = np.asarray(nibabel.load(written.with_name(f"{case_id}_prob-whole_tumour.nii.gz")).dataobj)
    assert np.all(probabilities.any(axis=(0, 1)))  # every slice was looked at
    assert "reference labels" not in capsys.readouterr().err
    (tmp_path / "clicks.csv").write_text(f"case_id,i,j,k,label\n{case_id},1,1,1,1\n")
    with pytest.raises(DataError, match="the model was trained without prompts"):
        predict.predict(unprompted, tmp_path / "out", str(bare), tmp_path / "clicks.csv")


@pytest.mark.slow
def test_an_evaluation_without_prompts_says_so(unprompted, tmp_path):
    scored(unprompted, tmp_path, "none")
    with pytest.raises(UsageError, match="--prompt_jitter moves prompts, and the runs have none"):
        evaluate.evaluate([unprompted], tmp_path / "other", prompt_jitter=[0.01])
    assert not (tmp_path / "prompt_jitter.csv").exists() and not (tmp_path / "other").exists()


def test_robustness_to_prompt_jitter(pointed, tmp_path):
    record = scored(pointed, tmp_path, "random_points", prompt_jitter=[1e-6, 0.2], prompt_draws=2)
    with (tmp_path / "prompt_jitter.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {line["method"] for line in lines} == {"vanilla_sam", "sam_ft", "sam_ft+ts"}
    assert {line["domain"] for line in lines} == {"A", "B"}
    assert len(lines) == 3 * 2 * 3 * 2  # methods, domains, amounts, metrics
    by_amount = {
        (line["domain"], line["method"], line["metric"], float(line["amount"])): float(line["mean"]) for line in lines
    }
    summaries = {(s.domain, s.method, s.metric, s.region, s.class_name): s.mean
                 for s in case_metrics.summarise(record.rows)}  # fmt: skip
    changes = []
    for line in lines:
        key = line["domain"], line["method"], line["metric"]
        still = by_amount[*key, 0.0]
        assert still == pytest.approx(summaries[*key, line["region"], "all"])
        assert by_amount[*key, 1e-6] == pytest.approx(still, abs=2e-3)  # as good as not moved
        changes.append(abs(by_amount[*key, 0.2] - still))
        draws = {"0.0": ("1", True)}.get(line["amount"], ("2", False))
        assert (line["draws"], line["sd_draws"] == "nan") == draws
    assert max(changes) > 1e-3
    page = (tmp_path / "report.html").read_text()
    assert "Robustness to prompt jitter" in page and "DSC (points), 0.2" in page
    assert len(json.loads((tmp_path / "summary.json").read_text())["calsegx"]["prompt_jitter"]) == len(lines)
    assert "prompt_jitter.csv" in (tmp_path / "SHA256SUMS").read_text()


@pytest.mark.parametrize(
    ("amounts", "draws"), [([0.0], 3), ([1.0], 3), ([0.1, 0.1], 3), ([float("nan")], 3), ([0.1], 0)]
)
def test_jitter_that_cannot_be_drawn_is_refused(pointed, tmp_path, amounts, draws):
    with pytest.raises(UsageError, match="--prompt_"):
        evaluate.evaluate([pointed], tmp_path / "out", prompt_jitter=amounts, prompt_draws=draws)
    assert not (tmp_path / "out").exists()


def test_jitter_of_no_prompts_is_refused(config):
    with pytest.raises(UsageError, match="--config.prompt_jitter=0.1 needs prompts to move"):
        config_checks.validate(dataclasses.replace(config, protocol="none", prompt_jitter=0.1))


def test_clicks_in_every_format_give_the_same_masks(pointed, dataset, tmp_path, capsys):
    """Voxels and millimetres, table and JSON; slices that were left out between clicked ones are said."""
    bare, case_id, image = one_case(dataset, tmp_path / "data")
    voxels = np.array([[n // 2 for n in image.shape]] * 2) + [[0, 0, 0], [0, 0, image.shape[2] // 2 - 1]]
    points = voxels @ image.affine[:3, :3].T + image.affine[:3, 3]
    (tmp_path / "voxels.json").write_text(
        json.dumps({case_id: [dict(zip("ijk", map(int, row), strict=True)) | {"label": 1} for row in voxels]})
    )
    rows = [",".join([case_id, *map(repr, map(float, row)), "1"]) for row in points]
    (tmp_path / "mm.csv").write_text("\n".join(["case_id,x,y,z,label", *rows]) + "\n")
    found = []
    for name in ("voxels.json", "mm.csv"):
        (mask,) = predict.predict(pointed, tmp_path / name.partition(".")[0], str(bare), tmp_path / name)
        found.append(np.asarray(nibabel.load(mask.with_name(f"{case_id}_prob-whole_tumour.nii.gz")).dataobj))
    np.testing.assert_array_equal(*found)
    prompted = found[0].any(axis=(0, 1))
    assert prompted[voxels[:, 2]].all() and not prompted[: image.shape[2] // 3].any()
    # Four slices of the file, two of the working grid.
    assert "2 slices between prompted ones have no prompt and are background" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"i": 900, "j": 1, "k": 1, "label": 1}], r"clicks.json, {case}\[0\]: the voxel \(900, 1, 1\) is outside"),
        ([{"box": [1, 1, 1, 5, 5, 1]}], r"clicks.json, {case}\[0\]: the model was trained with points"),
    ],
)
def test_a_prompt_that_does_not_fit_leaves_no_mask(pointed, dataset, tmp_path, content, message):
    case_id = min(path.name for path in dataset.glob("labelsTr/*")).removesuffix(".nii.gz")
    (tmp_path / "clicks.json").write_text(json.dumps({case_id: content}))
    with pytest.raises(DataError, match=message.format(case=case_id)) as caught:
        predict.predict(pointed, tmp_path / "out", clicks_file=tmp_path / "clicks.json", split="all", limit=1)
    assert caught.value.exit_code == 3
    assert not list((tmp_path / "out").glob("*.nii.gz"))
