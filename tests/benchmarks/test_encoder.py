"""The encoder benchmark compares the same model everywhere, counts its operations right, and refuses."""

import functools
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from benchmarks import attention_forms, encoder, encoder_problem
from calsegx.interfaces import InputError, UsageError
from calsegx.models import sam
from calsegx.models.sam import attention, presets, weights
from tests.models import test_sam_parity as parity

ROOT = pathlib.Path(__file__).parent.parent.parent
FORMS = {
    "naive": attention_forms.naive,
    "biased": attention_forms.biased,
    "folded": attention_forms.folded,
    "folded, not padded": functools.partial(attention_forms.folded, multiple=1),
}


@functools.cache
def tiny():
    """Meta's weights of the golden file: configuration, state under Meta's names, our parameters, the padded frame."""
    config, params = parity.tiny()
    return config, parity.state(), params, parity.frame()


def same_as_golden(out):
    """Meta's embedding is ``[1, C, h, w]``."""
    np.testing.assert_allclose(
        np.asarray(out).transpose(0, 3, 1, 2), parity.golden()["encoder/neck"], atol=2e-5, rtol=0
    )


@pytest.mark.parametrize("attend", ["meta", "sdpa"])
def test_torch_encoder_is_metas(attend):
    torch = pytest.importorskip("torch")
    from benchmarks import torch_encoder

    config, _, params, frame = tiny()
    with torch.inference_mode():
        state = torch_encoder.from_params(params)
        same_as_golden(torch_encoder.encode(config, state, torch.from_numpy(frame), getattr(torch_encoder, attend)))


def test_torch_state_is_metas_state_dict():
    pytest.importorskip("torch")
    from benchmarks import torch_encoder

    _, state, params, _ = tiny()
    ours = torch_encoder.from_params(params)
    expected = {k.removeprefix("image_encoder."): v for k, v in state.items() if k.startswith("image_encoder.")}
    assert ours.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(ours[name].numpy(), array)


def test_transformers_encoder_is_metas():
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from benchmarks import torch_encoder

    config, _, params, frame = tiny()
    with torch.inference_mode():
        encode = torch_encoder.transformers_encoder(config, torch_encoder.from_params(params))
        same_as_golden(encode(torch.from_numpy(frame)))


@pytest.mark.parametrize("form", FORMS)
def test_plain_jax_encoder_is_metas(form):
    config, _, params, frame = tiny()
    same_as_golden(jax.jit(lambda p, x: attention_forms.encode(config, p, x, FORMS[form]))(params, frame))


def grid_inputs(b=2, n=3, h=5, w=7, d=8):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(b, n, h, w, d)), jnp.float32) for _ in range(3))
    tables = [jnp.asarray(rng.normal(size=(2 * side - 1, d)), jnp.float32) for side in (h, w)]
    rows, columns = (attention.relative_positions(t, s, s) for t, s in zip(tables, (h, w), strict=True))
    return q, k, v, rows, columns


