"""Answers to questions about contexts: of each the likeliest span over all windows, cut out of the context's own text.

The spans are those of transformers' examples/pytorch/question-answering/utils_qa.py (postprocess_qa_predictions), but
for three things. Padding takes no place among the likeliest tokens. A question without a legal span is answered by an
empty text, there by "empty". Of equal scores the first window's, and in it the first token's, counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_cli.data.cache import Wanted
from qlora_cli.data.chat import make_chat
from qlora_cli.data.encode import Example
from qlora_cli.data.examples import wanted_rows
from qlora_cli.data.formats import check_row
from qlora_cli.data.portions import portions
from qlora_cli.data.row_task import RowTask
from qlora_cli.data.rows import Row
from qlora_cli.data.sources import resolve
from qlora_cli.data.squad import FORMATS, Question, Window, windows
from qlora_cli.errors import Exit, UserError, UserErrors
from qlora_cli.model.base import Base, Found
from qlora_cli.recipe import Recipe
from qlora_cli.recipe.schema import Source
from qlora_cli.tasks.question_answering import collate, span_logits
from qlora_cli.tasks.table import rows_of_batches

N_BEST = 20
"""Likeliest first and likeliest last tokens of a window, of which its span is made."""

MOST_ERRORS = 10
"""Broken rows that are told at once."""

RowRead = tuple[Row, str, str, bool]
"""A row of a file with its place, its format, and whether its columns chose that."""


@dataclass(frozen=True)
class Asked:
    """One question of a file, and the windows in which the model reads it.

    may_be_none: whether "no answer" can be answered: the data, asked or not, has questions without one (SQuAD 2).
    """

    where: str
    question: Question
    windows: list[Window]
    may_be_none: bool


class Span(NamedTuple):
    """The likeliest span of a window. score: the sum of its logits, -inf where no span is legal; null: of token 0."""

    text: str
    score: float
    null: float


def read_questions(
    sources: Sequence[Source],
    found: Found,
    recipe: Recipe,
    limit: int | None,
    tell: Callable[[UserError], None] = lambda error: None,
) -> list[Asked]:
    """The questions of the sources, the first `limit` of all, in windows as training makes them.

    No sources: the recipe's held-out data. Whether "no answer" can be answered, all of it decides, whatever the limit.
    Raises UserErrors with up to MOST_ERRORS broken rows among those before the limit; with data.on_bad_row: skip they
    are left out, each given to `tell`. Raises UserError for a window that the model cannot read.
    """
    wanted = _wanted(sources, found, recipe)
    chat = make_chat(wanted.settings)
    rows = chain.from_iterable(_rows(source, wanted) for source in wanted.sources)
    asked, errors, may_be_none = [], [], False
    for one in rows:
        try:
            where, question = _question(one)
            may_be_none |= not question.answers
            asked.append((where, question, windows(question, where, chat, wanted.limits)))
        except UserError as error:
            errors.append(error)
            if wanted.skip_bad:
                tell(error)
            elif len(errors) == MOST_ERRORS:
                raise UserErrors(errors) from error
        if len(asked) == limit:
            break
    if errors and not wanted.skip_bad:
        raise UserErrors(errors)
    may_be_none = may_be_none or _any_without_answer(rows)
    return [_readable(Asked(*one, may_be_none), found.context) for one in asked]


def _wanted(sources: Sequence[Source], found: Found, recipe: Recipe) -> Wanted:
    """The rows of the sources, of none the held-out ones of the recipe."""
    wanted = wanted_rows(
        recipe.data,
        "eval",
        found.tokenizer,
        found.stop_token_ids,
        seed=recipe.training.seed,
        today=date.today(),
        task=RowTask.of(recipe),
    )
    return replace(wanted, sources=list(sources), eval_fraction=0.0) if sources else wanted


def _question(one: RowRead | UserError) -> tuple[str, Question]:
    """The place of a row and its question. Raises UserError where it has none."""
    if isinstance(one, UserError):
        raise one
    row, where, format, auto = one
    check_row(format, auto, row, where, FORMATS)
    return where, FORMATS[format].read(row, where)


def _any_without_answer(rows: Iterator[RowRead | UserError]) -> bool:
    """Whether one of the questions behind the limit has no answer. What cannot be read there is not told: it is not
    asked, and a run without the limit names it."""
    try:
        for one in rows:
            with suppress(UserError):
                if not _question(one)[1].answers:
                    return True
    except UserError:
        pass
    return False


def _rows(source: Source, wanted: Wanted) -> Iterator[RowRead | UserError]:
    """The questions of a source as rows, or why one cannot be read, in the file's order."""
    for portion in portions(source, resolve(source, wanted.role).parts, wanted):
        unread = list(portion.unread)
        for at, (row, place) in enumerate(zip(portion.task.rows, portion.task.places, strict=True)):
            while unread and unread[0][0] <= at:
                yield unread.pop(0)[1]
            yield row, place, portion.task.format, portion.task.auto
        yield from (error for _, error in unread)
        if portion.failure is not None:
            raise portion.failure


