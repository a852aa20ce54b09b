"""A finished run to talk to, and what the tests of a conversation share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from qlora_cli.chat.dialogue import Dialogue
from qlora_cli.chat.session import opened
from qlora_cli.chat.wanted import Sampling, Voices
from qlora_cli.recipe import load_recipe


class Silent:
    """A report that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: None


def values_of(tiny_model: Path, rows_file: Path, run: Path) -> dict[str, Any]:
    return {
        "model": {"name_or_path": str(tiny_model)},
        "quantization": {"compute_dtype": "float32"},
        "adapter": {"r": 8, "alpha": 16},
        "data": {"train": [{"path": str(rows_file)}], "max_length": 256},
        "training": {"max_steps": 4, "micro_batch_size": 4, "gradient_accumulation_steps": 1, "learning_rate": 1e-2,
                     "optimizer": "adamw"},
        "evaluation": {"max_new_tokens": 8},
        "output_dir": str(run),
    }  # fmt: skip


@pytest.fixture(scope="session")
def run(tmp_path_factory, tiny_model, rows_file) -> Path:
    """A finished run of four steps with its merged model."""
    folder = tmp_path_factory.mktemp("chat")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values_of(tiny_model, rows_file, folder / "run")))
    done = subprocess.run(
        [sys.executable, "-m", "qlora_cli", "train", str(folder / "recipe.yaml")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    import peft

    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(str(folder / "run" / "adapter"), dtype=torch.float32)
    adapted.merge_and_unload().save_pretrained(folder / "run" / "merged")
    AutoTokenizer.from_pretrained(folder / "run" / "adapter").save_pretrained(folder / "run" / "merged")
    return folder / "run"


def session_of(run: Path, sampling: Sampling | None = None, **voices: Any) -> Any:
    return opened(load_recipe(run / "resolved.yaml"), Silent(), Voices(**voices), sampling or Sampling())


def said(dialogue: Dialogue, text: str) -> str:
    """What a reply says piece by piece, which is what it is."""
    heard: list[str] = []
    reply = dialogue.ask(text, heard.append)
    assert "".join(heard) == reply.text
    return reply.text
