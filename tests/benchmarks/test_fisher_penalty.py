"""The Fisher benchmark: Meta's decoder in PyTorch against the goldens, and the two frameworks against each other."""

import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from absl import flags  # noqa: E402

from benchmarks import fisher_penalty, measure, torch_decoder, torch_fisher, whole_step  # noqa: E402
from benchmarks import fisher_problem as problems  # noqa: E402
from calsegx.interfaces import InputError, UsageError  # noqa: E402
from calsegx.models.sam import model, weights  # noqa: E402
from tests.models import test_sam_parity as parity  # noqa: E402

KEYS = "framework mode grid batch classes dtype device seconds ratio_to_plain ratio_to_pytorch flops peak_bytes"


def options(line, *arguments):
    values = flags.FlagValues()
    fisher_penalty.define_flags(values)
    values(["fisher_penalty", *line.split(), *arguments])
    return values


@pytest.mark.parametrize("case", ["pt2", "mask"])
def test_torch_decoder_gives_the_golden_masks(case):
    config, params = parity.tiny()
    g = parity.golden()
    z = np.repeat(g["encoder/neck"].transpose(0, 2, 3, 1), len(g[f"{case}/low_res_multi"]), axis=0)
    embedded = model.embed_prompts(config, params["prompt_encoder"], z, parity.prompts_of(case))
    sparse, dense, position = (torch.from_numpy(np.array(x)) for x in embedded[:3])
    decoder = torch_decoder.from_params(config, params["mask_decoder"])
    image = torch.from_numpy(z).movedim(3, 1)
    with torch.no_grad():
        masks, iou = decoder(image, position.movedim(2, 0)[None], sparse, dense.movedim(3, 1))
    np.testing.assert_allclose(masks[:, 1:], g[f"{case}/low_res_multi"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(masks[:, :1], g[f"{case}/low_res_single"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(iou[:, 1:], g[f"{case}/iou_multi"], atol=1e-5, rtol=0)


def test_parameters_go_to_torch_and_back():
    _, params = parity.tiny()
    decoder = torch_decoder.from_params(parity.tiny()[0], params["mask_decoder"])
    back = torch_decoder.to_params(params["mask_decoder"], decoder.state_dict())
    for (name, a), b in zip(weights.flatten(params["mask_decoder"]).items(), jax.tree.leaves(back), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.slow
def test_frameworks_agree_on_a_softmax():
    gradients = fisher_penalty.check_agreement(problems.make("4", 2, 3))
    plain, exact = gradients["torch", "plain"], gradients["torch", "exact"]
    assert fisher_penalty._distance(exact, plain) > 1e-3, "the penalty must matter, or its check is empty"


def test_disagreement_is_refused_with_what_differs(monkeypatch):
    right = torch_fisher._relative_penalty
    monkeypatch.setattr(torch_fisher, "_relative_penalty", lambda z, g: 1.001 * right(z, g))
    with pytest.raises(InputError, match=r"grid 4, batch 1, K=1, mode exact, .* in penalty \(.*nothing is timed"):
        fisher_penalty.check_agreement(problems.make("4", 1, 1), modes=["exact"])


def test_a_zero_gradient_may_be_rounding_noise_but_no_more():
    whole = {"a": np.ones(4), "key_bias": np.zeros(4)}
    assert fisher_penalty.same_gradients({"a": np.ones(4), "key_bias": np.full(4, 1e-8)}, whole) == []
    assert len(fisher_penalty.same_gradients({"a": np.ones(4), "key_bias": np.full(4, 1e-4)}, whole)) == 1
    assert len(fisher_penalty.same_gradients({"a": np.full(4, np.nan), "key_bias": np.zeros(4)}, whole)) == 1


def test_torch_finite_difference_is_near_the_exact_gradient_in_float64():
    problem = problems.make("4", 2, 1)
    decoder = problems.torch_module(problem).double()
    inputs = torch_fisher.Inputs(*(x.double() if x.is_floating_point() else x for x in problems.torch_inputs(problem)))
    exact, difference = (torch_fisher.step(decoder, inputs, mode, 0.1)() for mode in ("exact", "finite_difference"))
    assert abs(exact[1] - difference[1]) < 1e-9 * exact[1]
    for name, gradient in exact[2].items():
        torch.testing.assert_close(difference[2][name], gradient, rtol=1e-3, atol=1e-6)


def test_rows_have_every_column(tmp_path):
    path = tmp_path / "rows.json"
    line = "--tables=1 --grids=4 --batches=1 --classes=1 --rounds=1 --modes=plain,exact --compile="
    fisher_penalty.run(options(line, f"--json={path}", f"--markdown={tmp_path / 'tables.md'}"))
    rows = json.loads(path.read_text())
    assert [(row["framework"], row["mode"]) for row in rows] == [
        (framework, mode) for framework in ("jax", "torch") for mode in ("plain", "exact")
    ]
    for row in rows:
        assert set(KEYS.split()) | {"gradient_error"} <= row.keys()
        assert row["seconds"] > 0 and row["gradient_error"] < 1e-4 and row["flops"] > 1e6
    assert rows[0]["ratio_to_plain"] == rows[2]["ratio_to_pytorch"] == 1.0
    assert rows[0]["peak_bytes"] > 1e5
    assert (tmp_path / "tables.md").read_text().count("\n") == 6


@pytest.mark.slow
def test_every_mode_and_both_memory_measurements(tmp_path):
    path = tmp_path / "rows.json"
    line = "--tables=1 --grids=4 --batches=2 --classes=1 --rounds=1 --draws=16 --compile= --peak=process"
    fisher_penalty.run(options(line, f"--json={path}"))
    rows = {(row["framework"], row["mode"]): row for row in json.loads(path.read_text())}
    assert {mode for framework, mode in rows if framework == "jax"} == set(problems.MODES)
    assert rows["jax", "every_k"]["mean_gradient_error"] < 1e-4
    assert rows["jax", "stochastic"]["mean_gradient_error"] < rows["jax", "stochastic"]["gradient_error"]
    assert all(row["peak_bytes"] > 0 for row in rows.values())


def test_a_wrong_compiled_step_is_not_timed():
    row = {"framework": "torch.compile", "mode": "exact", "dtype": "float32", "seconds": 1.0, "gradient_error": 1e-6}
    assert fisher_penalty.distrust(row) == row
    wrong = fisher_penalty.distrust(row | {"gradient_error": 0.4})
    assert wrong["seconds"] is None and wrong["status"] == "wrong: gradient error 4.0e-01"
    assert fisher_penalty.distrust(row | {"gradient_error": 0.4, "mode": "finite_difference"})["seconds"] == 1.0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # PyTorch's own code, inside its compiler
def test_torch_compile_differentiates_twice():
    problem = problems.make("4", 2, 1)  # not 1: see fisher_penalty.distrust
    eager, compiled = (problems.torch_step(problem, name, "exact")() for name in ("torch", "torch.compile"))
    torch.testing.assert_close(compiled[:2], eager[:2], rtol=1e-4, atol=0)
    a, b = (torch_decoder.to_params(problem.params, result[2]) for result in (compiled, eager))
    assert fisher_penalty.same_gradients(a, b) == []


@pytest.mark.slow
def test_tables_with_an_encoder(tmp_path):
    line = "--tables=2,3 --encoders=tiny --whole_rounds=1 --training_batch=1 --read_slices=3 --slices=10"
    rows = fisher_penalty.run(options(line))
    second = [row for row in rows if row["table"] == 2]
    assert {(row["encoder"], row["mode"]) for row in second} == {
        (encoder, mode) for encoder in ("tiny", "vit_h") for mode in whole_step.MODES
    }
    assert all("FLOPs" in row["method"] for row in second if row["encoder"] == "vit_h")
    assert all(row["overhead"] == 0 for row in second if row["mode"] == "plain")
    third = {(row["encoder"], row["training"], row["mode"]): row for row in rows if row["table"] == 3}
    assert third["vit_h", "cached", "exact"]["ratio_to_online"] < 0.5
    for row in third.values():
        parts = row["seconds_per_slice"]
        once = (parts["encode"] + parts["write"]) * row["views"] / row["epochs"] + parts["read"]
        expected = 10 * (parts["step"] + (parts["encode"] if row["training"] == "online" else once))
        assert row["seconds"] == pytest.approx(expected)


@pytest.mark.parametrize(
    "flag", ["--grids=sixty", "--modes=exactly", "--dtype=float16", "--tables=4", "--batches=0", "--encoders=vit_x"]
)
def test_bad_flags_are_refused_before_work(flag):
    with pytest.raises(UsageError, match=flag.split("=")[0]):
        fisher_penalty.run(options(flag))


def test_functions_take_turns_and_none_always_follows_the_same():
    calls = []
    seconds = measure.interleave({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=30, warmups=0)
    assert all(set(calls[i : i + 3]) == set("abc") for i in range(0, 90, 3))
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys("abc", 30)
    before_a = [calls[i - 1] for i in range(1, 90) if calls[i] == "a"]
    assert min(before_a.count("b"), before_a.count("c")) > 5


def test_peak_of_a_call_is_what_it_allocates():
    growth = measure.rss_growth(lambda: np.ones(20_000_000, np.uint8))
    if growth is None:
        pytest.skip("this kernel does not tell the peak")
    assert 19e6 < growth < 30e6


def test_a_failing_isolated_case_says_why():
    with pytest.raises(InputError, match="no_such_module"):
        measure.run_isolated("benchmarks.no_such_module", [])


def test_tables_are_markdown():
    lines = measure.table([{"a_b": 1.234, "c": None}], {"a_b": ".2f", "c": ""})
    assert lines == ["| a b  | c |", "| ---- | - |", "| 1.23 | - |"]
