"""The metrics benchmark: both sides agree on every row, rows are complete, and nothing is timed that differs."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("monai")
pytest.importorskip("torchmetrics")

from absl import flags  # noqa: E402

from benchmarks import metrics, torch_losses  # noqa: E402
from benchmarks import metrics_problem as problems  # noqa: E402
from calsegx import losses  # noqa: E402
from calsegx.interfaces import InputError, UsageError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")  # MONAI calls itself so
TINY = ("--volume=32,40,40", "--images=2,24,32", "--rounds=1", "--loss_rounds=1", "--noisolated")


def run(*arguments):
    values = flags.FlagValues()
    metrics.define_flags(values)
    values(["metrics", *TINY, *arguments])
    return metrics.run(values)


def test_rows(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{metrics.MARKS[0]}\nold\n{metrics.MARKS[1]}\nafter\n")
    run(f"--json={tmp_path}/rows.json", f"--page={page}")
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["table"] for row in rows[:3]] == ["surface", "surface", "calibration"]
    assert [row["what"] for row in rows[3:]] == [*losses.names(), "crac"]
    for row in rows:
        assert row["difference"] <= metrics.TOLERANCE
        assert row["ratio"] == row["seconds"] / row["other_seconds"]
        assert row["target"] == {"surface": 0.5, "calibration": 0.25, "losses": 1.0}[row["table"]]
        assert row["threads"] and row["other_threads"] >= 1
    logits, labels = 2 * 24 * 32 * 4 * 4, 2 * 24 * 32 * 4
    assert {row["floor_bytes"] for row in rows[3:] if row["what"] != "bce"} == {2 * logits + labels}
    assert all(row["compile_seconds"] > 0 for row in rows[3:])
    text = page.read_text()
    assert text.startswith("before\n<!--") and text.endswith("-->\nafter\n") and "old" not in text
    assert text.count("\n| ") == len(rows) + 2 * 3


def test_every_loss_has_a_formulation_in_pytorch():
    assert [*torch_losses.LOSSES, problems.CRAC] == problems.loss_names()


def test_classes_are_all_there_and_differ():
    prediction, truth = problems.volumes((32, 40, 40))
    both = problems.surfaces((32, 40, 40), False).results[0][0]
    assert (np.bincount(prediction.ravel(), minlength=4) > 20).all()
    assert (np.bincount(truth.ravel(), minlength=4) > 20).all()
    assert (both[:, 0] < 1).all() and (both[:, 1:] > 0).all()


def test_nothing_is_timed_when_a_loss_differs(tmp_path, monkeypatch):
    monkeypatch.setitem(torch_losses.LOSSES, "dice", lambda logits, labels: 1.001 * torch_losses.dice(logits, labels))
    with pytest.raises(InputError, match="calsegx and PyTorch disagree in 'dice' by 1.0e-03.*nothing is timed"):
        run("--tables=losses", "--losses=dice", f"--json={tmp_path}/rows.json")
    assert not (tmp_path / "rows.json").exists()


@pytest.mark.parametrize(
    ("flag", "error", "says"),
    [
        ("--tables=speed", UsageError, "'speed', which is none of surface, calibration, losses"),
        ("--losses=dicee", UsageError, "none of bce,"),
        ("--volume=155,240", UsageError, "three whole numbers"),
        ("--images=8,4,256", UsageError, r"at least \(2, 8, 8\)"),
        ("--page=nowhere.md", InputError, "no page with the lines"),
    ],
)
def test_refuses(flag, error, says, monkeypatch):
    monkeypatch.setattr(problems, "surfaces", lambda *_: pytest.fail("the work began"))
    with pytest.raises(error, match=says):
        run(flag)


@pytest.mark.slow
def test_our_memory_does_not_grow_with_the_volume():
    found = metrics.peaks((64, 128, 128))
    assert found["peak_bytes"] < found["quarter_peak_bytes"] + 2**21
    assert found["other_peak_bytes"] > 2 * found["other_quarter_peak_bytes"]
