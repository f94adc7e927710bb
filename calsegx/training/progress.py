"""A progress bar on a terminal, plain lines elsewhere."""

import os
import sys
import time
from types import TracebackType

from rich import console, progress


class Progress:
    """Context manager: ``update(completed, text)`` shows how far the work is, its speed and the time left.

    On a terminal a bar; elsewhere (a log file, a cluster job) a plain line at most every
    ``seconds_between_lines``.
    """

    def __init__(self, title: str, total: int, unit: str, *, quiet: bool = False, seconds_between_lines: float = 10.0):
        self.title, self.total, self.unit = title, total, unit
        self._console = _Console(quiet=quiet)
        self._between = seconds_between_lines
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[speed]}"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[text]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )

    def __enter__(self) -> "Progress":
        self._start = self._last_line = time.monotonic()
        self._first: int | None = None
        self._bar.start()
        self._task = self._bar.add_task(self.title, total=self.total, speed="", text="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, completed: int, text: str = "") -> None:
        """``completed`` of ``total`` units are done; ``text`` is shown behind them."""
        now = time.monotonic()
        if self._first is None:  # a resumed run does not start at 0, and the first unit includes compilation
            self._first, self._start = completed, now
        elapsed, done = now - self._start, completed - self._first
        rate = done / elapsed if done and elapsed > 0 else 0.0
        speed = f"{rate:.2f} {self.unit}/s" if rate else ""
        self._bar.update(self._task, completed=completed, speed=speed, text=text)
        if not self._console.is_terminal and (
            now - self._last_line >= self._between or completed in (self.total, self._first)
        ):
            self._last_line = now
            left = f", {duration((self.total - completed) / rate)} left" if rate else ""
            about = ", ".join(part for part in (speed + left, text) if part)
            self._console.print(
                f"{self.title}: {completed}/{self.total} {self.unit} {about}".rstrip(), highlight=False, soft_wrap=True
            )

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


class _Console(console.Console):
    """Goes silent when nobody reads any more (``| head``); rich's own ends the program."""

    def on_broken_pipe(self) -> None:
        """Send what follows to nowhere."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def duration(seconds: float) -> str:
    """``h:mm:ss``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
