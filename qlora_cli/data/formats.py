"""Row formats: one table from the recipe's name to the columns a row needs and the function that reads it.

A new format is one function and one line of FORMATS. Columns that a format does not name are ignored. A column that
holds null counts as missing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from qlora_cli.data.conversations import (
    Conversation,
    Message,
    Plain,
    assistant,
    messages,
    prompted,
    sharegpt,
    system,
    user,
)
from qlora_cli.data.dialogues import chip2, hh_rlhf, oasst
from qlora_cli.data.rows import Row, describe, text_of
from qlora_cli.errors import UserError

__all__ = [
    "FORMATS",
    "Conversation",
    "Format",
    "Message",
    "Plain",
    "assistant",
    "check_row",
    "choose_format",
    "fitting",
    "system",
    "user",
]


@dataclass(frozen=True, slots=True)
class Format:
    """What a row needs to be of this format, and how it is read.

    one_of:   the columns that it needs; several sets where a row may have either.
    read:     read(row, where), raising UserError at `where`: a Conversation or Plain, or what the task's encoder takes.
    optional: columns that are read where they are there.
    words:    the columns in words, where there are many sets.
    auto:     whether the columns may choose it; False for a second reading of another format's columns.
    """

    one_of: tuple[tuple[str, ...], ...]
    read: Callable[[Row, str], Any]
    optional: tuple[str, ...] = ()
    auto: bool = True
    words: str = ""

    def explained(self, columns: frozenset[str]) -> int:
        """How many of these columns this format reads at the most; 0 where it needs others too."""
        whole = [len(needed) for needed in self.one_of if columns.issuperset(needed)]
        return max(whole) + len(columns.intersection(self.optional)) if whole else 0

    def __str__(self) -> str:
        return self.words or " or ".join(", ".join(columns) for columns in self.one_of)


class Formats(dict[str, Format]):
    """The formats of a task by the recipe's name. A constant, so it is hashed by identity."""

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)


# ── instructions and questions ───────────────────────────────────────────────────────────────────────────────────────

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


def alpaca(row: Row, where: str) -> Conversation:
    """{instruction, input?, output, system?, history?} as turns; history is a list of [question, answer], all trained.

    Without a template: the prompt of Stanford Alpaca, verbatim (tatsu-lab/stanford_alpaca, train.py, PROMPT_DICT),
    with the answer directly behind "### Response:" as there; it has no place for a system's text or a history, which
    are LLaMA-Factory's (data/README.md).
    """
    told = _optional(row, "system", where)
    before = [system(told)] if told else []
    history: Any = row.get("history") or []
    if not isinstance(history, list):
        raise UserError(where, f"history is {describe(history)}, not a list", "make it a list of [question, answer]")
    for number, pair in enumerate(history, 1):
        place = f"{where}: history {number}"
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError(place, "is no pair", "write [question, answer]")
        said = dict(zip(("question", "answer"), pair, strict=True))
        before += [user(text_of(said, "question", place)), assistant(text_of(said, "answer", place))]
    task = _instructed(text_of(row, "instruction", where), row, where)
    return Conversation([*before, *task.messages]) if before else task


def seed_tasks(row: Row, where: str) -> Conversation:
    """{instruction, instances: [{input, output}]} with one instance, read as alpaca reads it.

    Source: yizhongw/self-instruct, data/seed_tasks.jsonl and human_eval/user_oriented_instructions.jsonl.
    """
    instances = row.get("instances")
    if not isinstance(instances, list) or not all(isinstance(instance, dict) for instance in instances):
        raise UserError(where, "instances is no list of objects", "make it a list of one {input, output}")
    if len(instances) != 1:
        what = f"has {len(instances)} instances, and a row is one example"
        raise UserError(where, what, "write one row per instance, each with the instruction")
    return _instructed(text_of(row, "instruction", where), instances[0], f"{where}: instance 1")


def _instructed(instruction: str, instance: Row, where: str) -> Conversation:
    """An instruction with the {input?, output} of an instance."""
    context, output = _optional(instance, "input", where), text_of(instance, "output", where)
    template = ALPACA_WITH_INPUT if context else ALPACA_WITHOUT_INPUT
    question = f"{instruction}\n\n{context}" if context else instruction
    plain = Plain.of(template.format(instruction=instruction, input=context), output)
    return Conversation([user(question), assistant(output)], plain=plain)


