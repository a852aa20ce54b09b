"""All rows of a role to token ids on disk, once: read in portions, prepared by a pool of processes, kept in a cache."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import tee
from pathlib import Path
from typing import Any

from qlora_cli.data.cache import Wanted, cache_folder, key_of, locked
from qlora_cli.data.limits import length_in_words
from qlora_cli.data.pool import Pool
from qlora_cli.data.portions import Portion, portions
from qlora_cli.data.rows import count
from qlora_cli.data.sources import Part, Resolved, resolve
from qlora_cli.data.store import Entry, Writer, part_to_json, read_index, written
from qlora_cli.data.worker import Job, Result
from qlora_cli.errors import UserError
from qlora_cli.recipe.schema import Source

LISTED = 1_000
"""So many rows that were left out are kept with their reasons; all are counted."""

AUTO_PROCESSES = 16
"""Most processes of `workers: auto`."""

Progress = Callable[[int], None]
"""Told how many rows are prepared."""


@dataclass
class _Count:
    """What was read of one source, as examples.SourceCount, but for the weight: it changes no row."""

    path: str
    num_ignored: int
    format: str = ""
    auto: bool = False
    num_rows: int = 0
    num_bad: int = 0
    num_examples: int = 0
    num_tokens: int = 0
    num_trained: int = 0


@dataclass
class _Seen:
    """What was seen on the way, for the index. long: (where, tokens, prompt) of the first too long and the longest."""

    sources: list[_Count] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    bad: list[tuple[str, str, str]] = field(default_factory=list)
    tally: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    long: list[tuple[str, int, int]] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        """Rows read of all sources."""
        return sum(source.num_rows for source in self.sources)


class Unfit(UserError):
    """What is left of the rows cannot be trained on. bad: where, what and what to do of the first rows left out."""

    def __init__(self, where: str, what: str, todo: str, seen: _Seen):
        super().__init__(where, what, todo)
        self.bad = tuple(seen.bad)
        self.num_bad = sum(source.num_bad for source in seen.sources)
        self.num_rows = seen.num_rows


def prepared(wanted: Wanted, workers: int | None, progress: Progress) -> tuple[Path, dict[str, Any]]:
    """The folder with the prepared rows, and its index; made where it is not there yet.

    workers: processes, None for one per core. Raises UserError for what the user has to mend.
    """
    resolved = [resolve(source, wanted.role) for source in wanted.sources]
    folder = cache_folder() / key_of(wanted, resolved)
    if (index := read_index(folder)) is not None:
        return folder, index
    with locked(folder):
        index = read_index(folder)  # another process may have been faster
        if index is None:
            _make(folder, wanted, resolved, workers or num_processes(), progress)
            index = read_index(folder)
    assert index is not None, "what was just written can be read"
    return folder, index


def num_processes() -> int:
    """One for each core that we may use, at most AUTO_PROCESSES."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, AUTO_PROCESSES)


def _make(folder: Path, wanted: Wanted, resolved: Sequence[Resolved], workers: int, progress: Progress) -> None:
    """Prepares all rows into `folder`, which appears whole or not at all."""
    aside = folder.with_name(f".{folder.name}")  # ours while we hold the lock; left there by who was killed
    for leftover in (folder, aside):
        shutil.rmtree(leftover, ignore_errors=True)
    seen = _Seen()
    try:
        with (
            Writer(aside) as writer,
            Pool(Job(wanted.settings, wanted.limits), workers, first_bad_ends=not wanted.skip_bad) as pool,
        ):
            for source, found in zip(wanted.sources, resolved, strict=True):
                _prepare_source(source, found, wanted, pool, writer, seen, progress)
            _refuse_unfit(wanted, writer.num_rows, seen)
            writer.finish(_index(seen))
        if key_of(wanted, resolved) != folder.name:
            what = "the data has changed while it was prepared"
            raise UserError(f"data.{wanted.role}", what, "start again when it is complete")
        with written(folder):
            aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _prepare_source(
    source: Source, found: Resolved, wanted: Wanted, pool: Pool, writer: Writer, seen: _Seen, progress: Progress
) -> None:
    """Prepares the rows of one source."""
    counted = _Count(source.path, found.num_ignored)
    seen.sources.append(counted)
    first_part = len(seen.parts)
    seen.parts += found.parts
    behind, ahead = tee(portions(source, found.parts, wanted))
    for portion, result in zip(behind, pool.map(portion.task for portion in ahead), strict=True):
        counted.format, counted.auto = portion.task.format, portion.task.auto
        rows = []
        for index, tokens, trained, segment, targets in result.examples:
            part, number = portion.places[index]
            rows.append(Entry(tokens, trained, first_part + part, number, segment, targets))
        writer.add(result.ids, rows)
        _count(portion, result, wanted, counted, seen)
        if portion.failure:
            raise portion.failure
        progress(seen.num_rows)


