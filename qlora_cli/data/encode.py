"""Text with trained characters to token ids with labels: the one encoder of training, evaluation and chat.

The ids are those of the whole text encoded at once, provided that the prompt's own ids are the beginning of it. Where
they are not (a prompt that ends in a space, for instance: " 42" is one token), the text is cut at the start of the
answer and encoded in pieces. So the ids before an answer are always those that the model sees when it is used, and
every character of an answer is trained.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from tokenizers import Encoding, Tokenizer

from qlora_cli.data.chat import Chat
from qlora_cli.data.conversations import Message
from qlora_cli.data.spans import Rendered
from qlora_cli.errors import UserError

IGNORE_INDEX = -100
"""The label of a token that is not trained, as in torch.nn.functional.cross_entropy."""

SHORT = 200
"""Characters of a prompt's end that may recur in many rows."""

TokenSpan = tuple[int, int | None]
"""First token and the one behind the last; None where no token ends with the characters."""


@dataclass(frozen=True, slots=True)
class Example:
    """One encoded row. `labels` is `input_ids` where trained and IGNORE_INDEX elsewhere: the same length, not shifted.

    where:   the row's place, as file:line.
    targets: what is learned besides tokens: a class or a number, or first and last token of a span; else empty.
    segment: where the second text of a pair begins; 0: there is none.
    """

    input_ids: list[int]
    labels: list[int]
    where: str
    targets: tuple[float, ...] = ()
    segment: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of the row."""
        return len(self.input_ids)

    @property
    def num_trained(self) -> int:
        """Tokens, or targets, that count in the loss. The first token has no context and is never predicted."""
        if self.targets:
            return len(self.targets)
        trainable = self.labels[1:]
        return len(trainable) - trainable.count(IGNORE_INDEX)

    @property
    def num_prompt(self) -> int:
        """Tokens before the first trained one: what `encode_prompt` gives for the same messages."""
        return next((at for at, label in enumerate(self.labels) if label != IGNORE_INDEX), len(self.labels))


def encode(rows: Sequence[Rendered], chat: Chat) -> list[Example | UserError]:
    """Encode the rows, in their order; where one cannot be, the reason stands in its place."""
    encodings = chat.tokenizer.encode_batch([row.text for row in rows], add_special_tokens=False)
    examples: list[Example | UserError] = []
    for row, encoding in zip(rows, encodings, strict=True):
        try:
            examples.append(_example(row, encoding, chat))
        except UserError as error:
            examples.append(error)
    return examples


def begin_of_second(encoding: Encoding) -> int:
    """The first token of the second text of a pair; where it has none, the first that counts as its; else 0."""
    for sides in (encoding.sequence_ids, encoding.type_ids):
        if 1 in sides:
            return sides.index(1)
    return 0


def encode_prompt(prompt: Sequence[Message] | str, chat: Chat, where: str = "the conversation") -> list[int]:
    """The ids that a model sees before it answers: those before the first trained token of the same row.

    prompt: messages, for the template with its generation prompt, or verbatim text, for the tokenizer's BOS.
    """
    if not isinstance(prompt, str):
        return _ids(chat.render(list(prompt), where, add_generation_prompt=True), chat.tokenizer)
    ids, bos = _ids(prompt, chat.tokenizer), chat.settings.bos
    return ids if bos and ids[: len(bos)] == bos else bos + ids


def unspelled(characters: Iterable[str], tokenizer: Tokenizer, unk_id: int | None) -> list[str]:
    """Those of the characters that the tokenizer cannot write: they become its unk, or vanish without a trace.

    The latter is what a BPE without unk and without byte tokens does.
    """
    return [one for one in characters if not one.isspace() and not _is_spelled(one, tokenizer, unk_id)]


def _example(row: Rendered, encoding: Encoding, chat: Chat) -> Example:
    """The example of one row. Raises UserError where its labels or its special tokens are not as they must be."""
    ids: list[int] = encoding.ids
    spans: list[TokenSpan] = []
    for start, end in row.spans:
        begin = _begin(row.text, start, encoding, ids, chat)
        last = _token_end(encoding, end) if row.templated else _verbatim_end(encoding, end, row.text)
        if begin is None or (last is None and not row.templated):
            ids, spans = _encode_cut(row, chat)
            break
        spans.append((begin, last))
    if not row.templated:
        return _verbatim(row, ids, spans, chat)
    if (bos := chat.settings.bos) and ids[: 2 * len(bos)] == bos + bos:
        what = f"{chat.settings.called} begins the row with two BOS tokens"
        raise UserError(row.where, what, "correct the template, or remove the BOS from the row's text")
    return _templated(row, ids, spans, chat)


def _begin(text: str, start: int, encoding: Encoding, ids: list[int], chat: Chat) -> int | None:
    """The answer's first token, where the ids before it are exactly those of the prompt alone; None where they differ.

    What stands before a control token is encoded independently of what follows it, so only the prompt's text from its
    last control token on is encoded again to compare: with a chat template that is mostly the same few words.
    """
    control, skipped = 0, 0
    at = _last_control(text, start, chat)
    if at is not None:
        token = encoding.char_to_token(at)
        covered = None if token is None else encoding.token_to_chars(token)
        if token is not None and covered and covered[0] == at and ids[token] in chat.isolating:
            control, skipped = at, token
    tail = _prompt_ids(text[control:start], chat.tokenizer)
    begin = skipped + len(tail)
    return begin if tuple(ids[skipped:begin]) == tail else None


def _last_control(text: str, end: int, chat: Chat) -> int | None:
    """The character at which the last text of a control token that ends before `end` begins."""
    for begin in (max(0, end - SHORT), 0):
        if places := [found.start() for found in chat.control.finditer(text, begin, end)]:
            return places[-1]
    return None


@lru_cache(maxsize=2**16)
def _is_spelled(character: str, tokenizer: Tokenizer, unk_id: int | None) -> bool:
    known = [token for token in _ids(character, tokenizer) if token != unk_id]
    text: str = tokenizer.decode(known, skip_special_tokens=False)
    return bool(text.strip())


@lru_cache(maxsize=4096)
def _short_ids(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    return tuple(_ids(text, tokenizer))


def _prompt_ids(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids of a prompt or of its end; short ones recur and are remembered."""
    return _short_ids(text, tokenizer) if len(text) <= SHORT else tuple(_ids(text, tokenizer))


