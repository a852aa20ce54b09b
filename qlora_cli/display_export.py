"""What a person sees of an export: where it is, what to know of it, and what to run next."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from qlora_cli.data.rows import count
from qlora_cli.data.view import visible


def print_export(result: dict[str, Any]) -> None:
    """A line for the place, one for each note, and the commands, which can be copied."""
    size = f"{count(len(result['files']), 'file')}, {sum(result['files'].values()):,} bytes"
    lines = [f"{result['out']}  ({result['to']}: {size})"]
    lines += [f"note      {note}" for note in result["notes"]]
    lines += [f"next      {command}" for command in result["commands"]]
    if "push" in result:
        lines.append(f"pushed    {result['push']['address']}")
    Console(highlight=False).print(Text(visible("\n".join(lines))), soft_wrap=True)
