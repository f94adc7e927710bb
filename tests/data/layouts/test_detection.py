"""Which layout a folder is of: exactly one, whatever the order of asking."""

import pytest

from calsegx.data import layouts
from calsegx.interfaces import DataError, UsageError
from tests.data.layouts import fake, trees

TREES = {
    **trees.ALL,
    "brats (2019)": fake.brats_2019,
    "brats (2023)": fake.brats_2023,
    "atlas": fake.atlas,
    "ibsr": fake.ibsr,
    "bids": fake.bids,
}


@pytest.mark.parametrize("tree", TREES)
def test_one_reader_knows_each_tree(tmp_path, tree):
    TREES[tree](tmp_path)
    before = sorted(tmp_path.rglob("*"))
    found = {name for name in layouts.registry.names() if layouts.registry.get(name)(tmp_path) is not None}
    assert found == {tree.split()[0]}
    assert sorted(tmp_path.rglob("*")) == before  # nothing is written into a dataset


@pytest.mark.parametrize("name", sorted({tree.split()[0] for tree in TREES}))
def test_every_layout_says_what_it_looks_for(tmp_path, name):
    trees.touch(tmp_path / "scan.nii.gz")
    with pytest.raises(DataError, match=rf"no known layout; .*; {name} \(.{{20,}}\)"):
        layouts.detect(tmp_path)


def test_folders_of_no_layout(tmp_path):
    with pytest.raises(DataError, match="is empty"):
        layouts.detect(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        layouts.detect(tmp_path / "nowhere")
    trees.touch(tmp_path / "scan.nii.gz")
    with pytest.raises(DataError, match=r"table \(A tab-separated cases.tsv.*nnunet_v2 \(A dataset.json") as caught:
        layouts.detect(tmp_path)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(DataError, match="is not of the layout table"):
        layouts.detect(tmp_path, "table")
    with pytest.raises(UsageError, match="nnunet_v2"):
        layouts.detect(tmp_path, "nnunet")
