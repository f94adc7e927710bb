"""The inputs of the tiny job, made once."""

import pytest

from tests.faults import jobs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    return jobs.make_inputs(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="session")
def whole(inputs):
    """An undisturbed run, at the place where ``damage.Site`` looks for it.  As it was, after every test."""
    workdir = inputs.folder / "run"
    code, said = jobs.run(inputs, inputs.arguments(workdir, method="sam_ft"))
    assert code == 0, said
    return workdir
