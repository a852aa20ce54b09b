"""A study of an encoder: a small BERT, pretrained on masked words by us, learns to answer questions by spans.

    python scripts/pretrain_encoder.py OUT/base
    python scripts/study_span.py OUT [--variants nf4,none]

Data: stories of scripts/span_text.py in SQuAD's form, some of them longer than the window, so that they are read in
several. Each tells one fact, so the question's kind decides the answer; its words finetuning never shows.
Each variant is the same recipe but for a few keys, trained by `qlora train`, and measured on the base with its new head
and on the adapter. `random` is nf4 without the pretraining, on the weights that it began with.

OUT/results.json holds the figures, OUT/NAME the runs; variants that are there already are measured, not trained again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import yaml
from pretrain_encoder import write_encoder
from span_text import question_row

from qlora_cli.evaluate.metrics import METRICS
from qlora_cli.evaluate.squad import Asked, answer_questions, read_questions
from qlora_cli.model.adapter import load_adapter
from qlora_cli.model.base import default_device, load_base
from qlora_cli.model.owner import start_of
from qlora_cli.recipe import Recipe
from qlora_cli.train.base import recipe_of_base
from qlora_cli.train.run import Run

NUM_TRAIN, NUM_HELD_OUT = 3_000, 1_000
TRAIN_SEED, HELD_OUT_SEED = 10, 11

VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"quantization": {"data_type": "none"}},
    "nf4": {"quantization": {"data_type": "nf4"}},
    "nf2": {"quantization": {"data_type": "nf2"}},
    "nf2-loftq": {"quantization": {"data_type": "nf2"}, "adapter": {"init": "loftq"}},
    "random": {"quantization": {"data_type": "nf4"}},
}

RECIPE: dict[str, Any] = {
    "model": {"task": "question_answering"},
    "adapter": {"r": 16, "alpha": 16},
    "data": {"max_length": 64, "doc_stride": 24},
    "training": {
        "epochs": 2,
        "micro_batch_size": 32,
        "gradient_accumulation_steps": 1,
        "learning_rate": 4e-3,
        "optimizer": "adamw",
        "max_grad_norm": 1.0,
        "eval_steps": 10_000,
        "save_steps": 10_000,
        "logging_steps": 50,
        "seed": 0,
    },
    "evaluation": {"batch_size": 100, "max_answer_length": 8},
}


def main() -> None:
    """Trains and measures every variant, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder with base/, as pretrain_encoder.py writes it")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated; default: all")
    options = parser.parse_args()
    out = options.out
    write_rows(out)
    if not (out / "base-random").exists():
        write_encoder(out / "base-random", num_steps=0)
    stored = out / "results.json"
    results: dict[str, Any] = {"train": NUM_TRAIN, "held_out": NUM_HELD_OUT, "variants": {}}
    if stored.exists():
        results["variants"] = json.loads(stored.read_text())["variants"]
    for name in options.variants.split(","):
        recipe = recipe_of(out, name)
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "qlora_cli", "train", recipe], check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        found = {**measured(Path(recipe)), "seconds": round(seconds)}
        before = results["variants"].get(name, {})
        if seconds < before.get("seconds", 0) / 2:  # trained by an earlier call
            found["seconds"] = before["seconds"]
        results["variants"][name] = found
        stored.write_text(json.dumps(results, indent=1))
    print_table(results)


def write_rows(out: Path) -> None:
    """train.jsonl and heldout.jsonl."""
    for name, seed, number in (("train", TRAIN_SEED, NUM_TRAIN), ("heldout", HELD_OUT_SEED, NUM_HELD_OUT)):
        random = Random(seed)
        rows = [question_row(random, index, new=name == "heldout") for index in range(number)]
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe_of(out: Path, name: str) -> str:
    """Writes the recipe of a variant and returns its path."""
    changes = VARIANTS[name]
    recipe = {section: {**RECIPE.get(section, {}), **changes.get(section, {})} for section in {*RECIPE, *changes}}
    recipe["model"]["name_or_path"] = str(out / ("base-random" if name == "random" else "base"))
    recipe["data"] |= {
        role: [{"path": str(out / f"{file}.jsonl")}] for role, file in (("train", "train"), ("eval", "heldout"))
    }
    path = out / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**recipe, "output_dir": str(out / name)}))
    return str(path)


def measured(path: Path) -> dict[str, Any]:
    """Exact match and F1 of what training began with, and of the adapter; of this also by the number of windows."""
    recipe = Recipe.model_validate(yaml.safe_load(path.read_text()))
    run = Run(Path(recipe.output_dir))
    base = load_base(recipe_of_base(recipe, run), default_device())
    asked = read_questions([], base, recipe, None)
    start = start_of(base.folder)
    before = base.model if start is None else load_adapter(base, start)
    found = {"before": scores(recipe, base, before, asked)}
    if start is not None:
        before.unload()
    return {**found, "after": scores(recipe, base, load_adapter(base, run.adapter), asked)}


def scores(recipe: Recipe, base: Any, model: Any, asked: Sequence[Asked]) -> dict[str, Any]:
    """The figures of a model over all questions, and over those whose context is read in one window, or in more."""
    evaluation = recipe.evaluation
    given = answer_questions(base, model, asked, int(evaluation.batch_size), evaluation.max_answer_length)
    answers = dict(given)
    groups = {
        "all": list(answers),
        "one window": [row for row in answers if len(asked[row].windows) == 1],
        "several windows": [row for row in answers if len(asked[row].windows) > 1],
        **{
            kind: [row for row in answers if asked[row].question.id.startswith(kind)]
            for kind in ("where", "who", "what")
        },
    }
    return {name: {"questions": len(rows), **figures([answers[row] for row in rows])} for name, rows in groups.items()}


def figures(answers: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Exact match and F1 of these answers."""
    texts, references = [one["prediction"] for one in answers], [one["references"] for one in answers]
    metrics = {"exact_match": METRICS["squad_exact_match"], "f1": METRICS["squad_f1"]}
    return {name: metric.figure(metric.rows(texts, references)) for name, metric in metrics.items()}


def print_table(results: dict[str, Any]) -> None:
    """The figures as Markdown."""
    print(f"{results['held_out']:,} held-out questions\n")
    print("| variant | exact match before | after | F1 after | one window | several | seconds of training |")
    print("|---|---|---|---|---|---|---|")
    for name, found in results["variants"].items():
        before, after = found["before"]["all"], found["after"]
        print(
            f"| {name} | {before['exact_match']:.3f} | {after['all']['exact_match']:.3f} | {after['all']['f1']:.3f} "
            f"| {after['one window']['exact_match']:.3f} | {after['several windows']['exact_match']:.3f} "
            f"| {found['seconds']} |"
        )


if __name__ == "__main__":
    main()
