"""The process's memory: glibc told to keep what XLA frees.

XLA's CPU backend allocates the buffers of a whole step at once.  glibc gives blocks of that size back to the kernel
when they are freed, so that every step pays a page fault per 4 KB: a training step of SAM's decoder on 64 x 64 features
spends 30 % of its CPU time there.
"""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # malloc.h
_NEVER = -1  # mallopt takes an int, the threshold is a size_t: its largest value


def keep_freed_memory() -> bool:
    """Reuse freed memory instead of giving it back; call it before the first array is made.

    The process keeps its peak of memory until it ends.  One arena, because only the main one is not limited in size.
    Returns whether there was a glibc to tell; elsewhere (macOS, musl) nothing changes.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return False
    options = (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER), (_M_ARENA_MAX, 1)
    results = [mallopt(option, value) for option, value in options]  # all of them, whatever one returns
    return all(result == 1 for result in results)
