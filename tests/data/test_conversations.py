"""Conversations: messages and sharegpt, what is trained of them, and what is refused with the message's number."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from qlora_cli.data.conversations import (
    Conversation,
    Message,
    Plain,
    assistant,
    messages,
    prompted,
    sharegpt,
    system,
    user,
)
from qlora_cli.errors import UserError

HI = [user("hi"), assistant("hello")]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
FLAT = '{"name": "add", "arguments": {"a": 1}}'


def refusal(reader: Any, row: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        reader(row, "a:7")
    assert str(caught.value).startswith("a:7: ")
    return str(caught.value).removeprefix("a:7: ")


def one(turn: Message) -> Message:
    """The assistant's message that `turn` becomes."""
    return messages({"messages": [user("hi"), turn]}, "").messages[1]


# ── types ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_conversation_without_flags_trains_every_answer() -> None:
    content = Conversation([system("x"), *HI, *HI])
    assert content.trained == (False, False, True, False, True)
    assert content.answers == (2, 4)
    assert content == Conversation([system("x"), *HI, *HI], (False, False, True, False, True))


def test_flags_fit_the_messages() -> None:
    with pytest.raises(AssertionError, match="one flag per message"):
        Conversation(HI, (True,))
    with pytest.raises(AssertionError):
        Conversation(HI, (True, True))


def test_plain_text_knows_its_trained_characters() -> None:
    plain = Plain((("ab", False), ("c", True), ("", False), ("de", False), ("", True)))
    assert plain.pieces == (("ab", False), ("c", True), ("de", False), ("", True))
    assert plain.text == "abcde"
    assert plain.spans == ((2, 3), (5, 5))
    assert Plain.of("", "x") == Plain((("x", True),))


