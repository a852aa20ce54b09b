"""Texts of any length in windows that predict each token once, as lm-evaluation-harness rolls them.

The first window begins with BOS (else EOS), which is read and not predicted. Every other window is as long as the model
reads, so the last one reads again what the one before it predicted. Source: lm_eval/utils.py,
get_rolling_token_windows with context_len 1, and loglikelihood_rolling (v0.4.13).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from qlora_cli.data.rows import text_of
from qlora_cli.data.sources import SourceMark, read_parts, resolve
from qlora_cli.errors import UserError
from qlora_cli.recipe.schema import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TextWindow:
    """ids: what is read, and behind it the last token, which is only predicted; the first num_context are not
    predicted. num_bytes: UTF-8 bytes of the text that the predicted tokens spell."""

    where: str
    ids: list[int]
    num_context: int
    num_bytes: int


def text_windows(
    sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase, length: int, limit: int | None
) -> Iterator[TextWindow]:
    """The windows of the first `limit` texts. length: tokens that the model reads at once."""
    for where, text in islice(_texts(sources), limit):
        yield from windows_of(where, text, tokenizer, length)


def windows_of(where: str, text: str, tokenizer: Any, length: int) -> list[TextWindow]:
    """The windows of a text; none of an empty one."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    whole = [prefix, *ids]
    found = []
    for begin in range(0, len(ids), length):
        end = min(begin + length, len(ids))
        first = 0 if begin == 0 else max(end - length, 0)  # in `whole`, which is one longer
        first_character = 0 if begin == 0 else offsets[begin][0]
        last_character = len(text) if end == len(ids) else offsets[end][0]
        num_bytes = len(text[first_character:last_character].encode())
        found.append(TextWindow(where, whole[first : end + 1], begin + 1 - first, num_bytes))
    return found


def _texts(sources: Sequence[Source]) -> Iterator[tuple[str, str]]:
    for source in sources:
        parts = resolve(source, "eval").parts
        for part, read in read_parts(parts, source, SourceMark()):
            where = parts[part].place(read.number)
            if isinstance(read.value, UserError):
                raise read.value
            yield where, text_of(read.value, "text", where)
