"""Memory: how much this process used, how much is free, and how the allocator keeps it."""

from __future__ import annotations

import ctypes
import platform
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

GIB = 2**30

_REFUSED = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
"""What PyTorch's allocators say."""

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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had, on the host or a GPU.

    >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: ..."))
    True
    >>> is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    False
    """
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _REFUSED)


def available(device: torch.device) -> int | None:
    """Bytes that this process can still get: of a GPU, or of the host within its limits.

    On the host it is the least of what the kernel calls available, what the control group
    (container) leaves and what ``ulimit -v`` leaves; None where the system does not tell.
    """
    if device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free) + unused
    found = [_of_kernel(), _of_group(), _of_limit()]
    return min((value for value in found if value is not None), default=None)


def _of_kernel() -> int | None:
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 2**10
    return None


_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)
"""Limit, use and statistics of the control group of a container, versions 2 and 1."""


def _of_group() -> int | None:
    for limit, used, statistics in _GROUPS:
        with suppress(OSError, ValueError):  # no such file; "max"
            most, now = (int(Path(path).read_text(encoding="ascii")) for path in (limit, used))
            lines = Path(statistics).read_text(encoding="ascii").splitlines()
            # File pages that the kernel gives up first.
            cache = next((int(x.split()[1]) for x in lines if x.startswith("inactive_file")), 0)
            return max(0, most - now + cache)
    return None


def _of_limit() -> int | None:
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most == resource.RLIM_INFINITY:
        return None
    with suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        return max(0, most - pages * resource.getpagesize())
    return None


def gib(size: float) -> str:
    """A size in words.

    >>> gib(3 * 2**30), gib(5 * 2**20)
    ('3.0 GiB', '5 MiB')
    """
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.0f} MiB"
