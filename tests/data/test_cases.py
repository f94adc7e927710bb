"""Cases, splits and classes."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from calsegx import configs
from calsegx.data import cases, classes, splits
from calsegx.interfaces import Case, DataError, Dataset, UsageError


def make_case(case_id, subject=None, split="", scanner="A", label=True):
    return Case(
        case_id, subject or case_id, {"T1": Path(f"{case_id}.nii")}, Path("label.nii") if label else None,
        split, scanner=scanner,
    )  # fmt: skip


def make_dataset(*entries, channels=("T1",)):
    return Dataset(Path("root"), tuple(entries), channels, {})


def split_of(dataset):
    return {case.case_id: case.split for case in dataset.cases}


def write_dataset(root, lines, header="case_id image:T1 label split scanner"):
    table = [header, *lines]
    (root / "cases.tsv").write_text("\n".join(line.replace(" ", "\t") for line in table) + "\n")
    for line in lines:
        for name in line.split():
            if name.endswith(".nii"):
                (root / name).write_bytes(name.encode())
    return configs.DataConfig(root=str(root))


def test_assign_by_subject():
    entries = [make_case(f"s{i}_{v}", f"s{i}", scanner="AB"[i % 2]) for i in range(20) for v in "xy"]
    assigned = splits.assign(make_dataset(*entries), val_fraction=0.15, test_fraction=0.25)
    by_subject = {}
    for case in assigned.cases:
        by_subject.setdefault(case.subject_id, set()).add(case.split)
    assert all(len(found) == 1 for found in by_subject.values())
    counts = {split: sum(found == {split} for found in by_subject.values()) for split in ("train", "val", "test")}
    assert counts == {"train": 12, "val": 3, "test": 5}
    for split in ("train", "val", "test"):  # both scanners are in every split
        assert {case.scanner for case in assigned.cases if case.split == split} == {"A", "B"}


@pytest.mark.parametrize("seed", range(5))
def test_assign_draws_evenly_from_every_domain(seed):
    entries = [make_case(f"s{i}", scanner="ABCDE"[i % 5]) for i in range(40)]
    assigned = splits.assign(make_dataset(*entries), val_fraction=0.125, test_fraction=0.25, seed=seed)
    for split, each in (("train", 5), ("val", 1), ("test", 2)):
        found = [case.scanner for case in assigned.cases if case.split == split]
        assert sorted(found) == sorted("ABCDE" * each)


def test_assign_is_a_function_of_subjects_and_seed():
    entries = [make_case(f"s{i}") for i in range(12)]
    first = split_of(splits.assign(make_dataset(*entries), 0.2, 0.2))
    assert split_of(splits.assign(make_dataset(*reversed(entries)), 0.2, 0.2)) == first
    assert split_of(splits.assign(make_dataset(*entries), 0.2, 0.2, seed=1)) != first


def test_assign_keeps_what_the_dataset_says():
    entries = [make_case(f"s{i}") for i in range(10)]
    entries += [make_case("t1", "t", "test", "A"), make_case("t2", "t", "test", "B"), make_case("t3", "t")]
    assigned = split_of(splits.assign(make_dataset(*entries), 0.2, 0.5))
    assert [name for name, split in assigned.items() if split == "test"] == ["t1", "t2", "t3"]
    assert sorted(assigned.values()).count("val") == 2
    full = make_dataset(make_case("a", split="train"), make_case("b", split="val"))
    assert splits.assign(full, 0.2, 0.2) == full


@pytest.mark.parametrize(("count", "expected"), [(1, (1, 0, 0)), (2, (1, 0, 1)), (3, (1, 1, 1)), (4, (2, 1, 1))])
def test_assign_few_subjects(count, expected):
    found = list(split_of(splits.assign(make_dataset(*map(make_case, "abcd"[:count])), 0.15, 0.25)).values())
    assert tuple(found.count(split) for split in ("train", "val", "test")) == expected


def test_zero_fractions_draw_nothing():
    assert set(split_of(splits.assign(make_dataset(*map(make_case, "abcd")), 0.0, 0.0)).values()) == {"train"}


@pytest.mark.parametrize("pair", [("train", "test"), ("train", "val"), ("val", "test")])
def test_leaks_are_refused(pair):
    dataset = make_dataset(make_case("a1", "a", pair[0]), make_case("b"), make_case("a2", "a", pair[1]))
    with pytest.raises(DataError, match=r"Subject 'a' is in the splits .*case 'a2'"):
        splits.assign(dataset, 0.2, 0.2)


def test_load_and_select(tmp_path):
    config = write_dataset(
        tmp_path,
        ["a a.nii a_l.nii train GE", "b b.nii b_l.nii train SE", "c c.nii c_l.nii val GE", "d d.nii d_l.nii test SE"],
    )
    dataset = cases.load(config)
    assert cases.domains(dataset, "scanner") == ("GE", "SE")
    assert cases.domain(dataset.cases[0], "centre") == "unknown"
    assert [c.case_id for c in cases.select(dataset, config, "train")] == ["a", "b"]
    source = dataclasses.replace(config, source="GE")
    assert [c.case_id for c in cases.select(dataset, source, "train")] == ["a"]
    assert [c.case_id for c in cases.select(dataset, source, "test")] == ["d"]
    with pytest.raises(DataError, match=r"no case in the split 'val' with --config.data.source 'SE'.*1 test case"):
        cases.select(dataset, dataclasses.replace(config, source="SE"), "val")
    with pytest.raises(DataError, match="no case in the split 'test' with the domain 'GE'"):
        cases.select(dataset, config, "test", "GE")
    with pytest.raises(UsageError, match=r"source='GEE' is no scanner of the dataset; it has GE, SE. Did you"):
        cases.select(dataset, dataclasses.replace(config, source="GEE"), "test")


def test_select_wants_labels_to_train_on():
    dataset = make_dataset(make_case("a", split="train", label=False), make_case("b", split="test", label=False))
    assert len(cases.select(dataset, configs.DataConfig(), "test")) == 1
    with pytest.raises(DataError, match="Case 'a' of the split 'train' has no label"):
        cases.select(dataset, configs.DataConfig(), "train")


def test_load_checks(tmp_path):
    with pytest.raises(UsageError, match=r"--config.data.root is empty"):
        cases.load(configs.DataConfig())
    config = write_dataset(tmp_path, ["a scan_a.nii a_l.nii", "b scan_b.nii b_l.nii"])
    (tmp_path / "scan_b.nii").unlink()
    with pytest.raises(DataError, match=r"scan_b.nii \(case b, T1\) does not exist.*'scan_a.nii'"):
        cases.load(config)
    config = write_dataset(tmp_path, ["a a.nii a.nii"])
    with pytest.raises(DataError, match=r".*a.nii is given as T1 of case 'a' and as label of case 'a'"):
        cases.load(config)
    config = write_dataset(tmp_path, ["p1 a.nii b.nii", "P1 c.nii d.nii"])
    with pytest.raises(DataError, match="Cases 'p1' and 'P1' .* upper and lower case"):
        cases.load(config)
    config = write_dataset(tmp_path, ["../x a.nii b.nii"])
    with pytest.raises(DataError, match="cannot name a file"):
        cases.load(config)


def test_channels():
    dataset = make_dataset(channels=("T1", "T1c", "T2", "FLAIR"))
    config = configs.DataConfig()
    assert cases.channels(config, dataset) == ("T1", "T1c", "T2")
    assert cases.channels(dataclasses.replace(config, channels="FLAIR"), dataset) == ("FLAIR",) * 3
    assert cases.channels(dataclasses.replace(config, channels="FLAIR, T1c,T1"), dataset) == ("FLAIR", "T1c", "T1")
    assert cases.channels(config, make_dataset(channels=("CT",))) == ("CT",) * 3
    with pytest.raises(UsageError, match=r"names 'FLIAR'; the dataset has T1, T1c, T2, FLAIR. Did you"):
        cases.channels(dataclasses.replace(config, channels="FLIAR"), dataset)
    assert cases.channels(config, make_dataset(channels=("T1", "T2"))) == ("T1", "T2", "T2")
    with pytest.raises(UsageError, match="one or three channels"):
        cases.channels(dataclasses.replace(config, channels="T1,T2"), make_dataset(channels=("T1", "T2")))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a x.nii 0 x.nii 1 l.nii"], None),
        (["a x.nii 1 x.nii 1 l.nii"], "x.nii is given as T1 of case 'a' and as T2 of case 'a'"),
        (["a x.nii 0 x.nii - l.nii"], "x.nii is given as T1 of case 'a' and as T2 of case 'a'"),
        (["a x.nii 0 y.nii - x.nii"], "x.nii is given as T1 of case 'a' and as label of case 'a'"),
        (
            ["a x.nii 0 x.nii 1 l.nii", "b x.nii 2 x.nii 3 m.nii"],
            "x.nii is given as T1 of case 'a' and as T1 of case 'b'",
        ),
    ],
)
def test_only_channels_of_one_case_share_a_file(tmp_path, lines, message):
    config = write_dataset(tmp_path, lines, "case_id image:T1 volume:T1 image:T2 volume:T2 label")
    table = tmp_path / "cases.tsv"
    table.write_text(table.read_text().replace("-", ""))
    if message is None:
        assert cases.load(config).cases[0].volumes == {"T1": 0, "T2": 1}
        return
    with pytest.raises(DataError, match=message):
        cases.load(config)


def test_fingerprint(tmp_path):
    paths = [tmp_path / name for name in ("a", "b", "label")]
    for path in paths:
        path.write_bytes(path.name.encode())
    case = Case("c", "c", {"T1": paths[0], "T2": paths[1]}, paths[2], "")
    first = cases.fingerprint(case)
    assert first == cases.fingerprint(dataclasses.replace(case, split="test", scanner="GE"))
    swapped = dataclasses.replace(case, images={"T1": paths[1], "T2": paths[0]})
    unlabelled = dataclasses.replace(case, label=None)
    paths[2].write_bytes(b"other")
    assert len({first, cases.fingerprint(case), cases.fingerprint(swapped), cases.fingerprint(unlabelled)}) == 4
    paths[0].unlink()
    with pytest.raises(DataError, match="case 'c', T1"):
        cases.fingerprint(case)


def test_fingerprint_of_several_volumes(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"x")
    case = Case("c", "c", dict.fromkeys(("T1", "T2"), tmp_path / "x"), None, "", volumes={"T1": 0, "T2": 1})
    first = cases.fingerprint(case)
    assert cases.fingerprint(dataclasses.replace(case, volumes={"T1": 1, "T2": 0})) != first
    hashed = []
    digest = cases.hashlib.file_digest
    monkeypatch.setattr(cases.hashlib, "file_digest", lambda *args: hashed.append(1) or digest(*args))
    assert cases.fingerprint(case) == first
    assert len(hashed) == 1  # a 4-D file is large


LABELS = {"background": 0, "core": 1, "oedema": 2, "rim": 4}


def test_classes():
    every = classes.parse("", LABELS)
    assert every.names == ("core", "oedema", "rim")
    assert every.ids == ((1,), (2,), (4,))
    merged = classes.parse("tumour=1+4, rest = 2", {})
    assert merged.names == ("tumour", "rest")
    voxels = np.array([[0, 1, 2, 4]])
    indices = classes.to_indices(merged, voxels, Path("seg.nii"))
    assert indices.dtype == np.uint8
    np.testing.assert_array_equal(indices, [[0, 1, 2, 1]])
    np.testing.assert_array_equal(classes.to_file_ids(merged, indices), [[0, 1, 2, 1]])
    back = classes.to_file_ids(every, classes.to_indices(every, voxels, Path("seg.nii")))
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(back, voxels)
    one = classes.parse("core=1", LABELS)  # declared ids of no class are background
    np.testing.assert_array_equal(classes.to_indices(one, voxels, Path("seg.nii")), [[0, 1, 0, 0]])


def test_ids_beyond_a_byte():
    brain = classes.parse("cortex=1003+2003", {})
    np.testing.assert_array_equal(classes.to_indices(brain, np.array([2003, 0]), Path("x")), [1, 0])
    assert classes.to_file_ids(brain, np.array([1, 0], np.uint8)).tolist() == [1003, 0]


def test_unknown_ids():
    with pytest.raises(DataError, match=r"seg.nii holds the label ids -1, 3; expected only 0, 1, 2, 4"):
        classes.to_indices(classes.parse("", LABELS), np.array([3, 1, -1]), Path("seg.nii"))


@pytest.mark.parametrize(
    ("spec", "labels", "message"),
    [
        ("", {}, r"--config.data.classes; expected name=ids"),
        ("", {"background": 0}, "declares no labels"),
        ("tumour", LABELS, "'tumour' is not a class"),
        ("tumour=", LABELS, "'tumour=' is not a class"),
        ("=1", LABELS, "'=1' is not a class"),
        ("tumour=1+x", LABELS, "not a class"),
        ("a=1,a=2", LABELS, "the name 'a' is taken"),
        ("a=1,b=1", LABELS, "id 1 stands twice"),
        ("a=0", LABELS, "id 0 is the background"),
        ("a=3", LABELS, r"uses the ids \[3\]; the dataset declares background=0, core=1"),
    ],
)
def test_bad_specs(spec, labels, message):
    with pytest.raises(UsageError, match=message):
        classes.parse(spec, labels)
