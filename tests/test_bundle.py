"""Bundles: what is written is read back, and nothing that was changed, added, lost or made to do harm is."""

import json
import os
import shutil
import stat
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from calsegx import bundle, configs, files
from calsegx.bundle import check
from calsegx.calibrators import storage
from calsegx.interfaces import DataError, InputError, UsageError
from calsegx.training import model_folder

SEEN = {
    "train": [
        {"case_id": "Doe_John_2", "subject_id": "Doe_John", "fingerprint": "b" * 64},
        {"case_id": "Doe_John_1", "subject_id": "Doe_John", "fingerprint": "a" * 64},
    ],
    "val": [{"case_id": "Roe_Jane_1", "subject_id": "Roe_Jane", "fingerprint": "c" * 64}],
}


def record(**data):
    config = configs.to_dict(configs.TrainConfig())
    config["data"] |= {"root": "/hospital/images", "cache": "/hospital/cache", "splits": "/hospital/folds.json", **data}
    config["model"]["weights"] = "/hospital/sam"
    return {
        "format": 1,
        "calsegx": "0",
        "backbone": "f" * 64,
        "config": config,
        "class_names": ["core", "rim"],
        "class_ids": [[1, 2], [4]],
        "known_ids": [0, 1, 2, 4],
        "channels": ["T1", "T2", "T2"],
        "dataset": "Dataset001",
        "seen": SEEN,
        "training data": "0",
        "training_domain": {"cases": 2, "intensities": {}, "features": None},
    }


@pytest.fixture
def content(tmp_path):
    """The files of a bundle, apart from its checksums."""
    made = tmp_path / "made"
    public = bundle.public_record(record(), bundle.ENCODER)
    model_folder.save(made, {"head": {"kernel": np.arange(6, dtype=np.float32)}}, public)
    kept = json.loads((made / "model" / "model.json").read_text())
    provenance = {"split": "val", "region": "all", "cases": SEEN["val"], "decoder_sha256": kept["decoder_sha256"]}
    params = {"temperature": 2.0, "identifiable": True, "provenance": provenance}
    storage.save(made / "calibrator.json", "temperature", bundle.public_calibrator(params, public))
    manifest = {"format": 1, "calsegx": "0", "license": "mit", "derived_from": "nothing", "encoder": "include"}
    documents = {**bundle.describe(public), bundle.MANIFEST: {**manifest, "calibrator": "temperature"}}
    return {
        **{name: made / "model" / name for name in ("decoder.safetensors", "model.json")},
        **{name: bundle.to_json(document) for name, document in documents.items()},
        "calibrator.json": made / "calibrator.json",
        "LICENSE": b"MIT\n",
        "README.md": b"A card\n",
        "encoder/model.safetensors": safetensors.numpy.save({"x": np.zeros(3, np.float32)}),
        "encoder/config.json": b"{}\n",
    }


@pytest.fixture
def folder(content, tmp_path):
    bundle.write(tmp_path / "bundle", content)
    return tmp_path / "bundle"


@pytest.fixture(autouse=True)
def user_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user_cache"))
    return tmp_path / "user_cache" / "calsegx" / "bundles"


def change(content, name, **values):
    """``content`` with other values in one of its JSON files, written as by export."""
    source = content[name]
    document = json.loads(source if isinstance(source, bytes) else source.read_bytes()) | values
    return content | {name: bundle.to_json(document)}


def change_config(content, group, **values):
    model = files.unseal(content["model.json"].read_bytes())
    (model["config"][group] if group else model["config"]).update(values)
    described = {name: bundle.to_json(document) for name, document in bundle.describe(model).items()}
    return content | described | {"model.json": files.seal(model).encode()}


