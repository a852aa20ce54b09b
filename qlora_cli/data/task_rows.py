"""The tasks whose rows are no conversations: what formats they have, and how a row of them becomes examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_cli.data import classes, formats, pairs, squad
from qlora_cli.data.encode import Example
from qlora_cli.data.formats import Formats
from qlora_cli.data.rows import Row

if TYPE_CHECKING:
    from qlora_cli.data.chat import Chat
    from qlora_cli.data.limits import Limits

Encode = Callable[[Any, str, "Chat", "Limits"], list[tuple[Example, Example]]]
"""(what the format read, where, chat, limits) to examples, each with itself within the limits."""


@dataclass(frozen=True)
class TaskRows:
    """What tells the rows of a task from those of another.

    formats, encode: how a row is read, and made into examples.
    templated: the texts that a source's template wrote, by their keys, as a row; None: no template can say it.
    expand:    the rows that a row of a file holds, in order.
    """

    formats: Formats
    encode: Encode
    templated: Callable[[dict[str, str]], Any] | None = None
    expand: Callable[[Row], Iterator[Row]] | None = None


TASK_ROWS: dict[str, TaskRows] = {
    "seq2seq_lm": TaskRows(pairs.FORMATS, pairs.encode, pairs.templated),
    "sequence_classification": TaskRows(classes.FORMATS, classes.encode, classes.templated),
    "question_answering": TaskRows(squad.FORMATS, squad.encode, expand=squad.questions),
}


def formats_of(task: str) -> Formats:
    """The row formats of a task."""
    return TASK_ROWS[task].formats if task in TASK_ROWS else formats.FORMATS
