"""A preparing process: rows come in on its standard input, token ids go out on its standard output.

A chat template is a program from somewhere. The sandbox keeps it from Python's internals; this process keeps it from
endless loops and giant strings: the kernel ends the process when one row takes more than ROW_SECONDS of processor time
or more than MEMORY_BYTES. The parent takes nothing from here but JSON and token ids.

Frames: 8 bytes of length and a pickle to here; two lengths of 8 bytes, JSON and bytes from here.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys
import traceback
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from qlora_cli.data.chat import Chat, ChatSettings, make_chat
from qlora_cli.data.confine import confine, cpu_limit
from qlora_cli.data.encode import IGNORE_INDEX, Example, encode, unspelled
from qlora_cli.data.limits import Limits, Tally, fitted, num_stops
from qlora_cli.data.row_reader import Template, reader
from qlora_cli.data.rows import Row, whole_text
from qlora_cli.data.spans import Rendered, render_row
from qlora_cli.data.task_rows import TASK_ROWS
from qlora_cli.errors import UserError

ROW_SECONDS = 10
"""Processor time that the rendering of one row may take; it takes some 60 µs."""

CHUNK_SECONDS = 120
"""Processor time for the token ids of a chunk."""

LOAD_SECONDS = 30
"""Processor time for the tokenizer to load and the template to compile; the largest tokenizers take two."""

MEMORY_BYTES = 2**30
"""What templates and rows may take on top of the tokenizer."""

MOST_WORDS = 600
"""Characters of a message that are kept: a message may quote the row."""

TRAINED = 1 << 31
"""The bit of a stored token id that says that it is trained; no vocabulary has two thousand million tokens."""

Made = tuple[int, Example, Example]
"""The index of a row in its task, an example of it, and as much of that as the limits let through."""


@dataclass(frozen=True)
class Job:
    """What a process needs to know once, and the processor time and the memory that it may take."""

    settings: ChatSettings
    limits: Limits
    row_seconds: float = ROW_SECONDS
    chunk_seconds: float = CHUNK_SECONDS
    load_seconds: float = LOAD_SECONDS
    memory_bytes: int = MEMORY_BYTES


@dataclass(frozen=True)
class Task:
    """Rows of one source; `places` says where each stands. auto: the format was chosen by the columns."""

    rows: list[Row]
    places: list[str]
    format: str
    auto: bool
    template: Template | None = None


@dataclass
class Result:
    """What became of a task's rows.

    examples:   (index in the task, tokens, trained tokens, segment, targets) of each, in order; a row may give several
    bad:        (index, where, what, todo) of each row that cannot be read, proven or trained on, once each, in order
    tally:      counts, by the names of the fields of examples.Examples
    long:       (index, tokens, tokens before the answer) of the first row beyond the limits and of the longest
    lost:       in how many rows each character stands that the tokenizer cannot write
    ids:        token ids of all examples, one behind the other, with TRAINED where trained
    """

    examples: list[tuple[int, int, int, int, tuple[float, ...]]] = field(default_factory=list)
    bad: list[tuple[int, str, str, str]] = field(default_factory=list)
    tally: Tally = field(default_factory=Counter)
    long: list[tuple[int, int, int]] = field(default_factory=list)
    lost: Counter[str] = field(default_factory=Counter)
    ids: array[int] = field(default_factory=lambda: array("I"))


def prepare(task: Task, job: Job, chat: Chat) -> Result:
    """Renders, encodes and limits the rows of a task.

    Raises MemoryError where they do not fit: alone they may, so it tells nothing of the row that it happened at.
    """
    result = Result()
    bad: dict[int, UserError] = {}
    made = _conversations if job.settings.task.name not in TASK_ROWS else _task_rows
    examples = made(task, job, chat, bad, result)
    too_long: set[int] = set()
    for index, example, cut in examples:
        if index not in bad and not _keep(index, example, cut, job, result):
            too_long.add(index)
    result.tally["num_too_long"] = len(too_long)
    result.bad = [(index, error.where, shortened(error.what), error.todo) for index, error in sorted(bad.items())]
    return result


def _conversations(task: Task, job: Job, chat: Chat, bad: dict[int, UserError], result: Result) -> list[Made]:
    """The examples of causal_lm: conversations and texts; why the others are none is put into `bad`."""
    indices, rendered, characters = _rendered(task, job, chat, bad, result.tally)
    with cpu_limit(job.chunk_seconds):
        encoded = encode(rendered, chat)
    _count_lost(characters, job, chat, result)
    made: list[Made] = []
    for index, example in zip(indices, encoded, strict=True):
        if isinstance(example, UserError):
            bad.setdefault(index, example)
        elif example.num_trained == 0:
            what = "nothing to train: the row's first token is its last, and a first token is never predicted"
            bad.setdefault(index, UserError(example.where, what, "remove the row, or give it a text"))
        else:
            made.append((index, example, job.limits.cut(example)))
    return made


def _task_rows(task: Task, job: Job, chat: Chat, bad: dict[int, UserError], result: Result) -> list[Made]:
    """The examples of the other tasks, whose rows are encoded one by one."""
    rows = TASK_ROWS[job.settings.task.name]
    read = _reader(task, job)
    spells_ascii = _spells_ascii(chat)
    characters: Counter[str] = Counter()
    made: list[Made] = []
    for index, (row, where) in enumerate(zip(task.rows, task.places, strict=True)):
        try:
            with cpu_limit(job.row_seconds):
                value = read(row, where)
                examples = rows.encode(value, where, chat, job.limits)
        except UserError as error:
            bad[index] = _unless_memory(error)
            continue
        except OSError as error:
            bad[index] = _asks_for_file(error, where)
            continue
        if not (spells_ascii and all(text.isascii() for text in value.texts)):
            characters.update(set().union(*value.texts))
        made += [(index, example, cut) for example, cut in examples]
    _count_lost(characters, job, chat, result)
    return made


def _count_lost(characters: Counter[str], job: Job, chat: Chat, result: Result) -> None:
    """Counts the characters that the tokenizer cannot write, by the rows that hold them."""
    with cpu_limit(job.chunk_seconds):
        lost = unspelled(characters, chat.tokenizer, job.settings.unk_id)
    result.lost.update({character: characters[character] for character in lost})


def _rendered(
    task: Task, job: Job, chat: Chat, bad: dict[int, UserError], tally: Tally
) -> tuple[list[int], list[Rendered], Counter[str]]:
    """The texts of the rows that can be rendered, each with its row's index; the others are put into `bad`.

    With them: in how many rows each character stands, where it may be one that the tokenizer cannot write.
    """
    indices: list[int] = []
    rendered: list[Rendered] = []
    characters: Counter[str] = Counter()
    spells_ascii = _spells_ascii(chat)
    read = _reader(task, job)
    for index, (row, where) in enumerate(zip(task.rows, task.places, strict=True)):
        try:
            with cpu_limit(job.row_seconds):
                texts = render_row(read(row, where), chat, where)
                for text in texts:  # a template may write half a character too
                    whole_text(text.text, "the rendered text", where)
        except UserError as error:
            bad[index] = _unless_memory(error)
            continue
        except OSError as error:
            bad[index] = _asks_for_file(error, where)
            continue
        tally["num_split"] += len(texts) > 1
        if not (spells_ascii and all(text.text.isascii() for text in texts)):  # else there is nothing to lose
            characters.update(set().union(*(text.text for text in texts)))
        indices += [index] * len(texts)
        rendered += texts
    return indices, rendered, characters


def _reader(task: Task, job: Job) -> Callable[[Row, str], Any]:
    """The function that reads a row of the task. Raises UserError at its first row for a template that is no Jinja."""
    with cpu_limit(job.row_seconds):
        return reader(task.format, task.auto, task.template, job.settings.task.name, next(iter(task.places), ""))


def _spells_ascii(chat: Chat) -> bool:
    """Whether the tokenizer writes every ASCII character, so that no text of these alone has to be looked at."""
    return not unspelled(map(chr, range(128)), chat.tokenizer, chat.settings.unk_id)


def _asks_for_file(error: OSError, where: str) -> UserError:
    """What is said where a template wants a Python module that none of LOADED_LATER is."""
    return UserError(where, f"the template asks for a file: {error}", "change the template")


def _unless_memory(error: UserError) -> UserError:
    """The error. Raises MemoryError where want of memory caused it."""
    if isinstance(error.__cause__, MemoryError):
        raise MemoryError from error
    return error


def _keep(index: int, example: Example, cut: Example, job: Job, result: Result) -> bool:
    """Adds an example to the result, within the limits; False where on_long_row is error and it is beyond them."""
    stop_ids = frozenset(job.settings.stops.values())
    kept = fitted(example, cut, job.limits, stop_ids, result.tally)
    if kept is None:
        if job.limits.on_long_row != "error":
            return True
        found = (index, example.num_tokens, example.num_prompt)
        longest = max([*result.long[1:], found], key=lambda one: one[1])
        result.long = [result.long[0] if result.long else found, longest]
        return False
    stops, trained = num_stops(kept, stop_ids), kept.num_trained
    result.tally["num_stops"] += stops
    result.tally["num_silent"] += stops == trained
    result.examples.append((index, kept.num_tokens, trained, kept.segment, kept.targets))
    both = zip(kept.input_ids, kept.labels, strict=True)
    result.ids.extend([token if label == IGNORE_INDEX else token | TRAINED for token, label in both])
    return True


def shortened(text: str) -> str:
    """The beginning of a message that quotes something huge."""
    return text if len(text) <= MOST_WORDS else f"{text[:MOST_WORDS]}... ({len(text):,} characters)"


# ── the process ──────────────────────────────────────────────────────────────────────────────────────────────────────


def main() -> None:
    """Answers tasks until its input ends."""
    frames, answers = sys.stdin.buffer, sys.stdout.buffer
    try:
        job: Job = _receive(frames)
        confine(40 * len(job.settings.tokenizer) + job.memory_bytes)
        try:
            with cpu_limit(job.load_seconds):
                chat = make_chat(job.settings)
        except UserError as error:
            _send(answers, _told(error))
            return
        _send(answers, {"ready": True})
        while (task := _receive(frames)) is not None:
            _answer(answers, task, job, chat)
    except MemoryError:
        os.abort()  # the parent tells of what
    except BaseException:
        _send(answers, {"bug": traceback.format_exc()})
        raise


def _answer(answers: BinaryIO, task: Task, job: Job, chat: Chat) -> None:
    """Prepares one task and sends what became of it."""
    try:
        result = prepare(task, job, chat)
    except UserError as error:  # of all rows: the source's template
        _send(answers, _told(error))
        return
    found = {name: getattr(result, name) for name in ("examples", "bad", "tally", "long", "lost")}
    _send(answers, found, result.ids.tobytes())


def _told(error: UserError) -> dict[str, Any]:
    """The answer for what is wrong with all rows."""
    _unless_memory(error)
    return {"error": [error.where, shortened(error.what), error.todo]}


def _receive(frames: BinaryIO) -> Any:
    """The next object of the parent, None at the end. The parent is trusted, so it may pickle."""
    head = frames.read(8)
    return pickle.loads(frames.read(struct.unpack("<Q", head)[0])) if len(head) == 8 else None


def _send(answers: BinaryIO, header: dict[str, Any], ids: bytes = b"") -> None:
    text = json.dumps(header).encode()
    answers.write(struct.pack("<QQ", len(text), len(ids)) + text + ids)
    answers.flush()