def question_answer(row: Row, where: str) -> Conversation:
    """{question, answer} as a user's and an assistant's turn; without a template "Question: ...\\nAnswer: ...".

    The space before the answer belongs to the answer: that is how byte-level tokenizers cut words. Source: GSM8K.
    """
    question, answer = text_of(row, "question", where), text_of(row, "answer", where)
    plain = Plain.of(f"Question: {question}\nAnswer:", f" {answer}")
    return Conversation([user(question), assistant(answer)], plain=plain)


SUMMARIES = (("document", "summary"), ("article", "highlights"), ("dialogue", "summary"))  # XSum, CNN/DailyMail, SAMSum


def summarisation(row: Row, where: str) -> Conversation:
    """A text and its summary, as the user asks for it; without a template "...\\n\\nTL;DR: ...", the prompt of GPT-2.

    The columns are those of XSum, CNN/DailyMail or SAMSum. Source of the prompt: Radford et al. 2019, section 3.6.
    """
    fit = [columns for columns in SUMMARIES if not _missing(columns, row)]
    if len(fit) != 1:
        found = "of two data sets" if fit else _columns(row)
        raise UserError(where, f"has the columns {found}", f"give it one of {FORMATS['summarisation']}")
    text, summary = (text_of(row, column, where) for column in fit[0])
    plain = Plain.of(f"{text}\n\nTL;DR:", f" {summary}")
    return Conversation([user(f"Summarize the following text.\n\n{text}"), assistant(summary)], plain=plain)


# ── verbatim text: the tokenizer's BOS and EOS are added once ────────────────────────────────────────────────────────


def prompt_completion(row: Row, where: str) -> Conversation | Plain:
    """{prompt, completion}: both texts, verbatim, or both lists of messages (TRL); the completion is trained."""
    if isinstance(row.get("prompt"), list) or isinstance(row.get("completion"), list):
        return prompted(row, where)
    if unread := [column for column in _TOLD if row.get(column)]:
        what = f"has {unread[0]}, but prompt and completion are texts, which are verbatim"
        raise UserError(where, what, f"remove {unread[0]}, or write lists of messages")
    return Plain.of(text_of(row, "prompt", where), text_of(row, "completion", where))


def self_instruct(row: Row, where: str) -> Plain:
    """{prompt, completion}, texts, without the "<|endoftext|>" that GPT-3's data ends with (yizhongw/self-instruct)."""
    completion = text_of(row, "completion", where).removesuffix("<|endoftext|>")
    return Plain.of(text_of(row, "prompt", where), completion)


def input_output(row: Row, where: str) -> Plain:
    """{input, output}, texts, verbatim; the output is trained. Source: artidoro/qlora, dataset_format input-output."""
    return Plain.of(text_of(row, "input", where), text_of(row, "output", where))


def text(row: Row, where: str) -> Plain:
    """{text}: everything is trained."""
    return Plain.of("", text_of(row, "text", where))


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────────

_TOLD = ("tools", "functions", "system")
FORMATS = Formats(
    {
        "alpaca": Format((("instruction", "output"),), alpaca, ("input", "system", "history")),
        "messages": Format((("messages",),), messages, _TOLD),
        "sharegpt": Format((("conversations",),), sharegpt, _TOLD),
        "prompt_completion": Format((("prompt", "completion"),), prompt_completion, _TOLD),
        "input_output": Format((("input", "output"),), input_output),
        "question_answer": Format((("question", "answer"),), question_answer),
        "summarisation": Format(SUMMARIES, summarisation),
        "text": Format((("text",),), text),
        "seed_tasks": Format((("instruction", "instances"),), seed_tasks),
        "hh_rlhf": Format((("chosen",),), hh_rlhf, ("rejected",)),
        "oasst": Format((("input", "output"), ("text",)), oasst, auto=False),
        "chip2": Format((("text",),), chip2, auto=False),
        "self_instruct": Format((("prompt", "completion"),), self_instruct, auto=False),
        "longform": Format((("input", "output"),), input_output, ("source", "subset"), auto=False),
    }
)
_DIALOGUES = (  # texts that the columns alone would take for plain ones: chosen format, column, beginning, the other
    ("text", "text", "### Human:", "oasst"),
    ("text", "text", "<human>:", "chip2"),
    ("input_output", "input", "### Human:", "oasst"),
)


