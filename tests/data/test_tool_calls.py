"""Tools and tool calls: every form that is read comes out as one, and the rest is refused with its number."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qlora_cli.data.tool_calls import calls_of, parsed, tools_of
from qlora_cli.errors import UserError

FUNCTION = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
FLAT = {"name": "add", "arguments": {"a": 1}}


@pytest.mark.parametrize(
    "tools",
    [
        [TOOL],
        [FUNCTION],
        [{"type": "function", **FUNCTION}],
        [{"function": FUNCTION}],
        json.dumps([FUNCTION]),
        [json.dumps(TOOL)],
        [{"type": "function", "function": json.dumps(FUNCTION)}],
    ],
)
def test_tools_come_out_in_one_form(tools: Any) -> None:
    assert tools_of({"tools": tools}, "") == [TOOL]
    assert tools_of({"functions": tools}, "") == [TOOL]


def test_a_tool_keeps_its_own_keys() -> None:
    strict = {**FUNCTION, "strict": True}
    assert tools_of({"tools": [{"function": strict, "cache": 1}]}, "") == [
        {"type": "function", "function": strict, "cache": 1}
    ]


@pytest.mark.parametrize("tools", [None, [], "", "[]"])
def test_no_tools_are_none(tools: Any) -> None:
    assert tools_of({"tools": tools}, "") is None
    assert tools_of({}, "") is None


BAD_TOOLS: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "a:7: tools is no valid JSON: "),
    "object": (FUNCTION, "a:7: tools is an object, not a list"),
    "no object": ([3], "a:7: tool 1: is the number 3, not an object"),
    "other type": ([TOOL, {"type": "retrieval"}], "a:7: tool 2: has the type 'retrieval'"),
    "no name": ([{"type": "function", "function": {}}], "tool 1: has no function with a name"),
    "function is a list": ([{"function": []}], "tool 1: has no function with a name"),
    "name is a number": ([{"name": 3}], "tool 1: name is the number 3, not a text"),
    "parameters": ([{"name": "f", "parameters": []}], "tool 1: parameters is a list, not an object"),
}


@pytest.mark.parametrize("case", BAD_TOOLS)
def test_bad_tools_are_refused_with_their_number(case: str) -> None:
    tools, what = BAD_TOOLS[case]
    with pytest.raises(UserError) as caught:
        tools_of({"tools": tools}, "a:7")
    assert what in str(caught.value)


def test_tools_and_functions_at_once_are_refused() -> None:
    with pytest.raises(UserError, match="a:7: has both tools and functions"):
        tools_of({"tools": [TOOL], "functions": [FUNCTION]}, "a:7")


@pytest.mark.parametrize(
    "value",
    [
        CALL,
        FLAT,
        [FLAT],
        json.dumps(FLAT),
        json.dumps([CALL]),
        [json.dumps(FLAT)],
        {"name": "add", "arguments": '{"a": 1}'},
        {"type": "function", "index": 0, "id": None, "function": {"name": "add", "arguments": '{"a": 1}'}},
    ],
)
def test_calls_come_out_in_one_form(value: Any) -> None:
    assert calls_of(value, "") == [CALL]


def test_a_call_keeps_its_id_and_may_have_no_arguments() -> None:
    expected = {"type": "function", "id": "c1", "function": {"name": "now", "arguments": {}}}
    assert calls_of({"id": "c1", "type": "function", "function": {"name": "now"}}, "") == [expected]


BAD_CALLS: dict[str, tuple[Any, str]] = {
    "no JSON": ("add(1)", "a:7: the tool call is no valid JSON: Expecting value at character 1"),
    "no object": ([FLAT, 3], "a:7: tool call 2: is the number 3, not an object"),
    "function is a list": ({"function": []}, "tool call 1: is a list, not an object"),
    "empty": ("[]", "a:7: the list of tool calls is empty"),
    "unknown key": ({"name": "f", "parameters": {}, "x": 1}, "tool call 1: has the unknown key 'parameters' and 'x'"),
    "key beside the function": ({"function": FLAT, "name": "g"}, "has the unknown key 'name'"),
    "key in the function": ({"function": {**FLAT, "id": "1"}}, "has the unknown key 'id'"),
    "other type": ({**FLAT, "type": "custom"}, "has the type 'custom'"),
    "no name": ({"arguments": {}}, "name is null, not a text"),
    "empty name": ({"name": ""}, "name is empty"),
    "id is a number": ({**FLAT, "id": 3}, "id is the number 3, not a text"),
    "arguments no JSON": ({"name": "f", "arguments": "{'a': 1}"}, "tool call 1: arguments is no valid JSON"),
    "arguments are a list": ({"name": "f", "arguments": "[1]"}, "arguments is a list, not an object"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_are_refused_with_their_number(case: str) -> None:
    value, what = BAD_CALLS[case]
    with pytest.raises(UserError) as caught:
        calls_of(value, "a:7")
    assert what in str(caught.value)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ('{"a": "\\ud83d"}', "x holds half of a character (U+D83D)"),
        ({"a": ["\ud83d"]}, "x holds half of a character (U+D83D)"),
        ('{"a": NaN}', "x has no JSON form"),
        ({"a": b"1"}, "x has no JSON form"),
        ("1" * 5000, "x has no JSON form"),
        ("[" * 100_000, "x is nested too deeply"),
    ],
)
def test_what_cannot_be_written_is_refused(value: Any, what: str) -> None:
    with pytest.raises(UserError) as caught:
        parsed(value, "x", "a:7")
    assert str(caught.value).startswith(f"a:7: {what}")
