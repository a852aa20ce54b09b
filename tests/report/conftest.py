"""Run folders to report on: a real one, and ones made by hand in any state."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

RECIPE: dict[str, Any] = {
    "model": {"name_or_path": "here/model", "task": "causal_lm"},
    "quantization": {"data_type": "nf4", "block_size": 64, "double_quant": True, "compute_dtype": "auto"},
    "adapter": {"r": 16, "alpha": 32.0, "dropout": 0.0, "target_modules": "all-linear", "init": "default"},
    "data": {"train": [{"path": "here/rows.jsonl"}], "eval": [], "eval_fraction": 0.0, "max_length": 128},
    "training": {"epochs": 2.0, "max_steps": None, "micro_batch_size": 8, "gradient_accumulation_steps": 1,
                 "learning_rate": 0.005, "lr_scheduler": "cosine", "optimizer": "adamw", "max_grad_norm": 0.3},
    "evaluation": {"best_metric": None},
}  # fmt: skip
FACTS: dict[str, Any] = {
    "qlora": "0.1.0", "python": "3.11.7", "packages": {"torch": "2.13.0"}, "device": "cpu (x86_64)",
    "date": "2026-11-23", "base": {"compute_dtype": "bfloat16"}, "data": {"rows": 100, "trained_tokens": 1000},
    "fingerprints": {"base": "ab" * 32},
    "plan": {"steps": 40, "memory_bytes": 26_600_000, "layers_recomputed": 0, "layers": 4},
}  # fmt: skip


def step(at: int, **values: Any) -> dict[str, Any]:
    """A line of metrics.jsonl as training writes it, of 20 steps an epoch."""
    line = {"step": at, "epoch": at / 20, "loss": 5.0 / at, "learning_rate": 1e-4 * at, "grad_norm": 0.5,
            "trained_tokens_per_s": 500.0, "memory_bytes": 1_500_000_000}  # fmt: skip
    return line | values


@pytest.fixture
def made_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run folder; keyword arguments: lines of metrics, facts, recipe's sections, files by their place."""

    def make(lines: Any = (), facts: Any = FACTS, files: Any = (), **sections: Any) -> Path:
        folder = tmp_path / "run"
        folder.mkdir()
        recipe = {name: {**section, **sections.get(name, {})} for name, section in RECIPE.items()}
        (folder / "resolved.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True))
        if facts is not None:
            (folder / "run.json").write_text(json.dumps(facts))
        text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
        (folder / "metrics.jsonl").write_text(text)
        for place, content in dict(files).items():
            path = folder / place
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        return folder

    return make


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory, tiny_model, rows_file) -> Path:
    """A run of six steps that was evaluated with its baseline, by the command line."""
    folder = tmp_path_factory.mktemp("trained")
    values = {
        "model": {"name_or_path": str(tiny_model)},
        "quantization": {"compute_dtype": "float32"},
        "data": {"train": [{"path": str(rows_file)}], "eval": [{"path": str(rows_file.with_name("heldout.jsonl"))}],
                 "max_length": 256},
        "training": {"max_steps": 6, "micro_batch_size": 4, "gradient_accumulation_steps": 1, "learning_rate": 1e-2,
                     "logging_steps": 2, "eval_steps": 3},
        "evaluation": {"max_new_tokens": 8, "bootstrap_resamples": 20},
        "output_dir": str(folder / "run"),
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    for arguments in (["train", folder / "recipe.yaml"], ["eval", folder / "run", "--baseline"]):
        command = [sys.executable, "-m", "qlora_cli", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
        assert done.returncode == 0, done.stderr
    return folder / "run"
