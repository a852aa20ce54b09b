"""Turns as a template of Go's text/template, as Ollama reads it (ollama/template/template.go).

Ollama gives a template .Messages, in which neighbours of one role have become one with a blank line between, and
joins what it gives back to the model's answer. Where the last message is the assistant's, the model goes on with it.
"""

from __future__ import annotations

import unicodedata

from qlora_cli.export.turns import END, ROLES, START, Between, Turns

VERBATIM = "{{ .Prompt }}"
"""The template of a model without one."""

REFUSED = "the chat template of this model has no place for this message"
BEYOND = 99999


def go_template(turns: Turns) -> str:
    """The template's text. A system text that the turns do not know ends in an error that says so.

    An assistant's text that they do not know is left out: Ollama cuts long conversations anywhere.
    """
    cases = "".join(f'{{{{ {"else " * (at > 0)}if eq .Role "{role}" }}}}{_case(turns.between, role)}'
                    for at, role in enumerate(ROLES))  # fmt: skip
    turn = f"{cases}{{{{ else }}}}{_stop()}{{{{ end }}}}"
    body = f"{{{{ range $i, $_ := .Messages }}}}{turn}{{{{ end }}}}"
    ends = [(before, text) for (before, role), text in turns.between.items() if role == END]
    last = [(before, literal(text)) for before, text in ends]
    last += [] if ("system", END) in turns.between else [("system", _stop())]
    return f'{{{{ $before := "{START}" }}}}{body}{_choice(last, "")}'


def _case(between: Between, role: str) -> str:
    """What is written for a message of a role, and that it was the last one."""
    known = [(before, text) for (before, now), text in between.items() if now == role]
    told = f'{{{{ .Content }}}}{{{{ $before = "{role}" }}}}'
    if role != "assistant":
        pieces = [(before, literal(text) + told) for before, text in known]
        return _choice(pieces, _stop())
    pieces = []
    for before, text in known:
        prompt = between.get((before, END), text)
        last = "{{ if eq (len (slice $.Messages $i)) 1 }}"
        piece = (
            literal(text) if prompt == text else f"{last}{literal(prompt)}{{{{ else }}}}{literal(text)}{{{{ end }}}}"
        )
        pieces.append((before, piece + told))
    return _choice(pieces, "")


def _choice(pieces: list[tuple[str, str]], otherwise: str) -> str:
    """One of the pieces, which are template text, by who spoke before."""
    if not pieces:
        return otherwise
    cases = "".join(
        f'{{{{ {"else " * (at > 0)}if eq $before "{before}" }}}}{text}' for at, (before, text) in enumerate(pieces)
    )
    return f"{cases}{f'{{{{ else }}}}{otherwise}' if otherwise else ''}{{{{ end }}}}"


def _stop() -> str:
    """Ends the rendering with an error, whose text names this expression: Go's templates have no other way."""
    return f'{{{{ index "{REFUSED}" {BEYOND} }}}}'


def literal(text: str) -> str:
    """Template text that writes exactly `text`, in a Modelfile between triple quotes.

    As it is where it can be; else as a string of Go: a Modelfile drops what is not printable, and ends at three quotes.
    """
    plain = all(char in "\n\t" or _is_printable(char) for char in text)
    if plain and not any(mark in text for mark in ("{", "}", '"""')) and not text.endswith('"'):
        return text
    return f'{{{{ "{"".join(map(_escaped, text))}" }}}}'


def _is_printable(char: str) -> bool:
    """Whether Go's strconv.IsPrint holds: letters, marks, numbers, punctuation, symbols and the ASCII space."""
    return char == " " or unicodedata.category(char)[0] in "LMNPS"


def _escaped(char: str) -> str:
    if char in '"\\':
        return f"\\{char}"
    if _is_printable(char):
        return char
    return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}"
