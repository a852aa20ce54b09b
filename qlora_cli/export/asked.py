"""The prompt that training rows had around them where there is no chat template, as what stands before and behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_cli.data.conversations import Conversation
from qlora_cli.data.formats import FORMATS, SUMMARIES, choose_format
from qlora_cli.data.sources import SourceMark, read_parts, resolve
from qlora_cli.errors import UserError
from qlora_cli.recipe.remote import is_local
from qlora_cli.recipe.schema import Source

COLUMNS = {
    "alpaca": ("instruction", "output"),
    "question_answer": ("question", "answer"),
    "summarisation": SUMMARIES[0],
}
"""Formats whose rows have a prompt around them: the columns of question and answer."""

PROBES = ("zeta", "Two\n\nlines {{ x }} {instruction}", "'\"")
"""Texts over which the prompt is proven to be what stands before and behind."""


@dataclass(frozen=True)
class Asked:
    """name: of the rows' format, or what is known of them; around: the prompt's two parts, None where not proven."""

    name: str
    around: tuple[str, str] | None


def asked_of(rows: Sequence[Source]) -> Asked:
    """How all of the training rows ask: verbatim, in the prompt of one format, or in ways that one prompt cannot be."""
    found = [_asked(source) for source in rows] or [Asked("verbatim", ("", ""))]
    if all(one == found[0] for one in found):
        return found[0]
    return Asked(", ".join(sorted({one.name for one in found})), None)


def _asked(source: Source) -> Asked:
    if source.template is not None:
        return Asked("data.train[].template", None)
    name: str = _chosen(source) if source.format == "auto" else source.format
    if not name:
        return Asked("a format that cannot be told without the rows", None)
    return Asked(name, _around(name)) if name in COLUMNS else Asked("verbatim", ("", ""))


def _around(name: str) -> tuple[str, str] | None:
    """What the format writes before and behind a question."""
    before, _, behind = _prompt(name, PROBES[0]).partition(PROBES[0])
    proven = all(_prompt(name, text) == before + text + behind for text in PROBES)
    return (before, behind) if proven else None


def _prompt(name: str, text: str) -> str:
    question, answer = COLUMNS[name]
    content = FORMATS[name].read({question: text, answer: "x"}, "the text")
    assert isinstance(content, Conversation)
    assert content.plain is not None
    return content.plain.pieces[0][0]


def _chosen(source: Source) -> str:
    """The format that the first row's columns choose; "" where that cannot be told here and now."""
    if not is_local(source.path):
        return ""
    try:
        _, read = next(iter(read_parts(resolve(source, "train").parts, source, SourceMark())))
        return "" if isinstance(read.value, UserError) else choose_format(read.value, source.path)
    except (UserError, StopIteration):  # the rows need not be there any more
        return ""
