"""The encoded examples of all sources of one role, within the length limits, with what was left out counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qlora_cli.data.chat import Chat, load_chat, render_row
from qlora_cli.data.encode import Example, encode, unspelled
from qlora_cli.data.formats import FORMATS, choose_format
from qlora_cli.data.sources import Role, load_rows
from qlora_cli.errors import UserError
from qlora_cli.recipe.schema import Data, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class SourceCount:
    """What was read from one source; `auto`: the format was chosen by the columns."""

    path: str
    format: str
    auto: bool
    num_rows: int

    def __str__(self) -> str:
        chosen = " (by its columns)" if self.auto else ""
        return f"{self.path}: {_count(self.num_rows, 'row')}, format {self.format}{chosen}"


@dataclass(frozen=True, slots=True)
class Limits:
    """The longest example in tokens: either in all, or prompt and answer apart. None: no limit."""

    max_length: int | None
    source_max_length: int | None
    target_max_length: int | None

    @classmethod
    def of(cls, data: Data) -> Limits:
        """The recipe's limits. Raises UserError where only one of the two of prompt and answer is set."""
        source, target = data.source_max_length, data.target_max_length
        if (source is None) != (target is None):
            missing, other = ("source", "target") if source is None else ("target", "source")
            what = f"is not set, but {other}_max_length is"
            raise UserError(f"data.{missing}_max_length", what, "set both, or neither and max_length")
        return cls(data.max_length if source is None else None, source, target)

    def cut(self, example: Example) -> Example:
        """The first tokens of the example, or of its prompt and of the rest, up to the limits; itself where it fits.

        The prompt is all before the first trained token and loses its end, as in artidoro/qlora, whose tokenizer
        truncates on the right.
        """
        ids, labels, prompt = example.input_ids, example.labels, example.num_prompt
        if self.max_length is not None:
            kept = [slice(0, self.max_length)]
        else:
            assert self.source_max_length is not None
            assert self.target_max_length is not None
            kept = [slice(0, min(prompt, self.source_max_length)), slice(prompt, prompt + self.target_max_length)]
        if sum(len(ids[part]) for part in kept) == len(ids):
            return example
        cut_ids, cut_labels = ([token for part in kept for token in tokens[part]] for tokens in (ids, labels))
        return Example(cut_ids, cut_labels, example.where)

    def __str__(self) -> str:
        if self.max_length is not None:
            return f"data.max_length is {self.max_length:,}"
        return f"data.source_max_length is {self.source_max_length:,} and target_max_length {self.target_max_length:,}"


@dataclass(frozen=True, slots=True)
class Examples:
    """Encoded rows in the order of the sources, and what became of the others.

    num_rows:       rows read = len(rows) + num_skipped + num_emptied
    num_skipped:    rows left out for their length (on_long_row: skip)
    num_truncated:  rows cut and kept (on_long_row: truncate)
    num_emptied:    rows left out because the cut took every trained token: they would add nothing to the loss
    num_cut_tokens: tokens cut from the rows that are kept
    num_lost_stops: trained stop tokens among them: these answers do not teach to stop
    num_silent:     rows kept whose answers are empty: they teach to stop at once
    num_tokens, num_trained: tokens of `rows`, and those that count in the loss
    lost_characters: what the tokenizer cannot write, most frequent first, with the number of rows that hold it
    """

    rows: tuple[Example, ...] = ()
    sources: tuple[SourceCount, ...] = ()
    num_rows: int = 0
    num_skipped: int = 0
    num_truncated: int = 0
    num_emptied: int = 0
    num_cut_tokens: int = 0
    num_lost_stops: int = 0
    num_silent: int = 0
    num_tokens: int = 0
    num_trained: int = 0
    lost_characters: tuple[tuple[str, int], ...] = ()

    def summary(self) -> list[str]:
        """Short lines for the user: each source, the totals, and every row that is not trained as it stands."""
        share = f"{self.num_trained / max(self.num_tokens, 1):.0%}"
        tokens = f"{_count(self.num_tokens, 'token')}, {self.num_trained:,} trained ({share})"
        lines = [*map(str, self.sources), f"{_count(len(self.rows), 'example')}, {tokens}"]
        if self.num_skipped:
            lines.append(f"{_count(self.num_skipped, 'row')} skipped: too long")
        if self.num_truncated:
            cut, stops = _count(self.num_cut_tokens, "token"), _count(self.num_lost_stops, "end-of-turn token")
            lines.append(f"{_count(self.num_truncated, 'row')} truncated: {cut} cut, {stops} lost")
        if self.num_emptied:
            lines.append(f"{_count(self.num_emptied, 'row')} left out: truncation left no trained token")
        if self.num_silent:
            lines.append(f"{_count(self.num_silent, 'row')} with an empty answer: trained to say nothing")
        if self.lost_characters:
            worst = ", ".join(f"{text!r} in {_count(num_rows, 'row')}" for text, num_rows in self.lost_characters[:5])
            lost = _count(len(self.lost_characters), "character")
            lines.append(f"{lost} lost, the tokenizer cannot write them: {worst}")
        return lines


