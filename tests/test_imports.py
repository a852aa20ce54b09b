"""The rooms of design.md, section 2, read from the real imports: a module imports only from rooms before its own."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "qlora_cli"
ROOMS = (
    *("errors", "recipe", "quant", "kernels", "model", "data", "tasks", "evaluate", "train", "plan", "merge", "export"),
    *(
        "evaluation",
        "merging",
        "exporting",
        "chat",
        "commands",
        "display",
        "display_arena",
        "display_chat",
        "display_evaluation",
        "display_export",
        "display_merge",
        "display_plan",
        "display_preview",
        "report",
        "cli",
        "__main__",
    ),
)
TERMINAL = {"typer", "rich", "click"}
HEAVY = {"torch", "transformers", "datasets", "accelerate", "bitsandbytes", "peft", "safetensors", "numpy"}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> list[tuple[str, ...]]:
    """Every imported module as its parts, those inside of functions too: `from qlora_cli import x` gives both parts."""
    found: list[tuple[str, ...]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [tuple(name.name.split(".")) for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import; write `from qlora_cli...`"
            module = tuple((node.module or "").split("."))
            found += [(*module, name.name) if module == ("qlora_cli",) else module for name in node.names]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_rooms_before_its_own(path: Path):
    room = room_of(path)
    assert room in ROOMS, f"{room} is no room of design.md, section 2: add it there and here"
    for parts in imported(path):
        if parts[0] == "qlora_cli" and len(parts) > 1 and parts[1] != "__version__":
            assert ROOMS.index(parts[1]) <= ROOMS.index(room), f"{room} imports {parts[1]}, which comes after it"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_command_line_and_the_display_know_the_terminal(path: Path):
    if room_of(path) != "cli" and not room_of(path).startswith("display"):
        assert not {parts[0] for parts in imported(path)} & TERMINAL


@pytest.mark.parametrize("room", ["errors", "recipe", "cli"])
def test_what_answers_at_once_loads_nothing_heavy(room: str):
    for path in [path for path in MODULES if room_of(path) == room]:
        assert not {parts[0] for parts in imported(path)} & HEAVY, path
