"""Rows of seq2seq_lm: a source text for the encoder and a target text for the decoder, both with special tokens.

The ids of an example are the source's, none of them trained, and behind them the target's, all trained: what HF's
examples give as `tokenizer(source)` and `tokenizer(text_target=target)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from qlora_cli.data.cuts import left_out, truncated
from qlora_cli.data.encode import IGNORE_INDEX, Example
from qlora_cli.data.formats import SUMMARIES, Format, Formats
from qlora_cli.data.rows import Row, text_of
from qlora_cli.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from qlora_cli.data.chat import Chat
    from qlora_cli.data.limits import Limits


class Pair(NamedTuple):
    """What is read and what is written."""

    source: str
    target: str

    @property
    def texts(self) -> tuple[str, ...]:
        """What the tokenizer has to spell."""
        return self


def of_columns(source: str, target: str) -> Callable[[Row, str], Pair]:
    """The reader of two columns that hold texts."""
    return lambda row, where: Pair(text_of(row, source, where), text_of(row, target, where))


def alpaca(row: Row, where: str) -> Pair:
    """{instruction, input?, output}: the instruction with the input below it, as LLaMA-Factory puts them together."""
    source = text_of(row, "instruction", where)
    if row.get("input"):
        source += "\n" + text_of(row, "input", where)
    return Pair(source, text_of(row, "output", where))


def summarisation(row: Row, where: str) -> Pair:
    """A text and its summary in the columns of XSum, CNN/DailyMail or SAMSum; T5's prefix is for a template."""
    source, target = next(columns for columns in SUMMARIES if all(row.get(column) is not None for column in columns))
    return Pair(text_of(row, source, where), text_of(row, target, where))


def templated(texts: dict[str, str]) -> Pair:
    """What a source's template wrote."""
    return Pair(texts["prompt"], texts["completion"])


FORMATS = Formats(
    {
        "source_target": Format((("source", "target"),), of_columns("source", "target")),
        "prompt_completion": Format((("prompt", "completion"),), of_columns("prompt", "completion")),
        "input_output": Format((("input", "output"),), of_columns("input", "output")),
        "question_answer": Format((("question", "answer"),), of_columns("question", "answer")),
        "summarisation": Format(SUMMARIES, summarisation),
        "alpaca": Format((("instruction", "output"),), alpaca, ("input",)),
    }
)


def encode(row: Pair, where: str, chat: Chat, limits: Limits) -> list[tuple[Example, Example]]:
    """The example of a pair, and the same within the limits. A target ends with the tokenizer's EOS.

    A source that is cut keeps the special tokens at its end, as HF's truncation does; a target that is cut does not:
    it would teach to stop there. Raises UserError for an empty source, and one of which a cut leaves nothing.
    """
    source = chat.tokenizer.encode(row.source).ids
    if not row.source.strip() or not source:
        raise UserError(where, "the source is empty", "give the row a text to read")
    target = chat.tokenizer.encode(row.target).ids
    if target[-1:] != [chat.settings.eos_id]:
        target = [*target, chat.settings.eos_id]
    whole = _example(source, target, where)
    longest, most = limits.source_max_length, limits.target_max_length
    assert longest is not None
    assert most is not None
    if len(source) <= longest and len(target) <= most:
        return [(whole, whole)]
    if limits.on_long_row != "truncate":
        return [(whole, left_out(where))]
    source = truncated(chat.tokenizer, (row.source,), longest, where).ids
    return [(whole, _example(source, target[:most], where))]


def _example(source: list[int], target: list[int], where: str) -> Example:
    return Example(source + target, [IGNORE_INDEX] * len(source) + target, where)
