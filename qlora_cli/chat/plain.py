"""What a model without a chat template is asked: the prompt that its training rows had, or the text as it stands."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jinja2
from jinja2 import nodes

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


class Asked(NamedTuple):
    """What puts a text into the prompt of training rows, None where it stays as it is. words: what is done with it."""

    words: str
    prompt: Callable[[str], str] | None


AS_IT_STANDS = Asked("continued as it stands", None)


def asked_as(source: Source) -> Asked:
    """How a text is asked that is to meet what the rows of a source of causal_lm were.

    Where the columns choose the format, the first row is read, if it lies on this machine.
    """
    if source.template is not None:
        return templated(source.template.prompt)
    name: str = _chosen(source) if source.format == "auto" else source.format
    if name not in ASKED:
        return AS_IT_STANDS
    question, answer = ASKED[name]

    def prompt(text: str) -> str:
        content = FORMATS[name].read({question: text, answer: ""}, "the text")
        assert isinstance(content, Conversation)
        assert content.plain is not None
        return content.plain.pieces[0][0]

    return Asked(f"put into the prompt of {name} rows", prompt)


def templated(template: str) -> Asked:
    """How a text is asked of a source with a template: in place of the one column that its prompt writes as it is.

    The template is read, not run: one that does more with its columns cannot be filled by a text.
    """
    try:
        parsed = jinja2.Environment(keep_trailing_newline=True).parse(template)
        columns = {node.name for node in parsed.find_all(nodes.Name)}
    except (jinja2.TemplateError, RecursionError):
        columns = set()
    plain = len(columns) == 1 and all(isinstance(node, nodes.Output) for node in parsed.body)
    written = [node for output in parsed.body for node in output.iter_child_nodes()] if plain else []
    if not written or not all(isinstance(node, nodes.TemplateData | nodes.Name) for node in written):
        words = f"{AS_IT_STANDS.words}: the prompt in data.train[0].template is more than one column with words around"
        return Asked(words, None)

    def prompt(text: str) -> str:
        return "".join(node.data if isinstance(node, nodes.TemplateData) else text for node in written)

    return Asked(f"put into the prompt of data.train[0].template as its {columns.pop()}", prompt)


def _chosen(source: Source) -> str:
    """The format that the first row's columns choose; "" where that cannot be told here and now."""
    if not is_local(source.path):
        return ""
    try:
        _, read = next(iter(read_parts(resolve(source, "train").parts, source, SourceMark())))
        return "" if isinstance(read.value, UserError) else choose_format(read.value, source.path)
    except (UserError, StopIteration):  # the rows need not be there any more
        return ""