def zipped(path, entries, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return path


def all_files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def entries(folder):
    return [(path.relative_to(folder).as_posix(), path.read_bytes()) for path in all_files(folder)]


def test_a_folder_and_a_zip_come_back(content, folder, tmp_path):
    bundle.write(tmp_path / "bundle.zip", content)
    compressed = zipped(tmp_path / "by_hand.zip", entries(folder), zipfile.ZIP_DEFLATED)
    for path in (folder, tmp_path / "bundle.zip", compressed):
        found = bundle.open_bundle(path)
        assert entries(found) == entries(folder)
        params, model = model_folder.load(found)
        np.testing.assert_array_equal(params["head"]["kernel"], np.arange(6))
        assert model["config"]["model"]["weights"] == str(found / "encoder")
    (folder / ".gitattributes").write_text("a clone of a repository has this")
    assert bundle.resolve(folder) == folder and bundle.resolve(tmp_path) == tmp_path


def test_names_and_paths_do_not_go_along():
    public = bundle.public_record(record(), "encoder")
    assert public["training_domain"] == record()["training_domain"]
    text = json.dumps(public)
    assert not [word for word in ("Doe", "Roe", "hospital", "training data") if word in text]
    assert public["seen"]["train"] == [
        {"case_id": "train case 1", "subject_id": "subject 1", "fingerprint": "a" * 64},
        {"case_id": "train case 2", "subject_id": "subject 1", "fingerprint": "b" * 64},
    ]
    assert public["seen"]["val"][0]["subject_id"] == "subject 2"
    with pytest.raises(UsageError, match="needs code from outside calsegx"):
        bundle.public_record(record(intensity="mine:function"), "")


@pytest.mark.parametrize("harm", ["change", "cut", "empty", "delete", "link"])
def test_harm_to_any_file_is_found(harm, folder, tmp_path):
    for path in all_files(folder):
        original = path.read_bytes()
        middle = len(original) // 2
        harmed = {
            "change": original[:middle] + bytes([original[middle] ^ 1]) + original[middle + 1 :],
            "cut": original[:-2],
            "empty": b"",
        }
        path.unlink()
        if harm in harmed:
            path.write_bytes(harmed[harm])
        elif harm == "link":
            (tmp_path / "elsewhere").write_bytes(original)
            path.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(DataError, match="The bundle .*(again|cannot have)"):
            bundle.open_bundle(folder)
        path.unlink(missing_ok=True)
        path.write_bytes(original)
    bundle.open_bundle(folder)


@pytest.mark.parametrize("name", ["more.json", "encoder/more.bin", "more/more.json"])
def test_a_file_too_many_is_refused(name, folder):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    with pytest.raises(DataError, match="more"):
        bundle.open_bundle(folder)


@pytest.mark.parametrize("name", check.REQUIRED)
def test_an_incomplete_bundle_is_not_written(name, content, tmp_path):
    del content[name]
    with pytest.raises(DataError, match=f"lacks {name}"):
        bundle.write(tmp_path / "bundle.zip", content)
    assert {path.name for path in tmp_path.iterdir()} <= {"made", "elsewhere"}


def test_what_the_files_say_must_be_what_the_model_does(content, tmp_path):
    def refused(match, changed):
        with pytest.raises(DataError, match=match):
            bundle.write(tmp_path / "bundle", changed)

    refused("has the format 2, but this calsegx knows 1", change(content, "bundle.json", format=2))
    refused("has the format '1'", change(content, "bundle.json", format="1"))
    refused("does not say its license", change(content, "bundle.json", license=" "))
    refused("does not say its derived_from", change(content, "bundle.json", derived_from=""))
    refused("should hold the calibrator None, but holds temperature", change(content, "bundle.json", calibrator=None))
    refused("'channels': .* in preprocessing.json", change(content, "preprocessing.json", channels=["T2", "T1", "T1"]))
    refused("'version': 0", change(content, "preprocessing.json", version=0))
    refused("in prompt_protocol.json", change(content, "prompt_protocol.json", protocol="gt_box"))
    refused("in labels.json", change(content, "labels.json", classes=[]))
    refused("holds no object", content | {"labels.json": b"[]"})
    refused("JSON that cannot be used .KeyError", content | {"bundle.json": b'{"format": 1}'})
    for group, values in (
        ("model", {"backbone": "os:system"}),
        ("data", {"intensity": "os:system"}),
        ("data", {"layout": "os:system"}),
        ("", {"loss": "sam + os:system"}),
        ("fisher", {"loss": "os:system"}),
    ):
        refused("asks for code from outside", change_config(content, group, **values))
    for weights in ("/etc", "../elsewhere", "encoder/..", ""):
        refused("names files outside of it", change_config(content, "model", weights=weights))
    refused("names files outside of it", change_config(content, "data", root="/etc"))
    params = storage.load(content["calibrator.json"])[1]
    params["provenance"]["decoder_sha256"] = "0"
    storage.save(tmp_path / "other.json", "temperature", params)
    refused("fitted on another decoder", content | {"calibrator.json": tmp_path / "other.json"})


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "encoder/../../evil", "a\\b", "encoder", ".hidden", "C:x"])
def test_a_zip_leads_nowhere_else(name, folder, user_cache, tmp_path):
    path = zipped(tmp_path / "evil.zip", [*entries(folder), (name, b"evil")])
    with pytest.raises(DataError, match=r"way out of it|holds a file twice|lacks|cannot have|does not list"):
        bundle.open_bundle(path)
    assert not list(user_cache.glob("*")) and not list(tmp_path.rglob("evil"))


def test_links_doubles_and_bombs_in_a_zip(folder, user_cache, tmp_path):
    def refused(match, added, compression=zipfile.ZIP_STORED):
        with pytest.raises(DataError, match=match):
            bundle.open_bundle(zipped(tmp_path / "evil.zip", [*entries(folder), *added], compression))
        assert not list(user_cache.glob("*"))

    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    refused("a link", [(link, "/etc/passwd")])
    refused("holds a file twice", [("readme.md", b"A card\n")])
    refused("refused unopened", [("bomb", bytes(10**7))], zipfile.ZIP_DEFLATED)
    refused("refused unopened", [(f"file{n}", b"") for n in range(100)])

    path = zipped(tmp_path / "overlapping.zip", [("one", bytes(1000))])
    data = bytearray(path.read_bytes())
    start = data.index(b"PK\1\2")
    data[start + 20 : start + 24] = (10**6).to_bytes(4, "little")  # the central directory's compressed size
    path.write_bytes(data)
    with pytest.raises(DataError, match="refused unopened"):
        bundle.open_bundle(path)


def test_damage_to_a_zip_is_found(content, user_cache, tmp_path):
    path = tmp_path / "bundle.zip"
    bundle.write(path, content)
    original, good = path.read_bytes(), entries(bundle.open_bundle(path))
    rng = np.random.default_rng(0)
    for position in rng.choice(len(original), 150, replace=False):
        path.write_bytes(original[:position] + bytes([original[position] ^ 0x55]) + original[position + 1 :])
        try:
            found = bundle.open_bundle(path)
        except DataError:
            continue
        assert entries(found) == good  # a date or an attribute
    path.write_bytes(original[: len(original) // 2])
    with pytest.raises(DataError, match="no whole zip of a model bundle"):
        bundle.open_bundle(path)
    path.write_bytes(original)
    unpacked = bundle.open_bundle(path)
    (unpacked / "README.md").write_text("changed in the cache")
    assert entries(bundle.open_bundle(path)) == good
    assert not [name for name in os.listdir(user_cache) if name.startswith(".")]


def test_a_full_disk_leaves_nothing(content, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(InputError, match="cannot be written .No space left on device"):
        bundle.write(tmp_path / "bundle", content)
    assert {path.name for path in tmp_path.iterdir()} == {"made"}
