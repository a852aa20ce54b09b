"""What a row becomes, a conversation or plain text, and the two formats of conversations: messages and sharegpt.

Of a message are read: role, content, tool_calls or function_call, tool_call_id, name, the reasoning and the flags that
say whether it is trained. What a template or a trainer elsewhere reads besides (_UNREAD, _MEDIA: images, `prefix`, ...)
is refused, because the text would be another one. Every other key (index, timestamp, model, ...) changes neither the
text nor the training and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_cli.data.rows import Row, describe, text_of
from qlora_cli.data.tool_calls import calls_of, tools_of
from qlora_cli.errors import UserError

Message = dict[str, Any]
"""One turn: role ("system", "user", "assistant" or "tool") and content (text), and where the row has them name,
tool_call_id, and of an assistant reasoning_content and tool_calls as tool_calls.calls_of gives them."""

_ROLES = {name: name for name in ("system", "user", "assistant", "tool")} | {"developer": "system", "function": "tool"}
_REASONING = ("reasoning_content", "thinking", "reasoning")
_FLAGS = ("train", "training", "weight", "loss_weight")  # axolotl (docs, tests), OpenAI, LLaMA-Factory v1
_PART_KINDS = ("reasoning", "thinking", "text", "tool_call")
_MEDIA = ("images", "image", "audios", "audio", "videos", "video")
_UNREAD = (  # keys of a message that templates read (Mistral, Cohere, gpt-oss, Gemma, Kimi), or that train a part of it
    *("prefix", "tool_plan", "citations", "tool_responses", "documents", "tools", "files", "refusal"),
    *("channel", "recipient", "train_detail", "training_detail"),
)
_UNREAD_COLUMNS = ("documents", "chat_template_kwargs")
_SPEAKERS = {  # sharegpt's `from`; the functions are LLaMA-Factory's
    **_ROLES,
    **dict.fromkeys(("human",), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "bot", "model"), "assistant"),
    **dict.fromkeys(("observation", "function_response", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
}


@dataclass(frozen=True, slots=True)
class Plain:
    """Text that is encoded verbatim, in pieces (text, trained). An empty piece is only kept where it is trained."""

    pieces: tuple[tuple[str, bool], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "pieces", tuple(piece for piece in self.pieces if piece[0] or piece[1]))

    @classmethod
    def of(cls, prompt: str, completion: str) -> Plain:
        """A prompt that is read and a completion that is trained."""
        return cls(((prompt, False), (completion, True)))

    @property
    def text(self) -> str:
        """All pieces, joined."""
        return "".join(text for text, _ in self.pieces)

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """First character and the one behind the last of every trained piece, in order."""
        found, at = [], 0
        for text, trained in self.pieces:
            if trained:
                found.append((at, at + len(text)))
            at += len(text)
        return tuple(found)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns for the chat template.

    trained: one per message, True only for an assistant's; given empty, every assistant's message is trained.
    tools:   JSON-schema functions as the templates of transformers take them, or None.
    plain:   its text where there is no template, or None where nobody has defined one.
    marked:  the index of the first assistant's message that is marked as not trained, or None.
    """

    messages: list[Message]
    trained: tuple[bool, ...] = ()
    tools: list[dict[str, Any]] | None = None
    plain: Plain | None = None
    marked: int | None = None

    def __post_init__(self) -> None:
        answers = tuple(message["role"] == "assistant" for message in self.messages)
        object.__setattr__(self, "trained", self.trained or answers)
        assert len(self.trained) == len(answers), "one flag per message"
        assert all(answer or not flag for answer, flag in zip(answers, self.trained, strict=True))

    @property
    def answers(self) -> tuple[int, ...]:
        """The indices of the trained messages, in order."""
        return tuple(index for index, flag in enumerate(self.trained) if flag)


def system(content: str) -> Message:
    """A system's turn."""
    return {"role": "system", "content": content}


def user(content: str) -> Message:
    """A turn of the user."""
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    """A turn of the assistant: what is trained."""
    return {"role": "assistant", "content": content}


def messages(row: Row, where: str) -> Conversation:
    """{messages: [{role, content, ...}], tools?, system?} of OpenAI and Hugging Face; the last turn is an answer.

    developer is read as system and function as tool. A text may be a list of parts: text, reasoning, tool_call
    (LLaMA-Factory v1). Raises UserError at the message's number.
    """
    return _conversation(row, _turns(row, "messages", where), where)


