"""What a process holds after it has freed large blocks."""

from __future__ import annotations

import subprocess
import sys

LOAD = """
import os, sys
from shared.runtime.process import give_large_blocks_back

def resident_mb():
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20

if sys.argv[1] == "given back":
    give_large_blocks_back()
first = bytes(b"x" * (31 << 20))
del first  # from now on glibc would keep blocks of this size
large, small = [], []
for _ in range(20):
    large.append(b"x" * (4 << 20))
    small.append([b"x" * 100_000])
before = resident_mb()
del large
print(before - resident_mb())
"""


def freed_mb(how: str) -> int:
    command = [sys.executable, "-c", LOAD, how]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_freed_blocks_of_large_bodies_are_given_back_to_the_kernel() -> None:
    assert freed_mb("given back") >= 75
