"""What the kernel lets a process do that runs somebody else's templates.

It may compute, for a time and in a space. Should a template break out of its sandbox, it can open no file and no socket
and, where we are not root, start no process.
"""

from __future__ import annotations

import importlib
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager

LOADED_LATER = (
    *("encodings.unicode_escape", "html", "jinja2.constants", "jinja2.debug", "pprint", "textwrap", "unicodedata"),
)
"""What is imported while templates are compiled and run, when no file can be opened any more."""


@contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """The kernel ends the process with SIGPROF when the block takes more processor time; nothing can catch it here."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def confine(memory_bytes: int) -> None:
    """Takes from this process what rows and templates do not need, for good.

    memory_bytes: address space on top of what the process has now.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends us
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for name in LOADED_LATER:
        importlib.import_module(name)
    wanted = dict.fromkeys((resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC), 0)
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        wanted[resource.RLIMIT_AS] = used + memory_bytes
    wanted[resource.RLIMIT_NOFILE] = 0
    for limit, value in wanted.items():
        hard = resource.getrlimit(limit)[1]
        lower = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (lower, lower))
