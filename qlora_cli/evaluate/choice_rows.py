"""Questions with choices, and texts with one right continuation, from files whose columns tell their shape.

How question, delimiter and choice are put together follows llm-foundry's tasks.yaml (MosaicML, v0.3): texts are
stripped, and a question that says so ("Question: ...") is answered behind "\\nAnswer: ", anything else behind a space.
White space at the end of the delimiter stands in front of the choice, as the tokenizer has to see it. Solved examples
are joined by empty lines, as in lm-evaluation-harness and the QLoRA repository's five-shot files.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from qlora_cli.data.rows import Row, count, describe, text_of, whole_text
from qlora_cli.data.sources import SourceMark, read_parts, resolve
from qlora_cli.errors import UserError, UserErrors
from qlora_cli.recipe.schema import Source

LETTERS = ("A", "B", "C", "D")

BETWEEN_SHOTS = "\n\n"

MOST_ERRORS = 10
"""Broken rows that are told at once."""

_ASKED = re.compile(r"^Question:", re.MULTILINE)
_MMLU_HEADER = re.compile(r"The following are multiple choice questions \(with answers\) about [^\n]*\n\n")


@dataclass(frozen=True)
class ChoiceRow:
    """One question, ready to be scored.

    where: its file and line. context: all that precedes the choices, with the solved examples and the delimiter.
    choices: what may follow, verbatim, with the white space in front. gold: the index of the right one; None for a
    continuation, which is right where greedy decoding would write it. group: MMLU's subject, or "".
    """

    where: str
    context: str
    choices: tuple[str, ...]
    gold: int | None
    group: str = ""


class Question(NamedTuple):
    """A row as it was read. header: what stands once before it and its solved examples; text, choices: stripped.

    delimiter: what stands between text and choice unless the user says otherwise.
    """

    where: str
    header: str
    text: str
    delimiter: str
    choices: tuple[str, ...]
    gold: int | None
    group: str

    @property
    def answer(self) -> str:
        """The right choice."""
        return self.choices[self.gold or 0]


def query(row: Row, where: str) -> Question:
    """{query, choices, gold, category?} of llm-foundry: ARC, PIQA, BoolQ, HellaSwag. gold: an index from 0."""
    text = _stripped(row, "query", where)
    # what tasks.yaml sets as continuation_delimiter for the files of such questions, and llm-foundry's default
    delimiter = "\nAnswer: " if _ASKED.search(text) else " "
    choices, gold = row["choices"], row["gold"]
    if not isinstance(choices, list) or len(choices) < 2:
        found = f"holds {len(choices)}" if isinstance(choices, list) else f"is {describe(choices)}"
        raise UserError(where, f"choices {found}, not two texts or more", "make choices a list of texts")
    texts = [_stripped({f"choices[{at}]": choice}, f"choices[{at}]", where) for at, choice in enumerate(choices)]
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(texts):
        what = f"gold is {describe(gold)}, not the index of a choice"
        raise UserError(where, what, f"make gold a number from 0 to {len(texts) - 1}")
    return Question(where, "", text, delimiter, tuple(texts), gold, _group(row, "category", where))


def continuation(row: Row, where: str) -> Question:
    """{context, continuation, category?} of llm-foundry: LAMBADA."""
    text, following = _stripped(row, "context", where), _stripped(row, "continuation", where)
    return Question(where, "", text, " ", (following,), None, _group(row, "category", where))


def mmlu(row: Row, where: str) -> Question:
    """{subject, input, output} of the QLoRA repository's MMLU, zero-shot and five-shot: the answer is A, B, C or D.

    Its qlora.py (artidoro/qlora, MMLUEvalCallback) takes the largest of the logits of "A" to "D" behind "Answer:" and
    the mean over subjects of the shares that are right. So do we, but for two things. Its letters are what the
    tokenizer makes of "A" alone, which with Llama's is the token of " A", but is not with a byte-level tokenizer; ours
    are " A" behind "Answer:". And it cuts an input beyond mmlu_source_max_len at its end, where the question is; we cut
    in front, as lm-evaluation-harness does.
    """
    whole, answer = _stripped(row, "input", where), _stripped(row, "output", where)
    if answer not in LETTERS:
        raise UserError(where, f"output is {answer!r}, not A, B, C or D", "make output the letter of the right choice")
    found = _MMLU_HEADER.match(whole)
    header = found.group() if found else ""
    gold = LETTERS.index(answer)
    return Question(where, header, whole[len(header) :], " ", LETTERS, gold, _group(row, "subject", where))


SHAPES: dict[tuple[str, ...], Callable[[Row, str], Question]] = {
    ("query", "choices", "gold"): query,
    ("context", "continuation"): continuation,
    ("subject", "input", "output"): mmlu,
}
"""What a row is, by the columns that it has; others are ignored."""


def read_choices(
    paths: Sequence[str | Source],
    *,
    delimiter: str | None,
    shots: int,
    shots_from: str | None,
    limit: int | None,
    seed: int,
) -> list[ChoiceRow]:
    """The rows of files, folders, patterns or data sets of the hub, the first `limit` of all.

    delimiter: between question and choice, with its white space; None: by the row, as above. shots: solved examples
    before each question, of its group, none with its text, from `shots_from` or the row's own path; which ones depends
    on the seed and the row's number alone. Raises UserErrors with up to MOST_ERRORS broken rows, and UserError where
    there are too few examples or where rows with choices and without are mixed.
    """
    pool = _by_group(_questions(shots_from, None)) if shots and shots_from is not None else None
    found: list[ChoiceRow] = []
    for path in paths:
        left = None if limit is None else limit - len(found)
        if left == 0:
            break
        questions = _questions(path, left if pool is not None or not shots else None)
        examples = pool or (_by_group(questions) if shots else {})
        for index, question in enumerate(questions[:left]):
            chosen = _shots(question, examples.get(question.group, []), shots, f"{seed}:{index}")
            found.append(_row(question, chosen, delimiter))
    for row in found:
        if (row.gold is None) != (found[0].gold is None):
            what = f"rows with choices and continuations are mixed: {found[0].where} is of the other kind"
            raise UserError(row.where, what, "measure them in two suites")
    return found


def _questions(path: str | Source, limit: int | None) -> list[Question]:
    """The rows of a path, or the first of them. Raises UserErrors with those that are broken."""
    source = Source(path=path) if isinstance(path, str) else path
    if limit is not None:
        source = source.model_copy(update={"limit": min(limit, source.limit or limit)})
    parts = resolve(source, "eval").parts
    found, errors = [], []
    for index, read in read_parts(parts, source, SourceMark()):
        try:
            if isinstance(read.value, UserError):
                raise read.value
            found.append(_question(read.value, parts[index].place(read.number)))
        except UserError as error:
            errors.append(error)
            if len(errors) == MOST_ERRORS:
                break
    if errors:
        raise UserErrors(errors)
    return found


def _question(row: Row, where: str) -> Question:
    """The row by the first shape whose columns it has."""
    for columns, read in SHAPES.items():
        if row.keys() >= set(columns):
            return read(row, where)
    known = "; ".join(", ".join(columns) for columns in SHAPES)
    what = f"columns are {', '.join(sorted(row)) or 'none'}: no known shape of questions with choices"
    raise UserError(where, what, f"give each row the columns of one of: {known}")


def _row(question: Question, shots: Sequence[Question], delimiter: str | None) -> ChoiceRow:
    """The question behind its solved examples."""

    def asked(each: Question) -> tuple[str, str]:
        whole = each.delimiter if delimiter is None else delimiter
        kept = whole.rstrip()
        return each.text + kept, whole[len(kept) :]

    solved = ["".join((*asked(shot), shot.answer)) for shot in shots]
    text, space = asked(question)
    context = question.header + BETWEEN_SHOTS.join([*solved, text])
    return ChoiceRow(
        question.where, context, tuple(space + choice for choice in question.choices), question.gold, question.group
    )


def _by_group(questions: Sequence[Question]) -> dict[str, list[Question]]:
    groups = defaultdict(list)
    for question in questions:
        groups[question.group].append(question)
    return dict(groups)


def _shots(question: Question, pool: Sequence[Question], shots: int, seed: str) -> list[Question]:
    """`shots` of the pool, none that asks the same."""
    drawn = random.Random(seed)
    chosen: list[Question] = []
    for size in (shots + 8, len(pool)):  # all of it only where many ask the same: it may be long, and so the rows
        order = drawn.sample(range(len(pool)), min(size, len(pool)))
        chosen = [pool[index] for index in order if pool[index].text != question.text][:shots]
        if len(chosen) == shots:
            break
    if len(chosen) < shots:
        of_group = f" in the group {question.group!r}" if question.group else ""
        what = f"{count(shots, 'solved example')} asked for, {len(chosen):,} other rows are there{of_group}"
        raise UserError(question.where, what, "lower shots, or name a file with more rows in shots_from")
    return chosen


def _group(row: Row, column: str, where: str) -> str:
    return text_of(row, column, where) if column in row else ""


def _stripped(row: dict[str, Any], column: str, where: str) -> str:
    """The text in a column without white space at its ends, of which something must be left."""
    text = text_of(row, column, where).strip()
    if not text:
        raise UserError(where, f"{column} is empty", "mend or remove the row")
    return whole_text(text, column, where)
