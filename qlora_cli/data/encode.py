"""Text with trained characters to token ids with labels: the one encoder of training, evaluation and chat.

The ids are those of the whole text encoded at once, provided that the prompt's own ids are the beginning of it. Where
they are not (a prompt that ends in a space, for instance: " 42" is one token), the text is cut at the start of the
answer and encoded in pieces. So the ids before an answer are always those that the model sees when it is used, and
every character of an answer is trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from qlora_cli.data.chat import Chat, Rendered, render_prompt
from qlora_cli.data.formats import Message
from qlora_cli.errors import UserError

if TYPE_CHECKING:
    from transformers import BatchEncoding

IGNORE_INDEX = -100
"""The label of a token that is not trained, as in torch.nn.functional.cross_entropy."""

CHUNK = 512
"""Rows that are tokenized at once: bounds the memory of the tokenizer's own results."""

TokenSpan = tuple[int, int | None]
"""First token and the one behind the last; None where no token ends with the characters."""


@dataclass(frozen=True, slots=True)
class Example:
    """One encoded row. `labels` is `input_ids` where trained and IGNORE_INDEX elsewhere: the same length, not shifted.

    where: the row's place, as file:line.
    """

    input_ids: list[int]
    labels: list[int]
    where: str

    @property
    def num_tokens(self) -> int:
        """Tokens of the row."""
        return len(self.input_ids)

    @property
    def num_trained(self) -> int:
        """Tokens that count in the loss. The first token has no context and is never predicted, whatever its label."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])

    @property
    def num_prompt(self) -> int:
        """Tokens before the first trained one: what `encode_prompt` gives for the same messages."""
        return next((at for at, label in enumerate(self.labels) if label != IGNORE_INDEX), len(self.labels))


def encode(rows: Iterable[Rendered], chat: Chat) -> Iterator[Example]:
    """Encode rows in their order. Raises UserError where an answer does not end with one stop token."""
    bos = _bos(chat)
    for chunk in _chunks(rows):
        whole = _tokenize([row.text for row in chunk], chat)
        heads = iter(_tokenize([row.text[:start] for row in chunk for start, _ in row.spans], chat)["input_ids"])
        for index, row in enumerate(chunk):
            prompts = [next(heads) for _ in row.spans]
            input_ids: list[int] = whole["input_ids"][index]
            if all(input_ids[: len(prompt)] == prompt for prompt in prompts):
                ends = [_token_end(whole, index, end) if row.templated else len(input_ids) for _, end in row.spans]
                spans = list(zip(map(len, prompts), ends, strict=True))
            else:
                input_ids, spans = _encode_cut(row, chat)
            if row.templated:
                yield _templated(row, input_ids, spans, chat)
            else:
                yield _verbatim(row, input_ids, spans[0][0], bos, chat.tokenizer.eos_token_id)


def encode_prompt(prompt: Sequence[Message] | str, chat: Chat, where: str = "the conversation") -> list[int]:
    """The ids that a model sees before it answers: those before the first trained token of the same row.

    prompt: messages, for the template with its generation prompt, or verbatim text, for the tokenizer's BOS.
    """
    if not isinstance(prompt, str):
        ids: list[int] = _tokenize([render_prompt(prompt, chat, where)], chat)["input_ids"][0]
        return ids
    bos = _bos(chat)
    ids = _tokenize([prompt], chat)["input_ids"][0]
    return ids if bos and ids[: len(bos)] == bos else bos + ids


def unspelled(characters: Iterable[str], chat: Chat) -> list[str]:
    """Those of the characters that the tokenizer cannot write: they become its unk, or vanish without a trace.

    The latter is what a BPE without unk and without byte tokens does.
    """
    visible = [character for character in characters if not character.isspace()]
    if not visible:
        return []
    unk = chat.tokenizer.unk_token_id
    known = [[token for token in ids if token != unk] for ids in _tokenize(visible, chat)["input_ids"]]
    texts: list[str] = chat.tokenizer.batch_decode(known)
    return [character for character, text in zip(visible, texts, strict=True) if not text.strip()]


def _chunks(rows: Iterable[Rendered]) -> Iterator[list[Rendered]]:
    """The rows, CHUNK at a time."""
    iterator = iter(rows)
    while chunk := list(islice(iterator, CHUNK)):
        yield chunk


def _tokenize(texts: list[str], chat: Chat) -> BatchEncoding:
    """The texts' ids, with nothing added, truncated or padded."""
    options = {"truncation": False, "padding": False, "return_attention_mask": False, "verbose": False}
    return chat.tokenizer(texts, add_special_tokens=False, **options)