def _count(portion: Portion, result: Result, wanted: Wanted, counted: _Count, seen: _Seen) -> None:
    """Adds what became of a portion. Raises UserError at its first bad row where none may be."""
    for error in portion.bad_rows(result):
        if not wanted.skip_bad:
            raise error
        counted.num_bad += 1
        if len(seen.bad) < LISTED:
            seen.bad.append((error.where, error.what, error.todo))
    counted.num_rows += portion.num_rows
    counted.num_examples += len(result.examples)
    counted.num_tokens += sum(tokens for _, tokens, *_ in result.examples)
    counted.num_trained += sum(trained for _, _, trained, *_ in result.examples)
    seen.tally += result.tally
    seen.lost += result.lost
    for index, tokens, prompt in result.long:
        found = (portion.task.places[index], tokens, prompt)
        longest = max([*seen.long[1:], found], key=lambda one: one[1])
        seen.long = [seen.long[0] if seen.long else found, longest]


def _refuse_unfit(wanted: Wanted, num_examples: int, seen: _Seen) -> None:
    """Refuses rows of which some are too long, none is left, or none, where they are trained on, teaches to stop."""
    num_rows = seen.num_rows
    place = f"data.{wanted.role}"
    if seen.long:
        (where, tokens, prompt), (longest, most, _) = seen.long[0], seen.long[-1]
        what = (
            f"the row has {length_in_words(tokens, prompt, wanted.settings.task.name)}, but {wanted.limits}; in all "
            f"{seen.tally['num_too_long']:,} of {num_rows:,} rows are too long, the longest has "
            f"{count(most, 'token')} ({longest})"
        )
        raise Unfit(where, what, "raise the limit, or set data.on_long_row to truncate or skip", seen)
    if num_examples:
        if not seen.tally["num_stops"] and wanted.role == "train" and wanted.settings.task.ends_with_stop:
            what = "no row is left that ends with a stop token, so the model would never learn to stop"
            raise Unfit(place, what, "raise the length limit, or set data.on_long_row: skip", seen)
        return
    if num_rows == 0:
        left = "holds out no row" if wanted.side == "eval" else "leaves no row to train on"
        what = f"is {wanted.eval_fraction} and {left}"
        raise Unfit("data.eval_fraction", what, "give more rows, or name held-out data in data.eval", seen)
    num_bad = sum(source.num_bad for source in seen.sources)
    if num_bad == num_rows:
        where, what, todo = seen.bad[0]
        raise Unfit(place, f"all {num_rows:,} rows are bad; the first: {where}: {what}", todo, seen)
    what = f"no row is left of {num_rows:,}: {wanted.limits}, and each is too long, bad, or loses its whole answer"
    raise Unfit(place, what, "raise the limit, or shorten the rows", seen)


def _index(seen: _Seen) -> dict[str, Any]:
    """What the index holds besides the totals."""
    return {
        "sources": [asdict(source) for source in seen.sources],
        "parts": [part_to_json(part) for part in seen.parts],
        "bad": seen.bad,
        "tally": dict(seen.tally),
        "lost_characters": sorted(seen.lost.items(), key=lambda lost: (-lost[1], lost[0])),
    }
