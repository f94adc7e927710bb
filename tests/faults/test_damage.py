"""A few of the damages of ``tests/faults/damage.py``, which does three hundred: nearly each kind of file, each way."""

import json

import pytest

from tests.faults import damage, jobs


@pytest.fixture(scope="module")
def site(inputs, whole):
    return damage.Site(inputs, evaluate=False)


@pytest.mark.parametrize("kind", [kind for kind in damage.KINDS if kind not in ("evaluation", "run: config.json")])
def test_damage_is_noticed(site, kind):
    count = 1 if kind.startswith("dataset") else len(damage.DAMAGES)
    found = damage.sweep(site, {kind: count}, seed=0)[kind]
    assert sum(found.values()) == count
    if kind.startswith(("checkpoint", "model", "calibrator")):
        assert not found[damage.HARMLESS]


def test_a_reader_that_notices_nothing_is_found_out(site, monkeypatch):
    """The proof itself: with the checks of the model taken away, the sweep fails."""

    def unchecked(text):
        content = json.loads(text)
        content.pop("sha256", None)
        return content

    monkeypatch.setattr(damage.model_folder.files, "unseal", unchecked)
    with pytest.raises(jobs.Failure, match=r"\d+ damages were not noticed"):
        damage.sweep(site, {"model: model.json": 30}, seed=0)