def test_preparing_processes_load_nothing_heavy() -> None:
    code = (
        "import sys, qlora_cli.data.formats; print({'torch', 'transformers', 'datasets', 'pydantic'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ── messages ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_messages_lose_the_keys_without_influence() -> None:
    told = {"role": "system", "content": "Be brief.", "id": 1, "model": "x", "timestamp": 3, "refusal": None}
    content = messages({"messages": [told, user("hi"), assistant("")], "tools": [], "id": 3}, "")
    assert content == Conversation([system("Be brief."), user("hi"), assistant("")])


def test_old_and_new_roles_have_one_name() -> None:
    turns = [{"role": "developer", "content": "a"}, user("b"), {"role": "function", "name": "f", "content": "c"}]
    content = messages({"messages": [*turns, assistant("d")]}, "")
    assert content.messages[:3] == [system("a"), user("b"), {"role": "tool", "content": "c", "name": "f"}]


def test_a_system_column_is_the_first_message() -> None:
    expected = Conversation([system("Be brief."), *HI])
    assert messages({"system": "Be brief.", "messages": HI}, "") == expected
    assert messages({"system": "Be brief.", "messages": expected.messages}, "") == expected
    assert "has a system column and another system message" in refusal(
        messages, {"system": "x", "messages": expected.messages}
    )
    assert "system is the number 3" in refusal(messages, {"system": 3, "messages": HI})


@pytest.mark.parametrize(
    "turn",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": [CALL], "content": None},
        {"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}], "content": ""},
        {"tool_calls": FLAT},
        {"function_call": {"name": "add", "arguments": '{"a": 1}'}},
        {"content": [{"type": "tool_call", "value": FLAT}]},
        {"content": [{"type": "tool_call", "value": {"name": "add", "arguments": {"a": 1}}}], "tool_calls": []},
    ],
)
def test_every_form_of_a_tool_call_is_read(turn: Message) -> None:
    assert one({"role": "assistant", **turn}) == {**assistant(""), "tool_calls": [CALL]}


def test_a_tools_answer_keeps_what_it_belongs_to() -> None:
    answer = {"role": "tool", "tool_call_id": "c1", "name": "add", "content": "3"}
    row = {"messages": [user("1 + 2"), one({"role": "assistant", "tool_calls": [CALL]}), answer, assistant("3")]}
    content = messages({**row, "tools": [{"name": "add"}]}, "")
    assert content.messages == [*row["messages"]]
    assert content.tools == [{"type": "function", "function": {"name": "add"}}]
    assert content.answers == (1, 3)


@pytest.mark.parametrize(
    "turn",
    [
        {"reasoning_content": "hm", "content": "ab"},
        {"thinking": "hm", "reasoning": "hm", "content": "ab"},
        {"thinking": "hm", "reasoning": "", "content": [{"type": "text", "text": "ab"}]},
        {"content": [{"type": "reasoning", "value": "hm"}, {"type": "text", "value": "ab"}]},
        {
            "content": [
                {"type": "thinking", "thinking": "hm"},
                {"type": "text", "text": "a"},
                {"type": "text", "text": "b"},
            ]
        },
    ],
)
def test_every_form_of_reasoning_is_read(turn: Message) -> None:
    assert one({"role": "assistant", **turn}) == {**assistant("ab"), "reasoning_content": "hm"}


@pytest.mark.parametrize("key", ["train", "training", "weight", "loss_weight"])
def test_a_message_says_whether_it_is_trained(key: str) -> None:
    no, yes = ({"weight": (0, 1), "loss_weight": (0.0, 1.0)}).get(key, (False, True))
    row = {"messages": [{**user("a"), key: no}, {**assistant("b"), key: no}, user("c"), {**assistant("d"), key: yes}]}
    assert messages(row, "").trained == (False, False, False, True)
    assert messages({"messages": [*row["messages"][:3], assistant("d")]}, "").answers == (3,)
    assert messages(row, "").messages[1] == assistant("b")


BAD_MESSAGES: dict[str, tuple[Any, str]] = {
    "no list": ("hi", "messages is a text. Make it a list of {role, content}"),
    "empty": ([], "messages is an empty list"),
    "missing": (None, "messages is null"),
    "no answer": ([user("hi")], "has no assistant's message, so nothing to train"),
    "ends with the user": ([*HI, user("c")], "ends with the user's message"),
    "nothing trained": ([user("a"), {**assistant("b"), "train": False}], "has nothing to train: every assistant's"),
    "turn that is no object": (["hi"], "message 1: is a text, not an object"),
    "no role": ([{"content": "hi"}], "message 1: has no role"),
    "unknown role": ([user("a"), {"role": "bot", "content": "b"}], "message 2: has the unknown role 'bot'"),
    "role that is no text": ([{"role": ["user"], "content": "b"}], "message 1: has the unknown role ['user']"),
    "no content": ([{"role": "user"}], "message 1: content is null, not a text"),
    "no content, empty calls": ([{"role": "assistant", "tool_calls": []}], "message 1: content is null, not a text"),
    "half of a character": ([user("\ud83d")], "message 1: content holds half of a character (U+D83D)"),
    "user with calls": ([{**user("a"), "tool_calls": [CALL]}], "message 1: the user's message has tool_calls"),
    "user with reasoning": ([{**user("a"), "thinking": "b"}], "message 1: the user's message has reasoning_content"),
    "user with an id of a call": (
        [{**user("a"), "tool_call_id": "b"}],
        "message 1: the user's message has tool_call_id",
    ),
    "name that is no text": ([{**user("a"), "name": 3}], "message 1: name is the number 3, not a text"),
    "bad call": ([{"role": "assistant", "tool_calls": [{}]}], "message 1: tool call 1: name is null"),
    "two forms of calls": (
        [{"role": "assistant", "tool_calls": [CALL], "function_call": {"name": "f"}}],
        "message 1: has function_call and other tool calls",
    ),
    "two reasonings": (
        [{**assistant("a"), "thinking": "b", "reasoning": "c"}],
        "message 1: has two different texts in",
    ),
    "reasoning that is no text": (
        [{**assistant("a"), "reasoning": ["c"]}],
        "message 1: reasoning is a list, not a text",
    ),
    "images": ([{**user("a"), "images": ["x.png"]}], "message 1: has images: images and sound are not goals"),
    "prefix": ([user("a"), {**assistant("b"), "prefix": True}], "message 2: has 'prefix', which is not available"),
    "train_detail": (
        [{**assistant("b"), "train_detail": [{}]}],
        "message 1: has 'train_detail', which is not available",
    ),
    "fraction": (
        [user("a"), {**assistant("b"), "weight": 0.5}],
        "message 2: weight is the number 0.5; fractional weights",
    ),
    "flag that is a text": ([{**assistant("b"), "train": "yes"}], "message 1: train is a text; fractional weights are"),
    "flags at odds": ([{**assistant("b"), "train": True, "weight": 0}], "message 1: train and weight contradict each"),
    "trained user": ([{**user("a"), "train": True}], "message 1: train marks the user's message as trained. Only an"),
}


@pytest.mark.parametrize("case", BAD_MESSAGES)
def test_messages_that_cannot_be_trained_are_refused_with_their_number(case: str) -> None:
    turns, what = BAD_MESSAGES[case]
    assert refusal(messages, {"messages": turns}).startswith(what)


BAD_PARTS: dict[str, tuple[list[Any], str]] = {
    "none": ([], "content is a list without a text"),
    "reasoning alone": ([{"type": "reasoning", "value": "hm"}], "content is a list without a text"),
    "no object": (["hi"], "part 1: is a text, not an object"),
    "no type": ([{"text": "a"}], "part 1: has the unknown type None"),
    "unknown type": ([{"type": "text", "text": "a"}, {"type": "refusal"}], "part 2: has the unknown type 'refusal'"),
    "image": ([{"type": "image_url", "image_url": {}}], "part 1: has the type 'image_url': images and sound are not"),
    "sound": ([{"type": "input_audio"}], "part 1: has the type 'input_audio': images and sound are not goals"),
    "no text": ([{"type": "text"}], "part 1: text is null, not a text"),
    "no text but a number": ([{"type": "text", "value": 3}], "part 1: value is the number 3, not a text"),
    "flag": ([{"type": "text", "text": "a", "train": False}], "part 1: has the key 'train', which a part cannot have"),
    "bad call": ([{"type": "tool_call", "value": "add"}], "the tool call is no valid JSON"),
    "order": ([{"type": "tool_call", "value": FLAT}, {"type": "text", "text": "a"}], "has parts in another order than"),
}


@pytest.mark.parametrize("case", BAD_PARTS)
def test_parts_that_cannot_be_written_are_refused_with_their_number(case: str) -> None:
    parts, what = BAD_PARTS[case]
    row = {"messages": [user("hi"), {"role": "assistant", "content": parts}]}
    assert refusal(messages, row).startswith(f"message 2: {what}")


@pytest.mark.parametrize("reader", [messages, sharegpt, prompted])
def test_columns_that_would_change_the_text_are_refused(reader: Any) -> None:
    row = {"messages": HI, "conversations": HI, "prompt": HI[:1], "completion": HI[1:]}
    assert "has images: images and sound are not goals" in refusal(reader, {**row, "images": ["x.png"]})
    assert "has 'chat_template_kwargs', which is not available" in refusal(
        reader, {**row, "chat_template_kwargs": {"enable_thinking": False}}
    )
    assert "tool 1: is the number 3" in refusal(reader, {**row, "tools": [3]})
    assert reader({**row, "images": [], "documents": None}, "") == Conversation(HI)


# ── prompt and completion ────────────────────────────────────────────────────────────────────────────────────────────


def test_of_a_prompt_no_answer_is_trained() -> None:
    row = {"prompt": [system("x"), *HI, user("c")], "completion": [assistant("d")], "system": "x"}
    assert prompted(row, "") == Conversation([system("x"), *HI, user("c"), assistant("d")], (*(False,) * 4, True))
    marked = {**row, "prompt": [user("a"), {**assistant("b"), "train": True}]}
    assert refusal(prompted, marked).startswith("message 2: is marked as trained, but stands in the prompt")
    inserted = prompted({**row, "prompt": HI[:1]}, "")
    assert inserted == Conversation([system("x"), user("hi"), assistant("d")])


def test_a_prompt_and_a_completion_are_lists_both() -> None:
    assert "completion is a text. Make it a list" in refusal(prompted, {"prompt": HI[:1], "completion": "x"})
    assert "prompt is a text. Make it a list" in refusal(prompted, {"prompt": "x", "completion": HI[1:]})


# ── sharegpt ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_sharegpt_has_speakers_for_the_roles() -> None:
    turns = [("system", "a"), ("human", "b"), ("function_call", FLAT), ("observation", "c"), ("gpt", "d")]
    row = {"conversations": [{"from": speaker, "value": value, "markdown": None} for speaker, value in turns]}
    called = {**assistant(""), "tool_calls": [CALL]}
    tool = {"role": "tool", "content": "c"}
    assert sharegpt(row, "") == Conversation([system("a"), user("b"), called, tool, assistant("d")])


def test_sharegpt_calls_several_functions_at_once() -> None:
    turns = [{"from": "user", "value": "b"}, {"from": "tool_call", "value": f"[{FLAT}, {FLAT}]", "weight": 1}]
    assert sharegpt({"conversations": turns}, "").messages[1]["tool_calls"] == [CALL, CALL]


def test_sharegpt_reads_turns_with_role_and_content_too() -> None:
    assert sharegpt({"conversations": HI, "system": "x"}, "") == Conversation([system("x"), *HI])
    mixed = [{"role": "human", "value": "hi"}, {"from": "chatgpt", "content": "hello", "train": True}]
    assert sharegpt({"conversations": mixed}, "") == Conversation(HI)


BAD_TURNS: dict[str, tuple[Any, str]] = {
    "no list": ("hi", "conversations is a text. Make it a list of {from, value}"),
    "empty": ([], "conversations is an empty list"),
    "no object": (["hi"], "message 1: is a text, not an object"),
    "no speaker": ([{"value": "hi"}], "message 1: has no from"),
    "unknown speaker": ([{"from": "me", "value": "hi"}], "message 1: has the unknown speaker 'me'. Use one of system"),
    "value is no text": ([{"from": "human", "value": 3}], "message 1: value is the number 3, not a text"),
    "no value": ([{"from": "human"}], "message 1: content is null, not a text"),
    "call without JSON": ([{"from": "function_call", "value": "f()"}], "message 1: the tool call is no valid JSON"),
    "call without value": ([{"from": "function_call"}], "message 1: a function call needs its JSON in value"),
    "call twice": (
        [{"from": "function_call", "value": FLAT, "tool_calls": [CALL]}],
        "message 1: a function call needs its JSON in value, and there alone",
    ),
    "ends with the tool": (
        [{"from": "gpt", "value": "a"}, {"from": "observation", "value": "b"}],
        "ends with the tool's message",
    ),
    "weight": ([{"from": "gpt", "value": "a", "weight": 2}], "message 1: weight is the number 2; fractional weights"),
}


@pytest.mark.parametrize("case", BAD_TURNS)
def test_turns_of_sharegpt_that_cannot_be_trained_are_refused_with_their_number(case: str) -> None:
    turns, what = BAD_TURNS[case]
    assert refusal(sharegpt, {"conversations": turns}).startswith(what)
