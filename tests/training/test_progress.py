"""Progress on a pipe that nobody reads any more."""

import pathlib
import subprocess
import sys

SCRIPT = """
import sys, time
from calsegx.training import progress
with progress.Progress("Work", 3, "steps", seconds_between_lines=0) as bar:
    for step in range(3):
        bar.say("x" * 100_000)
        bar.update(step + 1)
print("the end", file=sys.stderr)
"""


def test_a_closed_pipe_stops_no_work():
    job = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        cwd=pathlib.Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert job.stdout is not None and job.stderr is not None
    job.stdout.close()
    said = job.stderr.read()
    job.stderr.close()
    assert job.wait() == 0 and said == "the end\n"
