"""A worker's end of the conversation with the runner: one JSON object per line, a command in, an answer out.

    {"do": "steps", "n": 3}   n optimizer steps: seconds of each, losses, trained tokens, padded tokens, rows seen
    {"do": "memory", "n": 2}  the same, with the memory watched: peak and level at the moment the weights were loaded
    {"do": "stop"}            ends the process

A worker calls `wait` before every optimizer step and `record` after it. While no step is due `wait` blocks in a read.
A step's clock runs from one `wait` to the next, so that fetching rows, logging and whatever else a training loop does
between its steps counts. On a GPU it stops where the device has done all the steps of a command.
"""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TextIO

from memory import Memory


class Seen(NamedTuple):
    """What a step went through. rows: a checksum of its rows' ids that knows no order."""

    trained: int
    padded: int
    rows: int


class Channel:
    """The commands of one worker, and what it has recorded since the last one."""

    def __init__(self) -> None:
        """Keeps standard output for itself: what libraries print goes to standard error."""
        self.answers: TextIO = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self.memory = Memory()
        self.command: dict[str, Any] = {}
        self.due = 0
        self.marks: list[float] = []
        self.steps: list[tuple[Any, Callable[[], Seen]]] = []
        self.is_ready = False
        self.facts: dict[str, Any] = {}

    def weights_loaded(self) -> None:
        """To be called at the moment the base's weights are loaded: memory is told from here."""
        self.memory.weights_loaded()

    def wait(self) -> None:
        """Returns when a step is to be taken; raises SystemExit when no more are."""
        if not self.is_ready:
            self.is_ready = True
            self._answer({"ready": True, **self.facts})
        if self.due:
            self.marks.append(time.perf_counter())
            return
        if self.command:
            self.memory.finish()  # first: it waits for the device
            self.marks.append(time.perf_counter())
            self._answer(self._result())
        while not self.due:
            self._obey(sys.stdin.readline())
        self.marks = [time.perf_counter()]

    def record(self, loss: Any, seen: Callable[[], Seen]) -> None:
        """The mean loss of a step and its rows, both looked at when the clock has stopped.

        The loss is a () tensor, or a function that returns that of all steps of the command.
        """
        self.steps.append((loss, seen))
        self.due -= 1

    def _obey(self, line: str) -> None:
        self.command = json.loads(line) if line.strip() else {"do": "stop"}  # the runner has gone
        if self.command["do"] == "stop":
            sys.exit(0)
        self.due, self.steps = self.command["n"], []
        if self.command["do"] == "memory":
            self.memory.watch()

    def _result(self) -> dict[str, Any]:
        seen = [one() for _, one in self.steps]
        found = {
            "seconds": [later - sooner for sooner, later in zip(self.marks, self.marks[1:], strict=False)],
            "losses": [float(loss() if callable(loss) else loss) for loss, _ in self.steps],
            "trained": [one.trained for one in seen],
            "padded": [one.padded for one in seen],
            "rows": sum(one.rows for one in seen),
        }
        return found | (self.memory.figures() if self.command["do"] == "memory" else {})

    def _answer(self, values: dict[str, Any]) -> None:
        self.answers.write(json.dumps(values) + "\n")


def checksum(rows: Iterable[Sequence[int]]) -> int:
    """The sum of the CRCs of the rows' ids."""
    return sum(zlib.crc32(array("I", row).tobytes()) for row in rows)


def seen_in(input_ids: Any, labels: Any, attention_mask: Any | None) -> Seen:
    """What a padded batch of tensors (B, T) holds; the first token of a row is never predicted."""
    mask = (input_ids == input_ids) if attention_mask is None else attention_mask.bool()
    rows = [ids[kept].tolist() for ids, kept in zip(input_ids.cpu(), mask.cpu(), strict=True)]
    return Seen(int((labels[:, 1:] != -100).sum()), input_ids.numel(), checksum(rows))