def _bos(chat: Chat) -> list[int]:
    """What the tokenizer puts before a text by default: [BOS] or nothing; what it puts behind is left to us."""
    bare = _tokenize(["a"], chat)["input_ids"][0]
    full: list[int] = chat.tokenizer("a")["input_ids"]
    return next(full[:at] for at in range(len(full) + 1) if full[at : at + len(bare)] == bare)


def _token_end(encoding: BatchEncoding, index: int, end: int) -> int | None:
    """The token behind the one that holds the character before `end`: a stop token's last one."""
    token: int | None = encoding.char_to_token(index, end - 1)
    return None if token is None else token + 1


def _encode_cut(row: Rendered, chat: Chat) -> tuple[list[int], list[TokenSpan]]:
    """The row's ids where the text is cut at the start of every answer, and the tokens of every answer."""
    cuts = [start for start, _ in row.spans] + [len(row.text)]
    input_ids: list[int] = list(_tokenize([row.text[: cuts[0]]], chat)["input_ids"][0])
    spans: list[TokenSpan] = []
    for (start, end), cut in zip(row.spans, cuts[1:], strict=True):
        begin = len(input_ids)
        encoding, skip, shift = _continue(row.text[start:cut], chat)
        input_ids += encoding["input_ids"][0][skip:]
        last = _token_end(encoding, 0, end - start + shift) if row.templated else len(input_ids) - begin + skip
        spans.append((begin, None if last is None else begin + last - skip))
    return input_ids, spans


def _continue(piece: str, chat: Chat) -> tuple[BatchEncoding, int, int]:
    """A text that follows another one, with the number of tokens and characters to skip.

    It is encoded behind a line break, so that a SentencePiece tokenizer adds no space at its start.
    """
    line_break: list[int] = _tokenize(["\n"], chat)["input_ids"][0]
    encoding = _tokenize(["\n" + piece], chat)
    if encoding["input_ids"][0][: len(line_break)] == line_break:
        return encoding, len(line_break), 1
    return _tokenize([piece], chat), 0, 0  # one token holds the line break and the text's start


def _templated(row: Rendered, input_ids: list[int], spans: list[TokenSpan], chat: Chat) -> Example:
    """The example of a rendered conversation: each span of tokens is trained and ends with a stop token."""
    labels = [IGNORE_INDEX] * len(input_ids)
    stop_ids = set(chat.stops.values())
    for start, end in spans:
        if end is None or end <= start or input_ids[end - 1] not in stop_ids:
            what = "the end-of-turn token that the chat template writes is not one token of the vocabulary"
            raise UserError(row.where, what, "add it to the tokenizer, or use a template made for this model")
        labels[start:end] = input_ids[start:end]
    return Example(input_ids, labels, row.where)


def _verbatim(row: Rendered, ids: list[int], start: int, bos: list[int], eos: int) -> Example:
    """The example of a verbatim text, trained from token `start` on, with BOS and EOS, neither twice."""
    if ids[: len(bos)] != bos:
        ids, start = bos + ids, start + len(bos)
    if ids[-1:] != [eos]:
        ids = [*ids, eos]
    start = max(start, len(bos))
    return Example(ids, [IGNORE_INDEX] * start + ids[start:], row.where)
