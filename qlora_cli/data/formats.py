"""Row formats: one table from the recipe's name to the columns a row needs and the function that reads it.

A new format is one function and one line of FORMATS. Columns that a format does not name are ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qlora_cli.data.sources import Row, Rows, describe
from qlora_cli.errors import UserError

Message = dict[str, str]
"""One turn: {"role": "system" | "user" | "assistant", "content": text}."""

ROLES = ("system", "user", "assistant")
_TOOL_KEYS = ("tool_calls", "tool_call_id", "function_call")
_TURN_KEYS = ("reasoning_content", "thinking", "weight")  # they change what is rendered or trained


@dataclass(frozen=True, slots=True)
class Plain:
    """Text that is encoded verbatim: `prompt` is read, `completion` is trained."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns for the chat template; every answer is trained. `plain` is its text where there is no template."""

    messages: list[Message]
    plain: Plain | None = None


@dataclass(frozen=True, slots=True)
class Format:
    """What a row needs to be of this format, and how it is read. `read(row, where)` raises UserError at `where`."""

    columns: tuple[str, ...]
    read: Callable[[Row, str], Conversation | Plain]


def alpaca(row: Row, where: str) -> Conversation:
    """{instruction, input?, output} as a user's and an assistant's turn.

    Without a template: the prompt of Stanford Alpaca, verbatim (tatsu-lab/stanford_alpaca, train.py, PROMPT_DICT),
    with the answer directly behind "### Response:" as there.
    """
    instruction, output = text_of(row, "instruction", where), text_of(row, "output", where)
    context = text_of(row, "input", where) if "input" in row else ""
    template = ALPACA_WITH_INPUT if context else ALPACA_WITHOUT_INPUT
    question = f"{instruction}\n\n{context}" if context else instruction
    plain = Plain(template.format(instruction=instruction, input=context), output)
    return Conversation([user(question), assistant(output)], plain)


def question_answer(row: Row, where: str) -> Conversation:
    """{question, answer} as a user's and an assistant's turn; without a template "Question: ...\\nAnswer: ...".

    The space before the answer belongs to the answer: that is how byte-level tokenizers cut words.
    """
    question, answer = text_of(row, "question", where), text_of(row, "answer", where)
    return Conversation([user(question), assistant(answer)], Plain(f"Question: {question}\nAnswer:", f" {answer}"))


def prompt_completion(row: Row, where: str) -> Plain:
    """{prompt, completion}, both texts, verbatim; the tokenizer's BOS and EOS are added once."""
    return Plain(text_of(row, "prompt", where), text_of(row, "completion", where))


def text(row: Row, where: str) -> Plain:
    """{text}: everything is trained; the tokenizer's BOS and EOS are added once."""
    return Plain("", text_of(row, "text", where))


def messages(row: Row, where: str) -> Conversation:
    """{messages: [{role, content}]} with the roles system, user and assistant; the last turn is an answer."""
    turns = row["messages"]
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if turns == [] else describe(turns)
        raise UserError(where, f"messages is {found}", "make it a list of {role, content}")
    if row.get("tools"):
        raise UserError(where, "has tools; tool use is not available yet", "remove the row")
    read = [_message(turn, f"{where}: message {number}") for number, turn in enumerate(turns, 1)]
    if not any(turn["role"] == "assistant" for turn in read):
        raise UserError(where, "has no assistant's message, so nothing to train", "add the answer or remove the row")
    if read[-1]["role"] != "assistant":
        raise UserError(where, f"ends with the {read[-1]['role']}'s message", "end the row with the assistant's answer")
    return Conversation(read)


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

FORMATS: dict[str, Format] = {
    "alpaca": Format(("instruction", "output"), alpaca),
    "messages": Format(("messages",), messages),
    "prompt_completion": Format(("prompt", "completion"), prompt_completion),
    "question_answer": Format(("question", "answer"), question_answer),
    "text": Format(("text",), text),
}


def choose_format(name: str, rows: Rows) -> str:
    """The format of all rows: `name`, or where it is `auto` the one format that fits the columns of every row.

    Raises UserError at the first row that lacks a column, fits no format, or fits another one too.
    """
    if name == "auto":
        name = _only_fit(rows.rows[0], rows.where[0])
        for row, where in zip(rows.rows, rows.where, strict=True):
            if (fit := fitting(row)) != [name]:
                what = f"the columns {_columns(row)} fit {' and '.join(fit) or 'no format'}, the first row's fit {name}"
                raise UserError(where, what, "set the format of the source, or give all rows the same columns")
    for row, where in zip(rows.rows, rows.where, strict=True):
        missing = [column for column in FORMATS[name].columns if column not in row]
        if missing:
            fit = fitting(row)
            what = f"no column {' and '.join(missing)} for the format {name}, found {_columns(row)}"
            raise UserError(where, what, f"set format: {' or '.join(fit)}" if fit else _known_columns())
    return name


def fitting(row: Row) -> list[str]:
    """The formats whose columns the row has, in the order of the table."""
    return [name for name, format in FORMATS.items() if all(column in row for column in format.columns)]


def user(content: str) -> Message:
    """A turn of the user."""
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    """A turn of the assistant: what is trained."""
    return {"role": "assistant", "content": content}


def text_of(row: Row, column: str, where: str) -> str:
    """The text in a column. Raises UserError where it is anything else, or no valid Unicode."""
    value: Any = row.get(column)
    if not isinstance(value, str):
        raise UserError(where, f"{column} is {describe(value)}, not a text", f"make {column} a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        what = f"{column} holds half of a character (U+{ord(value[error.start]):04X}), which has no UTF-8 form"
        raise UserError(where, what, "mend the escape sequence in the row") from error
    return value


def _message(turn: Any, where: str) -> Message:
    """One turn of a messages row, checked; keys without influence on the text are dropped."""
    if not isinstance(turn, dict):
        raise UserError(where, f"is {describe(turn)}, not an object", "write {role: ..., content: ...}")
    role = turn.get("role")
    if role in ("tool", "function", "developer") or any(turn.get(key) for key in _TOOL_KEYS):
        raise UserError(where, "uses tools or a developer role, which is not available yet", "remove the row")
    if role not in ROLES:
        what = "has no role" if role is None else f"has the unknown role {role!r}"
        raise UserError(where, what, f"use one of {', '.join(ROLES)}")
    for key in _TURN_KEYS:
        if key in turn:
            raise UserError(where, f"has the key {key!r}, which is not available yet", "remove it from the messages")
    if isinstance(turn.get("content"), list):
        raise UserError(where, "content is a list; parts are not available yet", "join its texts into one")
    return {"role": role, "content": text_of(turn, "content", where)}


def _only_fit(row: Row, where: str) -> str:
    """The one format that fits the row."""
    fit = fitting(row)
    if not fit:
        raise UserError(where, f"no format fits the columns {_columns(row)}", _known_columns())
    if len(fit) > 1:
        what = f"the columns {_columns(row)} fit {' and '.join(fit)}"
        raise UserError(where, what, f"set format: {' or '.join(fit)}")
    return fit[0]


def _columns(row: Row) -> str:
    """The names of a row's columns, for a message."""
    return ", ".join(map(repr, row)) or "(none)"


def _known_columns() -> str:
    """The remedy that lists every format with its columns."""
    known = "; ".join(f"{name}: {', '.join(format.columns)}" for name, format in FORMATS.items())
    return f"rename the columns to those of a format ({known})"
