"""Whose answer an id is, from all rating files together: a file's name says which two models met, not in which order.

In half of the QLoRA repository's relative ratings the file's name has the models in the wrong order. An answer id
stands in every file of its model, so that the only name common to its files is the model's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from qlora_cli.errors import UserError

Owners = Mapping[str, frozenset[str]]
"""Answer id -> the models that it can be of: one where it is known, none where its files have no model in common."""

NAME_THEM = "name the models in its rows, as model_a and model_b"


class Meeting(NamedTuple):
    """A file of judgements. names: its two models, in any order; rows: the ids of the first and the second answer."""

    path: str
    names: tuple[str, str]
    rows: Sequence[tuple[str, str]]


def owners_of(meetings: Sequence[Meeting]) -> Owners:
    """The models that each answer id can be of, narrowed down as far as all files allow.

    First by the names common to the files of an id, then by its neighbours: beside an answer of one model stands one
    of the other. Two models that gave the same answer may share its id, which then is of none.
    Raises UserError for the first file of which the ids leave open which answers are whose.
    """
    found: dict[str, frozenset[str]] = {}
    for meeting in meetings:
        names = frozenset(meeting.names)
        for answer in {answer for row in meeting.rows for answer in row}:
            found[answer] = found.get(answer, names) & names
    while _narrow(meetings, found):
        pass
    for meeting in meetings:
        _check(meeting, meetings, found)
    return found


def _narrow(meetings: Sequence[Meeting], found: dict[str, frozenset[str]]) -> bool:
    """Settles ids that stand beside a settled one; whether there were any."""
    settled = False
    for meeting in meetings:
        for row in meeting.rows:
            for answer, beside in (row, row[::-1]):
                if answer != beside and len(found[answer]) == 2 and len(found[beside]) == 1:
                    found[answer] -= found[beside]
                    settled = True
    return settled


def _check(meeting: Meeting, meetings: Sequence[Meeting], found: Owners) -> None:
    """Raises UserError unless each of the file's models has an id of its own in it."""
    seen = {found[answer] for row in meeting.rows for answer in row}
    missing = [name for name in meeting.names if {name} not in seen]
    if len(missing) == 2 and any(len(models) == 2 for models in seen):
        one, other = meeting.names
        what = f"its answer ids do not tell which answers are {one}'s and which are {other}'s"
        todo = f"add files in which one of the two meets a third model, or {NAME_THEM}"
        raise UserError(meeting.path, what, todo)
    if missing:
        ids = {answer for row in meeting.rows for answer in row if not found[answer]}
        others = (one for one in meetings if missing[0] not in one.names and any(ids & {*row} for row in one.rows))
        other = next((one.path for one in others if one is not meeting), "another file")
        what = f"no answer id in it is {missing[0]}'s alone: {other} has the same ids, and names other models"
        raise UserError(meeting.path, what, f"correct the name of one of the two files, or {NAME_THEM}")


def in_order(meeting: Meeting, row: tuple[str, str], owners: Owners) -> tuple[str, str] | None:
    """The models of a row's first and second answer; None where the two ids do not tell, or contradict each other."""
    one, other = meeting.names
    first, second = (owners[answer] for answer in row)
    forward = {one} == first or {other} == second
    backward = {other} == first or {one} == second
    if forward == backward:
        return None
    return (one, other) if forward else (other, one)
