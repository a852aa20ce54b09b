"""Peak memory of this process: on a GPU what torch's allocator says, else anonymous resident bytes.

Pages of mapped files are left out on a CPU: the kernel takes them back when it needs them. The level when the weights
are loaded is taken after freed heap pages have gone back to the system, or a loader's own peak would hide in it.
"""

from __future__ import annotations

import ctypes
import gc
import threading
from typing import Any

EVERY_S = 0.005


class Memory:
    """The level at the moment the weights were loaded, and the peak while it is watched."""

    def __init__(self) -> None:
        self.level = self.peak = 0
        self.done = threading.Event()
        self.watcher: threading.Thread | None = None

    def weights_loaded(self) -> None:
        """Takes the level above which everything that training adds lies."""
        gc.collect()
        if cuda := _cuda():
            cuda.synchronize()
            self.level = cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)
            self.level = anonymous_bytes()

    def watch(self) -> None:
        """Begins to look for the peak; not while speed is measured, since looking takes time."""
        if cuda := _cuda():
            cuda.reset_peak_memory_stats()
            return
        self.peak = anonymous_bytes()
        self.done.clear()
        self.watcher = threading.Thread(target=self._look, daemon=True)
        self.watcher.start()

    def finish(self) -> None:
        """Waits until the device has done its work, and stops looking."""
        if cuda := _cuda():
            cuda.synchronize()
        if self.watcher:
            self.done.set()
            self.watcher.join()
            self.watcher = None

    def figures(self) -> dict[str, Any]:
        """Bytes: peak and level; reserved ones, of a GPU, are what the allocator has taken from the driver."""
        if cuda := _cuda():
            peak, reserved = cuda.max_memory_allocated(), cuda.max_memory_reserved()
            return {"peak_bytes": peak, "reserved_bytes": reserved, "weights_bytes": self.level}
        return {"peak_bytes": self.peak, "weights_bytes": self.level}

    def _look(self) -> None:
        while not self.done.wait(EVERY_S):
            self.peak = max(self.peak, anonymous_bytes())


def anonymous_bytes() -> int:
    """Anonymous resident bytes of this process."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon:"))


def limit(gib: float) -> None:
    """Lets this process take so many GiB of the GPU; more is an out-of-memory error."""
    cuda = _cuda()
    assert cuda, "a limit needs a GPU"
    cuda.set_per_process_memory_fraction(min(gib * 2**30 / cuda.get_device_properties(0).total_memory, 1.0))


def _cuda() -> Any:
    """torch.cuda where there is a GPU, else None."""
    import torch

    return torch.cuda if torch.cuda.is_available() else None
