"""launch.verify: the table, the JSON, the verdict and the exit code."""

import json
import pathlib
import shutil

import pytest

from calsegx.data import layouts
from calsegx.interfaces import DataError, UsageError
from launch import verify
from tests.launch.test_bad_input import resave, run


@pytest.fixture
def damaged(dataset, tmp_path):
    """A copy of the phantoms, one of them on another grid and one cut off."""
    folder = pathlib.Path(shutil.copytree(dataset, tmp_path / "Dataset001_Phantom"))
    resave(folder / "labelsTr" / "subject001_A.nii.gz", lambda data: data[:-1])
    path = folder / "imagesTr" / "subject002_A_0001.nii.gz"
    path.write_bytes(path.read_bytes()[:-40])
    return folder


def snapshot(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def test_a_dataset_in_order(dataset, tmp_path, capsys):
    before = snapshot(dataset)
    report = verify.verify_dataset(dataset, output=tmp_path / "out")
    assert report.count("error") == 0 and snapshot(dataset) == before
    content = json.loads((tmp_path / "out" / "verify.json").read_text())
    assert content["valid"] and len(content["cases"]) == 8
    assert "Verifying: 8/8 cases" in capsys.readouterr().out


def test_stop_lists_everything_and_fails(damaged, tmp_path, capsys):
    before = snapshot(damaged)
    with pytest.raises(
        DataError, match=r"2 error\(s\), in 2 of 8 cases; all findings are in .*verify.json; correct them"
    ):
        verify.verify_dataset(damaged, output=tmp_path / "out")
    printed = capsys.readouterr().out
    assert "error: file (1)\n  subject002_A: " in printed and "error: geometry (1)\n  subject001_A: " in printed
    content = json.loads((tmp_path / "out" / "verify.json").read_text())
    assert not content["valid"] and content["counts"]["error"] == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["verify.json"]
    assert snapshot(damaged) == before


def test_skip_lists_the_cases_to_leave_out(damaged, capsys):
    output = damaged.parent / "left"
    report = verify.verify_dataset(damaged, output=output, on_error="skip")
    assert list(report.failing()) == ["subject002_A", "subject001_A"]
    assert "Left out: subject002_A, subject001_A" in capsys.readouterr().out
    left, whole = (layouts.detect(folder) for folder in (output, damaged))
    assert {case.case_id for case in left.cases} == {case.case_id for case in whole.cases} - set(report.failing())
    assert verify.verify_dataset(output).count("error") == 0
    with pytest.raises(UsageError, match="holds a cases.tsv already"):
        verify.verify_dataset(damaged, output=output, on_error="skip")


def test_skip_cannot_leave_out_all_or_what_is_no_case(dataset, damaged):
    table = damaged / "cases.tsv"
    good = table.read_text()
    lines = good.splitlines()
    only = [lines[0], *(line for line in lines if line.startswith(("subject001_A", "subject002_A")))]
    table.write_text("\n".join(only) + "\n")
    with pytest.raises(DataError, match="in 2 of 2 cases"):
        verify.verify_dataset(damaged, on_error="skip")
    table.write_text(good.replace("subject003_A\tsubject003", "subject003_A\tsubject005"))
    with pytest.raises(DataError, match=r"is not valid: 3 error\(s\), in 2 of 8 cases"):
        verify.verify_dataset(damaged, on_error="skip")


def test_long_groups_are_cut_where_the_file_has_them(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(verify, "MOST_LINES", 1)
    report = verify.verify_dataset(dataset, output=tmp_path / "out")
    oblique = sum(finding.check == "axes" for finding in report.findings)
    assert f"note: axes ({oblique})" in (printed := capsys.readouterr().out)
    assert printed.count("is oblique by") == 1 < oblique and f"and {oblique - 1} more in verify.json" in printed
    verify.verify_dataset(dataset)
    assert capsys.readouterr().out.count("is oblique by") == oblique


def test_the_dataset_is_never_written_to(dataset):
    with pytest.raises(UsageError, match="lies inside the dataset"):
        verify.verify_dataset(dataset, output=dataset / "out")
    assert not (dataset / "out").exists()


def test_the_command(damaged, tmp_path):
    code, stderr = run("verify", f"--data={damaged}", f"--output={tmp_path / 'out'}")
    assert code == 3 and stderr.startswith(f"error: {damaged} is not valid") and len(stderr.splitlines()) == 1
    code, stderr = run("verify", f"--data={damaged}", "--on-error=skip")
    assert (code, stderr) == (0, "")
    code, stderr = run("verify", f"--data={tmp_path / 'nowhere'}")
    assert code == 3 and "nowhere does not exist" in stderr
    code, stderr = run("verify", f"--data={damaged}", "--on_error=ignore")
    assert code == 2 and "on_error" in stderr
