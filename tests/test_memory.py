"""Freed memory is kept: steps that allocate the same again cause no page faults."""

import resource
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import numpy as np
from calsegx import memory
kept = memory.keep_freed_memory() if sys.argv[1] == "keep" else True
def step():
    return float(np.ones(64 << 17).sum())  # 64 MB
step(), step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4): step()
print(int(kept), (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 4)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_steps_that_allocate_the_same_cause_no_page_faults():
    faults = {}
    for how in ("keep", "give back"):
        out = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True).stdout
        kept, faults[how] = map(int, out.split())
        if not kept:
            pytest.skip("this C library has no mallopt")
    pages = (64 << 20) // resource.getpagesize()
    assert faults["keep"] < 0.1 * pages
    assert faults["keep"] < faults["give back"]
