"""Where training takes its examples from: prepared rows on disk, or a stream that is prepared meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

from qlora_cli.data.encode import Example
from qlora_cli.data.examples import Examples
from qlora_cli.data.order import Order, Window
from qlora_cli.data.stream import Cursor, Stream

Place = dict[str, Any]
"""A place in a stream, as plain values: what a checkpoint keeps beside the number of steps."""


class Feed(Protocol):
    """The windows of a run.

    examples: what is prepared, empty for a stream. capacity: tokens of a row that examples fill, None without packing.
    longest: tokens of the longest example. digest: SHA-256 of what is trained on.
    """

    @property
    def examples(self) -> Examples: ...
    @property
    def capacity(self) -> int | None: ...
    @property
    def longest(self) -> int: ...
    @property
    def digest(self) -> str: ...

    def total_steps(self, epochs: float, max_steps: int | None) -> int: ...
    def windows(self, num_steps: int, step: int, place: Place | None) -> Iterator[tuple[Window[Example], Place | None]]:
        """The windows behind `step`, where the feed stands at `place`, each with the place behind it."""

    def epochs_done(self, step: int) -> float: ...
    def close(self) -> None: ...


@dataclass
class StoredFeed:
    """Prepared examples in the order of their epochs: the number of steps is the whole place."""

    examples: Examples
    order: Order

    @property
    def capacity(self) -> int | None:
        return self.order.capacity

    @property
    def longest(self) -> int:
        return int(self.examples.lengths.max())

    @property
    def digest(self) -> str:
        return self.examples.digest

    def total_steps(self, epochs: float, max_steps: int | None) -> int:
        return self.order.total_steps(epochs, max_steps)

    def windows(self, num_steps: int, step: int, place: Place | None) -> Iterator[tuple[Window[Example], Place | None]]:
        rows = self.examples.rows
        for window in self.order.windows(num_steps, step):
            units = [[rows[index] for index in unit] for unit in window.units]
            yield Window(window.step, window.epoch, units), None

    def epochs_done(self, step: int) -> float:
        return self.order.epochs_done(step)

    def close(self) -> None:
        pass


class StreamFeed:
    """A stream; `digest` is of what is read and how, not of the rows, which nobody has read."""

    def __init__(self, stream: Stream, longest: int, digest: str, say: Callable[[str], None]) -> None:
        self.say = say
        self.stream, self.longest, self.digest = stream, longest, digest
        self.examples = Examples(parts=tuple(chain.from_iterable(stream.parts)))
        self.capacity = stream.capacity
        self.passes = 0

    def total_steps(self, epochs: float, max_steps: int | None) -> int:
        assert max_steps is not None, "a rule asks for training.max_steps beside a stream"
        return max_steps

    def windows(self, num_steps: int, step: int, place: Place | None) -> Iterator[tuple[Window[Example], Place | None]]:
        cursor = Cursor.from_json(place) if place else self.stream.beginning()
        for window, behind in self.stream.windows(num_steps, step, cursor):
            self.passes = window.epoch
            yield window, behind.to_json()

    def epochs_done(self, step: int) -> float:
        return float(self.passes)

    def close(self) -> None:
        for line in _counted(self.stream.tally).losses():
            self.say(f"train    read so far: {line}")
        with suppress(Exception):  # what it was preparing is not needed any more
            self.stream.__exit__(None, None, None)


def _counted(tally: Mapping[str, int]) -> Examples:
    """No examples, with these counts."""
    known: dict[str, Any] = {name: n for name, n in tally.items() if name in Examples.__dataclass_fields__}
    return Examples(**known)
