"""Folds: the protocols, the leak check, the file, and how a run takes a fold."""

import dataclasses
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calsegx import configs
from calsegx.data import cases, classes, folds, phantoms, splits
from calsegx.interfaces import Case, DataError, Dataset, UsageError


def make_case(case_id, subject, centre="", label=True, split=""):
    path = Path(f"{case_id}.nii")
    return Case(case_id, subject, {"T1": path}, path if label else None, split, centre=centre)


def make_dataset(*entries):
    return Dataset(Path("root"), tuple(entries), ("T1",), {})


def centres(text):
    """One case per letter, of the centre that it names."""
    return make_dataset(*(make_case(f"c{i:02d}", f"s{i:02d}", centre) for i, centre in enumerate(text)))


def make(dataset, protocol, volumes=None, **options):
    return folds.make(dataset, protocol, folds.Options(**{"domain": "centre", **options}), volumes)


def subjects_of(dataset, ids):
    return {case.subject_id for case in dataset.cases if case.case_id in set(ids)}


def centres_of(dataset, ids):
    return {case.centre for case in dataset.cases if case.case_id in set(ids)}


@st.composite
def studies(draw):
    """Datasets of one to three centres: 6 to 20 persons each, with one to three visits, and lesion volumes."""
    entries, volumes = [], {}
    for centre in "ABC"[: draw(st.integers(1, 3))]:
        for person in range(draw(st.integers(6, 20))):
            for visit in range(draw(st.integers(1, 3))):
                case_id = f"{centre}{person}_{visit}"
                entries.append(make_case(case_id, f"{centre}{person}", centre))
                volumes[case_id] = float(draw(st.integers(1, 1000)))
    return make_dataset(*entries), volumes


PROTOCOLS = st.sampled_from(["random", "kfold", "leave_one_domain_out", "domain"])


@settings(deadline=None, max_examples=60)
@given(studies(), PROTOCOLS, st.integers(0, 3), st.integers(2, 6), st.randoms())
def test_folds_are_disjoint_by_subject_and_depend_on_the_seed_alone(study, protocol, seed, count, shuffle):
    dataset, volumes = study
    if len({case.centre for case in dataset.cases}) == 1 and protocol in folds.BY_DOMAIN:
        with pytest.raises(DataError, match="All cases of root have the centre 'A'"):
            make(dataset, protocol)
        return
    found = make(dataset, protocol, volumes, seed=seed, folds=count)
    for fold in found:
        splits.check(dataset, fold, "here")
        people = [subjects_of(dataset, fold[part]) for part in splits.PARTS]
        assert all(people) and len(set.union(*people)) == sum(map(len, people))
        if protocol != "domain":  # there, only two domains are used
            assert sorted(sum((fold[part] for part in splits.PARTS), [])) == sorted(volumes)
    reordered = list(dataset.cases)
    shuffle.shuffle(reordered)
    assert make(make_dataset(*reordered), protocol, volumes, seed=seed, folds=count) == found
    if protocol in ("kfold", "leave_one_domain_out"):  # every case is test once
        assert sorted(sum((fold["test"] for fold in found), [])) == sorted(volumes)


