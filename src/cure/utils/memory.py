"""Memory of this process: how much it used, and how the C library's allocator keeps it."""

from __future__ import annotations

import ctypes
import platform
import resource
import sys
from pathlib import Path

# Numbers of the parameters in glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Keep freed memory for the next layer instead of giving it back to the system.

    A layer's result takes megabytes.  By default glibc asks the system for each of them and gives
    it back at once, and the system fills with zeros, page by page, what is then overwritten.  It
    is a setting of the whole process, so the command makes it, not the library.  Memory that is in
    use at the same time decides the peak as before: ``make bench`` prints both.

    Returns:
        Whether it could be set: with glibc, on Linux.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_MMAP_MAX, 0)) and bool(libc.mallopt(_TRIM_THRESHOLD, _LARGEST))


def peak() -> float:
    """The most memory that this process has used so far, in MiB."""
    if sys.platform == "linux":
        # Not getrusage: a child process inherits the peak of its parent there.
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) / 2**10 for line in lines if "VmHWM" in line)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
