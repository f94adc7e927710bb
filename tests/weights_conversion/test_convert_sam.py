"""Checkpoints in, a weights folder or one clear sentence out; the safetensors door works without torch."""

import argparse
import dataclasses
import importlib.util
import json
import pickle
import subprocess
import sys
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest

from calsegx.interfaces import DataError, UsageError
from calsegx.models import sam
from calsegx.models.sam import presets, weights
from tests.weights_conversion import checkpoints
from weights_conversion import convert_sam, meta_names


@pytest.fixture
def out(tmp_path):
    return tmp_path / "weights" / "sam"


def refused(source, out, error, match, **options):
    """The conversion stops with one sentence, and leaves nothing."""
    before = sorted(out.parent.parent.rglob("*"))
    with pytest.raises(error, match=match) as caught:
        convert_sam.convert(source, out, **options)
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message
    assert sorted(out.parent.parent.rglob("*")) == before


# ------------------------------------------------------------------------------------------------ without torch


def test_safetensors_do_not_import_torch(tmp_path, out):
    source = checkpoints.write_safetensors(tmp_path / "model.safetensors")
    code = (
        "import pathlib, sys; from weights_conversion import convert_sam; "
        f"convert_sam.convert(pathlib.Path({str(source)!r}), pathlib.Path({str(out)!r})); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert (out / "SHA256SUMS").is_file()


def test_safetensors_of_transformers(tmp_path, out):
    source = checkpoints.write_safetensors(tmp_path / "model.safetensors")
    plan = convert_sam.convert(source, out)
    config, params = sam.load(out)
    assert config == plan.config == checkpoints.CONFIG
    expected = meta_names.convert(checkpoints.meta_state())
    flat = weights.flatten(params)
    assert flat.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(flat[name], expected[name])
    assert {path.name for path in out.iterdir()} == {*weights.FILES, "SHA256SUMS"}
    card = (out / "README.md").read_text()
    for text in ("license: apache-2.0", "`model.safetensors`", weights.sha256(source), "Not a medical device", "`sam`"):
        assert text in card


def test_the_summary_says_what_was_assumed(tmp_path, out):
    plan = convert_sam.convert(checkpoints.write_safetensors(tmp_path / "s"), out)
    text = convert_sam.summary(plan, out, "auto")
    for part in ("5 heads, window 3, global blocks 1, 3", "8 heads (no shape tells them", "--preprocessing=medsam"):
        assert part in text
    ((name, reason),) = plan.ignored.items()
    assert name in (checkpoints.SHARED, checkpoints.OWN) and f"not converted: {name}, the same matrix as" in text
    assert "as asked" in convert_sam.summary(plan, out, "sam")


def test_medsam_preprocessing(tmp_path, out):
    convert_sam.convert(checkpoints.write_safetensors(tmp_path / "s"), out, preprocessing="medsam")
    config, _ = sam.load(out)
    medsam = {"preprocessing": "medsam", "pixel_mean": (0, 0, 0), "pixel_std": (255, 255, 255)}
    assert config == dataclasses.replace(checkpoints.CONFIG, **medsam)
    assert "# MedSAM" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "preprocessing", "reason"),
    [
        ("medsam_vit_b.safetensors", "medsam", "the file's name says MedSAM; --preprocessing=sam changes it"),
        ("My-MedSAM", "medsam", "the file's name says MedSAM; --preprocessing=sam changes it"),
        ("med_sam", "sam", "whose name does not say MedSAM; for MedSAM give --preprocessing=medsam"),
    ],
)
def test_the_name_of_the_file_hints_at_medsam(tmp_path, name, preprocessing, reason):
    folder = tmp_path / "medsam"  # the folder's name says nothing
    folder.mkdir()
    source = checkpoints.write_safetensors(folder / name)
    plan = convert_sam.convert(source, tmp_path / "auto")
    assert plan.config.preprocessing == sam.load(tmp_path / "auto")[0].preprocessing == preprocessing
    assert f"preprocessing {preprocessing}: " in convert_sam.summary(plan, tmp_path / "auto", "auto")
    assert reason in convert_sam.summary(plan, tmp_path / "auto", "auto")
    asked = convert_sam.convert(source, tmp_path / "asked", preprocessing="sam")
    assert asked.config.preprocessing == "sam"
    assert "preprocessing sam: as asked" in convert_sam.summary(asked, tmp_path / "asked", "sam")


