"""SIGTERM, SIGINT and SIGUSR1 as a wish: the work in hand is finished and saved first."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

from calsegx import sharding

# Slurm announces the end of an allocation by the signal that is asked for with --signal, usually SIGUSR1; to whoever
# waits for the job that is the same as SIGTERM.
EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 143}


class Interrupted(Exception):
    """The work ended early because a signal asked for it; the message says what was kept."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class Stop:
    """Context manager: inside it a first signal only sets ``requested``; a second one ends the process at once."""

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None] = {}
        self._wakeup, self._wakeup_before = -1, -1

    def __enter__(self) -> "Stop":
        self._before = {number: signal.signal(number, self._receive) for number in EXIT_CODES}
        reading, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        self._wakeup_before = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        threading.Thread(target=_end_at_the_second, args=(reading,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self._signal is not None

    def requested_anywhere(self) -> bool:
        """Whether any process was; all of them must ask, at the same point."""
        return sharding.any_process(self.requested)

    def interrupted(self, kept: str) -> Interrupted:
        """The error to raise when the work has been saved; ``kept`` is a sentence about that."""
        received = self._signal or signal.SIGTERM  # another process received it
        return Interrupted(f"Stopped by {received.name}: {kept}", EXIT_CODES[received])

    def check(self, kept: str) -> None:
        """Raise ``interrupted(kept)`` if this process was asked to stop."""
        if self.requested:
            raise self.interrupted(kept)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number)
        for each in EXIT_CODES:
            signal.signal(each, signal.SIG_DFL)


def _end_at_the_second(reading: int) -> None:
    """Python's handlers wait while the main thread compiles or waits for a device; this thread does not."""
    received = 0
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        while number := pipe.read(1):
            received += number[0] in EXIT_CODES
            if received == 2:
                os._exit(EXIT_CODES[signal.Signals(number[0])])