def sharegpt(row: Row, where: str) -> Conversation:
    """{conversations: [{from, value}], tools?, system?}; function_call holds JSON and is the assistant's.

    Its turns may be {role, content} too, as axolotl reads this column.
    """
    turns = _turns(row, "conversations", where)
    return _conversation(row, [_as_message(turn, f"{where}: message {n}") for n, turn in enumerate(turns, 1)], where)


def prompted(row: Row, where: str) -> Conversation:
    """{prompt, completion, tools?}, both lists of messages, of which the completion's answers are trained (TRL)."""
    prompt, completion = (_turns(row, column, where) for column in ("prompt", "completion"))
    return _conversation(row, [*prompt, *completion], where, len(prompt))


def _turns(row: Row, column: str, where: str) -> list[Any]:
    """The list of turns in a column."""
    turns = row.get(column)
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if turns == [] else describe(turns)
        example = "{from, value}" if column == "conversations" else "{role, content}"
        raise UserError(where, f"{column} is {found}", f"make it a list of {example}")
    return turns


def _conversation(row: Row, turns: Sequence[Any], where: str, num_prompt: int = 0) -> Conversation:
    """The turns, checked; of the first `num_prompt` none is trained."""
    _refuse_unread(row, _UNREAD_COLUMNS, where)
    read, trained, marked = [], [], None
    for number, turn in enumerate(turns, 1):
        place = f"{where}: message {number}"
        message = _message(turn, place)
        flag = _flag(turn, message["role"], place)
        if flag and number <= num_prompt:
            raise UserError(place, "is marked as trained, but stands in the prompt", "move it to the completion")
        read.append(message)
        trained.append(message["role"] == "assistant" and (number > num_prompt if flag is None else flag))
        if message["role"] == "assistant" and flag is False and marked is None:
            marked = number - 1
    if not any(message["role"] == "assistant" for message in read):
        raise UserError(where, "has no assistant's message, so nothing to train", "add the answer or remove the row")
    if read[-1]["role"] != "assistant":
        raise UserError(where, f"ends with the {read[-1]['role']}'s message", "end the row with the assistant's answer")
    if not any(trained):
        what = "has nothing to train: every assistant's message is marked as not trained"
        raise UserError(where, what, "remove the row, or mark an answer as trained")
    text = text_of(row, "system", where) if row.get("system") is not None else ""
    if text and read[0]["role"] == "system" and read[0]["content"] != text:
        raise UserError(where, "has a system column and another system message", "keep one of them")
    if text and read[0]["role"] != "system":
        read, trained = [system(text), *read], [False, *trained]
        marked = None if marked is None else marked + 1
    return Conversation(read, tuple(trained), tools_of(row, where), marked=marked)


def _as_message(turn: Any, where: str) -> Any:
    """A turn of sharegpt with the keys of a message; what is no object is left to be refused as one."""
    if not isinstance(turn, dict):
        return turn
    speaker = turn.get("from", turn.get("role"))
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        what = "has no from" if speaker is None else f"has the unknown speaker {speaker!r}"
        raise UserError(where, what, f"use one of {', '.join(_SPEAKERS)}")
    rest = {key: value for key, value in turn.items() if key not in ("from", "value", "role", "content")}
    value = turn.get("value", turn.get("content"))
    if _SPEAKERS[speaker] == "call":
        if not value or rest.get("tool_calls"):
            raise UserError(where, "a function call needs its JSON in value, and there alone", "mend the row")
        return {**rest, "role": "assistant", "tool_calls": value}
    return {**rest, "role": _SPEAKERS[speaker], "content": text_of(turn, "value", where) if "value" in turn else value}


def _message(turn: Any, where: str) -> Message:
    """One turn, checked, with the keys of Message alone."""
    if not isinstance(turn, dict):
        raise UserError(where, f"is {describe(turn)}, not an object", "write {role: ..., content: ...}")
    role = turn.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        what = "has no role" if role is None else f"has the unknown role {role!r}"
        raise UserError(where, what, f"use one of {', '.join(_ROLES)}")
    _refuse_unread(turn, _UNREAD, where)
    message = {"role": _ROLES[role], **_content(turn, where)}
    if message["role"] != "assistant":
        for key in ("reasoning_content", "tool_calls"):
            if key in message:
                raise UserError(where, f"the {message['role']}'s message has {key}", "only an assistant's may have it")
    for key in ("tool_call_id", "name"):
        if turn.get(key) not in (None, ""):
            message[key] = text_of(turn, key, where)
    if "tool_call_id" in message and message["role"] != "tool":
        raise UserError(where, f"the {message['role']}'s message has tool_call_id", "only a tool's may have it")
    return message


