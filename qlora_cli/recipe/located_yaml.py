"""YAML 1.2 with the place of every key and value: any bytes give plain values or one UserError.

PyYAML scans and composes, but resolves scalars as YAML 1.1 does: `2e-4` is text there, `no` is false, `12:30:45` is
45045 and the last of two equal keys wins. Here the core schema of YAML 1.2 decides (yaml.org/spec/1.2.2, section 10.3),
and whatever a recipe cannot mean is refused where it stands.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from yaml.composer import Composer
from yaml.error import Mark, MarkedYAMLError, YAMLError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from qlora_cli.errors import UserError
from qlora_cli.recipe.yaml_words import in_plain_words

MAX_BYTES = 256 * 1024
MAX_DEPTH = 50
MAX_NODES = 20_000  # with every alias written out: nine lines of aliases can ask for 10^9

KeyPath = tuple[str | int, ...]

CORE = "tag:yaml.org,2002:"
SCALARS = {
    CORE + "null": re.compile(r"(?:~|null|Null|NULL|)\Z"),
    CORE + "bool": re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"),
    CORE + "int": re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z"),
    CORE + "float": re.compile(
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
    ),
}


class Place(NamedTuple):
    """Where something was written. Sorts by position: the file first, then each override in its order."""

    order: int
    line: int
    column: int
    source: str

    def __str__(self) -> str:
        return self.source if self.order else f"{self.source}:{self.line}:{self.column}"


@dataclass(frozen=True)
class Located:
    """Plain values, with the place of each key and of each value by its path from the root."""

    source: str
    order: int = 0
    keys: dict[KeyPath, Place] = field(default_factory=dict)
    values: dict[KeyPath, Place] = field(default_factory=dict)

    def place(self, node: Node) -> Place:
        return self.at(node.start_mark)

    def at(self, mark: Mark) -> Place:
        return Place(self.order, mark.line + 1, mark.column + 1, self.source)


def read_yaml(path: Path) -> tuple[dict[str, Any], Located]:
    """The mapping in a UTF-8 file and the places in it. Raises UserError for everything else that a path can hold."""
    value, located = parse_yaml(_decode(_read(path), str(path)), Located(str(path)))
    if value is None:
        raise UserError(f"{path}:1:1", "the recipe is empty", "Write a starter with `qlora init PATH`")
    if not isinstance(value, dict):
        place = located.values[()]
        raise UserError(place, f"a recipe is a mapping, this is {show(value)}", "Begin with `model:` and its keys")
    return value, located


def parse_yaml(text: str, located: Located) -> tuple[Any, Located]:
    """The one document in `text` as plain values; fills `located` with the places. Raises UserError."""
    core: _CoreComposer | None = None
    try:
        core = _CoreComposer(text, located)
        node = core.get_single_node()
    except ReaderError as error:
        before = text[: error.position]
        place = Place(located.order, before.count("\n") + 1, len(before) - before.rfind("\n"), located.source)
        todo = "Delete it: a recipe is printable text"
        raise UserError(place, f"the character U+{ord(text[error.position]):04X}", todo) from None
    except MarkedYAMLError as error:
        mark = _mark(error)
        what, todo = in_plain_words(error.problem or "", _line(text, mark.line))
        raise UserError(located.at(mark), what, todo) from None
    except (YAMLError, ValueError, OverflowError):  # an escape such as \UFFFFFFFF or a 5000-digit %YAML version
        mark = core.get_mark() if core else Mark(located.source, 0, 0, 0, None, 0)
        what, todo = in_plain_words("an escape or directive that no text can hold", _line(text, mark.line))
        raise UserError(located.at(mark), what, todo) from None
    if node is None:
        located.values[()] = Place(located.order, 1, 1, located.source)
        return None, located
    return _build(node, (), located), located


def show(value: Any) -> str:
    """A value as a message quotes it: strings in quotes, the rest as YAML writes it, at most 60 characters."""
    if isinstance(value, str):
        text = repr(value)
    elif isinstance(value, bool):
        text = str(value).lower()
    elif value is None:
        text = "null"
    elif isinstance(value, dict):
        text = "{" + ", ".join(f"{key}: {show(entry)}" for key, entry in list(value.items())[:8]) + "}"
    elif isinstance(value, list):
        text = "[" + ", ".join(show(entry) for entry in value[:8]) + "]"
    else:
        text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


class _CoreComposer(Reader, Scanner, Parser, Composer, BaseResolver):
    """PyYAML's composer with the core schema's scalars and an end to nesting, which would exhaust the stack."""

    def __init__(self, text: str, located: Located):
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        BaseResolver.__init__(self)
        self.located, self.depth, self.num_nodes = located, 0, 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        self.depth += 1
        self.num_nodes += 1
        place = self.located.at(self.peek_event().start_mark)
        if self.num_nodes > MAX_NODES:
            raise _too_many(place)
        if self.depth > MAX_DEPTH:
            raise UserError(place, f"nested deeper than {MAX_DEPTH} levels", "Close the brackets: a recipe needs five")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


for _tag, _pattern in SCALARS.items():
    _CoreComposer.add_implicit_resolver(_tag, _pattern, None)


def _build(node: Node, path: KeyPath, located: Located) -> Any:
    """The plain value of a node; notes its place and those below it."""
    place = located.place(node)
    if len(located.values) >= MAX_NODES or len(path) > MAX_DEPTH:
        raise _too_many(place)
    located.values[path] = place
    if isinstance(node, ScalarNode):
        return _scalar(node, place)
    kind = "map" if isinstance(node, MappingNode) else "seq"
    if node.tag != CORE + kind:
        raise _unknown_tag(node.tag, place)
    if isinstance(node, SequenceNode):
        return [_build(entry, (*path, index), located) for index, entry in enumerate(node.value)]
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = _key(key_node, located.place(key_node))
        if key in mapping:
            first = located.keys[(*path, key)]
            what = f"the key `{key}` appears twice, first at line {first.line}, column {first.column}"
            raise UserError(located.place(key_node), what, "Delete one of the two")
        located.keys[(*path, key)] = located.place(key_node)
        mapping[key] = _build(value_node, (*path, key), located)
    return mapping


def _key(node: Node, place: Place) -> str:
    """The text of a mapping's key. Raises UserError where it is no text, or YAML 1.1's merge key."""
    if not isinstance(node, ScalarNode):
        raise UserError(place, "a key that is itself a list or a mapping", "Write `key: value` with text as the key")
    key = _scalar(node, place)
    if not isinstance(key, str):
        raise UserError(place, f"the key {show(key)} is not text", f'Put it in quotes: "{node.value}"')
    if key == "<<" and node.style is None:
        raise UserError(place, "the merge key `<<`, which YAML 1.2 does not have", "Write the merged keys out")
    return key


def _scalar(node: ScalarNode, place: Place) -> Any:
    """A scalar by the core schema. Raises UserError for a tag, number or character that a recipe cannot mean."""
    text, tag = node.value, node.tag
    if tag == CORE + "str":
        bad = re.search("[\0\ud800-\udfff]", text)
        if bad:
            what = f"the character U+{ord(bad[0]):04X} in {show(text)}"
            raise UserError(place, what, "Delete it: no text can hold it")
        return text
    if tag not in SCALARS:
        raise _unknown_tag(tag, place)
    if not SCALARS[tag].match(text):
        raise UserError(place, f"{show(text)} is no !!{tag.removeprefix(CORE)}", "Delete the tag or mend the value")
    if tag == CORE + "null":
        return None
    if tag == CORE + "bool":
        return text.lower() == "true"
    return _integer(text, place) if tag == CORE + "int" else _finite(text, place)


def _integer(text: str, place: Place) -> int:
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    # int() refuses more than 4300 digits with a ValueError; nothing in a recipe needs more than 64 bits
    number = int(text.removeprefix("0o"), base) if len(text) <= 30 else 1 << 64
    if abs(number) >= 1 << 63:
        raise UserError(place, f"the number {_shortened(text)} does not fit in 64 bits", "Write a smaller number")
    return number


def _finite(text: str, place: Place) -> float:
    number = math.inf if text.lower().endswith(("inf", "nan")) else float(text)
    if not math.isfinite(number):
        raise UserError(place, f"{_shortened(text)} is not a finite number", "Write a number, or leave the key out")
    return number


def _mark(error: MarkedYAMLError) -> Mark:
    """Where a problem begins: for a quote or bracket left open that is its own place, not the end of the file."""
    unclosed = "end of stream" in (error.problem or "") or "<stream end>" in (error.problem or "")
    mark = error.context_mark if unclosed and error.context_mark else error.problem_mark
    assert mark is not None, error
    return mark


def _too_many(place: Place) -> UserError:
    what = f"more than {MAX_NODES} values or {MAX_DEPTH} levels once aliases are written out"
    return UserError(place, what, "Use fewer: an alias that repeats others, or itself, grows without end")


def _unknown_tag(tag: str, place: Place) -> UserError:
    seen = tag.replace(CORE, "!!")
    return UserError(place, f"the tag `{_shortened(seen)}`", "Delete it: a recipe holds plain values only")


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:20]}... of {len(text)} characters"


def _line(text: str, number: int) -> str:
    lines = text.splitlines()
    return lines[number].strip() if number < len(lines) else ""


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise UserError(path, "no such file", "Check the path, or write a starter with `qlora init PATH`") from None
    except IsADirectoryError:
        raise UserError(path, "this is a folder", "Name the recipe file in it") from None
    except OSError as error:
        raise UserError(path, f"cannot be read: {error.strerror}", "Make it a file that you may read") from None
    if len(data) > MAX_BYTES:
        raise UserError(path, f"larger than {MAX_BYTES // 1024} KiB", "Name a recipe, not a data or weight file")
    return data


def _decode(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        column = len(before[before.rfind(b"\n") + 1 :].decode("utf-8", "replace")) + 1
        place = Place(0, before.count(b"\n") + 1, column, source)
        what = f"the byte 0x{data[error.start]:02X} is not UTF-8"
        raise UserError(place, what, "Save the recipe as UTF-8 text") from None
