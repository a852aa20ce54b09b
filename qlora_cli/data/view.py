"""A row as the model sees it: its text in stretches that are trained or not, with every special token on its own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from tokenizers import pre_tokenizers

from qlora_cli.data.encode import IGNORE_INDEX, Example
from qlora_cli.data.examples import Examples
from qlora_cli.data.row_task import NO_TEXT
from qlora_cli.data.rows import count

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"
"""What a decoder writes for bytes that are no whole character."""

UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Characters that move a terminal's cursor, change its colours or turn the direction of text."""

BYTE = re.compile("<0x([0-9A-F]{2})>")
"""A byte in a vocabulary of SentencePiece's kind."""


Marks = tuple[str, str, str, str]
"""What stands before and behind trained text, and before and behind a special token, where there is no colour."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens that follow each other: all trained or none; a special token stands alone.

    A character that several tokens spell is whole. num_cut: characters that `shortened` left out here.
    part: which text of the row it is of, where that has several by name.
    """

    text: str
    trained: bool
    special: bool
    ids: tuple[int, ...]
    num_cut: int = 0
    part: str = ""


PARTS: dict[str, tuple[str, str]] = {
    "causal_lm": ("", ""),
    "seq2seq_lm": ("source", "target"),
    "sequence_classification": ("text", "second text"),
    "question_answering": ("question", "context"),
}
"""What the two texts of a row are called, by task."""


def pieces(
    example: Example, tokenizer: PreTrainedTokenizerBase, special_ids: frozenset[int], task: str = "causal_lm"
) -> list[Piece]:
    """The row in pieces; together their texts are what the tokenizer decodes the row to.

    The first token is not trained, whatever its label: nothing predicts it.
    """
    first, second = PARTS[task]
    border = example.num_prompt if task == "seq2seq_lm" else example.segment or example.num_tokens
    backend = tokenizer.backend_tokenizer
    ids = example.input_ids
    trained = [at > 0 and label != IGNORE_INDEX for at, label in enumerate(example.labels)]
    kinds = [(trained[at], at if ids[at] in special_ids else None, at < border) for at in range(len(ids))]
    found: list[Piece] = []
    begin = before = 0
    for (is_trained, special, is_first), group in groupby(kinds):
        end = begin + len(list(group))
        known = backend.decode(ids[before:begin], skip_special_tokens=False)
        text = backend.decode(ids[before:end], skip_special_tokens=False)
        text = text[len(known) :] if text.startswith(known) else ""
        if not text or REPLACEMENT in (text[0], text[-1]):
            text = _spelled([backend.id_to_token(token) or "" for token in ids[begin:end]])
        part = first if is_first else second
        found.append(Piece(text, is_trained, special is not None, tuple(ids[begin:end]), part=part))
        before, begin = begin, end
    return found


