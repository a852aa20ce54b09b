"""Private-use characters around every text of a row: they show where a template writes it, or that it does not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qlora_cli.data.conversations import Message
from qlora_cli.errors import UserError

Span = tuple[int, int]
"""First character and the one behind the last."""

MARKS = re.compile("[\U000f0000-\U000ffffd]")  # supplementary private use area A
FIRST_MARK = 0xF0000
REPEATABLE = ("the name of a tool", "the description of a tool", "a tool call's name")
"""What a template may write again: Gemma 4 names the function in front of its result. The first place counts."""
_MOST_TEXTS = 32_000


@dataclass(frozen=True, slots=True)
class Leaf:
    """A text somewhere in a message, and where it stands in the rendering; None where the template left it out.

    owner: index of its message, -1 for a tool's description; kind: its place in the message, in words.
    """

    owner: int
    kind: str
    text: str
    at: Span | None = None


def texts_of(message: Message) -> Iterator[tuple[str, str]]:
    """The texts of a message that the model has to read or write, each with its name."""
    if "reasoning_content" in message:
        yield "the reasoning", message["reasoning_content"]
    yield "the text", message["content"]
    for call in message.get("tool_calls", ()):
        yield "a tool call's name", call["function"]["name"]
        yield from (("a tool call's argument", text) for text in strings_in(call["function"]["arguments"]))


def strings_in(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys not among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings_in(item)


def words_in(value: Any) -> Iterator[str]:
    """Every text in a JSON value, and every key."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from words_in(item)


def variants(value: Any) -> Iterator[Any]:
    """Copies of a JSON value with one key renamed, or without one value that holds neither text nor other values."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield {key + chr(FIRST_MARK) if other == key else other: value[other] for other in value}
            if _is_bare(item):
                yield {other: value[other] for other in value if other != key}
            yield from ({**value, key: variant} for variant in variants(item))
    elif isinstance(value, list):
        for at, item in enumerate(value):
            if _is_bare(item):
                yield [*value[:at], *value[at + 1 :]]
            yield from ([*value[:at], variant, *value[at + 1 :]] for variant in variants(item))


def _is_bare(value: Any) -> bool:
    """Whether marks cannot show a value: a number, true, null, an empty text, object or list."""
    return not value.strip() if isinstance(value, str) else not (isinstance(value, dict | list) and value)


class Marker:
    """Puts marks around texts, and remembers which."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.leaves: list[Leaf] = []
        self.owner = -1

    def mark(self, text: str, kind: str) -> str:
        """The text with two marks inside its outer white space, so that a template's trim works as before.

        Nothing is put into an empty text: a template may ask whether it is empty, and there is nothing to lose.
        """
        inner = text.strip()
        if not inner:
            return text
        if MARKS.search(text):
            what = f"a text of message {self.owner + 1} holds private-use characters above U+F0000"
            raise UserError(self.where, what, "remove them")
        if len(self.leaves) >= _MOST_TEXTS:
            raise UserError(self.where, f"the row holds more than {_MOST_TEXTS:,} texts", "split or remove the row")
        first = FIRST_MARK + 2 * len(self.leaves)
        self.leaves.append(Leaf(self.owner, kind, inner))
        begin = text.index(inner)
        return text[:begin] + chr(first) + inner + chr(first + 1) + text[begin + len(inner) :]

    def message(self, message: Message, index: int) -> Message:
        """A copy of the message with its texts marked."""
        self.owner = index
        marked = dict(message)
        for key, kind in (("reasoning_content", "the reasoning"), ("content", "the text")):
            if key in message:
                marked[key] = self.mark(message[key], kind)
        if "tool_calls" in message:
            marked["tool_calls"] = [self._call(call) for call in message["tool_calls"]]
        return marked

    def tools(self, tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        """A copy of the tools with names and descriptions marked: of the rest templates make what they like."""
        self.owner = -1
        if tools is None:
            return None
        return [{**tool, "function": self._described(tool["function"])} for tool in tools]

    def _described(self, function: dict[str, Any]) -> dict[str, Any]:
        marked = dict(function)
        for key in ("name", "description"):
            if isinstance(function.get(key), str):
                marked[key] = self.mark(function[key], f"the {key} of a tool")
        return marked

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        name = self.mark(function["name"], "a tool call's name")
        return {**call, "function": {**function, "name": name, "arguments": self._marked(function["arguments"])}}

    def _marked(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.mark(value, "a tool call's argument")
        if isinstance(value, dict):
            return {key: self._marked(item) for key, item in value.items()}
        return [self._marked(item) for item in value] if isinstance(value, list) else value


def spellings(leaf: Leaf) -> set[str]:
    """How a text may be written: as it is, and in a tool call as JSON, or as JSON within JSON."""
    if leaf.owner >= 0 and "tool call" not in leaf.kind:
        return {leaf.text}
    found = {leaf.text}
    for _ in range(2):
        found |= {json.dumps(text, ensure_ascii=False)[1:-1] for text in found}
    return found
