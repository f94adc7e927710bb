"""Signals: the first is a wish, the second ends the process at once."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from calsegx.training import interruption


@pytest.mark.parametrize("number", list(interruption.EXIT_CODES))
def test_a_signal_is_remembered(number):
    before = signal.getsignal(number)
    with interruption.Stop() as stop:
        stop.check("nothing yet.")
        os.kill(os.getpid(), number)
        assert stop.requested and stop.requested_anywhere()
        with pytest.raises(interruption.Interrupted, match=f"Stopped by {number.name}: all is kept.") as caught:
            stop.check("all is kept.")
        assert caught.value.exit_code == interruption.EXIT_CODES[number]
    assert signal.getsignal(number) == before


def test_the_second_signal_is_immediate():
    script = (
        "import os, signal, time\n"
        "from calsegx.training import interruption\n"
        "with interruption.Stop() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print(stop.requested, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.stdout == "True\n" and done.returncode == -signal.SIGINT
