"""Ctrl-C while a reply is written: the first ends the reply behind its next token, a second one the command."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Halt:
    """Whether the reply is to end now; asked of by the generation, set by `halting`."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self) -> bool:
        return self.asked


@contextmanager
def halting(halt: Halt) -> Iterator[None]:
    """For the block SIGINT asks `halt`; while it is asked, SIGINT is KeyboardInterrupt as ever."""

    def ask(number: int, frame: FrameType | None) -> None:
        if halt.asked:
            raise KeyboardInterrupt
        halt.asked = True

    halt.asked = False
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        halt.asked = False