def _readable(asked: Asked, context: int | None) -> Asked:
    """The question itself, if the model can read its windows."""
    longest = max(window.example.num_tokens for window in asked.windows)
    if context is not None and longest > context:
        what = f"a window takes {longest:,} tokens, the model has {context:,} positions"
        raise UserError(asked.where, what, f"set data.max_length: {context}")
    return asked


def answer_questions(
    base: Base, model: Any, asked: Sequence[Asked], batch_size: int, max_answer_length: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The index of each question with its answer, as they are done, those with the longest windows first.

    batch_size: windows of the longest length in one forward pass; it changes no answer but by rounding.
    max_answer_length: tokens of a span.
    prediction: the answer, empty for "no answer". score: of its span, None where no span is legal; null_score: of
    "no answer", the least over the windows, None where that cannot be answered; the greater of the two wins.
    The model is in evaluation mode until the last answer is taken, then in its own.
    """
    flat = [(row, at) for row, one in enumerate(asked) for at in range(len(one.windows))]
    lengths = [asked[row].windows[at].example.num_tokens for row, at in flat]
    found: dict[int, dict[int, Span]] = {}
    training = model.training
    model.eval()
    try:
        for batch in rows_of_batches(lengths, batch_size, max(lengths, default=0), False, base):
            places = [flat[index] for index in batch]
            read = [(asked[row].question.context, asked[row].windows[at]) for row, at in places]
            for (row, at), span in zip(places, _spans(base, model, read, max_answer_length), strict=True):
                spans = found.setdefault(row, {})
                spans[at] = span
                if len(spans) == len(asked[row].windows):
                    yield row, _answer(asked[row], [span for _, span in sorted(found.pop(row).items())])
    finally:
        model.train(training)


def _answer(asked: Asked, spans: Sequence[Span]) -> dict[str, Any]:
    """The answer to a question from the spans of its windows, in their order."""
    best = max(spans, key=lambda span: span.score)
    null = min(span.null for span in spans) if asked.may_be_none else None
    return {
        "id": asked.question.id,
        "where": asked.where,
        "question": asked.question.question,
        "prediction": "" if null is not None and null > best.score else best.text,
        "references": [text for text, _ in asked.question.answers],
        "score": None if best.score == -torch.inf else best.score,
        "null_score": null,
    }


@torch.no_grad()
def _spans(base: Base, model: Any, read: Sequence[tuple[str, Window]], max_answer_length: int) -> list[Span]:
    """The likeliest span of each window. read: the context that it is of, and the window.

    Raises UserError where the model's logits are not numbers.
    """
    examples: list[Example] = [window.example for _, window in read]
    batch = collate(examples, base)
    with base.compute():
        starts, ends = span_logits(model, batch)
    broken = (starts.isnan() | ends.isnan()).any(dim=1).tolist()
    if True in broken:
        where = examples[broken.index(True)].where
        raise UserError(where, "the model's logits are not numbers", "check its weights and compute_dtype", Exit.FAILED)
    in_context = torch.zeros(starts.shape, dtype=torch.bool)
    for index, (_, window) in enumerate(read):
        in_context[index, : len(window.offsets)] = torch.tensor([span is not None for span in window.offsets])
    firsts, lasts, scores = best_spans(starts, ends, in_context.to(starts.device), max_answer_length)
    nulls = (starts[:, 0] + ends[:, 0]).tolist()
    found = zip(read, firsts.tolist(), lasts.tolist(), scores.tolist(), nulls, strict=True)
    return [Span(_text(*one, first, last, score), score, null) for one, first, last, score, null in found]


def best_spans(
    starts: Tensor, ends: Tensor, in_context: Tensor, max_answer_length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """First and last token of each window's likeliest legal span, int64 (B,), and its score, float32 (B,), else -inf.

    starts, ends (B, T) float32 logits; in_context (B, T) bool. Both ends are among the N_BEST likeliest of all tokens.
    """
    best = [logits.sort(dim=1, descending=True, stable=True).indices[:, :N_BEST] for logits in (starts, ends)]
    firsts, lasts = best[0].unsqueeze(2), best[1].unsqueeze(1)
    scores = starts.gather(1, best[0]).unsqueeze(2) + ends.gather(1, best[1]).unsqueeze(1)
    legal = in_context.gather(1, best[0]).unsqueeze(2) & in_context.gather(1, best[1]).unsqueeze(1)
    legal &= (firsts <= lasts) & (lasts - firsts < max_answer_length)
    flat = scores.masked_fill(~legal, -torch.inf).flatten(1)
    chosen = flat.argmax(dim=1, keepdim=True)
    width = best[1].shape[1]
    tokens = best[0].gather(1, chosen // width), best[1].gather(1, chosen % width)
    return tokens[0].squeeze(1), tokens[1].squeeze(1), flat.gather(1, chosen).squeeze(1)


def _text(context: str, window: Window, first: int, last: int, score: float) -> str:
    """What stands in the context between two tokens of a window, empty where no span is legal."""
    if score == -torch.inf:
        return ""
    begin, end = window.offsets[first], window.offsets[last]
    assert begin is not None, "a span is in the context"
    assert end is not None, "a span is in the context"
    return context[begin[0] : end[1]]
