"""Judgements on disk: which of two models answered better, or what each answer scored.

The QLoRA repository's rating files as they are, and any rows with two names and an outcome.
"""

from __future__ import annotations

import glob
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qlora_cli.data.readers import DataFile, suffix_of
from qlora_cli.data.rows import Row, describe, near_names
from qlora_cli.data.sources import resolve
from qlora_cli.errors import UserError
from qlora_cli.evaluate.answer_ids import NAME_THEM, Meeting, in_order, owners_of
from qlora_cli.recipe.schema import Source

NAMES = (("model_a", "model_b"), ("model_1", "model_2"), ("system_a", "system_b"))
"""Columns that name the two models, the one shown first in front."""

IDS = ("answer1_id", "answer2_id")
"""Columns of the QLoRA repository's rating files, which name no model."""

TIES = ("tie", "tie (bothbad)", "both_bad")
"""Values of `winner` beside a column's name and a model's: those of Chatbot Arena."""

CLASSES = {1: 1.0, 2: 0.0, 3: 0.5}
"""The first answer's result for each `score` of three classes: the first is better, the second is, they are equal."""

QUESTIONS = ("question_id", "message_id", "prompt_id")
"""Columns that tell what was asked."""

_JUDGE = re.compile(
    r"[-_](?:gpt-?4o?(?:-turbo)?|gpt-?3\.5(?:-turbo)?|claude-[\w.]+)[-_]reviewer(?:[-_]threeclass)?$", re.IGNORECASE
)
_REVIEWER = re.compile(r"[-_]reviewer(?:[-_]threeclass)?$")
_VERSUS = re.compile(r"[-_]vs[-_]")
_GENERATIONS = re.compile(r"-(?:vicuna|oa)-generations(?:-topp0\.9-temp0\.7)?$")
_SIZE_FIRST = re.compile(r"(\d+)b-(.+)")
_SPELLINGS = {"gpt35": "gpt-3.5", "gpt4": "gpt-4"}


class Judgement(NamedTuple):
    """A game. first, second: the models in the order shown; outcome: the first one's result, 1, 0.5 or 0.

    scores: what each answer scored, where it was scored; question: what was asked, where that is told.
    """

    first: str
    second: str
    outcome: float
    scores: tuple[float, float] | None
    question: str | None


class LeftOut(NamedTuple):
    """A judgement that says nothing. where: file:line; what: why."""

    where: str
    what: str


@dataclass(frozen=True)
class Judgements:
    """What was read: the judgements in the order of the files, those left out, and the number of files."""

    usable: tuple[Judgement, ...]
    left_out: tuple[LeftOut, ...]
    num_files: int


class _File(NamedTuple):
    """A file's rows with their places."""

    path: str
    rows: list[tuple[str, Row]]


def read_judgements(targets: Sequence[str]) -> Judgements:
    """The judgements of files, folders and patterns, in the order of their paths; a file named twice is read once.

    Raises UserError where nothing is there, for a row that cannot be read or names no models, for answer ids that do
    not tell whose answers they are, and where no judgement is usable.
    """
    parts = {os.path.normpath(part.path): part for target in targets for part in _files(target)}
    files = [_File(path, _rows(parts[path])) for path in sorted(parts)]
    named = _name_answers([file for file in files if not _has_names(file)])
    found = [
        _judgement(where, row, named.get((file.path, at)))
        for file in files
        for at, (where, row) in enumerate(file.rows)
    ]
    usable = tuple(one for one in found if isinstance(one, Judgement))
    left_out = tuple(one for one in found if isinstance(one, LeftOut))
    if not usable:
        first = left_out[0]
        raise UserError(first.where, f"no judgement is usable; here: {first.what}", "name files of judgements")
    return Judgements(usable, left_out, len(files))


def _files(target: str) -> list[DataFile]:
    """What a path or pattern means; never a data set of the hub."""
    path = os.path.expanduser(target)
    if not os.path.lexists(path) and not glob.has_magic(path):
        what = "no such file or folder" + near_names(Path(path))
        raise UserError(target, what, "name files or folders of judgements")
    return [part for part in resolve(Source(path=path), "eval").parts if isinstance(part, DataFile)]


def _rows(file: DataFile) -> list[tuple[str, Row]]:
    """Each row with its place. Raises UserError for one that cannot be read."""
    rows = []
    for number, value, _ in file.read():
        if isinstance(value, UserError):
            raise value
        rows.append((file.place(number), value))
    return rows


# ── who answered ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _name_columns(row: Row) -> tuple[str, str] | None:
    return next((columns for columns in NAMES if columns[0] in row and columns[1] in row), None)


def _has_names(file: _File) -> bool:
    """Whether each row names its models. Raises UserError for a row that has neither names nor answer ids."""
    for where, row in file.rows:
        if _name_columns(row) is None and not all(isinstance(row.get(column), str) for column in IDS):
            known = ", ".join(" and ".join(columns) for columns in (*NAMES, IDS))
            raise UserError(where, f"names no two models, found {sorted(row)}", f"add one of {known}")
    return all(_name_columns(row) for _, row in file.rows)