@pytest.mark.parametrize("form", FORMS)
def test_forms_follow_the_definition(form):
    """On a grid that is not square, against the definition in float64."""
    q, k, v, rows, columns = (np.asarray(x, np.float64) for x in grid_inputs())
    logits = np.einsum("bnhwd,bnHWd->bnhwHW", q, k) / np.sqrt(q.shape[-1])
    logits += (
        np.einsum("bnhwd,hHd->bnhwH", q, rows)[..., None] + np.einsum("bnhwd,wWd->bnhwW", q, columns)[..., None, :]
    )
    exponentials = np.exp(logits - logits.max((-2, -1), keepdims=True))
    expected = np.einsum("bnhwHW,bnHWd->bnhwd", exponentials, v) / exponentials.sum((-2, -1))[..., None]
    np.testing.assert_allclose(jax.jit(FORMS[form])(*grid_inputs()), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("form", FORMS)
def test_forms_keep_the_type_of_bfloat16(form):
    inputs = [x.astype(jnp.bfloat16) for x in grid_inputs()]
    out = FORMS[form](*inputs)
    assert out.dtype == jnp.bfloat16
    exact = attention_forms.naive(*(x.astype(jnp.float32) for x in inputs))
    np.testing.assert_allclose(np.asarray(out, np.float32), exact, atol=0.1, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_calsegx_and_naive_agree(dtype):
    problem = encoder_problem.make("vit_b", 128, 2, dtype, depth=1)
    out = [encoder_problem.to_numpy(encoder_problem.build(problem, name).call()) for name in ("calsegx", "naive")]
    tolerance = {"float32": 2e-5, "bfloat16": 0.1}[dtype]
    assert out[0].shape == (2, 8, 8, 256)
    np.testing.assert_allclose(out[0], out[1], atol=tolerance, rtol=0)


def test_flops_are_those_that_xla_counts():
    """Where windows need no padding; XLA also counts softmax, norms and activations, a few percent at this width."""
    config = sam.SamConfig(image_size=448, embed_dim=256, depth=2, num_heads=4, global_attn_indexes=(1,), out_chans=64)
    params = weights.template(config)
    images = jax.ShapeDtypeStruct((1, 448, 448, 3), jnp.float32)
    encode = jax.jit(lambda p, x: attention_forms.encode(config, p, x, attention_forms.naive))
    analysis = encode.lower(params, images).compile().cost_analysis()
    counted = (analysis[0] if isinstance(analysis, list) else analysis)["flops"]
    assert 0.94 < encoder_problem.flops(config, 1) / counted <= 1.0


def test_flops_of_the_real_sizes():
    """Tera multiply-adds at 1024, added up by hand.

    B: projections 0.3479, global 0.1031, windows 0.0118, positions 0.0024, patches 0.0024, neck 0.0032.
    H: projections 2.5770, global 0.1718, windows 0.0688, positions 0.0076, patches 0.0040, neck 0.0038.
    """
    assert encoder_problem.flops(presets.VIT_B, 1) / 2e12 == pytest.approx(0.4708, abs=2e-4)
    assert encoder_problem.flops(presets.VIT_H, 1) / 2e12 == pytest.approx(2.8330, abs=2e-4)
    assert encoder_problem.flops(presets.VIT_B, 3) == 3 * encoder_problem.flops(presets.VIT_B, 1)


def run(*arguments):
    """The benchmark in this process; its flags have the names of other benchmarks' flags, hence their own container."""
    values = flags.FlagValues()
    encoder.define_flags(values)
    values(["encoder", *arguments])
    encoder.run(values)


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--models=vit_x", "none of vit_b, vit_l, vit_h"),
        ("--models=tiny", "none of vit_b, vit_l, vit_h"),
        ("--dtypes=float16", "neither float32 nor bfloat16"),
        ("--image_size=100", "multiple of 16"),
        ("--batches=0", "positive whole numbers"),
        ("--implementations=fast", "none of calsegx"),
        ("--implementations=folded cudnn", "only measured on a GPU"),
    ],
)
def test_refuses_bad_flags(flag, says):
    with pytest.raises(UsageError, match=says):
        run(flag)


SMALL = ("--image_size=128", "--depth=1", "--rounds=2")


def test_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(encoder_problem, "matmul_peak", lambda dtype: {"jax": 1e11})
    names = encoder_problem.default_implementations()
    run(*SMALL, "--batches=2", "--noisolated", f"--json={tmp_path}/rows.json")
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["implementation"], row["batch"]) for row in rows] == [(name, 2) for name in names]
    for row in rows:
        assert row["status"] == "ok"
        assert row["images_per_second"] == pytest.approx(row["batch"] / row["seconds"])
        assert row["share_of_matmul_peak"] == pytest.approx(row["flops"] / row["seconds"] / 1e11)
        if encoder_problem.TORCH:
            reference = next(r for r in rows if r["implementation"] == "meta")
            assert row["ratio_to_pytorch"] == pytest.approx(row["seconds"] / reference["seconds"])
    assert capsys.readouterr().out.splitlines()[-1] == f"The rows are in {tmp_path}/rows.json"


def test_nothing_is_timed_when_implementations_disagree(tmp_path, monkeypatch):
    def swapped(q, k, v, rows, columns):
        return attention_forms.naive(q, k, v, columns, rows)

    monkeypatch.setattr(encoder_problem, "matmul_peak", lambda dtype: {"jax": 1e11})
    monkeypatch.setitem(encoder_problem._FORMS, "naive", swapped)
    with pytest.raises(InputError, match="deviates from 'calsegx'.*nothing was timed"):
        run(*SMALL, "--implementations=calsegx,naive", "--noisolated", f"--json={tmp_path}/rows.json")
    assert not (tmp_path / "rows.json").exists()


@pytest.mark.slow
def test_memory_and_compile_time_come_from_fresh_processes(tmp_path):
    """A grid of 32 x 32: the logits of 12 heads alone are 48 MiB."""
    arguments = [
        "--image_size=512",
        "--depth=1",
        "--rounds=1",
        "--implementations=naive",
        f"--json={tmp_path}/rows.json",
    ]
    command = [sys.executable, "-m", "benchmarks.encoder", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["peak_bytes"] > 12 * 1024**2 * 4
    assert row["cached_compile_seconds"] < row["compile_seconds"]


@pytest.mark.slow
def test_a_bad_flag_is_one_sentence_and_an_exit_code():
    command = [sys.executable, "-m", "benchmarks.encoder", "--models=vit_x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: --models has 'vit_x', which is none of vit_b, vit_l, vit_h."
