"""Tools and tool calls of a row, in the one form that chat templates read; arguments are objects, never JSON texts.

Sources of the forms that are read: OpenAI's chat and fine-tuning API (arguments as a JSON text, `function_call`),
transformers ("writing a chat template", tools as JSON schema), LLaMA-Factory (flat {name, arguments}).
"""

from __future__ import annotations

import json
from typing import Any

from qlora_cli.data.rows import Row, describe, text_of
from qlora_cli.errors import UserError

_CALL_KEYS = {"id", "type", "index"}  # index: a stream's leftover
_FUNCTION_KEYS = {"name", "arguments"}


def tools_of(row: Row, where: str) -> list[dict[str, Any]] | None:
    """The row's tools, each {"type": "function", "function": {name, description?, parameters?, ...}}; None without.

    They stand in `tools`, or in OpenAI's old `functions`, as a list or as the JSON text of one. A tool may be the
    bare function, or the JSON text of a tool. Raises UserError at the tool's number.
    """
    named = [column for column in ("tools", "functions") if row.get(column)]
    if not named:
        return None
    if len(named) > 1:
        raise UserError(where, "has both tools and functions", "keep one of them")
    tools = parsed(row[named[0]], named[0], where)
    if not isinstance(tools, list):
        raise UserError(
            where, f"{named[0]} is {describe(tools)}, not a list", "make it a list of JSON-schema functions"
        )
    return [_tool(tool, f"{where}: tool {number}") for number, tool in enumerate(tools, 1)] or None


def calls_of(value: Any, where: str) -> list[dict[str, Any]]:
    """Calls as {"type": "function", "id"?, "function": {"name", "arguments": object}}; `value` is one or a list.

    A call may be flat ({name, arguments}), and every level may be the JSON text of its value. No arguments are {}.
    """
    calls = parsed(value, "the tool call", where)
    calls = calls if isinstance(calls, list) else [calls]
    if not calls:
        raise UserError(where, "the list of tool calls is empty", "name a call, or remove the message")
    return [_call(call, f"{where}: tool call {number}") for number, call in enumerate(calls, 1)]


def parsed(value: Any, name: str, where: str) -> Any:
    """The JSON value that a text holds, or a value that is no text as it stands; all of it can be written as UTF-8."""
    try:
        if isinstance(value, str):
            value = json.loads(value)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except json.JSONDecodeError as error:
        what = f"{name} is no valid JSON: {error.msg} at character {error.pos + 1}"
        raise UserError(where, what, "mend the JSON text in the row") from error
    except UnicodeEncodeError as error:
        what = f"{name} holds half of a character (U+{ord(error.object[error.start]):04X}), which has no UTF-8 form"
        raise UserError(where, what, "mend the escape sequence in the row") from error
    except (TypeError, ValueError, RecursionError) as error:  # bytes, NaN, 5,000 digits, 1,000 brackets
        reason = "is nested too deeply" if isinstance(error, RecursionError) else f"has no JSON form: {error}"
        raise UserError(where, f"{name} {reason}", "mend or remove the row") from error
    return value


def _tool(tool: Any, where: str) -> dict[str, Any]:
    """One tool, its own keys kept, with `type` and `function` in front."""
    tool = parsed(tool, "the tool", where)
    if not isinstance(tool, dict):
        raise UserError(where, f"is {describe(tool)}, not an object", "write {type: function, function: {name: ...}}")
    if tool.get("type", "function") != "function":
        raise UserError(where, f"has the type {tool['type']!r}", "only tools of the type function can be rendered")
    if "function" not in tool:
        tool = {"function": {key: value for key, value in tool.items() if key != "type"}}
    function = parsed(tool["function"], "function", where)
    if not isinstance(function, dict) or not function.get("name"):
        raise UserError(where, "has no function with a name", "write {type: function, function: {name: ...}}")
    text_of(function, "name", where)
    parameters = function.get("parameters", {})
    if not isinstance(parameters, dict):
        raise UserError(where, f"parameters is {describe(parameters)}, not an object", "write them as a JSON schema")
    return {"type": "function", **tool, "function": function}


def _call(call: Any, where: str) -> dict[str, Any]:
    """One call. A key that would be lost is refused."""
    call = parsed(call, "the call", where)
    function = parsed(call.get("function", call), "function", where) if isinstance(call, dict) else call
    if not isinstance(function, dict):
        raise UserError(where, f"is {describe(function)}, not an object", "write {name: ..., arguments: {...}}")
    own, inner = ({key for key, value in item.items() if value is not None} for item in (call, function))
    unknown = own - _CALL_KEYS - (_FUNCTION_KEYS if function is call else {"function"})
    unknown |= set() if function is call else inner - _FUNCTION_KEYS
    if unknown:
        todo = "write {name: ..., arguments: {...}}"
        raise UserError(where, f"has the unknown key {' and '.join(sorted(map(repr, unknown)))}", todo)
    if call.get("type", "function") != "function":
        raise UserError(where, f"has the type {call['type']!r}", "only calls of the type function can be rendered")
    if not text_of(function, "name", where):
        raise UserError(where, "name is empty", "name the function")
    identity = {"id": text_of(call, "id", where)} if call.get("id") is not None else {}
    named = {"name": function["name"], "arguments": _arguments(function.get("arguments"), where)}
    return {"type": "function", **identity, "function": named}


def _arguments(value: Any, where: str) -> dict[str, Any]:
    """The arguments as an object; null, or none at all, is the empty one."""
    arguments = parsed({} if value is None else value, "arguments", where)
    if not isinstance(arguments, dict):
        raise UserError(where, f"arguments is {describe(arguments)}, not an object", "write arguments as an object")
    return arguments
