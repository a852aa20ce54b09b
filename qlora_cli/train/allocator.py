"""The C library's allocator, for a process that computes the same shapes over and over."""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST = 32 * 1024**2  # bytes; glibc takes no larger M_MMAP_THRESHOLD


def keep_freed_memory(device_type: str) -> bool:
    """Lets the process keep what it frees, on a CPU under glibc; returns whether that was set.

    By default glibc gives large blocks back to the kernel and gets them again as zeroed pages, every step: some
    percent of a step's CPU time, for which the process holds some percent more memory. To be called once the base
    is loaded, lest what that took is kept as well.
    """
    if device_type != "cpu" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
