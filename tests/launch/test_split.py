"""Folds from the command line, and runs on them: both ways of the scanner split, and each centre left out once."""

import dataclasses
import json
import shutil

import pytest

from calsegx.data import folds, phantoms
from calsegx.interfaces import DataError, UsageError
from launch import calibrate, components, evaluate, split, train
from tests.launch.test_bad_input import run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three persons seen by scanner A, three by A and B; three centres of two persons each."""
    root = tmp_path_factory.mktemp("split") / "data"
    phantoms.write_dataset(root, train=3, val=0, test=3, scale=0.35, processes=1)
    table = (root / "cases.tsv").read_text().splitlines()
    rows = [dict(zip(table[0].split("\t"), line.split("\t"), strict=True)) for line in table[1:]]
    for row in rows:
        row["centre"] = ["north", "east", "west"][int(row["subject_id"][-1]) % 3]
    (root / "cases.tsv").write_text("\n".join([table[0], *("\t".join(row.values()) for row in rows)]) + "\n")
    return root


def train_and_evaluate(config, data, splits_file, number, folder, **changes):
    """A few steps on a fold; returns the model's record and the evaluation's."""
    own = dataclasses.replace(config.data, root=str(data), splits=str(splits_file), fold=number, **changes)
    own = dataclasses.replace(own, cache=str(folder.parent / "features"))
    config = dataclasses.replace(config, steps=2, batch_size=2, data=own)
    train.train(config, folder / "run")
    record = json.loads((folder / "run" / "model" / "model.json").read_text())
    return record, evaluate.evaluate([folder / "run"], folder / "evaluation")


def seen(record, part):
    return [entry["case_id"] for entry in record["seen"][part]]


def scanner_split(config, data, tmp_path, number, source, target):
    path = tmp_path / "splits.json"
    split.split(data, "domain", folds.Options(), path)
    fold = json.loads(path.read_text())[number]
    assert fold["name"] == f"{source} to {target}"
    record, evaluation = train_and_evaluate(config, data, path, number, tmp_path / source, source=source)
    assert seen(record, "train") == fold["train"] and seen(record, "val") == fold["val"]
    assert all(case_id.endswith(source) for case_id in fold["train"] + fold["val"])
    assert {row.case_id for row in evaluation.rows} == set(fold["test"])
    assert (evaluation.source, list(evaluation.targets)) == (source, [target])  # both are tested: the gap is measured
    return path, fold


def test_scanner_split_through_training_evaluation_and_calibration(config, data, tmp_path):
    path, fold = scanner_split(config, data, tmp_path, 0, "A", "B")
    run_folder = tmp_path / "A" / "run"
    done = calibrate.calibrate(run_folder)
    assert [case["case_id"] for case in done.params["provenance"]["cases"]] == fold["val"]  # never the test's
    # What the run was trained, validated and tested on stays so: a file that says otherwise is refused.
    path.write_text(json.dumps([{**fold, "train": fold["val"], "val": fold["train"]}]))
    with pytest.raises(DataError, match="Validation case .* is not among the 1 that the run was validated on"):
        evaluate.evaluate([run_folder], tmp_path / "again")
    path.write_text(json.dumps([{**fold, "train": fold["test"][:2], "test": fold["train"]}]))
    with pytest.raises(DataError, match="Test case .* holds the same files as case .* trained or validated on"):
        evaluate.evaluate([run_folder], tmp_path / "again")
    path.unlink()
    with pytest.raises(UsageError, match="The file of folds .* does not exist"):
        evaluate.evaluate([run_folder], tmp_path / "again")
    assert not (tmp_path / "again").exists()
    record = json.loads((run_folder / "model" / "model.json").read_text())
    assert len(components.of_model(record, str(data)).dataset.cases) == 9  # another dataset: no file of folds


@pytest.mark.slow
def test_scanner_split_the_other_way(config, data, tmp_path):
    scanner_split(config, data, tmp_path, 1, "B", "A")


@pytest.mark.slow
def test_leave_one_centre_out(config, data, tmp_path):
    path = tmp_path / "splits.json"
    split.split(data, "leave_one_domain_out", folds.Options(domain="centre"), path)
    made = json.loads(path.read_text())
    assert [fold["name"] for fold in made] == ["without east", "without north", "without west"]
    tested = []
    for number, fold in enumerate(made):
        folder = tmp_path / str(number)
        record, evaluation = train_and_evaluate(config, data, path, number, folder, source="", domain="centre")
        assert seen(record, "train") == fold["train"] and seen(record, "val") == fold["val"]
        assert {row.case_id for row in evaluation.rows} == set(fold["test"])
        tested += fold["test"]
    assert len(tested) == len(set(tested)) == 9


def test_the_command_prints_and_writes_the_folds(data, tmp_path):
    arguments = [f"--data={data}", "--protocol=kfold", "--folds=3", "--domain=centre", "--seed=0"]
    code, stderr = run("split", *arguments, f"--output={tmp_path / 'splits.json'}")
    assert code == 0, stderr
    assert [len(set(fold)) for fold in json.loads((tmp_path / "splits.json").read_text())] == [4, 4, 4]
    inside = data / "splits.json"
    code, stderr = run("split", *arguments, f"--output={inside}")
    said = f"error: --output={inside} lies inside the dataset, which is never written to; name another folder."
    assert code == 2 and stderr == said
    assert [path.name for path in tmp_path.iterdir()] == ["splits.json"]
    code, stderr = run("split", *arguments, "--check=x", "--output=y")
    assert code == 2 and "Give --protocol and --output to make folds, or --check" in stderr


def test_the_table(data, tmp_path):
    table = split.split(data, "domain", folds.Options(source="A"), tmp_path / "splits.json").splitlines()
    assert table[0] == "fold 0 (A to B)" and table[4] == "  1 of the dataset's cases in no part"
    assert table[1].startswith("  train    3 cases of    3 subjects, median lesion ")
    assert table[3].endswith("; scanner A 2 of 2, B 2 of 2")
    without = split.split(data, "domain", folds.Options(source="A"), tmp_path / "other.json", lesion_load=False)
    assert without.count("median lesion  not known;") == 3
    assert split.check(data, tmp_path / "splits.json", "scanner").splitlines() == table
    nothing = tmp_path / "splits_final.json"
    nothing.write_text(json.dumps([{"train": ["subject001_A"], "val": []}]))
    with pytest.raises(DataError, match="splits_final.json, fold 0, has no case in val"):
        split.check(data, nothing, "scanner")


def test_a_copy_under_another_subject_is_refused(data, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(data, root)
    text = (root / "cases.tsv").read_text()
    line = next(line for line in text.splitlines() if line.startswith("subject001_A"))
    copied = line.replace("subject001", "another1")
    for old, new in zip(line.split("\t")[2:7], copied.split("\t")[2:7], strict=True):
        shutil.copy(root / old, root / new)
    (root / "cases.tsv").write_text(text + copied + "\n")
    with pytest.raises(DataError, match="hold the same image under two subjects") as refused:
        split.split(root, "kfold", folds.Options(folds=2), tmp_path / "splits.json")
    assert "subject001_A" in str(refused.value) and "another1_A" in str(refused.value)
    # nnU-Net's own file of the same dataset is checked as well.
    own = tmp_path / "splits_final.json"
    own.write_text(json.dumps([{"train": ["another1_A"], "val": ["subject001_A"]}]))
    with pytest.raises(DataError, match="_final.json, fold 0: cases 'another1_A' in train and 'subject001_A' in"):
        split.check(root, own, "scanner")
    assert not (tmp_path / "splits.json").exists()


def test_unknown_classes_and_damaged_files(data, tmp_path):
    with pytest.raises(UsageError, match="--classes='rim=9' uses the ids .9."):
        split.split(data, "kfold", folds.Options(folds=2), tmp_path / "splits.json", spec="rim=9")
    root = tmp_path / "data"
    shutil.copytree(data, root)
    path = next((root / "imagesTr").iterdir())
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=f"{path.name} is truncated or damaged: .*copy or download it again"):
        split.split(root, "kfold", folds.Options(folds=2), tmp_path / "splits.json")
    assert not (tmp_path / "splits.json").exists()
