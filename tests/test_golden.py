"""All golden cases of losses and metrics, or files of the same form: see tests/golden/README.md.

``pytest tests/test_golden.py --golden-losses=PREFIX --golden-metrics=PREFIX`` reads ``PREFIX.npz`` and ``PREFIX.json``.
"""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from scipy import special

from tests import golden_cases
from tests.golden_cases import calibration, calibrators, losses, penalties, shapes, uncertainty  # noqa: F401, register


def pytest_generate_tests(metafunc: pytest.Metafunc):
    for name in golden_cases.KINDS:
        if f"{name}_case" in metafunc.fixturenames:
            given, folder = metafunc.config.getoption(f"--golden-{name}"), metafunc.config.invocation_params.dir
            prefix = golden_cases.prefix_of(given, name, folder)
            cases = golden_cases.read(prefix)
            metafunc.parametrize(f"{name}_case", [(prefix, case) for case in cases], ids=[case["id"] for case in cases])


def run(prefix, stored, record_property):
    case = golden_cases.load(prefix, stored)
    record = {"kind": golden_cases.UNKNOWN, "status": "failed"}
    record_property("golden", record)
    record["kind"] = golden_cases.entry_of(case)[0].kind
    record |= golden_cases.check(case)._asdict()
    if record["status"] == "left":
        pytest.skip(f"not reproduced: {'; '.join(record['left'])}")


def test_losses(losses_case, record_property):
    run(*losses_case, record_property)


def test_metrics(metrics_case, record_property):
    run(*metrics_case, record_property)


def test_every_mapping_has_a_case():
    files = [golden_cases.prefix_of(None, name, pathlib.Path()) for name in golden_cases.KINDS]
    methods = {case["method"] for prefix in files for case in golden_cases.read(prefix)}
    unused = [e.pattern.pattern for e in golden_cases.entries if not any(map(e.pattern.match, methods))]
    assert not unused


def test_an_unknown_method_fails_with_a_sentence():
    case = dataclasses.replace(golden_cases.stored("losses", "ce_A"), method="a new loss")
    with pytest.raises(AssertionError, match="The method 'a new loss' of case ce_A is known to 0 mappings"):
        golden_cases.check(case)


@pytest.mark.parametrize(
    ("role", "change", "message"),
    [
        ("grad", lambda array: array + 2e-9 * np.abs(array).max(), "grad: 2e-09 instead of at most 1e-09"),
        ("grad", lambda array: np.where(array == array.max(), np.nan, array), "grad: inf"),
        ("grad", lambda array: array[:1], "grad: inf"),
        ("entropy", lambda array: array, r"says nothing about the outputs \['entropy'\]"),
    ],
)
def test_a_difference_and_a_forgotten_output_fail(role, change, message):
    case = golden_cases.stored("losses", "ce_A")
    case = dataclasses.replace(case, outputs={**case.outputs, role: change(case.outputs["grad"])})
    with pytest.raises(AssertionError, match=message):
        golden_cases.check(case)


def test_other_files_with_other_shapes(tmp_path):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(3, 5, 4, 2, 3)), rng.integers(0, 5, (3, 4, 2, 3))
    log_p, targets = special.log_softmax(logits, axis=1), np.moveaxis(np.eye(5)[labels], -1, 1)
    outputs = {"v": -(log_p * targets).sum() / labels.size, "g": (np.exp(log_p) - targets) / labels.size}
    np.savez(tmp_path / "other.npz", z=logits, y=labels, **outputs)
    case = {
        "id": "x",
        "method": "cross-entropy (mean over B and pixels)",
        "source": "here",
        "inputs": {"logits": "z", "labels": "y"},
        "hparams": {},
        "outputs": {"value": "v", "grad": "g"},
    }
    (tmp_path / "other.json").write_text(json.dumps({"cases": [case]}))
    prefix = golden_cases.prefix_of("other", "losses", tmp_path)
    outcome = golden_cases.check(golden_cases.load(prefix, *golden_cases.read(prefix)))
    assert (outcome.kind, outcome.status) == ("losses", "passed")
