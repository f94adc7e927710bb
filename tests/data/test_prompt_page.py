"""docs/data/prompts.md: it names every protocol, and its prompt files are read as it says."""

import pathlib
import re

import numpy as np

from calsegx import configs
from calsegx.data import clicks

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "data" / "prompts.md").read_text()


def test_every_protocol_has_a_line():
    assert re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE) == list(configs.PROTOCOLS)


def test_the_examples_are_read(tmp_path):
    tables = [re.sub(r"(?m)^ +", "", text) for text in re.findall(r"(?:^    .+\n)+", PAGE, re.MULTILINE)]
    (example,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    found = []
    for name, text in (("voxels.csv", tables[0]), ("mm.csv", tables[1]), ("clicks.json", example)):
        (tmp_path / name).write_text(text)
        found.append(clicks.read_clicks(tmp_path / name))
    voxels, world, both = found
    np.testing.assert_array_equal(voxels["p001"].coordinates, [[120, 88, 40], [30, 40, 40]])
    assert voxels["p001"].labels.tolist() == [1, 0] and not voxels["p001"].world.any()
    assert world["p001"].world.all()
    assert both["p001"].world.tolist() == [False, True] and both["p002"].labels.tolist() == [2, 3]
