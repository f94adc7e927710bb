"""The lock of a folder: held by one process, freed by its death."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from calsegx import locks
from calsegx.interfaces import InputError

HOLD = """
import pathlib, sys, time
from calsegx import locks
with locks.exclusive(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of ``tmp_path``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        cwd=pathlib.Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_refused_and_told_who(holder, tmp_path):
    with (
        pytest.raises(InputError, match=rf"{tmp_path} is in use by another process \({holder.pid} on "),
        locks.exclusive(tmp_path),
    ):
        raise AssertionError("two processes in one folder")


def test_a_dead_process_holds_nothing(holder, tmp_path):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert json.loads((tmp_path / ".lock.json").read_text())["pid"] == holder.pid
    with locks.exclusive(tmp_path):
        assert json.loads((tmp_path / ".lock.json").read_text())["pid"] == os.getpid()
    assert not (tmp_path / ".lock.json").exists()


def test_the_lock_is_free_after_an_error(tmp_path):
    with pytest.raises(KeyError), locks.exclusive(tmp_path / "new"):
        raise KeyError
    with locks.exclusive(tmp_path / "new"):
        pass