def _name_answers(files: Sequence[_File]) -> dict[tuple[str, int], tuple[str, str] | None]:
    """Path and index of a row -> the models of its first and second answer, for rows that have answer ids alone."""
    kept = [[at for at, (_, row) in enumerate(file.rows) if _name_columns(row) is None] for file in files]
    meetings = [
        Meeting(file.path, names_in(file.path), [(file.rows[at][1][IDS[0]], file.rows[at][1][IDS[1]]) for at in rows])
        for file, rows in zip(files, kept, strict=True)
    ]
    owners = owners_of(meetings)
    return {
        (meeting.path, at): in_order(meeting, ids, owners)
        for meeting, rows in zip(meetings, kept, strict=True)
        for at, ids in zip(rows, meeting.rows, strict=True)
    }


def names_in(path: str) -> tuple[str, str]:
    """The two models in a file's name, NAME-vs-NAME-JUDGE-reviewer[-threeclass] or NAME-vs-NAME, as readable names.

    Raises UserError for a name of any other form.
    """
    stem = Path(path).name[: -len(suffix_of(path) or "")]
    names = _VERSUS.split(_JUDGE.sub("", stem))
    if len(names) != 2 or not all(names) or _REVIEWER.search(names[1]):
        what = "the rows have answer ids, and the file's name does not tell of which two models"
        todo = f"name it MODEL-vs-MODEL.jsonl or MODEL-vs-MODEL-gpt-4-reviewer.jsonl, or {NAME_THEM}"
        raise UserError(path, what, todo)
    one, other = map(readable_name, names)
    if one == other:
        raise UserError(path, f"{one} meets itself", f"correct the file's name, or {NAME_THEM}")
    return one, other


def readable_name(name: str) -> str:
    """A model's name without what the QLoRA repository's files add: '30b-guanaco-vicuna-generations-topp0.9-temp0.7'
    is guanaco-33b (LLaMA's 33B, which the files call 30b), 'answer-gpt35' and 'gpt-3.5' are the same model."""
    short = _GENERATIONS.sub("", re.sub(r"^answer[-_]", "", name))
    if sized := _SIZE_FIRST.fullmatch(short):
        size, family = sized.groups()
        short = f"{family}-{'33' if size == '30' else size}b"
    return _SPELLINGS.get(short, short)


# ── what was judged ──────────────────────────────────────────────────────────────────────────────────────────────────


def _judgement(where: str, row: Row, answered: tuple[str, str] | None) -> Judgement | LeftOut:
    """A row as a game, or why it is none. answered: the models by the answer ids, of a row that names none."""
    columns = _name_columns(row)
    names = answered if columns is None else _named(where, row, columns)
    if names is None:
        return LeftOut(where, "the answer ids are of both models, or of none")
    scores = scores_of(row.get("score"))
    outcome = winner_of(row["winner"], columns, names) if "winner" in row else outcome_of(row.get("score"), scores)
    if outcome is None:
        column = next((column for column in ("winner", "score") if column in row), None)
        return LeftOut(where, f"{column} is {row[column]!r}" if column else "no winner and no score")
    asked = next((str(row[column]) for column in QUESTIONS if column in row), None)
    return Judgement(*names, outcome, scores, asked)


def _named(where: str, row: Row, columns: tuple[str, str]) -> tuple[str, str]:
    """The two models that a row names. Raises UserError where one is no text, or both are the same."""
    for column in columns:
        if not isinstance(row[column], str) or not row[column].strip():
            what = f"{column} is {describe(row[column])}, not a name"
            raise UserError(where, what, f"put a model's name into {column}")
    if row[columns[0]] == row[columns[1]]:
        raise UserError(where, f"{row[columns[0]]} meets itself", "name two models, or remove the row")
    return row[columns[0]], row[columns[1]]


def scores_of(score: Any) -> tuple[float, float] | None:
    """Two finite scores from 0 on; None for anything else: [-1, -1] says that the judge's text held none."""
    if not isinstance(score, list) or len(score) != 2:
        return None
    if not all(isinstance(one, int | float) and not isinstance(one, bool) for one in score):
        return None
    return (float(score[0]), float(score[1])) if all(math.isfinite(one) and one >= 0 for one in score) else None


def outcome_of(score: Any, scores: tuple[float, float] | None) -> float | None:
    """The first answer's result by two scores, of which the higher wins, or by a class; None where there is neither."""
    if scores:
        return 0.5 if scores[0] == scores[1] else float(scores[0] > scores[1])
    return CLASSES.get(score) if isinstance(score, int) and not isinstance(score, bool) else None


def winner_of(winner: Any, columns: tuple[str, str] | None, names: tuple[str, str]) -> float | None:
    """The first answer's result by `winner`: a column's name, a model's, or one of TIES; None for anything else."""
    first, second = (winner in (columns[at] if columns else None, names[at]) for at in (0, 1))
    if first == second:
        return 0.5 if not first and winner in TIES else None
    return 1.0 if first else 0.0
