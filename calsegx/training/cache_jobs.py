"""What a feature cache still needs: which views are missing, which of several processes computes them, what is damaged.

Processes that fill one cache at the same time share nothing but its folder.  Each locks the view that it is about to
compute (``.claims``); the system frees the lock when the process ends, however it ends.
"""

import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from types import TracebackType
from typing import NamedTuple

import filelock
import numpy as np

from calsegx import features, locks
from calsegx.data import cases as case_tools
from calsegx.interfaces import Case, InputError
from calsegx.training import progress as progress_bar


class Job(NamedTuple):
    """A view to compute; ``rng`` None means unaugmented."""

    case: Case
    view: str
    fingerprint: str
    rng: np.random.Generator | None


def view_names(count: int) -> list[str]:
    """``["view0", ...]``: the first is unaugmented."""
    return [f"view{index}" for index in range(count)]


def missing(cache: features.FeatureCache, cases: Sequence[tuple[Case, int]], seed: int) -> tuple[list[Job], int]:
    """The views of ``cases`` that the cache lacks, or has of other files, and how many it has.

    Raises:
        InputError: when what says so is damaged.
    """
    jobs, present = [], 0
    for case, views in cases:
        fingerprint = case_tools.fingerprint(case)
        for index, view in enumerate(view_names(views)):
            if cache.has(case.case_id, view, fingerprint):
                present += 1
                continue
            key = [seed, index, zlib.crc32(case.case_id.encode())]
            jobs.append(Job(case, view, fingerprint, np.random.default_rng(key) if index else None))
    return jobs, present


class Claims:
    """The views that this process computes.  A context manager that gives all of them back."""

    def __init__(self, cache: features.FeatureCache):
        self._cache = cache
        self._held: dict[tuple[str, str], filelock.BaseFileLock] = {}

    def __enter__(self) -> "Claims":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for lock in self._held.values():
            lock.release()

    def take(self, jobs: Sequence[Job], elsewhere: list[Job]) -> Iterator[Job]:
        """Claim one job after the other, as they are asked for; what another process has claimed goes ``elsewhere``.

        What another process has computed by now is neither.
        """
        for job in jobs:
            lock = locks.claim(self._cache.claim_path(job.case.case_id, job.view))
            if lock is None:
                elsewhere.append(job)
            elif self._cache.has(job.case.case_id, job.view, job.fingerprint):
                lock.release()
            else:
                self._held[job.case.case_id, job.view] = lock
                yield job

    def give_back(self, case_id: str, view: str) -> None:
        """Free a view that is computed, or cannot be."""
        self._held.pop((case_id, view)).release()


def verify(
    cache: features.FeatureCache,
    cases: Sequence[tuple[Case, int]],
    *,
    progress: bool = True,
    between: Callable[[], None] = lambda: None,
) -> list[tuple[str, str]]:
    """Read every byte of the views that the cache holds of ``cases``, in as many threads as there are cores.

    Damaged views are said and set aside, so that filling the cache computes them anew.

    Args:
        cache: what to read.
        cases: each with its number of views.
        progress: whether to say something.
        between: called after every view; it may raise.

    Returns:
        Case and view of what was damaged.
    """
    there = [
        (case.case_id, view) for case, views in cases for view in view_names(views) if cache.holds(case.case_id, view)
    ]
    damaged = []
    with (
        progress_bar.Progress("Checking the cache", len(there), "views", quiet=not progress) as bar,
        futures.ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="check") as readers,
    ):
        reading = {readers.submit(cache.verify, *name): name for name in there}
        try:
            for done, read in enumerate(futures.as_completed(reading), start=1):
                error = read.exception()
                if isinstance(error, InputError):
                    damaged.append(reading[read])
                    bar.say(str(error).partition(": run the same")[0])
                elif error is not None:
                    raise error
                bar.update(done, reading[read][0])
                between()
        except BaseException:
            readers.shutdown(wait=False, cancel_futures=True)
            raise
    return sorted(damaged)
