"""The length limits of a recipe, and what happens to a row beyond them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_cli.data.encode import Example
from qlora_cli.data.rows import count
from qlora_cli.errors import UserError

if TYPE_CHECKING:
    from qlora_cli.recipe.schema import Data


@dataclass(frozen=True, slots=True)
class Limits:
    """The longest example in tokens: either in all, or prompt and answer apart. None: no limit.

    on_long_row: data.on_long_row. task: model.task; of seq2seq_lm max_length may be both other limits.
    """

    max_length: int | None
    source_max_length: int | None = None
    target_max_length: int | None = None
    on_long_row: str = "error"
    task: str = "causal_lm"

    @classmethod
    def of(cls, data: Data, task: str = "causal_lm") -> Limits:
        """The recipe's limits; of seq2seq_lm max_length is one for the source and one for the target.

        Raises UserError where only one of the two of prompt and answer is set.
        """
        source, target = data.source_max_length, data.target_max_length
        if (source is None) != (target is None):
            missing, other = ("source", "target") if source is None else ("target", "source")
            what = f"is not set, but {other}_max_length is"
            raise UserError(f"data.{missing}_max_length", what, "set both, or neither and max_length")
        max_length = data.max_length if source is None else None
        if source is None and task == "seq2seq_lm":
            source = target = data.max_length
        return cls(max_length, source, target, data.on_long_row, task)

    @property
    def longest(self) -> int:
        """Tokens of the longest example that is possible."""
        if self.source_max_length is None:
            return self.max_length or 0
        return self.source_max_length + (self.target_max_length or 0)

    @property
    def most_positions(self) -> int:
        """Positions of a model that the longest example takes: an encoder reads the source, a decoder the target."""
        if self.task != "seq2seq_lm":
            return self.longest
        return max(self.source_max_length or 0, self.target_max_length or 0)

    def cut(self, example: Example) -> Example:
        """The first tokens of the example, or of its prompt and of the rest, up to the limits; itself where it fits.

        The prompt is all before the first trained token and loses its end, as in artidoro/qlora, whose tokenizer
        truncates on the right.
        """
        ids, labels = example.input_ids, example.labels
        if self.max_length is not None:
            kept = [slice(0, self.max_length)]
        else:
            assert self.source_max_length is not None
            assert self.target_max_length is not None
            prompt = example.num_prompt
            kept = [slice(0, min(prompt, self.source_max_length)), slice(prompt, prompt + self.target_max_length)]
        if sum(len(ids[part]) for part in kept) == len(ids):
            return example
        cut_ids, cut_labels = ([token for part in kept for token in tokens[part]] for tokens in (ids, labels))
        return Example(cut_ids, cut_labels, example.where)

    def __str__(self) -> str:
        if self.max_length is not None:
            each = ", for the source and for the target" if self.task == "seq2seq_lm" else ""
            return f"data.max_length is {self.max_length:,}{each}"
        return f"data.source_max_length is {self.source_max_length:,} and target_max_length {self.target_max_length:,}"


Tally = Counter[str]
"""Counts of what happened to rows; the names are fields of examples.Examples."""


def fitted(example: Example, cut: Example, limits: Limits, stop_ids: frozenset[int], tally: Tally) -> Example | None:
    """The example within the limits, counted; None where it is left out. cut: as much of it as fits, or itself."""
    if cut is not example:
        return LONG_ROWS[limits.on_long_row](example, cut, stop_ids, tally)
    return example


def _refuse(example: Example, cut: Example, stop_ids: frozenset[int], tally: Tally) -> Example | None:
    """Nothing: the preparation ends with an error that tells how many such rows there are."""
    return None


def _skip(example: Example, cut: Example, stop_ids: frozenset[int], tally: Tally) -> Example | None:
    """Nothing: the row is left out."""
    tally["num_skipped"] += 1
    return None


def _truncate(example: Example, cut: Example, stop_ids: frozenset[int], tally: Tally) -> Example | None:
    """The cut row, without it where it has lost every trained token."""
    if not cut.num_trained:
        tally["num_emptied"] += 1
        return None
    tally["num_truncated"] += 1
    tally["num_cut_tokens"] += example.num_tokens - cut.num_tokens
    tally["num_cut_trained"] += example.num_trained - cut.num_trained
    tally["num_lost_stops"] += num_stops(example, stop_ids) - num_stops(cut, stop_ids)
    return cut


LONG_ROWS: dict[str, Callable[[Example, Example, frozenset[int], Tally], Example | None]] = {
    "error": _refuse,
    "truncate": _truncate,
    "skip": _skip,
}


def num_stops(example: Example, stop_ids: frozenset[int]) -> int:
    """Trained stop tokens of an example."""
    labels = example.labels[1:]
    return sum(map(labels.count, stop_ids))


PROMPTS = {"causal_lm": "before the answer", "seq2seq_lm": "of the source"}
"""What the tokens before the first trained one are; other tasks train no token."""


def length_in_words(num_tokens: int, num_prompt: int, task: str) -> str:
    """A row's length in words: '812 tokens (300 before the answer)'."""
    tokens = count(num_tokens, "token")
    return f"{tokens} ({num_prompt:,} {PROMPTS[task]})" if task in PROMPTS else tokens
