"""What a model without a chat template is asked: the prompt that its training rows had, or the text as it stands."""

from __future__ import annotations

from collections.abc import Callable

from qlora_cli.data.conversations import Conversation
from qlora_cli.data.formats import FORMATS, SUMMARIES, choose_format
from qlora_cli.data.sources import SourceMark, read_parts, resolve
from qlora_cli.errors import UserError
from qlora_cli.recipe.remote import is_local
from qlora_cli.recipe.schema import Source

ASKED = {
    "alpaca": ("instruction", "output"),
    "question_answer": ("question", "answer"),
    "summarisation": SUMMARIES[0],
}
"""Formats whose rows have a prompt around them where there is no template: the columns of question and answer."""


def asked_as(source: Source) -> tuple[str, Callable[[str], str]] | None:
    """The name of the source's format and what puts a text into its prompt; None where rows are verbatim.

    Where the columns choose the format, the first row is read, if it lies on this machine.
    """
    if source.template is not None:
        return None
    name: str = _chosen(source) if source.format == "auto" else source.format
    if name not in ASKED:
        return None
    question, answer = ASKED[name]

    def prompt(text: str) -> str:
        content = FORMATS[name].read({question: text, answer: ""}, "the text")
        assert isinstance(content, Conversation)
        assert content.plain is not None
        return content.plain.pieces[0][0]

    return name, prompt


def _chosen(source: Source) -> str:
    """The format that the first row's columns choose; "" where that cannot be told here and now."""
    if not is_local(source.path):
        return ""
    try:
        _, read = next(iter(read_parts(resolve(source, "train").parts, source, SourceMark())))
        return "" if isinstance(read.value, UserError) else choose_format(read.value, source.path)
    except (UserError, StopIteration):  # the rows need not be there any more
        return ""
