"""Finetunes a published 656k-parameter model on Shakespeare and on GSM8K through `qlora`, and prints what it gained.

    python scripts/real_input.py ../shared/data runs/real-input [--steps N]

The data folder holds weights/tinystories-656k-hf, text/tinyshakespeare/input.txt and text/gsm8k/{train,test}.jsonl.
Shakespeare's last tenth and GSM8K's test file are held out. The table is that of docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

ROWS_OF_TEXT = 700  # characters in a row of Shakespeare: about 250 of the model's tokens


def main() -> None:
    """One run per data set, and a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    print("| data | held-out rows | perplexity before | after | token accuracy before | after | train s |")
    print("|---|---|---|---|---|---|---|")
    for name, source in (("shakespeare", shakespeare), ("gsm8k", gsm8k)):
        train, held_out = source(arguments.data, arguments.out)
        recipe = write_recipe(arguments.data, arguments.out, name, train, held_out, arguments.steps)
        started = time.perf_counter()
        qlora("train", str(recipe))
        seconds = time.perf_counter() - started
        result = json.loads(qlora("eval", str(recipe), "--baseline", "--json"))
        print(row(name, result, seconds), flush=True)


def shakespeare(data: Path, out: Path) -> tuple[str, str]:
    """The play as rows of text: the first nine tenths to train on, the rest held out."""
    text = (data / "text" / "tinyshakespeare" / "input.txt").read_text()
    rows = [text[start : start + ROWS_OF_TEXT] for start in range(0, len(text), ROWS_OF_TEXT)]
    cut = len(rows) * 9 // 10
    paths = []
    for role, part in (("train", rows[:cut]), ("heldout", rows[cut:])):
        path = out / f"shakespeare-{role}.jsonl"
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in part))
        paths.append(str(path))
    return paths[0], paths[1]


def gsm8k(data: Path, out: Path) -> tuple[str, str]:
    """The published files as they are."""
    folder = data / "text" / "gsm8k"
    return str(folder / "train.jsonl"), str(folder / "test.jsonl")


def write_recipe(data: Path, out: Path, name: str, train: str, held_out: str, steps: int) -> Path:
    """NF4 with double quantisation, LoRA r 16 on all linear layers, the default 8-bit optimizer."""
    recipe: dict[str, Any] = {
        "model": {"name_or_path": str(data / "weights" / "tinystories-656k-hf")},
        "data": {
            "train": [{"path": train}],
            "eval": [{"path": held_out, "limit": 150}],
            "max_length": 512,
            "on_long_row": "skip",
        },
        "training": {
            "max_steps": steps,
            "micro_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "learning_rate": 5e-3,
            "logging_steps": 50,
            "eval_steps": 100,
        },
        "evaluation": {"max_new_tokens": 1},  # a model of this size solves no problem: perplexity is the figure
        "output_dir": str(out / name),
    }
    path = out / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def qlora(*arguments: str) -> str:
    """Runs the command line; its progress goes to stderr, its result is returned."""
    return subprocess.run(
        [sys.executable, "-m", "qlora_cli", *arguments], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def row(name: str, result: dict[str, Any], seconds: float) -> str:
    """A line of the table."""
    before, after = result["models"]["base"], result["models"]["adapter"]
    return (
        f"| {name} | {result['suites'][0]['rows']} | {before['perplexity']:.2f} | {after['perplexity']:.2f} "
        f"| {before['token_accuracy']:.1%} | {after['token_accuracy']:.1%} | {seconds:.0f} |"
    )


if __name__ == "__main__":
    main()