@pytest.mark.parametrize("name", [checkpoints.SHARED, checkpoints.OWN])
def test_the_matrix_of_positions_may_be_stored_once(tmp_path, out, name):
    state = checkpoints.transformers_state()
    del state[name]
    plan = convert_sam.convert(checkpoints.write_safetensors(tmp_path / "s", state), out)
    assert not plan.ignored


def test_two_different_matrices_of_positions_are_refused(tmp_path, out):
    state = checkpoints.transformers_state()
    state[checkpoints.SHARED][0, 0] += 1
    source = checkpoints.write_safetensors(tmp_path / "s", state)
    refused(source, out, DataError, "are one matrix in a SAM but differ in this file")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_floats_become_float32(tmp_path, out, dtype):
    state = {name: array.astype(dtype) for name, array in checkpoints.transformers_state().items()}
    convert_sam.convert(checkpoints.write_safetensors(tmp_path / "s", state), out)
    flat = weights.flatten(sam.load(out)[1])
    expected = meta_names.convert(checkpoints.meta_state())
    for name, array in flat.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, expected[name].astype(dtype).astype(np.float32))


def test_buffers_of_the_preprocessing_are_ignored_with_a_reason(tmp_path, out):
    state = {**checkpoints.meta_state(), "pixel_mean": np.ones((3, 1, 1)), "pixel_std": np.ones((3, 1, 1))}
    plan = convert_sam.convert(checkpoints.write_safetensors(tmp_path / "s", state), out)
    assert plan.naming == "Meta" and set(plan.ignored) == {"pixel_mean", "pixel_std"}
    assert "`pixel_mean` (a buffer" in (out / "README.md").read_text()


def change(name=None, **replaced):
    state = checkpoints.transformers_state()
    if name:
        del state[name]
    return {**state, **replaced}


