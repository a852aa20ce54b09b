"""How a row of a file becomes what the task's encoder takes: by its format, or by the template of its source."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qlora_cli.data.conversations import Conversation, Plain, assistant, user
from qlora_cli.data.formats import check_row
from qlora_cli.data.jinja import TEMPLATE_ERRORS, compile_row_template
from qlora_cli.data.rows import Row, whole_text
from qlora_cli.data.task_rows import TASK_ROWS, formats_of
from qlora_cli.errors import UserError

Template = dict[str, Any]
"""A source's template: prompt, pair, completion, chat."""

Reader = Callable[[Row, str], Any]
"""(row, where) to what the task's encoder takes; raises UserError at `where`."""


def reader(format: str, auto: bool, template: Template | None, task: str, place: str) -> Reader:
    """The function that reads the rows of a source. auto: the format was chosen by the columns.

    Raises UserError at `place` for a template that is no Jinja.
    """
    if template is not None:
        return _templated(template, task, place)
    formats = formats_of(task)

    def read(row: Row, where: str) -> Any:
        check_row(format, auto, row, where, formats)
        return formats[format].read(row, where)

    return read


def _templated(template: Template, task: str, place: str) -> Reader:
    """The reader of a source's own Jinja strings."""
    names = [name for name in ("prompt", "pair", "completion") if template.get(name) is not None]
    parts = {}
    for name in names:
        try:
            parts[name] = compile_row_template(template[name])
        except TEMPLATE_ERRORS as error:
            what = f"template.{name} of its data source is no valid Jinja: {error}"
            raise UserError(place, what, "correct it in the recipe") from error
    made = TASK_ROWS[task].templated if task in TASK_ROWS else _conversation if template["chat"] else _plain
    assert made is not None, "a rule refuses a template for this task"

    def read(row: Row, where: str) -> Any:
        texts = {}
        for name, part in parts.items():
            try:
                texts[name] = whole_text(part(row), f"template.{name}", where)
            except TEMPLATE_ERRORS as error:
                found = ", ".join(row) or "no columns"
                what = f"template.{name} of its data source stops with: {error}; the row has {found}"
                raise UserError(where, what, "correct the template in the recipe, or the row") from error
        return made(texts)

    return read


def _plain(texts: dict[str, str]) -> Plain:
    return Plain.of(texts["prompt"], texts["completion"])


def _conversation(texts: dict[str, str]) -> Conversation:
    turns = [user(texts["prompt"]), assistant(texts["completion"])]
    return Conversation(turns, plain=_plain(texts))
