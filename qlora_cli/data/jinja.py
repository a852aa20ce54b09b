"""Jinja as transformers compiles chat templates (transformers 5.23, utils/chat_template_utils.py), with a fixed date.

It stands on its own so that the preparing processes need not import transformers. The sandbox keeps a template from
Python's internals; it does not keep it from endless loops or giant strings, so compile and render only where limits
hold (data/worker.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date, datetime, time
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

TEMPLATE_ERRORS = (
    *(jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError),
    *(MemoryError, AssertionError, NameError),
)
"""What somebody else's program can raise while it is compiled or rendered."""


def compile_template(text: str, today: date) -> jinja2.Template:
    """The compiled template; `strftime_now` writes `today`, at midnight. Raises one of TEMPLATE_ERRORS."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = datetime.combine(today, time()).strftime
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment.from_string(text)


def compile_row_template(text: str) -> Callable[..., str]:
    """A template of a data source over the columns of a row; a column that is not there, or is null, is an error."""
    environment = ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, finalize=_no_null
    )
    environment.filters["tojson"] = _row_tojson
    return environment.from_string(text).render


def _no_null(value: Any) -> Any:
    """The value of an expression. Raises TemplateError for a null, which Jinja would write as "None"."""
    if value is None:
        raise jinja2.TemplateError("a value is null; write {{ column or '' }} where it may be")
    return value


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` marks an answer for transformers; what is inside is written."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own interface)

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

    def _write(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict(...)` for templates, without the type's own attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace, refusing names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace may not hold the name {name!r}")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _row_tojson(value: Any, **options: Any) -> str:
    if isinstance(value, jinja2.Undefined):
        str(value)  # names the column that is not there
    return _tojson(value, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
