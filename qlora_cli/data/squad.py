"""Rows of question_answering: a question, a context, and where in it an answer stands; long contexts in windows.

Format: SQuAD (Rajpurkar et al. 2016; version 2 with questions that have no answer), flat as on the hub or nested as in
the official files.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from qlora_cli.data.encode import IGNORE_INDEX, Example, begin_of_second
from qlora_cli.data.formats import Format, Formats
from qlora_cli.data.rows import Row, describe, text_of
from qlora_cli.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Encoding

    from qlora_cli.data.chat import Chat
    from qlora_cli.data.limits import Limits


class Question(NamedTuple):
    """A question about a context. answers: (text, first character) of each; none: it has no answer there."""

    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """What the tokenizer has to spell."""
        return self.question, self.context


class Window(NamedTuple):
    """One example of a question with what turns its tokens back into text.

    offsets: first character of the context and the one behind the last, of each token; None where it is none of it.
    """

    example: Example
    offsets: list[tuple[int, int] | None]


def questions(row: Row) -> Iterator[Row]:
    """The flat rows of a row: itself, or those of an official file ({data}) or one of its articles ({paragraphs})."""
    if isinstance(row.get("data"), list):
        for article in row["data"]:
            yield from questions(article) if isinstance(article, dict) else [article]
    elif isinstance(row.get("paragraphs"), list):
        for paragraph in row["paragraphs"]:
            if not isinstance(paragraph, dict) or not isinstance(paragraph.get("qas"), list):
                yield paragraph  # which the format refuses
                continue
            for asked in paragraph["qas"]:
                yield {**asked, "context": paragraph.get("context")} if isinstance(asked, dict) else asked
    else:
        yield row


def squad(row: Row, where: str) -> Question:
    """{context, question, answers, id?}; answers: {text: [...], answer_start: [...]} or a list of {text, answer_start}.

    White space before a question is left out, as HF's run_qa.py does. Raises UserError where an answer does not stand
    where the row says.
    """
    question, context = text_of(row, "question", where), text_of(row, "context", where)
    answers = tuple(_answers(row.get("answers"), where))
    for text, start in answers:
        if not text.strip() or context[start : start + len(text)] != text:
            at = context.find(text)
            hint = f"it stands at character {at}" if text.strip() and at >= 0 else "the context does not hold it"
            what = f"the answer {text!r} is not at character {start} of the context: {hint}"
            raise UserError(where, what, "mend answer_start, or remove the row")
    return Question(str(row.get("id", "")) or where, question.lstrip(), context, answers)


def _answers(value: Any, where: str) -> Iterator[tuple[str, int]]:
    if isinstance(value, dict) and isinstance(value.get("text"), list) and isinstance(value.get("answer_start"), list):
        if len(value["text"]) != len(value["answer_start"]):
            raise UserError(where, "answers has more texts than answer_start, or fewer", "give each text its start")
        value = [
            {"text": text, "answer_start": start}
            for text, start in zip(value["text"], value["answer_start"], strict=True)
        ]
    if not isinstance(value, list):
        todo = "write {text: [...], answer_start: [...]} or a list of {text, answer_start}"
        raise UserError(where, f"answers is {describe(value)}", todo)
    for answer in value:
        start = answer.get("answer_start") if isinstance(answer, dict) else None
        if not isinstance(start, int) or isinstance(start, bool) or start < 0:
            raise UserError(where, f"an answer is {describe(answer)} without a valid answer_start", "mend the row")
        yield text_of(answer, "text", where), start


FORMATS = Formats({"squad": Format((("context", "question", "answers"),), squad, ("id",))})


def encode(row: Question, where: str, chat: Chat, limits: Limits) -> list[tuple[Example, Example]]:
    """The windows of a question as examples; none is beyond the limit."""
    return [(window.example, window.example) for window in windows(row, where, chat, limits)]


def windows(row: Question, where: str, chat: Chat, limits: Limits) -> list[Window]:
    """The question with each window of the context, `doc_stride` tokens of which are in the window before too.

    targets: first and last token of the first answer, 0 and 0 where the window does not hold it whole (HF's
    run_qa.py). Raises UserError where the question leaves a window no more room than doc_stride.
    """
    assert limits.max_length is not None, "a pair of limits is for seq2seq_lm"
    tokenizer, stride = chat.tokenizer, chat.settings.task.doc_stride
    if not row.question.strip() or not row.context.strip():
        raise UserError(where, "the question or the context is empty", "mend or remove the row")
    taken = len(tokenizer.encode(row.question, "").ids)
    room = limits.max_length - taken
    whole = tokenizer.encode(row.question, row.context)
    if len(whole.ids) <= limits.max_length:
        return [_window(row, whole, where)]
    if room <= stride:
        what = f"the question takes {taken} of {limits.max_length} tokens, which leaves a window {max(room, 0)}"
        raise UserError(where, f"{what}: not more than data.doc_stride ({stride})", "raise data.max_length")
    tokenizer.enable_truncation(limits.max_length, stride=stride, strategy="only_second")
    try:
        first = tokenizer.encode(row.question, row.context)
    finally:
        tokenizer.no_truncation()
    return [_window(row, encoding, where) for encoding in (first, *first.overflowing)]


def _window(row: Question, encoding: Encoding, where: str) -> Window:
    ids, sides = encoding.ids, encoding.sequence_ids
    offsets = [span if side == 1 else None for span, side in zip(encoding.offsets, sides, strict=True)]
    start, end = _answer_tokens(row, encoding.tokens, offsets)
    labels = [IGNORE_INDEX] * len(ids)
    labels[start : end + 1] = ids[start : end + 1]
    return Window(Example(ids, labels, where, (start, end), begin_of_second(encoding)), offsets)


def _answer_tokens(row: Question, tokens: list[str], offsets: list[tuple[int, int] | None]) -> tuple[int, int]:
    """First and last token of the first answer, 0 and 0 where these tokens do not hold it whole.

    White space around it is left out, also as the token of a space alone, to which SentencePiece's tokenizers give the
    place of the letter behind it.
    """
    spans = [span for span in offsets if span]
    if not row.answers or not spans:
        return 0, 0
    text, begin = row.answers[0]
    begin, behind = begin + len(text) - len(text.lstrip()), begin + len(text.rstrip())
    held = [at for at, span in enumerate(offsets) if span and span[0] < behind and span[1] > begin]
    held = [at for at in held if tokens[at] != "\u2581"]
    is_whole = spans[0][0] <= begin and behind <= spans[-1][1]
    return (held[0], held[-1]) if held and is_whole else (0, 0)
