"""The allocator's setting: freed memory stays with the process, when it is asked to."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

MEASURE = """
import os
import torch
{before}
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
largest = [torch.ones(2**22) for _ in range(8)]
held = resident()
del largest
print((held - resident()) // 2**20)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="needs glibc on Linux"
)
@pytest.mark.parametrize(
    ("before", "kept"),
    [
        ("", False),
        ("from cure.utils.memory import keep_freed_memory; assert keep_freed_memory()", True),
    ],
)
def test_what_is_freed_stays_only_when_asked(before, kept):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE.format(before=before)],
        capture_output=True,
        text=True,
        check=True,
    )
    given_back = int(done.stdout)
    assert (given_back < 8) if kept else (given_back > 100), given_back
