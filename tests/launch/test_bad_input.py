"""Bad input to the scripts: one sentence that names the culprit and the remedy, an exit code, nothing half-written."""

import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys

import nibabel
import numpy as np
import pytest

from calsegx import configs
from calsegx.interfaces import DataError, InputError, UsageError
from calsegx.training import metrics_log
from launch import evaluate, predict, train

ROOT = pathlib.Path(__file__).parent.parent.parent


def run(script, *arguments):
    """A script in a process of its own; returns its exit code and what it printed to stderr."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-m", f"launch.{script}", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    return result.returncode, result.stderr.strip()


@pytest.mark.parametrize(
    ("script", "arguments", "code", "sentence"),
    [
        ("train", ["--config.metod=calsam"], 2, "There is no flag --config.metod. Did you mean --config.method?"),
        ("train", ["--workdir=x", "--stps=3"], 2, "Unknown command line flag 'stps'"),
        ("train", ["--workdir=x", "--config.method=calsm"], 2, "is not one of .*Did you mean 'calsam'"),
        ("train", ["--workdir=x", "--config.steps=many"], 2, "--config.steps=many"),
        ("train", ["--workdir=x"], 2, "--config.data.root is empty"),
        ("train", ["--workdir=x", "--config.data.root=/nowhere/at/all"], 3, "/nowhere/at/all does not exist"),
        ("evaluate", ["--workdir=x", "--runs=/nowhere"], 1, "/nowhere/model holds no trained model"),
        ("predict", ["--output=x"], 2, "Give the trained run with --run, or a model bundle with --model"),
        ("predict", ["--output=x", "--run=a", "--model=b"], 2, "one of the two"),
        ("predict", ["--output=x", "--model=/nowhere"], 1, "--model=/nowhere is no model bundle"),
    ],
)
def test_command_lines(script, arguments, code, sentence, tmp_path):
    arguments = [a.replace("=x", f"={tmp_path / 'x'}") for a in arguments]
    returned, stderr = run(script, *arguments)
    assert returned == code, stderr
    assert re.search(sentence, stderr), stderr
    assert stderr.startswith("error: ") and "Traceback" not in stderr and len(stderr.splitlines()) == 1
    assert not (tmp_path / "x").exists()


def resave(path, change):
    image = nibabel.load(path)
    data = change(np.asarray(image.dataobj))
    nibabel.save(nibabel.Nifti1Image(data, image.affine, None), path)


def nan(data):
    data = data.astype(np.float32)
    data[3, 4, 5] = np.nan
    return data


@pytest.fixture
def damaged(dataset, tmp_path):
    """A copy of the dataset to damage."""
    return pathlib.Path(shutil.copytree(dataset, tmp_path / "Dataset001_Phantom"))


def attempt(config, root, workdir, **data):
    """Train on ``root`` with a cache of its own."""
    data = dataclasses.replace(config.data, root=str(root), cache="", **data)
    train.train(dataclasses.replace(config, data=data), workdir)


@pytest.mark.parametrize(
    ("name", "damage", "sentence"),
    [
        ("imagesTr/{}_0001.nii.gz", lambda p: p.unlink(), "is missing|does not exist"),
        ("imagesTr/{}_0003.nii.gz", lambda p: p.write_bytes(p.read_bytes()[:-50]), "truncated|ends|incomplete|cut"),
        ("imagesTr/{}_0003.nii.gz", lambda p: resave(p, nan), "1 .*(NaN|finite)"),
        ("imagesTr/{}_0003.nii.gz", lambda p: resave(p, lambda d: d * 0 + 7), "constant|cannot be normalised"),
        ("labelsTr/{}.nii.gz", lambda p: resave(p, lambda d: d[:-1]), "different shapes"),
        ("labelsTr/{}.nii.gz", lambda p: resave(p, lambda d: np.where(d == 3, 9, d)), "label ids 9"),
    ],
)
def test_damaged_files(config, damaged, tmp_path, name, damage, sentence):
    path = damaged / name.format("subject001_A")
    damage(path)
    with pytest.raises(DataError, match=sentence) as error:
        attempt(config, damaged, tmp_path / "run")
    assert path.name in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "config.json").exists()
    assert not list(tmp_path.glob("run/features/subject001_A/**/done.json"))


def test_an_empty_folder(config, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=f"{tmp_path / 'empty'}"):
        attempt(config, tmp_path / "empty", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_no_case_in_a_split(config, damaged, tmp_path):
    table = damaged / "cases.tsv"
    table.write_text(table.read_text().replace("\tval\t", "\ttrain\t"))
    with pytest.raises(DataError, match="no case in the split 'val'"):
        attempt(config, damaged, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"source": "C"}, "'C'.*A, B"),
        ({"channels": "T1c,T2,FLAR"}, "'FLAR'.*Did you mean 'FLAIR'"),
        ({"classes": "tumour=1+7"}, r"ids \[7\]"),
        ({"layout": "nnunet"}, "no dataset layout named 'nnunet'.*nnunet_v2"),
        ({"lower_percentile": 99.9}, "lower_percentile=99.9"),
    ],
)
def test_settings_that_do_not_fit_the_data(config, tmp_path, change, sentence):
    with pytest.raises(UsageError, match=sentence):
        attempt(config, config.data.root, tmp_path / "run", **change)
    assert not (tmp_path / "run").exists()


def test_more_slices_in_a_batch_than_there_are(config, tmp_path):
    with pytest.raises(UsageError, match="batch_size"):
        train.train(dataclasses.replace(config, batch_size=100_000), tmp_path / "run")


def test_a_saved_configuration_with_an_unknown_field_is_refused():
    with pytest.raises(UsageError, match="model.json has no field 'stepz'. Did you mean 'steps'"):
        configs.from_dict(configs.TrainConfig, {"stepz": 3}, "model.json")


def test_weights_that_are_none(config, tmp_path):
    model = configs.ModelConfig(weights=str(tmp_path))
    with pytest.raises(InputError, match="model.safetensors is missing"):
        train.train(dataclasses.replace(config, model=model), tmp_path / "run")


def test_a_flipped_byte_in_a_checkpoint_is_noticed(config, tmp_path, capsys):
    run = tmp_path / "run"
    train.train(config, run)
    before = (run / "model" / "decoder.safetensors").read_bytes()
    path = max((run / "checkpoints" / "4" / "state").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    train.train(config, run, resume=True)
    said = capsys.readouterr().out
    assert "Step 4 was skipped: its file state/" in said and "from step 2 to 4" in said
    assert (run / "model" / "decoder.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seed": -1}, "--config.seed=-1"),
        ({"loss": "bce", "data": {"classes": ""}}, "bce"),
        ({"loss": "math:pi"}, "is a float; expected a function"),
        ({"loss": "no_such_module:loss"}, "cannot be loaded"),
        ({"optimizer": {"b1": 1.5}}, "--config.optimizer.b1=1.5"),
        ({"optimizer": {"learning_rate": float("inf")}}, "learning_rate=inf"),
        ({"data": {"rotation_degrees": float("nan")}}, "rotation_degrees=nan"),
        ({"data": {"classes": "a/b=1+2+3"}}, "'a/b' cannot be part of a file name"),
    ],
)
def test_values_that_make_no_sense(config, tmp_path, change, sentence):
    for name, value in change.items():
        if isinstance(value, dict):
            value = dataclasses.replace(getattr(config, name), **value)
        config = dataclasses.replace(config, **{name: value})
    with pytest.raises(UsageError, match=sentence):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_z_scores_are_refused_not_clipped(config, damaged, tmp_path):
    path = damaged / "imagesTr" / "subject001_A_0003.nii.gz"
    resave(path, lambda d: ((d - d.mean()) / d.std()).astype(np.float32))
    with pytest.raises(DataError, match=f"{path.name}.*negative"):
        attempt(config, damaged, tmp_path / "run")


def test_nothing_goes_into_the_dataset(dataset, config, tmp_path):
    before = sorted(dataset.rglob("*"))
    train.train(dataclasses.replace(config, steps=1), tmp_path / "run")
    with pytest.raises(UsageError, match="--output=.* lies inside the dataset"):
        predict.predict(tmp_path / "run", dataset / "labelsTs")
    with pytest.raises(UsageError, match="--workdir=.* lies inside the dataset"):
        train.train(config, dataset / "run")
    with pytest.raises(UsageError, match="--workdir=.* lies inside the dataset"):
        evaluate.evaluate([tmp_path / "run"], dataset / "evaluation")
    data = dataclasses.replace(config.data, cache=str(dataset / "cache"))
    with pytest.raises(UsageError, match="--config.data.cache=.* lies inside the dataset"):
        train.train(dataclasses.replace(config, data=data), tmp_path / "other")
    assert sorted(dataset.rglob("*")) == before


def test_a_log_may_end_in_the_middle_of_a_line_but_not_be_wrong_before(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "seconds": 0.1}\n{"step": 2, "sec')
    assert metrics_log.read(path) == [{"step": 1, "seconds": 0.1}]
    path.write_text('garbage\n{"step": 2, "seconds": 0.2}\n')
    with pytest.raises(InputError, match="metrics.jsonl, line 1"):
        metrics_log.read(path)