def _ids(text: str, tokenizer: Tokenizer) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def _token_end(encoding: Encoding, end: int) -> int | None:
    """The token behind the one that holds the character before `end`: a stop token's last one."""
    token: int | None = encoding.char_to_token(end - 1) if end else None
    return None if token is None else token + 1


def _verbatim_end(encoding: Encoding, end: int, text: str) -> int | None:
    """The token behind all that begin before `end`, several of which may spell one character; None where one of them
    covers a character behind it too."""
    if end == len(text):
        return len(encoding.ids)
    offsets = encoding.offsets
    last = bisect_left(offsets, end, key=lambda offset: offset[0])
    return last if all(behind <= end for _, behind in offsets[max(last - 1, 0) : last]) else None


def _encode_cut(row: Rendered, chat: Chat) -> tuple[list[int], list[TokenSpan]]:
    """The row's ids where the text is cut at the start of every answer, and the tokens of every answer.

    A verbatim text is cut at the end of an answer too; in a conversation that is where its stop token ends.
    """
    starts = [start for start, _ in row.spans]
    edges = sorted({*starts, *(end for _, end in row.spans if not row.templated), len(row.text)})
    ids = _ids(row.text[: edges[0]], chat.tokenizer)
    ends = dict(row.spans)
    spans: list[TokenSpan] = []
    for start, cut in zip(edges, [*edges[1:], edges[-1]], strict=True):
        begin = len(ids)
        encoding, skip, shift = _continue(row.text[start:cut], chat.tokenizer)
        ids += encoding.ids[skip:]
        if start in ends:
            last = _token_end(encoding, ends[start] - start + shift) if row.templated else len(encoding.ids)
            spans.append((begin, None if last is None else begin + last - skip))
    return ids, spans


def _continue(piece: str, tokenizer: Tokenizer) -> tuple[Encoding, int, int]:
    """A text that follows another one, with the number of tokens and characters to skip.

    It is encoded behind a line break, so that a SentencePiece tokenizer adds no space at its start.
    """
    line_break = list(_short_ids("\n", tokenizer))
    encoding = tokenizer.encode("\n" + piece, add_special_tokens=False)
    if encoding.ids[: len(line_break)] == line_break:
        return encoding, len(line_break), 1
    # one token holds the line break and the text's start
    return tokenizer.encode(piece, add_special_tokens=False), 0, 0


def _templated(row: Rendered, ids: list[int], spans: list[TokenSpan], chat: Chat) -> Example:
    """The example of a rendered conversation: each span of tokens is trained and ends with a stop token."""
    if row.whole:
        return Example(ids, list(ids), row.where)
    labels = [IGNORE_INDEX] * len(ids)
    stop_ids = set(chat.settings.stops.values())
    for start, end in spans:
        if end is None or end <= start or ids[end - 1] not in stop_ids:
            what = "the end-of-turn token that the chat template writes is not one token of the vocabulary"
            raise UserError(row.where, what, "add it to the tokenizer, or use a template made for this model")
        labels[start:end] = ids[start:end]
    return Example(ids, labels, row.where)


def _verbatim(row: Rendered, ids: list[int], spans: list[TokenSpan], chat: Chat) -> Example:
    """The example of a verbatim text with BOS and EOS, neither twice; the EOS is trained where the text's end is."""
    settings = chat.settings
    added = 0 if ids[: len(settings.bos)] == settings.bos else len(settings.bos)
    if (bos := settings.bos) and (bos + ids if added else ids)[: 2 * len(bos)] == bos + bos:
        raise UserError(row.where, "the text begins with two BOS tokens", "remove one of them")
    reaches = bool(row.spans) and row.spans[-1][1] == len(row.text)
    whole = settings.bos[:added] * (added > 0) + ids
    if ids[-1:] != [settings.eos_id]:
        whole = [*whole, settings.eos_id]
    labels = [IGNORE_INDEX] * len(whole)
    for start, end in spans:
        last = len(whole) if reaches and end == len(ids) else (len(ids) if end is None else end) + added
        first = max(start + added, len(settings.bos))
        labels[first:last] = whole[first:last]
    if row.whole:
        labels = list(whole)
    return Example(whole, labels, row.where)