def _content(turn: Message, where: str) -> Message:
    """The message's content and, where it has them, reasoning_content and tool_calls, from wherever they stand."""
    content: Any = turn.get("content")
    parts = _parts(content, where) if isinstance(content, list) else []
    calls = [call for kind, value in parts if kind == "tool_call" for call in calls_of(value, where)]
    for key in ("tool_calls", "function_call"):
        if turn.get(key):
            if calls:
                raise UserError(where, f"has {key} and other tool calls", "keep one of them")
            calls = calls_of(turn[key], where)
    thoughts = {text_of(turn, key, where) for key in _REASONING if turn.get(key) is not None}
    thoughts.add("".join(value for kind, value in parts if kind == "reasoning"))
    thoughts.discard("")
    if len(thoughts) > 1:
        raise UserError(where, f"has two different texts in {', '.join(_REASONING)} or its parts", "keep one of them")
    texts = [value for kind, value in parts if kind == "text"]
    if isinstance(content, list) and not texts and not calls:
        raise UserError(where, "content is a list without a text", "write {type: text, text: ...}")
    if not isinstance(content, list):
        texts = [""] if content is None and calls else [text_of(turn, "content", where)]
    found: Message = {"content": "".join(texts)}
    if thoughts:
        found["reasoning_content"] = thoughts.pop()
    return found | ({"tool_calls": calls} if calls else {})


def _parts(parts: list[Any], where: str) -> list[tuple[str, Any]]:
    """The parts of a content as (kind, value): reasoning, then text, then tool_call, as every template writes them."""
    found: list[tuple[str, Any]] = []
    for number, part in enumerate(parts, 1):
        place = f"{where}: part {number}"
        if not isinstance(part, dict):
            raise UserError(place, f"is {describe(part)}, not an object", "write {type: text, text: ...}")
        kind = part.get("type")
        if isinstance(kind, str) and any(word in kind for word in ("image", "audio", "video")):
            raise UserError(place, f"has the type {kind!r}: images and sound are not goals", "remove the row")
        if kind not in _PART_KINDS:
            raise UserError(place, f"has the unknown type {kind!r}", f"use one of {', '.join(_PART_KINDS)}")
        if flags := [key for key in (*_FLAGS, *_UNREAD) if part.get(key) is not None]:
            raise UserError(
                place, f"has the key {flags[0]!r}, which a part cannot have", "set it for the whole message"
            )
        key = next((key for key in ("value", kind) if part.get(key) is not None), kind)
        value = part.get(key) if kind == "tool_call" else text_of(part, key, place)
        found.append(("reasoning" if kind == "thinking" else kind, value))
    if found != sorted(found, key=lambda part: ("reasoning", "text", "tool_call").index(part[0])):
        raise UserError(where, "has parts in another order than reasoning, text, tool_call", "split the message")
    return found


def _flag(turn: Row, role: str, where: str) -> bool | None:
    """Whether the message says that it is trained; None where it says nothing."""
    flags: dict[str, bool] = {}
    for key in _FLAGS:
        value = turn.get(key)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            what = f"{key} is {describe(value)}; fractional weights are not available"
            raise UserError(where, what, "make it 0 (not trained) or 1 (trained)")
        flags[key] = bool(value)
    if len({*flags.values()}) > 1:
        raise UserError(where, f"{' and '.join(flags)} contradict each other", "keep one of them")
    flag = next(iter(flags.values()), None)
    if flag and role != "assistant":
        what = f"{next(iter(flags))} marks the {role}'s message as trained"
        raise UserError(where, what, "only an assistant's message can be trained; set it to false or remove it")
    return flag


def _refuse_unread(holder: Row, unread: tuple[str, ...], where: str) -> None:
    """Raises UserError where a row or a message holds what would change its text elsewhere and is not read here."""
    for key in _MEDIA:
        if holder.get(key):
            raise UserError(where, f"has {key}: images and sound are not goals", "remove the row")
    for key in unread:
        if holder.get(key):
            raise UserError(where, f"has {key!r}, which is not available", f"remove {key} or the row")