def load_examples(
    sources: Sequence[Source],
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    stop_token_ids: frozenset[int],
    role: Role,
) -> Examples:
    """Read, render, encode and limit the rows of all sources; no sources give no examples.

    stop_token_ids: the end-of-turn tokens of the model's generation config; the tokenizer's EOS is always one.
    Raises UserError at the first row that cannot be read, proven or trained on, for rows beyond the limits where
    data.on_long_row is error, and where no row is left.
    """
    if not sources:
        return Examples()
    limits = Limits.of(data)
    chat = load_chat(data.chat_template, tokenizer, stop_token_ids)
    counts, encoded = [], []
    characters: Counter[str] = Counter()
    for source in sources:
        count, examples = _encode_source(source, role, chat, characters)
        counts.append(count)
        encoded += examples
    kept = LONG_ROWS[data.on_long_row](encoded, limits, chat)
    if not kept.rows:
        what = f"no row is left of {len(encoded):,}: {limits}, and each is too long or loses its whole answer"
        raise UserError(f"data.{role}", what, "raise the limit, or shorten the rows")
    by_number = sorted(characters, key=lambda character: (-characters[character], character))
    return replace(
        kept,
        sources=tuple(counts),
        num_rows=len(encoded),
        num_silent=sum(_num_stops(example, chat) == example.num_trained for example in kept.rows),
        num_tokens=sum(example.num_tokens for example in kept.rows),
        num_trained=sum(example.num_trained for example in kept.rows),
        lost_characters=tuple((character, characters[character]) for character in unspelled(by_number, chat)),
    )


def _encode_source(
    source: Source, role: Role, chat: Chat, characters: Counter[str]
) -> tuple[SourceCount, list[Example]]:
    """All rows of one source, encoded in full length. Counts into `characters` the rows that hold each character."""
    rows = load_rows(source, role)
    name = choose_format(source.format, rows)
    read = FORMATS[name].read
    rendered = [render_row(read(row, where), chat, where) for row, where in zip(rows.rows, rows.where, strict=True)]
    for row in rendered:
        characters.update(set(row.text))
    examples = list(encode(rendered, chat))
    for example in examples:
        if example.num_trained == 0:
            what = "nothing to train: the row's first token is its last, and a first token is never predicted"
            raise UserError(example.where, what, "remove the row, or give it a text")
    return SourceCount(source.path, name, source.format == "auto", len(examples)), examples


# ── data.on_long_row ─────────────────────────────────────────────────────────────────────────────────────────────────


def _refuse(encoded: list[Example], limits: Limits, chat: Chat) -> Examples:
    """All rows, if all fit."""
    too_long = [example for example in encoded if limits.cut(example) is not example]
    if too_long:
        first, longest = too_long[0], max(too_long, key=lambda example: example.num_tokens)
        what = (
            f"the row has {_length(first)}, but {limits}; in all {len(too_long):,} of {len(encoded):,} rows "
            f"are too long, the longest has {_length(longest)} ({longest.where})"
        )
        raise UserError(first.where, what, "raise the limit, or set data.on_long_row to truncate or skip")
    return Examples(tuple(encoded))


def _skip(encoded: list[Example], limits: Limits, chat: Chat) -> Examples:
    """The rows that fit."""
    rows = tuple(example for example in encoded if limits.cut(example) is example)
    return Examples(rows, num_skipped=len(encoded) - len(rows))


def _truncate(encoded: list[Example], limits: Limits, chat: Chat) -> Examples:
    """All rows cut to the limits, without those that lose every trained token."""
    cut = [limits.cut(example) for example in encoded]
    pairs = [(whole, part) for whole, part in zip(encoded, cut, strict=True) if part.num_trained]
    shorter = [(whole, part) for whole, part in pairs if part is not whole]
    return Examples(
        tuple(part for _, part in pairs),
        num_truncated=len(shorter),
        num_emptied=len(encoded) - len(pairs),
        num_cut_tokens=sum(whole.num_tokens - part.num_tokens for whole, part in shorter),
        num_lost_stops=sum(_num_stops(whole, chat) - _num_stops(part, chat) for whole, part in shorter),
    )


LONG_ROWS: dict[str, Callable[[list[Example], Limits, Chat], Examples]] = {
    "error": _refuse,
    "truncate": _truncate,
    "skip": _skip,
}


def _num_stops(example: Example, chat: Chat) -> int:
    """Trained stop tokens of an example."""
    stop_ids = frozenset(chat.stops.values())
    return sum(label in stop_ids for label in example.labels[1:])


def _length(example: Example) -> str:
    """A row's length in words: '812 tokens (300 before the answer)'."""
    return f"{_count(example.num_tokens, 'token')} ({example.num_prompt:,} before the answer)"


def _count(number: int, noun: str) -> str:
    """'1 row', '7,473 rows'."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