def special_ids(tokenizer: Any, stop_token_ids: frozenset[int]) -> frozenset[int]:
    """The ids of the tokens that are no text: control tokens, unk, and those that end a turn."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids) | stop_token_ids)


def _spelled(tokens: Sequence[str]) -> str:
    r"""The text that the tokens spell byte by byte, half a character as \xf0\x9f."""
    byte_of = _bytes_of_letters()
    spelled = bytearray()
    for token in tokens:
        if match := BYTE.fullmatch(token):
            spelled.append(int(match[1], 16))
        elif all(letter in byte_of for letter in token):
            spelled += bytes(byte_of[letter] for letter in token)
        else:
            spelled += token.replace("\u2581", " ").encode()
    return spelled.decode("utf-8", "backslashreplace")


def _bytes_of_letters() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for: its own, or in order the unprintable ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = {letter: ord(letter) for letter in letters if ord(letter) < 256}
    others = (byte for byte in range(256) if chr(byte) not in own)
    return own | {letter: next(others) for letter in letters if letter not in own}


# ── what is shown ────────────────────────────────────────────────────────────────────────────────────────────────────


def row_of(
    examples: Examples, at: int, tokenizer: PreTrainedTokenizerBase, special: frozenset[int], labels: Sequence[str] = ()
) -> dict[str, Any]:
    """An example as plain values: its number from 1, its place, its tokens, its pieces, and in words what is learned.

    labels: names of the classes, in the order of their ids.
    """
    example = examples.rows[at]
    return {
        "number": at + 1,
        "where": example.where,
        "num_tokens": example.num_tokens,
        "num_trained": example.num_trained,
        "learned": learned_in_words(example, examples.task, labels),
        "targets": list(example.targets),
        "pieces": [
            {
                "text": piece.text,
                "trained": piece.trained,
                "special": piece.special,
                "ids": list(piece.ids),
                "part": piece.part,
            }
            for piece in pieces(example, tokenizer, special, examples.task)
        ],
    }


def learned_in_words(example: Example, task: str, labels: Sequence[str]) -> str:
    """'9 trained', 'label: positive (1)', 'label: 3.8', or where an answer stands."""
    if task == "sequence_classification":
        (target,) = example.targets
        return f"label: {labels[int(target)]} ({int(target)})" if labels else f"label: {target:g}"
    if task == "question_answering":
        first, last = map(int, example.targets)
        return f"answer: tokens {first + 1:,} to {last + 1:,}" if last else "no answer here"
    return f"{example.num_trained:,} trained"


def by_part(pieces: Sequence[Piece]) -> list[tuple[str, list[Piece]]]:
    """The pieces of each text of a row, behind its name; of a row with one unnamed text all of them."""
    return [(name, list(group)) for name, group in groupby(pieces, key=lambda piece: piece.part)]


def shown(examples: Examples, number: int) -> list[int]:
    """The first `number` examples, taken from the sources in turn, in the order of the sources."""
    ranges, first = [], 0
    for source in examples.sources:
        ranges.append(range(first, first + source.num_examples))
        first += source.num_examples
    longest = max((len(rows) for rows in ranges), default=0)
    in_turn = (rows[at] for at in range(min(longest, number)) for rows in ranges if at < len(rows))
    return sorted(row for row, _ in zip(in_turn, range(number), strict=False))


def shortened(row: Sequence[Piece], untrained: int = 360, trained: int = 1200, most: int = 24) -> list[Piece]:
    """The row without the middle of long texts, and without its middle pieces where it has more than `most`.

    untrained, trained: characters of the longest text that stays whole.
    """
    if len(row) > most:
        middle = row[most // 2 : -most // 2]
        num_cut = sum(len(piece.text) for piece in middle)
        gap = Piece("", middle[0].trained, False, (), num_cut, middle[0].part)
        row = [*row[: most // 2], gap, *row[-most // 2 :]]
    return [part for piece in row for part in _cut(piece, trained if piece.trained else untrained)]


def _cut(piece: Piece, longest: int) -> Iterator[Piece]:
    """The piece, or its beginning and its end with what is between them counted."""
    if len(piece.text) <= longest:
        yield piece
        return
    edge = longest // 3
    head, tail = piece.text[:edge].rsplit(" ", 1)[0], piece.text[-edge:].split(" ", 1)[-1]
    yield Piece(head, piece.trained, False, (), part=piece.part)
    yield Piece("", piece.trained, False, (), len(piece.text) - len(head) - len(tail), piece.part)
    yield Piece(tail, piece.trained, False, (), part=piece.part)


def visible(text: str) -> str:
    r"""The text with \x1b for what a terminal would obey and a reader not see; line breaks and tabs stay."""
    return UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


MARKS: dict[bool, Marks] = {True: ("⟦", "⟧", "‹", "›"), False: ("[[", "]]", "{", "}")}
"""The marks where the output takes such characters, and where it does not."""


LEGEND = (
    Piece("trained", True, False, ()),
    Piece("  not trained  ", False, False, ()),
    Piece("special token", False, True, ()),
)
"""What the marks and the colours mean."""


def text_of_part(part: Piece) -> str:
    """The text of a piece for a reader, or what stands where characters are left out."""
    return f" [... {part.num_cut:,} characters ...] " if part.num_cut else visible(part.text)


def marked(parts: Sequence[Piece], marks: Marks) -> str:
    """A row as plain text with the marks."""
    begin, end, *special = marks
    text, inside = "", False
    for part in parts:
        if part.trained != inside:
            text, inside = text + (begin if part.trained else end), part.trained
        text += text_of_part(part).join(special) if part.special else text_of_part(part)
    return text + end if inside else text


def end_of(path: str, width: int) -> str:
    """The end of a path in `width` columns, from a folder on where one fits."""
    if len(path) <= width:
        return path
    end = path[3 - width :]
    return "..." + (end[end.index("/") :] if "/" in end else end)


def bar(length: float, draws: bool) -> str:
    """A bar in eighths of a character, or of # where the output `draws` none; what is more than nothing is seen."""
    if not draws:
        return "#" * max(round(length), length > 0)
    eighths = max(round(8 * length), length > 0)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def figure(number: int) -> str:
    """A number in nine characters at most: 1,234,567, then 12.3M."""
    if number < 10_000_000:
        return f"{number:,}"
    return f"{number / 1e6:.1f}M" if number < 1e9 else f"{number / 1e9:.2f}B"


def range_in_words(one: dict[str, int]) -> str:
    """The lengths of a histogram's bin."""
    return f"{one['first']:,} to {one['last']:,}" if one["last"] > one["first"] else f"{one['first']:,}"


def source_in_words(source: dict[str, Any]) -> str:
    """How a source was read."""
    told = source["format"] + (" by its columns" if source["auto"] else "")
    told += f", weight {source['weight']:g}" if source["weight"] != 1 else ""
    told += f", {count(source['num_ignored'], 'other file')} left out" if source["num_ignored"] else ""
    return told + (f", {count(source['num_bad'], 'bad row')} left out" if source["num_bad"] else "")


def source_columns(task: str) -> list[str]:
    """What `source_figures` gives."""
    return ["rows", "examples", "tokens", *(["trained"] if task not in NO_TEXT else [])]


def source_figures(source: dict[str, Any], task: str) -> list[str]:
    """Rows, examples, tokens and, where text is trained, the share of trained tokens of a source."""
    numbers = [figure(source[f"num_{name}"]) for name in ("rows", "examples", "tokens")]
    trained = [f"{source['num_trained'] / max(source['num_tokens'], 1):.1%}"]
    return [*numbers, *(trained if task not in NO_TEXT else [])]


def spreads(task: str) -> list[tuple[str, str]]:
    """The lengths that are told: label, and key of the statistics."""
    return [("example", "lengths"), *([("trained", "answers")] if task not in NO_TEXT else [])]


SPREAD = ("least", "median", "90%", "99%", "most", "mean")
"""What `spread_figures` gives."""


def spread_figures(spread: dict[str, Any]) -> list[str]:
    """How lengths are spread, in the order of SPREAD."""
    *whole, mean = spread.values()
    return [*map(figure, whole), f"{mean:,.1f}"]
