"""One process, warmed once, runs most tests: importing torch and transformers costs more than any of them."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
CACHE = tempfile.TemporaryDirectory(prefix="qlora-tests-")  # what a test prepares, no run of the user finds
os.environ["QLORA_CACHE"] = CACHE.name

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real models and data beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"real models and data are not there ({SHARED})")
    return SHARED


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in float32 with a byte-level tokenizer."""
    from tests.tiny import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a small random model by its name in tests/architectures.py, made once."""
    from tests.architectures import write_architecture

    root = tmp_path_factory.mktemp("architectures")
    return cache(lambda name: write_architecture(root / name, name))


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve conversations of unequal length, and four others beside them in heldout.jsonl."""
    folder = tmp_path_factory.mktemp("rows")
    rows = [conversation(f"say {'na ' * index}{index}", f"{index}{' batman' * (index % 5)}") for index in range(16)]
    for name, part in (("rows.jsonl", rows[:12]), ("heldout.jsonl", rows[12:])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder / "rows.jsonl"


@pytest.fixture(scope="session")
def heldout_file(rows_file: Path) -> Path:
    """Four conversations that are not among the twelve."""
    return rows_file.with_name("heldout.jsonl")


def conversation(question: str, answer: str) -> dict[str, Any]:
    """A row in the format `messages`."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def make_recipe(tiny_model: Path, rows_file: Path, tmp_path: Path) -> Callable[..., Any]:
    """Builds a checked recipe on the tiny model; keyword arguments are sections, merged over the test's defaults."""
    from qlora_cli.recipe import Recipe

    def build(**sections: Any) -> Any:
        values: dict[str, Any] = {
            "model": {"name_or_path": str(tiny_model)},
            "quantization": {"compute_dtype": "float32"},
            "adapter": {"r": 4, "alpha": 8},
            "data": {"train": [{"path": str(rows_file)}], "max_length": 256},
            "training": {
                "max_steps": 6,
                "micro_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "optimizer": "adamw",
                "learning_rate": 1e-2,
                "logging_steps": 1,
                "seed": 7,
            },
            "output_dir": str(tmp_path / "run"),
        }
        for name, section in sections.items():
            values[name] = {**values[name], **section} if isinstance(values.get(name), dict) else section
        return Recipe.model_validate(values)

    return build


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def qlora(monkeypatch, capfd) -> Callable[..., Ended]:
    """Runs the command line in this warm process: the same entry point, the same streams, no second import of torch."""
    from qlora_cli.cli import main

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["qlora", *map(str, arguments)])
        capfd.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return Ended(code, *capfd.readouterr())

    return run
