"""The prepared examples of one role, with what was read and what became of every row, in words for the user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora_cli.data.cache import Wanted
from qlora_cli.data.chat import chat_settings
from qlora_cli.data.encode import Example
from qlora_cli.data.limits import Limits
from qlora_cli.data.order import Rows
from qlora_cli.data.prepare import Progress, prepared
from qlora_cli.data.row_task import CAUSAL_LM, NO_TEXT, RowTask, trained_in_words
from qlora_cli.data.rows import Role, count
from qlora_cli.data.sources import Part
from qlora_cli.data.store import StoredRows, part_from_json
from qlora_cli.recipe.schema import Data, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class SourceCount:
    """What was read from one source; `auto`: the format was chosen by the columns.

    num_ignored: files of a folder that hold no rows; num_bad: rows left out (on_bad_row: skip); weight: passes over
    its num_examples examples in an epoch.
    """

    path: str
    format: str
    auto: bool
    weight: float
    num_ignored: int
    num_rows: int
    num_bad: int
    num_examples: int
    num_tokens: int
    num_trained: int

    def __str__(self) -> str:
        chosen = " (by its columns)" if self.auto else ""
        bad = f", {self.num_bad:,} bad and left out" if self.num_bad else ""
        ignored = f", {count(self.num_ignored, 'other file')} left out" if self.num_ignored else ""
        weight = f", weight {self.weight:g}" if self.weight != 1 else ""
        return f"{self.path}: {count(self.num_rows, 'row')}{bad}, format {self.format}{chosen}{weight}{ignored}"


@dataclass(frozen=True, slots=True)
class Examples:
    """Encoded rows in the order of the sources, and what became of the others.

    num_rows:        rows read
    num_bad:         rows left out because they cannot be read, proven or trained on (on_bad_row: skip)
    bad:             the first of them: where, what, what to do
    num_skipped:     rows left out for their length (on_long_row: skip)
    num_truncated:   rows cut and kept (on_long_row: truncate)
    num_emptied:     rows left out because the cut took every trained token: they would add nothing to the loss
    num_cut_tokens:  tokens cut from the rows that are kept, num_cut_trained trained ones among them
    num_lost_stops:  stop tokens among those: these answers do not teach to stop
    num_silent:      examples whose answers are empty: they teach to stop at once
    num_split:       conversations that are proven as one example per answer only
    num_tokens, num_trained: tokens of `rows`, and those that count in the loss
    lost_characters: what the tokenizer cannot write, most frequent first, with the number of rows that hold it
    digest:          SHA-256 of the ids and labels of all rows, in order
    folder:          where they lie
    parts:           the files and hub data sets that they come from
    task:            what they are for, by model.task
    """

    rows: Sequence[Example] = ()
    sources: tuple[SourceCount, ...] = ()
    num_rows: int = 0
    num_bad: int = 0
    bad: tuple[tuple[str, str, str], ...] = ()
    num_skipped: int = 0
    num_truncated: int = 0
    num_emptied: int = 0
    num_cut_tokens: int = 0
    num_cut_trained: int = 0
    num_lost_stops: int = 0
    num_silent: int = 0
    num_split: int = 0
    num_tokens: int = 0
    num_trained: int = 0
    lost_characters: tuple[tuple[str, int], ...] = ()
    digest: str = ""
    folder: Path = field(default_factory=Path)
    parts: tuple[Part, ...] = ()
    task: str = CAUSAL_LM.name

    @property
    def lengths(self) -> Rows:
        """Tokens of every example."""
        return lengths_of(self.rows)

    @property
    def trained_lengths(self) -> Rows:
        """Trained tokens of every example."""
        if isinstance(self.rows, StoredRows):
            return self.rows.num_trained
        return np.array([row.num_trained for row in self.rows])

    def summary(self) -> list[str]:
        """Short lines for the user: each source, the totals, and every row that is not trained as it stands."""
        trained = trained_in_words(self.task, self.num_trained, self.num_tokens, digits=0)
        tokens = f"{count(len(self.rows), 'example')}, {count(self.num_tokens, 'token')}, {trained}"
        return [*map(str, self.sources), tokens, *self.losses()]

    def losses(self) -> list[str]:
        """The lines about rows that are not trained as they stand."""
        lines = [f"bad row {where}: {what}" for where, what, _ in self.bad[:5]]
        if self.num_bad > 5:
            lines.append(f"... and {count(self.num_bad - 5, 'more bad row')}; `qlora preview --errors` lists them")
        if self.num_split:
            lines.append(f"{count(self.num_split, 'conversation')} made into one example per answer, as only so proven")
        if self.num_skipped:
            lines.append(f"{count(self.num_skipped, 'row')} left out: too long")
        if self.num_truncated:
            cut = f"{count(self.num_truncated, 'row')} truncated: {count(self.num_cut_tokens, 'token')} cut"
            stops = f"{count(self.num_lost_stops, 'end-of-turn token')} lost"
            trains_text = self.task not in NO_TEXT
            lines.append(f"{cut}, {self.num_cut_trained:,} of them trained, {stops}" if trains_text else cut)
        if self.num_emptied:
            lines.append(f"{count(self.num_emptied, 'row')} left out: truncation left no trained token")
        if self.num_silent:
            lines.append(f"{count(self.num_silent, 'row')} with an empty answer: trained to say nothing")
        if self.lost_characters:
            worst = ", ".join(f"{text!r} in {count(num_rows, 'row')}" for text, num_rows in self.lost_characters[:5])
            lost = count(len(self.lost_characters), "character")
            lines.append(f"{lost} lost, the tokenizer cannot write them: {worst}")
        return lines


def lengths_of(rows: Sequence[Example]) -> Rows:
    """Tokens of every example; those of stored ones are known without reading them."""
    return rows.lengths if isinstance(rows, StoredRows) else np.array([row.num_tokens for row in rows], np.int64)


def load_examples(
    data: Data,
    role: Role,
    tokenizer: PreTrainedTokenizerBase,
    stop_token_ids: frozenset[int],
    *,
    seed: int,
    today: date,
    task: RowTask = CAUSAL_LM,
    progress: Progress = lambda num_rows: None,
) -> Examples:
    """The examples of data.train or data.eval, prepared or found prepared; no sources give none.

    stop_token_ids: the end-of-turn tokens of the model's generation config; the tokenizer's EOS is always one.
    seed: chooses the rows of eval_fraction. today: for a template that prints the date. task: what the rows are for.
    Raises UserError at the first row that cannot be read, proven or trained on (data.on_bad_row: error), for rows
    beyond the limits (data.on_long_row: error), and where no row is left.
    """
    if role == "eval" and not data.eval and not data.eval_fraction:
        return Examples()
    wanted = wanted_rows(data, role, tokenizer, stop_token_ids, seed=seed, today=today, task=task)
    workers = None if data.workers == "auto" else data.workers
    try:
        found = _examples(*prepared(wanted, workers, progress), wanted.sources)
        return replace(found, task=task.name)
    except FileNotFoundError:  # somebody emptied the cache between two lines
        return _examples(*prepared(wanted, workers, progress), wanted.sources)


def wanted_rows(
    data: Data,
    role: Role,
    tokenizer: PreTrainedTokenizerBase,
    stop_token_ids: frozenset[int],
    *,
    seed: int,
    today: date,
    task: RowTask = CAUSAL_LM,
) -> Wanted:
    """What the recipe wants of data.train or data.eval. Raises UserError as chat_settings does."""
    return Wanted(
        role="train" if data.eval_fraction else role,
        sources=data.eval if role == "eval" and not data.eval_fraction else data.train,
        settings=chat_settings(data, tokenizer, stop_token_ids, today, task),
        limits=Limits.of(data, task.name),
        skip_bad=data.on_bad_row == "skip",
        eval_fraction=data.eval_fraction,
        seed=seed,
        side=role,
    )


def _examples(folder: Path, index: dict[str, Any], wanted: Sequence[Source]) -> Examples:
    """The examples of a prepared folder."""
    parts = [part_from_json(facts) for facts in index["parts"]]
    rows = StoredRows(folder, index["num_rows"], index["num_tokens"], parts)
    tally = {name: number for name, number in index["tally"].items() if name in Examples.__dataclass_fields__}
    counted = zip(index["sources"], wanted, strict=True)
    sources = tuple(SourceCount(**facts, weight=source.weight) for facts, source in counted)
    return Examples(
        rows=rows,
        sources=sources,
        num_rows=sum(source.num_rows for source in sources),
        num_bad=sum(source.num_bad for source in sources),
        bad=tuple(tuple(one) for one in index["bad"]),
        num_tokens=index["num_tokens"],
        num_trained=index["num_trained"],
        lost_characters=tuple((text, num_rows) for text, num_rows in index["lost_characters"]),
        digest=index["digest"],
        folder=folder,
        parts=tuple(parts),
        **tally,
    )