PATCHES = "vision_encoder.patch_embed.projection.weight"
NECK = "vision_encoder.neck.conv1.weight"
QUERY = "mask_decoder.transformer.layers.0.self_attn.q_proj.weight"
TABLE = "vision_encoder.layers.0.attn.rel_pos_h"
WRONG = {  # state -> what the sentence says
    "missing": (
        lambda: change(NECK),
        r"missing image_encoder.neck.0.weight \(Meta's names\); not used none; get the file again",
    ),
    "extra": (lambda: change(surplus=np.ones(1)), "missing none; not used surplus;"),
    "both": (
        lambda: change(NECK, surplus=np.ones(1), more=np.ones(1)),
        r"missing image_encoder.neck.0.weight .*; not used more, surplus;",
    ),
    "twice": (
        lambda: change(**{"image_encoder.neck.0.weight": np.ones((1, 1, 1, 1))}),
        "missing none; not used (image_encoder.neck.0|vision_encoder.neck.conv1).weight;",
    ),
    "shape": (lambda: change(**{QUERY: np.ones((32, 31))}), rf"wrong {QUERY} \(32, 31\) instead of \(32, 32\)"),
    "head width": (lambda: change(**{TABLE: np.ones((5, 9))}), "its width 40 is no multiple of its head width 9"),
    "even table": (lambda: change(**{TABLE: np.ones((8, 8))}), "for windows of 3, 4.5 tokens on a grid of 8"),
    "axes": (lambda: change(**{PATCHES: np.ones((40, 3, 16, 16, 1))}), r"has shape \(40, 3, 16, 16, 1\) where 4 axes"),
    "windows": (lambda: change(**{TABLE: np.ones((7, 8))}), "for windows of 3, 4 tokens on a grid of 8"),
    "integers": (
        lambda: change(**{NECK: np.ones((32, 40, 1, 1), np.int32)}),
        f"wrong {NECK} I32 instead of a float of 16 to 64 bits",
    ),
    "not finite": (lambda: change(**{QUERY: np.full((32, 32), np.nan)}), f"{QUERY} holds values that are not finite"),
    "too large": (lambda: change(**{QUERY: np.full((32, 32), 1e300)}), f"{QUERY} holds values that are not finite"),
    "no relative positions": (
        lambda: {name: array for name, array in change().items() if "rel_pos" not in name},
        "has no relative positions",
    ),
    "no position embedding": (lambda: change("vision_encoder.pos_embed"), "missing image_encoder.pos_embed"),
    "SAM 2": (lambda: {"image_encoder.trunk.blocks.0.norm1.weight": np.ones(3)}, "is a SAM 2 or SAM 3; what converts"),
    "LiteMedSAM": (
        lambda: {"image_encoder.layers.0.blocks.0.conv1.c.weight": np.ones(3)},
        "is a SAM with a TinyViT encoder",
    ),
    "SAM-HQ": (lambda: change(**{"mask_decoder.hf_token.weight": np.ones((1, 32))}), "is a SAM-HQ"),
    "adapters": (
        lambda: change(**{"vision_encoder.layers.0.Adapter.conv.weight": np.ones(1)}),
        "is a SAM with adapters in its encoder",
    ),
    "ViT": (lambda: {"cls_token": np.ones((1, 1, 4))}, r"is another model \(its first entry is cls_token\)"),
    "ours": (
        lambda: meta_names.convert(checkpoints.meta_state()),
        "is a file that calsegx wrote, converted already",
    ),
    "empty": (dict, r"is another model \(its first entry is missing\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_content_is_named(tmp_path, out, name):
    state, match = WRONG[name]
    refused(checkpoints.write_safetensors(tmp_path / "model.safetensors", state()), out, DataError, match)


def archive(path, *names):
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, b"0123456789" * 100)
    return path


def cut(path, keep=0.6):
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    return path


def compressed(path, change):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", bytes(range(256)) * 100)
    data = bytearray(path.read_bytes())
    change(data, data.index(b"PK\x01\x02"))
    return content(path, data)


def damage(data, _):
    data[40] |= 6  # the first block's type, which deflate does not know: 30 bytes of header, 10 of name


def encrypt(data, entry):
    data[6] |= 1
    data[entry + 8] |= 1


def recode(data, entry):
    data[8] = data[entry + 10] = 99


def content(path, data):
    path.write_bytes(data)
    return path


FILES = {  # file -> what the sentence says
    "no such file": (lambda path: path / "x.pth", UsageError, "x.pth does not exist"),
    "folder": (lambda path: path, UsageError, "is a folder; give the checkpoint file itself"),
    "empty": (lambda path: content(path / "x.pth", b""), DataError, r"is empty \(0 bytes\)"),
    "web page": (
        lambda path: content(path / "x.pth", b"\n<!DOCTYPE html><html>Sign in</html>"),
        DataError,
        "x.pth is a web page, not a checkpoint: .* download it again",
    ),
    "pointer": (
        lambda path: content(path / "x.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        DataError,
        "is a Git LFS pointer",
    ),
    "text": (lambda path: content(path / "x.pth", b"hello"), DataError, "is neither a PyTorch checkpoint nor"),
    "cut safetensors": (
        lambda path: cut(checkpoints.write_safetensors(path / "x")),
        DataError,
        "is a safetensors file that is cut short or damaged .* download it again",
    ),
    "cut safetensors header": (
        lambda path: cut(checkpoints.write_safetensors(path / "x"), 0.001),
        DataError,
        "is a safetensors file that is cut short or damaged",
    ),
    "cut .pth": (lambda path: cut(archive(path / "x", "a/data.pkl")), DataError, "x is cut short: its end"),
    "flipped .pth": (
        lambda path: content(path / "x", archive(path / "x", "a/data.pkl").read_bytes().replace(b"345", b"355", 1)),
        DataError,
        "is damaged: a/data.pkl in it does not have its checksum",
    ),
    "damaged deflate": (lambda path: compressed(path / "x", damage), DataError, "x is damaged .*invalid block type"),
    "encrypted": (lambda path: compressed(path / "x", encrypt), DataError, "x is damaged .* is encrypted"),
    "unknown method": (lambda path: compressed(path / "x", recode), DataError, "x is damaged .*not supported"),
    "zip": (lambda path: archive(path / "x", "sam.pth"), DataError, "is a zip archive but no PyTorch checkpoint"),
    "TorchScript": (
        lambda path: archive(path / "x", "a/data.pkl", "a/constants.pkl"),
        DataError,
        "is a TorchScript program",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_an_unusable_file_is_named(tmp_path, out, name):
    make, error, match = FILES[name]
    refused(make(tmp_path), out, error, match)


def test_a_checkpoint_of_torch_without_torch_says_what_to_install(tmp_path, out, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    source = archive(tmp_path / "x.pth", "x/data.pkl")
    refused(source, out, UsageError, r"PyTorch is not installed: pip install '\.\[torch\]' .* model.safetensors")


def test_check_without_the_libraries_says_so_first(tmp_path, out, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(tmp_path / "x", out, UsageError, "torch and transformers cannot be found", check=True)


def test_an_existing_output_is_refused_before_the_source_is_read(tmp_path, out):
    out.mkdir(parents=True)
    refused(tmp_path / "no such file", out, UsageError, "exists already; choose another one")


def test_an_output_that_cannot_be_made(tmp_path):
    source = checkpoints.write_safetensors(tmp_path / "s")
    refused(source, source / "weights" / "sam", UsageError, "cannot be made")


@pytest.mark.parametrize(
    ("arguments", "code", "stream", "text"),
    [
        ("--source={source} --output={out}", 0, "stdout", "Wrote 198 arrays, "),
        ("--source={source}.x --output={out}", 2, "stderr", "error: --source="),
        ("--source={cut} --output={out}", 3, "stderr", "is cut short or damaged"),
        ("--output={out}", 2, "stderr", "--source"),
    ],
)
def test_command_line(tmp_path, out, arguments, code, stream, text):
    source = checkpoints.write_safetensors(tmp_path / "model.safetensors")
    broken = cut(checkpoints.write_safetensors(tmp_path / "cut"))
    command = arguments.format(source=source, cut=broken, out=out).split()
    done = subprocess.run(
        [sys.executable, "-m", "weights_conversion.convert_sam", *command], capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    assert text in getattr(done, stream) and "Traceback" not in done.stderr
    assert out.parent.exists() == (code == 0)


# --------------------------------------------------------------------------------------------------- with torch


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def test_meta_and_transformers_give_identical_weights(tmp_path, out, torch):
    convert_sam.convert(checkpoints.write_torch(tmp_path / "sam.pth"), out)
    convert_sam.convert(checkpoints.write_safetensors(tmp_path / "model.safetensors"), tmp_path / "other")
    for name in ("model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    (config, params), (other_config, others) = sam.load(out), sam.load(tmp_path / "other")
    assert config == other_config == checkpoints.CONFIG
    jax.tree.map(np.testing.assert_array_equal, params, others)


def test_a_training_checkpoint_of_medsam(tmp_path, out, torch):
    state = {f"module.{name}": array for name, array in checkpoints.meta_state().items()}
    source = checkpoints.write_torch(tmp_path / "x.pth", {"model": state, "optimizer": {"state": {}}, "epoch": 3})
    plan = convert_sam.convert(source, out)
    assert plan.config.preprocessing == "medsam" and set(plan.ignored) == {"optimizer", "epoch"}
    assert "--preprocessing=sam changes it" in convert_sam.summary(plan, out, "auto")
    convert_sam.convert(checkpoints.write_torch(tmp_path / "plain.pth"), tmp_path / "plain")
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "plain" / "model.safetensors").read_bytes()
    convert_sam.convert(source, tmp_path / "asked", preprocessing="sam")
    assert json.loads((tmp_path / "asked" / "config.json").read_text())["preprocessing"] == "sam"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_checkpoints(tmp_path, out, torch, dtype):
    state = {name: torch.from_numpy(x).to(getattr(torch, dtype)) for name, x in checkpoints.meta_state().items()}
    torch.save(state, tmp_path / "x.pth")
    convert_sam.convert(tmp_path / "x.pth", out)
    flat = weights.flatten(sam.load(out)[1])
    for name, tensor in state.items():
        array = tensor.float().numpy()
        converted = flat[meta_names.to_ours(name)]
        np.testing.assert_array_equal(converted, meta_names.convert({name: array})[meta_names.to_ours(name)])


def test_a_file_of_an_old_torch(tmp_path, out, torch):
    source = checkpoints.write_torch(tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    convert_sam.convert(source, out)
    assert sam.load(out)[0] == checkpoints.CONFIG
    refused(cut(source), tmp_path / "y" / "z", DataError, "is cut short")


def test_foreign_code_is_not_run_and_named(tmp_path, out, torch):
    state = {"model": checkpoints.meta_state(), "args": argparse.Namespace(epochs=3)}
    source = checkpoints.write_torch(tmp_path / "x.pth", state)
    refused(source, out, DataError, "asks for argparse.Namespace, which is code, not weights, and was not run")


def test_a_malicious_pickle_is_not_run(tmp_path, out, torch):
    class Malicious:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    source = content(tmp_path / "x.pth", pickle.dumps({"model": Malicious()}, protocol=2))
    refused(source, out, DataError, r"x.pth .*, (which is code, not weights|.*damaged)")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("state", "match"),
    [
        ([1, 2], "holds a list, not a state dict"),
        ({}, "holds no entries"),
        ({0: np.ones(2)}, "holds an entry that is named 0"),
        ({"epoch": 3}, "is another model"),
        ({**checkpoints.meta_state(), "epoch": 3}, "missing none; not used epoch"),
    ],
)
def test_other_contents_of_a_checkpoint(tmp_path, out, torch, state, match):
    refused(checkpoints.write_torch(tmp_path / "x.pth", state), out, DataError, match)


# ----------------------------------------------------------------------------------------------------- memory

MEASURE = """
import pathlib, re
from weights_conversion import convert_sam
# Not ru_maxrss: that one survives exec, and would begin at the peak of whoever started this.
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
if {kind!r} == "torch":
    import torch
libraries = peak()
convert_sam.convert(pathlib.Path({source!r}), pathlib.Path({out!r}))
print(peak() - libraries)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")
@pytest.mark.parametrize(("kind", "share"), [("safetensors", 0.15), ("torch", 1.1)])
def test_peak_memory(tmp_path, kind, share):
    """On top of the libraries' 0.4 GB, as a share of the file: torch maps all of it, safetensors one array a time."""
    state = {name: np.zeros(shape, np.float32) for name, shape in checkpoints.meta_shapes(presets.VIT_L).items()}
    if kind == "torch":
        pytest.importorskip("torch")
        source = checkpoints.write_torch(tmp_path / "x.pth", state)
    else:
        source = checkpoints.write_safetensors(tmp_path / "x", state)
    code = MEASURE.format(kind=kind, source=str(source), out=str(tmp_path / "out"))
    peak = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert peak < share * source.stat().st_size
