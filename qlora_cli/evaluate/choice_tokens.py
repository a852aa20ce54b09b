"""Choices as tokens: the same ones that lm-evaluation-harness 0.4.13 scores (api/model.py, models/huggingface.py).

It encodes the context, then context and choice as one text, and takes as the choice what is behind as many tokens as
the context has. Where a token spans the end of the context, it thereby loses what that token holds of the choice, and
so do we. Where all of the choice is lost the harness stops; here the choice is then encoded for itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_cli.errors import UserError
from qlora_cli.evaluate.choice_rows import ChoiceRow

ROWS_AT_ONCE = 512
"""Rows whose texts are given to the tokenizer in one call."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A choice behind its context.

    ids: (T,) int32, the context and the choice, its last `num_tokens` tokens. num_cut: tokens of the context that were
    left out in front, since the model reads no more.
    """

    ids: NDArray[np.int32]
    num_tokens: int
    num_cut: int

    @property
    def read(self) -> NDArray[np.int32]:
        """(T - 1,) int32: what the model reads. The last token is only predicted."""
        return self.ids[:-1]


def encode_rows(tokenizer: Any, rows: Sequence[ChoiceRow], longest: int | None) -> Iterator[list[Encoded]]:
    """Each row's choices as tokens, in the order of the rows.

    longest: tokens that the model reads at once; None: any number, where lm-evaluation-harness would take the
    tokenizer's figure or 2,048. Raises UserError for a choice that is longer, or of which no token is left.
    """
    for begin in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[begin : begin + ROWS_AT_ONCE]
        pairs = [_space_moved(row.context, choice) for row in part for choice in row.choices]
        texts = list(dict.fromkeys(context for context, _ in pairs if context))
        contexts = dict(zip(texts, _encode(tokenizer, texts), strict=True))
        wholes = iter(_encode(tokenizer, [context + choice for context, choice in pairs if context]))
        remaining = iter(pairs)
        for row in part:
            found = []
            for text in row.choices:
                context, choice = next(remaining)
                if context:
                    before = contexts[context]
                    behind = next(wholes)[len(before) :] or _alone(tokenizer, choice)
                else:
                    before, behind = _without_context(tokenizer, choice)
                found.append(_cut(before, behind, longest, row.where, text))
            yield found


def _space_moved(context: str, choice: str) -> tuple[str, str]:
    """White space at the end of the context belongs to the choice: tokenizers join it to the word behind."""
    kept = context.rstrip()
    return kept, context[len(kept) :] + choice


def _prefix_id(tokenizer: Any) -> int:
    """The token that stands for an empty context."""
    first = tokenizer.bos_token_id
    return int(tokenizer.eos_token_id if first is None else first)


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Each text with the tokenizer's own special tokens, but none where the text already begins with one."""
    prefix = tokenizer.decode(_prefix_id(tokenizer))
    found: dict[int, list[int]] = {}
    for begins in (True, False):
        which = [index for index, text in enumerate(texts) if text.startswith(prefix) == begins]
        if which:
            chosen = [texts[index] for index in which]
            arguments = {"add_special_tokens": False} if begins else {}
            found |= zip(which, tokenizer(chosen, verbose=False, **arguments)["input_ids"], strict=True)
    return [found[index] for index in range(len(texts))]


def _alone(tokenizer: Any, choice: str) -> list[int]:
    ids: list[int] = tokenizer(choice, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _without_context(tokenizer: Any, choice: str) -> tuple[list[int], list[int]]:
    """The prefix token and the tokens of a choice that nothing precedes."""
    prefix = _prefix_id(tokenizer)
    ids = _alone(tokenizer, choice)
    return [prefix], ids[1:] if ids[:1] == [prefix] else ids


def _cut(context: list[int], choice: list[int], longest: int | None, where: str, text: str) -> Encoded:
    """Both behind each other, shortened from the left so that the model reads at most `longest` tokens of them."""
    if not choice or not context:
        raise UserError(where, f"the choice {text!r} has no tokens behind its context", "mend or remove the row")
    if longest is not None and len(choice) > longest:
        what = f"a choice has {len(choice):,} tokens, the model reads {longest:,}"
        raise UserError(where, what, "remove the row, or use a model with a longer context")
    whole = context + choice
    kept = whole if longest is None else whole[-(longest + 1) :]
    return Encoded(np.asarray(kept, dtype=np.int32), len(choice), len(whole) - len(kept))
