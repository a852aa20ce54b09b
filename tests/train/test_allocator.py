"""On a CPU freed memory is taken again without new pages; on a GPU the allocator is left alone."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from qlora_cli.train.allocator import keep_freed_memory

FAULTS = """
import resource, sys
import numpy as np
from qlora_cli.train.allocator import keep_freed_memory

def step():
    blocks = [np.ones(20 * 2**17) for _ in range(4)]  # 20 MiB each

if sys.argv[1] == "keep":
    assert keep_freed_memory("cpu")
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    """Pages that a process of its own asks the kernel for in five steps."""
    done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_what_was_freed_is_used_again():
    assert faults("keep") < 100
    assert faults("leave") > 1000, "glibc does so by itself: the function is not needed any more"


def test_a_gpu_process_is_left_alone():
    assert not keep_freed_memory("cuda")
