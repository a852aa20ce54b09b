"""Training rows that are read and prepared while training: nothing of them is stored, and they may never end.

Rows are taken block by block, from several sources in proportion to their weights; a source that ends begins anew. The
examples of a block are shuffled, and packed, among themselves. So a place in the stream is the place in every source
where its block begins and the number of units taken of it: going on there reads that one block again, none before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from types import TracebackType
from typing import Any

import numpy as np

from qlora_cli.data.cache import Wanted, stream_digest
from qlora_cli.data.encode import Example
from qlora_cli.data.order import Window, permutation
from qlora_cli.data.packing import pack
from qlora_cli.data.pool import Pool
from qlora_cli.data.portions import portions_of
from qlora_cli.data.prepare import num_processes
from qlora_cli.data.rows import Mark, Read
from qlora_cli.data.sources import Part, SourceMark, read_parts, resolve
from qlora_cli.data.store import decoded
from qlora_cli.data.worker import Job, Result
from qlora_cli.errors import UserError
from qlora_cli.recipe.schema import Source

BEGINNING = SourceMark()
BLOCK = 4096
"""Rows that are shuffled together."""


@dataclass(frozen=True)
class SourcePlace:
    """A place in a source: its mark, the passes over it before, and the format once its rows have chosen one."""

    mark: SourceMark = BEGINNING
    passes: int = 0
    format: str | None = None


@dataclass(frozen=True)
class Cursor:
    """A place in a stream: before unit `unit` of block `block`, which begins at `sources`."""

    block: int
    unit: int
    sources: tuple[SourcePlace, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        places = [[place.mark.part, [*place.mark.mark], place.mark.num_rows] for place in self.sources]
        rest = [[place.passes, place.format] for place in self.sources]
        return {"block": self.block, "unit": self.unit, "marks": places, "sources": rest}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Cursor:
        """What `to_json` gave."""
        marks = [SourceMark(part, Mark(*mark), num_rows) for part, mark, num_rows in values["marks"]]
        sources = [SourcePlace(mark, *rest) for mark, rest in zip(marks, values["sources"], strict=True)]
        return cls(values["block"], values["unit"], tuple(sources))


@dataclass
class _Block:
    """A block of examples. units: its examples, shuffled, as they are counted in a step; after: where the next begins.

    bad: rows left out.
    """

    number: int
    before: tuple[SourcePlace, ...]
    units: list[list[Example]] = field(default_factory=list)
    after: tuple[SourcePlace, ...] = ()
    bad: list[UserError] = field(default_factory=list)


class Stream:
    """The training rows of sources with `streaming: true`, for a `with` block: its processes end with it.

    capacity: examples are packed into rows of so many tokens at most. tell: is given every bad row that is left out.
    tally: counts of what was read so far, by the names of the fields of examples.Examples.
    """

    def __init__(
        self,
        wanted: Wanted,
        units_per_step: int,
        seed: int,
        capacity: int | None = None,
        workers: int | None = None,
        tell: Callable[[UserError], None] = lambda error: None,
    ) -> None:
        self.wanted, self.units_per_step, self.seed, self.capacity = wanted, units_per_step, seed, capacity
        self.tell = tell
        self.parts = [resolve(source, wanted.role).parts for source in wanted.sources]
        self.pool = Pool(
            Job(wanted.settings, wanted.limits), workers or num_processes(), first_bad_ends=not wanted.skip_bad
        )
        self.ahead = ThreadPoolExecutor(1)
        self.readers: list[_Reader] = []
        self.tally: Counter[str] = Counter()

    def digest(self) -> str:
        """SHA-256 of what is read and how: files by name and size, since streams are too long to be hashed."""
        return stream_digest(self.wanted, self.parts)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.pool.__exit__(kind, error, at)
        self.ahead.shutdown(cancel_futures=True)

    def beginning(self) -> Cursor:
        """The place before the first row."""
        return Cursor(0, 0, (SourcePlace(),) * len(self.parts))

    def windows(self, num_steps: int, start_step: int, cursor: Cursor) -> Iterator[tuple[Window[Example], Cursor]]:
        """The windows of the steps start_step, ..., num_steps - 1, each with the place behind it, from `cursor`."""
        units = self._units(cursor)
        for step in range(start_step, num_steps):
            taken = list(islice(units, self.units_per_step))
            passes = min(place.passes for place in taken[-1][1].sources)
            yield Window(step, passes, [unit for unit, _ in taken]), taken[-1][1]

    def _units(self, cursor: Cursor) -> Iterator[tuple[list[Example], Cursor]]:
        """All units from `cursor` on, each with the place behind it; the next block is prepared meanwhile."""
        block, skipped = self._prepared(cursor.block, cursor.sources), cursor.unit
        while True:
            following = self._submit(block)
            for error in block.bad:
                self.tell(error)
            for index in range(skipped, len(block.units)):
                yield block.units[index], Cursor(block.number, index + 1, block.before)
            block, skipped = following.result(), 0

    def _submit(self, block: _Block) -> Future[_Block]:
        return self.ahead.submit(self._prepared, block.number + 1, block.after)

    def _prepared(self, number: int, before: tuple[SourcePlace, ...]) -> _Block:
        """The block that begins at `before`."""
        block = _Block(number, before)
        examples: list[Example] = []
        after = []
        for index, place in enumerate(before):
            reader = self._reader(index, place)
            examples += self._drawn(reader, self._quota(index, number), block)
            after.append(reader.place)
        if examples and not self.tally["num_stops"] and self.wanted.settings.task.ends_with_stop:
            what = "no row ends with a stop token, so the model would never learn to stop"
            raise UserError("data.train", what, "raise the length limit, or set data.on_long_row: skip")
        if not examples:
            what = f"no row is left of {BLOCK:,}: each is bad, too long or loses its whole answer"
            raise UserError("data.train", what, "raise the limit, or mend the rows")
        block.after = tuple(after)
        block.units = self._shuffled(examples, number)
        return block

    def _reader(self, index: int, place: SourcePlace) -> _Reader:
        """The reader that stands there already, or a new one."""
        if len(self.readers) <= index:
            self.readers.append(_Reader(self.wanted.sources[index], self.parts[index], place))
        assert self.readers[index].place == place, "blocks are read one behind the other"
        return self.readers[index]

    def _quota(self, index: int, number: int) -> int:
        """Rows that a block takes of a source; over many blocks in proportion to the weights, to the row."""
        weights = [source.weight for source in self.wanted.sources]
        share = weights[index] / sum(weights)
        return int((number + 1) * BLOCK * share) - int(number * BLOCK * share)

    def _drawn(self, reader: _Reader, num_rows: int, block: _Block) -> Iterator[Example]:
        """The examples of the source's next rows."""
        source, parts = reader.source, reader.parts
        found = list(portions_of(islice(reader.rows, num_rows), source, parts, self.wanted, reader.place.format))
        for portion, result in zip(found, self.pool.map(portion.task for portion in found), strict=True):
            self.tally += result.tally
            bad = portion.bad_rows(result)
            if bad and not self.wanted.skip_bad:
                raise bad[0]
            block.bad += bad
            if portion.failure:
                raise portion.failure
            if result.long:
                raise self._too_long(portion.task.places[result.long[0][0]], result.long[0][1])
            yield from _examples(result, portion.task.places)
            if portion.task.format:
                reader.format = portion.task.format

    def _too_long(self, place: str, tokens: int) -> UserError:
        what = f"the row has {tokens:,} tokens, but {self.wanted.limits}"
        return UserError(place, what, "raise the limit, or set data.on_long_row to truncate or skip")

    def _shuffled(self, examples: list[Example], number: int) -> list[list[Example]]:
        """The units of a block, in the order that the seed and the block's number give."""
        name = f"{self.seed} block {number}"
        order = permutation(len(examples), name)
        if self.capacity is None:
            return [[examples[at]] for at in order]
        bins = list(pack([example.num_tokens for example in examples], order.tolist(), self.capacity))
        return [[examples[at] for at in bins[index]] for index in permutation(len(bins), f"{name} bins")]


class _Reader:
    """The rows of a source without end: behind the last comes the first. `place` is behind the last one given."""

    def __init__(self, source: Source, parts: Sequence[Part], start: SourcePlace) -> None:
        self.source, self.parts = source, parts
        self.mark, self.passes, self.format = start.mark, start.passes, start.format
        self.rows = self._endless()

    @property
    def place(self) -> SourcePlace:
        return SourcePlace(self.mark, self.passes, self.format)

    def _endless(self) -> Iterator[tuple[int, Read]]:
        while True:
            for part, read in read_parts(self.parts, self.source, self.mark):
                self.mark = SourceMark(part, read.after, self.mark.num_rows + 1)
                yield part, read
            self.mark, self.passes = SourceMark(), self.passes + 1


def _examples(result: Result, places: Sequence[str]) -> Iterator[Example]:
    """The examples of a portion."""
    ids = np.frombuffer(result.ids, np.uint32)
    end = 0
    for index, tokens, _, segment, targets in result.examples:
        yield decoded(ids[end : end + tokens], places[index], tuple(targets), segment)
        end += tokens
