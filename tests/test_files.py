"""Atomic writing."""

import errno
import os

import pytest

from calsegx import files
from calsegx.interfaces import InputError


def test_text_and_bytes(tmp_path):
    files.write_atomically(tmp_path / "new" / "a.txt", "μm")
    files.write_atomically(tmp_path / "new" / "b.bin", b"\x00")
    assert (tmp_path / "new" / "a.txt").read_bytes() == "μm".encode()
    assert (tmp_path / "new" / "b.bin").read_bytes() == b"\x00"


def test_a_full_disk_leaves_the_old_file_and_one_sentence(tmp_path, monkeypatch):
    path = tmp_path / "x.txt"
    files.write_atomically(path, "old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"x.txt cannot be written \(No space left on device\); free some space"):
        files.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]
