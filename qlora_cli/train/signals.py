"""Ctrl-C and SIGTERM end a run after the step in hand, with a checkpoint; a second one ends it at once."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from qlora_cli.errors import Exit

CODES = {signal.SIGINT: Exit.SIGINT, signal.SIGTERM: Exit.SIGTERM}


class Interrupted(Exception):
    """The run ended early, after a verified save, because a signal asked it to."""

    def __init__(self, code: Exit):
        self.code = code
        super().__init__(f"interrupted by {code.name}")


@contextmanager
def asked_to_stop(say: Callable[[str], None]) -> Iterator[Callable[[], Exit | None]]:
    """Yields a function that returns the exit code of the signal received so far, or None."""
    received: list[Exit] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        received.append(CODES[signal.Signals(number)])
        say(f"{signal.Signals(number).name}: finishing this step and saving; once more stops at once")

    before = {number: signal.signal(number, handle) for number in CODES}
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
