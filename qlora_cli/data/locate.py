"""Where each text of a row stands in its rendering: found by marks around it, or noticed to be missing there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qlora_cli.data.chat import Chat
from qlora_cli.data.conversations import Conversation, Message
from qlora_cli.data.marks import FIRST_MARK, MARKS, REPEATABLE, Leaf, Marker, Span, spellings, variants
from qlora_cli.errors import UserError


@dataclass(slots=True)
class Proof:
    """What is known of one rendering: its text, and each leaf's place."""

    messages: list[Message]
    where: str
    text: str = ""
    leaves: list[Leaf] = field(default_factory=list)

    def of(self, message: int) -> list[Span]:
        """Where the texts of a message stand."""
        return [leaf.at for leaf in self.leaves if leaf.owner == message and leaf.at]


def locate(proof: Proof, content: Conversation, wanted: Sequence[int], chat: Chat) -> None:
    """Finds every leaf in the rendering. Raises UserError where one is lost, doubled, moved or rewritten."""
    marker = Marker(proof.where)
    tools = marker.tools(content.tools)
    messages = [marker.message(message, index) for index, message in enumerate(content.messages)]
    marked = chat.render(messages, proof.where, tools)
    if MARKS.sub("", marked) != proof.text:
        raise chat.refused("rewrites the texts of the row", proof.where)
    places: dict[int, list[int]] = {}
    for before, match in enumerate(MARKS.finditer(marked)):
        places.setdefault(ord(match[0]) - FIRST_MARK, []).append(match.start() - before)
    behind = 0  # the end of what was found of the messages before
    for number, leaf in enumerate(marker.leaves):
        begins, ends = places.get(2 * number, []), places.get(2 * number + 1, [])
        if not begins or not ends:
            _refuse_lost(leaf, proof, wanted, chat)
            proof.leaves.append(leaf)
            continue
        if leaf.kind not in REPEATABLE and (len(begins) > 1 or len(ends) > 1):
            raise chat.refused(f"repeats {described(leaf, proof)}", proof.where)
        found = replace(leaf, at=(begins[0], ends[0]))
        if proof.text[begins[0] : ends[0]] not in spellings(leaf):
            raise chat.refused(f"rewrites {described(leaf, proof)}", proof.where)
        proof.leaves.append(found)
    for index in range(len(content.messages)):
        spans = proof.of(index)
        if any(begin < behind for begin, _ in spans):
            raise chat.refused(f"moves {name_of(content.messages[index], index + 1)}", proof.where)
        behind = max([behind, *(end for _, end in spans)])
    _check_calls(proof, content, chat)
    _check_tools(proof, content, chat)


def _refuse_lost(leaf: Leaf, proof: Proof, wanted: Sequence[int], chat: Chat) -> None:
    """Raises UserError for a text that the template drops, unless it is the reasoning of an answer not trained here.

    The model does not see that one either when it is used.
    """
    if leaf.kind == "the reasoning" and leaf.owner not in wanted and chat.settings.train_on != "all":
        return
    raise chat.refused(f"drops {described(leaf, proof)}", proof.where)


def _check_calls(proof: Proof, content: Conversation, chat: Chat) -> None:
    """Refuses a template that drops a key of a tool call's arguments, or a value without a text (a number, ...).

    Marks cannot show these; with another key, or without the value, the rendering must change.
    """
    for index, message in enumerate(content.messages):
        for number, call in enumerate(message.get("tool_calls", ())):
            for arguments in variants(call["function"]["arguments"]):
                calls = list(message["tool_calls"])
                calls[number] = {**call, "function": {**call["function"], "arguments": arguments}}
                others = [*content.messages]
                others[index] = {**message, "tool_calls": calls}
                if _renders_alike(proof, others, content.tools, chat):
                    raise chat.refused(f"drops a tool call's arguments of {name_of(message, index + 1)}", proof.where)


def _check_tools(proof: Proof, content: Conversation, chat: Chat) -> None:
    """Refuses a template that drops the parameters of a tool: without them the rendering must change."""
    for number, tool in enumerate(content.tools or ()):
        if tool["function"].get("parameters"):
            tools = [*(content.tools or ())]
            tools[number] = {**tool, "function": {**tool["function"], "parameters": {}}}
            if _renders_alike(proof, content.messages, tools, chat):
                raise chat.refused(f"drops the parameters of a tool ({tool['function']['name']!r})", proof.where)


def _renders_alike(proof: Proof, messages: list[Message], tools: list[dict[str, Any]] | None, chat: Chat) -> bool:
    """Whether other messages or tools are rendered as the row itself; where they cannot be, they are read."""
    try:
        return chat.render(messages, proof.where, tools) == proof.text
    except UserError as error:
        if isinstance(error.__cause__, MemoryError):
            raise
        return False


def described(leaf: Leaf, proof: Proof) -> str:
    """A leaf in words: 'the reasoning of message 2 (assistant)'."""
    if leaf.owner < 0:
        return f"{leaf.kind} ({leaf.text[:40]!r})"
    return f"{leaf.kind} of {name_of(proof.messages[leaf.owner], leaf.owner + 1)}"


def name_of(message: Message, number: int) -> str:
    """A message in words: 'message 2 (assistant)'."""
    return f"message {number} ({message['role']})"