@settings(deadline=None, max_examples=60)
@given(studies(), st.integers(2, 6), st.integers(0, 3))
def test_kfold_is_even_within_one_subject(study, count, seed):
    dataset, volumes = study
    found = make(dataset, "kfold", volumes, folds=count, seed=seed)
    for centre in sorted({case.centre for case in dataset.cases}):
        people = sorted({case.subject_id for case in dataset.cases if case.centre == centre})
        load = {name: np.mean([volumes[c.case_id] for c in dataset.cases if c.subject_id == name]) for name in people}
        largest = sorted(people, key=lambda name: load[name])[len(people) * 3 // 4 :]
        distinct = len(set(load.values())) == len(people)  # of equal loads the seed decides which is the larger
        for group in (people, largest) if distinct else (people,):
            in_test = [len(subjects_of(dataset, fold["test"]) & set(group)) for fold in found]
            assert max(in_test) - min(in_test) <= 1


@pytest.mark.parametrize("seed", range(4))
def test_random_draws_every_centre_and_every_load(seed):
    dataset = centres("A" * 40 + "B" * 40)
    volumes = {case.case_id: float(i % 40) for i, case in enumerate(dataset.cases)}
    (fold,) = make(dataset, "random", volumes, val_fraction=0.2, test_fraction=0.2, seed=seed)
    for part, each in (("train", 24), ("val", 8), ("test", 8)):
        for centre in "AB":
            mine = [volumes[c.case_id] for c in dataset.cases if c.case_id in fold[part] and c.centre == centre]
            assert len(mine) == each
            by_load = np.histogram(mine, bins=[0, 10, 20, 30, 40])[0]
            assert np.abs(by_load - each / 4).max() <= (2 if part == "train" else 1)


def test_without_loads_only_the_domain_counts():
    dataset = centres("AB" * 10)
    assert make(dataset, "kfold") == make(dataset, "kfold", {})
    assert make(dataset, "kfold") != make(dataset, "kfold", seed=1)


def test_the_seed_shuffles_within_a_bin_of_loads():
    dataset = centres("A" * 24)
    volumes = {case.case_id: float(i + 1) for i, case in enumerate(dataset.cases)}
    first, second = (make(dataset, "kfold", volumes, folds=3, seed=seed) for seed in (0, 1))
    assert first != second
    for fold in (*first, *second):  # two of each quartile of six
        assert sorted((volumes[case_id] - 1) // 6 for case_id in fold["test"]) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_leave_one_domain_out_and_the_scanner_split():
    dataset = centres("A" * 8 + "B" * 8 + "C" * 8)
    found = make(dataset, "leave_one_domain_out")
    assert [fold["name"] for fold in found] == ["without A", "without B", "without C"]
    for fold, centre in zip(found, "ABC", strict=True):
        assert centres_of(dataset, fold["test"]) == {centre} and len(fold["test"]) == 8
        assert centres_of(dataset, fold["train"]) == set("ABC") - {centre}
    found = make(dataset, "domain")
    assert [fold["name"] for fold in found] == ["A to the others", "B to the others", "C to the others"]
    for fold, source in zip(found, "ABC", strict=True):
        assert centres_of(dataset, [*fold["train"], *fold["val"]]) == {source}
        own = [case.centre for case in dataset.cases if case.case_id in fold["test"]]
        assert [own.count(centre) for centre in "ABC"] == [2 if centre == source else 8 for centre in "ABC"]
    assert make(dataset, "domain", source="B") == found[1:2]
    (pair,) = make(dataset, "domain", source="B", target="A")
    assert pair["name"] == "B to A" and centres_of(dataset, pair["test"]) == {"A", "B"}
    assert [fold["name"] for fold in make(dataset, "domain", target="A")] == ["B to A", "C to A"]


def test_the_paired_test_of_several_scanners_is_of_people_whom_any_of_them_has_seen():
    several = [make_case(f"p{i}{centre}", f"p{i}", centre) for i, other in enumerate("BBCC") for centre in "A" + other]
    alone = [make_case(f"{centre}{i}", f"{centre}{i}", centre) for centre in "ABC" for i in range(6)]
    there = make(make_dataset(*several, *alone), "domain", source="A")[0]
    tested = {case_id for case_id in there["test"] if case_id.endswith("A") and case_id.startswith("p")}
    assert len(tested) == 2  # of ten people the share of the test, all of them seen elsewhere too
    trained = {case_id[:-1] for case_id in there["train"] + there["val"] if case_id.startswith("p")}
    assert trained and not {f"{name}{centre}" for name in trained for centre in "BC"} & set(there["test"])


def seen_by_a_and(others):
    """A dataset in which A has seen everybody, and with each person one more domain: a letter of ``others``."""
    people = [(f"p{i:02d}", letter) for i, other in enumerate(others) for letter in "A" + other]
    return make_dataset(*(make_case(person + letter, person, letter) for person, letter in people))


def test_every_target_has_its_share_of_the_paired_test():
    for others, share in (("B" * 12 + "CC" + "D" * 12, "BBCCDD"), ("B" * 9 + "CC", "BC"), ("B" * 9 + "C" * 6, "BBCC")):
        test = make(seen_by_a_and(others), "domain", source="A", test_fraction=len(share) / len(others))[0]["test"]
        assert sorted(case_id[-1] for case_id in test if not case_id.endswith("A")) == list(share)
    alone = [make_case(f"{centre}{i}", f"{centre}{i}", centre) for centre in "BD" for i in range(3)]
    seen = make_dataset(*seen_by_a_and("BBDDD" + "C" * 8).cases, *alone)
    fold = make(seen, "domain", source="A", test_fraction=2 / 13)[0]
    assert centres_of(seen, fold["test"]) == set("ABCD")  # C first: people of B and D are tested anyway
    with pytest.raises(DataError, match=r"'D' is tested in 'A to the others': 'A' has seen all.* 2 of 16 are tested"):
        make(seen_by_a_and("B" * 6 + "CC" + "D" * 8), "domain", source="A", test_fraction=2 / 16)


def test_people_seen_by_both_scanners_are_the_paired_test_first():
    both = [make_case(f"p{i}{centre}", f"p{i}", centre) for i in range(4) for centre in "AB"]
    dataset = make_dataset(*both, *(make_case(f"a{i}", f"a{i}", "A") for i in range(8)))
    there, back = make(dataset, "domain")
    assert len(there["test"]) == 6 and all(case_id.startswith("p") for case_id in there["test"])  # 3 of 12, twice
    left = subjects_of(dataset, [f"p{i}A" for i in range(4)]) - subjects_of(dataset, there["test"])
    assert f"{left.pop()}B" not in sum((there[part] for part in splits.PARTS), [])
    assert centres_of(dataset, [*back["train"], *back["val"]]) == {"B"}
    assert {f"a{i}" for i in range(8)} < set(back["test"]) and len(back["test"]) == 10
    with pytest.raises(DataError, match="Without the centre 'A' 0 subject.* 12 have cases there; use"):
        make(dataset, "leave_one_domain_out")


def test_only_labelled_cases_are_drawn():
    dataset = centres("AAAABBBB")
    more = make_dataset(*dataset.cases, make_case("x", "x", "A", label=False))
    assert make(more, "kfold") == make(dataset, "kfold")
    bare = make_dataset(*(dataclasses.replace(case, label=None) for case in dataset.cases))
    assert make(bare, "kfold") == make(dataset, "kfold")


@pytest.mark.parametrize(
    ("text", "protocol", "options", "error", "sentence"),
    [
        ("    ", "domain", {}, DataError, "4 case.* have no centre, such as 'c0.'; name the centre of every case"),
        ("AA  ", "leave_one_domain_out", {}, DataError, "2 case.* have no centre, such as 'c0.'"),
        ("AAAA", "domain", {}, DataError, "All cases of root have the centre 'A', so no other is left"),
        (
            "AAAB",
            "leave_one_domain_out",
            {},
            DataError,
            "The centre 'B' of root has 1 subject; a domain needs",
        ),
        ("AABB", "domain", {}, DataError, "fold 'A to B' of 4 subject.* has no case in val"),
        ("AA", "kfold", {"folds": 2}, DataError, "fold '1 of 2' of 2 subject.* has no case in val"),
        ("A", "random", {}, DataError, "fold 'random' of 1 subject.* has no case in val"),
        ("AAAA", "kfold", {"folds": 5}, UsageError, "--folds=5 must be from 2 to the number of subjects, 4"),
        ("AAAA", "kfold", {"folds": 1}, UsageError, "--folds=1 must be"),
        ("AAABBB", "domain", {"source": "a"}, UsageError, "--source='a' is no centre of the dataset; it has A, B"),
        ("AAABBB", "domain", {"source": "B", "target": "B"}, UsageError, "--source and --target are both 'B'"),
        ("AAAA", "random", {"val_fraction": 0.0}, UsageError, "--val_fraction=0.0 must be above 0"),
        ("AAAA", "random", {"test_fraction": float("nan")}, UsageError, "--test_fraction=nan must be above 0"),
        ("AAAA", "random", {"val_fraction": 0.5, "test_fraction": 0.5}, UsageError, "leave subjects to train on"),
    ],
)
def test_small_or_incomplete_datasets_are_refused(text, protocol, options, error, sentence):
    dataset = centres(text.replace(" ", "-"))
    dataset = make_dataset(*(dataclasses.replace(c, centre=c.centre.replace("-", "")) for c in dataset.cases))
    with pytest.raises(error, match=sentence):
        make(dataset, protocol, **options)


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_a_part_without_a_positive_case_is_refused(part):
    dataset = centres("A" * 12)
    (fold,) = make(dataset, "random")
    volumes = {case.case_id: 0.0 for case in dataset.cases}
    with pytest.raises(DataError, match="no case with foreground in train"):
        make(dataset, "random", volumes)
    # One lesion cannot be in three parts.
    volumes[fold[part][0]] = 5.0
    with pytest.raises(DataError, match=r"fold 'random' of 12 subject.* has no case with foreground in \w+;"):
        make(dataset, "random", volumes)


def test_foreground_ml(tmp_path):
    root = tmp_path / "data"
    phantoms.write_dataset(root, train=1, val=0, test=0, scale=0.35, processes=1)
    (case,) = cases.read(root).cases
    image = nibabel.load(case.label)
    for spec, ids in (("", [1, 2, 3]), ("rest=2+3", [2, 3])):
        class_map = classes.parse(spec, cases.read(root).labels)
        expected = np.isin(np.asarray(image.dataobj), ids).sum() * np.prod(image.header.get_zooms()) / 1000
        assert folds.foreground_ml(case, class_map) == pytest.approx(expected, rel=1e-5) and expected > 0


LEAKS = [
    ({"train": ["a1", "b1"], "val": ["a2"]}, "x: subject 'a' is in train .case 'a1'. and in val .case 'a2'."),
    ({"train": ["b1"], "val": ["c1"], "test": ["b1"]}, "x: case 'b1' is in train and again in test"),
    ({"train": ["b1", "b1"], "val": ["c1"]}, "x: case 'b1' is in train and again in train"),
    ({"train": ["b1"], "val": ["d1"]}, "x: subject 'd' is in test .case 'd2'. and in val .case 'd1'."),
    ({"train": ["b1"], "val": ["c1"], "test": ["e1"]}, "x: cases 'b1' in train and 'e1' in test hold the same image"),
]


@pytest.mark.parametrize(("fold", "sentence"), LEAKS)
def test_leaks_are_refused(fold, sentence):
    names = ("a1", "a2", "b1", "c1", "d1", "d2", "e1")
    entries = [make_case(name, name[0], split="test" if name == "d2" else "") for name in names]
    hashes = {case.case_id: {case.case_id, "same" if case.case_id in ("b1", "e1") else ""} - {""} for case in entries}
    with pytest.raises(DataError, match=sentence):
        splits.check(make_dataset(*entries), fold, "x", hashes)


def test_the_same_image_of_one_subject_or_in_one_part_is_no_leak():
    entries = [make_case(name, name[0]) for name in ("a1", "a2", "b1", "c1")]
    hashes = dict.fromkeys(("a1", "a2", "b1"), {"same"}) | {"c1": {"other"}}
    splits.check(make_dataset(*entries), {"train": ["a1", "a2", "b1"], "val": ["c1"]}, "x", hashes)


def test_image_hashes_see_the_voxels(tmp_path):
    voxels = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    stored = {"a.nii": voxels, "b.nii.gz": voxels, "c.nii": voxels.astype(np.float32), "d.nii": voxels + 1}
    for name, data in stored.items():
        image = nibabel.Nifti1Image(data, np.diag([1, 1, 3, 1]))
        image.header["descrip"] = name  # another header is no other image
        image.to_filename(tmp_path / name)
    hashes = [splits.image_hashes(Case(name, name, {"T1": tmp_path / name}, None, "")) for name in stored]
    assert hashes[0] == hashes[1] == hashes[2] != hashes[3]
    path = tmp_path / "b.nii.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"b.nii.gz is truncated or damaged"):
        splits.image_hashes(Case("b", "b", {"T1": path}, None, ""))


def write_dataset(root, test_folder=False):
    """Six cases of three persons in a hand-written table; with ``test_folder`` one more that is test and unlabelled."""
    root.mkdir()
    lines = ["case_id\tsubject_id\timage:T1\tlabel\tsplit"]
    lines += [f"p{i}_{v}\tp{i}\tp{i}_{v}.nii\tp{i}_{v}_l.nii\ttrain" for i in range(3) for v in "ab"]
    if test_folder:
        lines.append("q\tq\tq.nii\t\ttest")
    (root / "cases.tsv").write_text("\n".join(lines))
    for line in lines[1:]:
        for name in line.split("\t")[2:4]:
            if name:
                (root / name).write_bytes(name.encode())
    return configs.DataConfig(root=str(root))


THREE = {"train": ["p0_a", "p0_b"], "val": ["p1_a"], "test": ["p2_a", "p2_b"]}


def test_a_run_takes_a_fold_of_a_file(tmp_path):
    config = write_dataset(tmp_path / "data")
    path = tmp_path / "splits.json"
    splits.write(path, [{"train": ["p2_a"], "val": ["p1_a"], "test": ["p0_a"]}, THREE])
    config = dataclasses.replace(config, splits=str(path), fold=1)
    dataset = cases.load(config)
    assert {c.case_id: c.split for c in dataset.cases if c.split} == {
        **dict.fromkeys(("p0_a", "p0_b"), "train"),
        "p1_a": "val",
        **dict.fromkeys(("p2_a", "p2_b"), "test"),
    }
    assert [case.case_id for case in cases.select(dataset, config, "val")] == ["p1_a"]  # p1_b is unused
    assert splits.read(path)[1] == {"name": "", **THREE}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "splits.json"]


def test_nnunets_own_file(tmp_path):
    """splits_final.json as nnU-Net writes it (indented, sorted keys); imagesTs stay test."""
    config = write_dataset(tmp_path / "data", test_folder=True)
    path = tmp_path / "splits_final.json"
    own = [{"train": ["p0_a", "p1_a"], "val": ["p2_a", "p2_b"]}, {"train": ["p2_a"], "val": ["p0_a", "p1_a"]}]
    path.write_text(json.dumps(own, indent=4, sort_keys=True))
    dataset = cases.load(dataclasses.replace(config, splits=str(path)))
    assert {c.case_id: c.split for c in dataset.cases if c.split} == {
        **{"p0_a": "train", "p1_a": "train", "p2_a": "val", "p2_b": "val", "q": "test"},
    }
    splits.write(path.with_name("ours.json"), make(centres("AAAABBBB"), "kfold", folds=2))
    for fold in json.loads(path.with_name("ours.json").read_text()):  # what nnU-Net reads of it
        assert isinstance(fold["train"], list) and isinstance(fold["val"], list)
        assert not set(fold["train"]) & set(fold["val"])
    # A file that has the part test decides on it alone.
    splits.write(path.with_name("other.json"), [THREE])
    dataset = cases.load(dataclasses.replace(config, splits=str(path.with_name("other.json"))))
    assert [case.case_id for case in dataset.cases if case.split == "test"] == ["p2_a", "p2_b"]


@pytest.mark.parametrize(
    ("content", "fold", "sentence"),
    [
        (None, 0, "splits.json does not exist; make one with launch.split"),
        ("[{", 0, "is not readable JSON .*expected a list of folds"),
        ("{}", 0, "holds no list of folds"),
        ("[]", 0, "holds no list of folds"),
        ('[{"train": ["p0_a"]}]', 0, "fold 0: the lists train and val"),
        ('[{"train": "p0_a", "val": ["p1_a"]}]', 0, "fold 0: the lists train and val"),
        ('[{"train": ["p0_a"], "val": ["p1_a"], "test": [3]}]', 0, "fold 0: the lists train and val"),
        (json.dumps([THREE, THREE]), 2, r"--config.data.fold=2 is not in .*has 2 fold\(s\), numbered from 0 to 1"),
        (
            json.dumps([{**THREE, "val": ["p1a"]}]),
            0,
            "fold 0: val names the case 'p1a', which .* Did you mean 'p1_a'",
        ),
    ],
)
def test_unusable_files_of_folds(tmp_path, content, fold, sentence):
    config = write_dataset(tmp_path / "data")
    path = tmp_path / "splits.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=sentence):
        cases.load(dataclasses.replace(config, splits=str(path), fold=fold))
    with pytest.raises(UsageError, match="--config.data.fold=1 needs a file of folds"):
        cases.load(dataclasses.replace(config, fold=1))


def test_folds_are_never_written_into_the_dataset_nor_over_others(tmp_path):
    root = tmp_path / "data"
    write_dataset(root)
    dataset = cases.read(root)
    for inside in (root / "splits.json", root / "new" / ".." / "splits.json"):
        with pytest.raises(UsageError, match="lies inside the dataset"):
            splits.check_output(inside, dataset)
    with pytest.raises(UsageError, match="is a folder; name a file in it"):
        splits.check_output(tmp_path, dataset)
    path = tmp_path / "splits.json"
    splits.check_output(path, dataset)
    splits.write(path, [THREE])
    splits.write(path, [THREE])  # the same again
    with pytest.raises(UsageError, match="exists and holds something else"):
        splits.write(path, [THREE, THREE])
    assert json.loads(path.read_text()) == [THREE]
