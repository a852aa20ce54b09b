"""Texts cut to a length with the special tokens around them, as transformers' truncation cuts them."""

from __future__ import annotations

from tokenizers import Encoding, Tokenizer

from qlora_cli.data.encode import Example
from qlora_cli.data.rows import count
from qlora_cli.errors import UserError


def encoded(tokenizer: Tokenizer, texts: tuple[str, ...]) -> Encoding:
    """One text or a pair with its special tokens."""
    first, *second = texts
    return tokenizer.encode(first, second[0] if second else None)


def truncated(tokenizer: Tokenizer, texts: tuple[str, ...], max_length: int, where: str) -> Encoding:
    """One text or a pair in at most `max_length` tokens: the longer text loses its end.

    Raises UserError where the special tokens leave a text no room, which the tokenizer itself passes over.
    """
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    try:
        encoding = encoded(tokenizer, texts)
    finally:
        tokenizer.no_truncation()
    if len(encoding.ids) > max_length or not {*range(len(texts))} <= {*encoding.sequence_ids}:
        what = f"{count(max_length, 'token')} are too few for the text beside its special tokens"
        raise UserError(where, what, "raise the length limit")
    return encoding


def left_out(where: str) -> Example:
    """What stands for a row beyond the limits where none is cut."""
    return Example([], [], where)
