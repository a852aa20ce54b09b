"""So much of Go's text/template, and of Ollama's Modelfile, as the exported ones use; written from their documents."""

from __future__ import annotations

import ast
import re
from typing import Any

ACTION = re.compile(r'\{\{ ((?:"(?:\\.|[^"\\])*"|[^"])*?) \}\}')
STRING = re.compile(r'"(?:\\.|[^"\\])*"')


class Stopped(Exception):
    """The template ended in an error, as Go's `index` of what is not there does."""


def execute(template: str, messages: list[dict[str, str]]) -> str:
    """What Ollama makes of the messages: neighbours of one role are one, with a blank line between."""
    collated: list[dict[str, str]] = []
    for message in messages:
        if collated and collated[-1]["role"] == message["role"]:
            collated[-1]["content"] += "\n\n" + message["content"]
        else:
            collated.append(dict(message))
    out: list[str] = []
    nodes, rest = _parse(_tokens(template), ())
    assert rest == []
    _run(nodes, {"messages": collated}, out)
    return "".join(out)


def modelfile(text: str) -> dict[str, list[str]]:
    """The commands of a Modelfile with their values, unquoted."""
    found: dict[str, list[str]] = {}
    for name, value in re.findall(r'^([A-Z]+(?: [a-z_]+)?) ("""[\s\S]*?"""|[^\n]*)$', text, re.MULTILINE):
        for quote in ('"""', '"'):
            if value.startswith(quote):
                value = value.removeprefix(quote).removesuffix(quote)
                break
        found.setdefault(name, []).append(value)
    return found


def _tokens(template: str) -> list[tuple[str, str]]:
    found, at = [], 0
    for action in ACTION.finditer(template):
        found += [("text", template[at : action.start()]), ("action", action[1])]
        at = action.end()
    found.append(("text", template[at:]))
    assert not any("{{" in text or "}}" in text for kind, text in found if kind == "text")
    return [token for token in found if token != ("text", "")]


def _parse(tokens: list[tuple[str, str]], ends: tuple[str, ...]) -> tuple[list[Any], list[tuple[str, str]]]:
    """Nodes up to one of the ends, which stays in the rest."""
    nodes: list[Any] = []
    while tokens:
        kind, text = tokens[0]
        if kind == "action" and text.split()[0] in ends:
            return nodes, tokens
        tokens = tokens[1:]
        if kind == "action" and text.split()[0] in ("if", "range"):
            node, tokens = _block(text, tokens)
            nodes.append(node)
        else:
            nodes.append((kind, text))
    return nodes, tokens


def _block(text: str, tokens: list[tuple[str, str]]) -> tuple[Any, list[tuple[str, str]]]:
    inner, tokens = _parse(tokens, ("else", "end"))
    closing, tokens = tokens[0][1], tokens[1:]
    otherwise: list[Any] = []
    if closing.startswith("else if "):
        node, tokens = _block(closing.removeprefix("else "), tokens)
        otherwise = [node]
    elif closing == "else":
        otherwise, tokens = _parse(tokens, ("end",))
        tokens = tokens[1:]
    return (text.split()[0], text, inner, otherwise), tokens


def _run(nodes: list[Any], names: dict[str, Any], out: list[str]) -> None:
    for kind, text, *branches in nodes:
        if kind == "text":
            out.append(text)
        elif kind == "if":
            _run(branches[0] if _value(text.removeprefix("if "), names) else branches[1], names, out)
        elif kind == "range":
            assert text == "range $i, $_ := .Messages"
            for at, message in enumerate(names["messages"]):
                names["at"], names["message"] = at, message
                _run(branches[0], names, out)
        elif assigned := re.fullmatch(r"(\$\w+) :?= (.+)", text):
            names[assigned[1]] = _value(assigned[2], names)
        else:
            out.append(_value(text, names))


def _value(text: str, names: dict[str, Any]) -> Any:
    if STRING.fullmatch(text):
        return ast.literal_eval(text)
    if text.startswith("index "):
        raise Stopped(text)
    if text == "eq (len (slice $.Messages $i)) 1":
        return names["at"] == len(names["messages"]) - 1
    if text.startswith("eq "):
        _, one, other = text.split()
        return _value(one, names) == _value(other, names)
    if text.startswith("$"):
        return names[text]
    return names["message"][{".Role": "role", ".Content": "content"}[text]]