def choose_format(row: Row, where: str, formats: Formats = FORMATS) -> str:
    """The format of `auto`: the one that reads most of the row's columns.

    Raises UserError where none fits, two fit equally well, the text is a dialogue that another format reads, or the row
    holds tools or a system's text that this one does not.
    """
    fit = fitting(row, formats)
    if not fit:
        known = "; ".join(f"{name}: {format}" for name, format in formats.items())
        todo = f"give the source a template, or rename the columns to those of a format of this model.task ({known})"
        raise UserError(where, f"no format fits the columns {_columns(row)}", todo)
    if len(fit) > 1:
        what = f"the columns {_columns(row)} fit {' and '.join(fit)}"
        raise UserError(where, what, f"set format: {' or '.join(fit)}")
    _refuse_dialogue(fit[0], row, where, formats)
    _refuse_unread(fit[0], row, where, formats)
    return fit[0]


def check_row(name: str, auto: bool, row: Row, where: str, formats: Formats = FORMATS) -> None:
    """Raises UserError where the row lacks a column of the format, or with `auto` would choose another one."""
    format = formats[name]
    fit = fitting(row, formats)
    if auto and fit and fit != [name]:
        what = f"the columns {_columns(row)} fit {' and '.join(fit)}, the first row's fit {name}"
        raise UserError(where, what, "set the format of the source, or give all rows the same columns")
    if not format.explained(_found(row)):
        missing = format.words or " or ".join(" and ".join(_missing(columns, row)) for columns in format.one_of)
        what = f"no column {missing} for the format {name} (null counts as none), found {_columns(row)}"
        todo = f"set format: {' or '.join(fit)}" if fit else "fill it in, or set data.on_bad_row: skip"
        raise UserError(where, what, todo)
    if auto:
        _refuse_dialogue(name, row, where, formats)
    _refuse_unread(name, row, where, formats)


def fitting(row: Row, formats: Formats = FORMATS) -> list[str]:
    """The formats that read most of the row's columns, in the order of the table; those of `auto` alone."""
    return [*_fitting(_found(row), formats)]


def _found(row: Row) -> frozenset[str]:
    """The columns that hold something."""
    return frozenset(column for column, value in row.items() if value is not None)


@lru_cache(maxsize=64)
def _fitting(columns: frozenset[str], formats: Formats) -> tuple[str, ...]:
    explained = {name: format.explained(columns) for name, format in formats.items() if format.auto}
    return tuple(name for name, number in explained.items() if number and number == max(explained.values()))


def _refuse_dialogue(chosen: str, row: Row, where: str, formats: Formats) -> None:
    """Raises UserError where the format that the columns have chosen would read a dialogue as one plain text."""
    for name, column, beginning, other in _DIALOGUES:
        if chosen == name and other in formats and str(row[column]).lstrip().startswith(beginning):
            what = f"{column} begins with {beginning!r}: a dialogue, which the format {name} would not tell apart"
            raise UserError(where, what, f"set format: {other} or {name}")


def _refuse_unread(name: str, row: Row, where: str, formats: Formats) -> None:
    """Raises UserError where the row says what its other columns are read with, and the format does not look."""
    if unread := [column for column in _TOLD if row.get(column) and column not in formats[name].optional]:
        what = f"has {unread[0]}, which the format {name} does not read"
        todo = f"remove {unread[0]}" + (", or write the row as messages" if "messages" in formats else "")
        raise UserError(where, what, todo)


def _missing(columns: tuple[str, ...], row: Row) -> list[str]:
    """The columns that the row has not."""
    return [column for column in columns if row.get(column) is None]


def _optional(row: Row, column: str, where: str) -> str:
    """The text in a column, empty where it is missing."""
    return "" if row.get(column) is None else text_of(row, column, where)


def _columns(row: Row) -> str:
    """The names of a row's columns, for a message."""
    return ", ".join(map(repr, row)) or "(none)"
