"""Three GLUE tasks with a decoder of 656,000 weights as classifier: NF4 against 16-bit LoRA, over three seeds.

    python scripts/study_glue.py ../shared/data OUT [--tasks sst2,mrpc,stsb] [--seeds 1,2,3]

Base: tinystories-656k. SST-2 is the comparison: the same rows, order and budget for both data types; MRPC (a pair of
sentences) and STS-B (a number) show the other kinds of row from training to the merged model. Each figure is of
GLUE's dev file, which nothing was chosen by. OUT/results.json holds the figures, OUT/TASK-TYPE-SEED the runs; runs that
are there already are measured, not trained again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

TASKS: dict[str, dict[str, Any]] = {
    "sst2": {
        "folder": "SST-2",
        "model": {"labels": ["negative", "positive"]},
        "metrics": ["accuracy"],
        "types": ("none", "nf4"),
        "steps": 800,
    },
    "mrpc": {
        "folder": "MRPC",
        "model": {"labels": ["different", "equivalent"]},
        "metrics": ["accuracy", "f1"],
        "types": ("nf4",),
        "steps": 345,
    },
    "stsb": {
        "folder": "STS-B",
        "model": {"num_labels": 1},
        "metrics": ["pearson", "spearman"],
        "types": ("nf4",),
        "steps": 540,
    },
}
"""What is measured of each; labels in the order of GLUE's ids. steps of 32 rows: SST-2 25,600, the others 3 epochs."""


def main() -> None:
    """Trains and measures every run, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder with weights/tinystories-656k-hf and text/glue")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seeds", default="1,2,3")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for task in options.tasks.split(","):
        for seed in map(int, options.seeds.split(",") if task == "sst2" else ["1"]):
            for data_type in TASKS[task]["types"]:
                name = f"{task}-{data_type}-{seed}"
                results[name] = run(options, task, data_type, seed)
                path.write_text(json.dumps(results, indent=1))
    print_tables(results)


def run(options: argparse.Namespace, task: str, data_type: str, seed: int) -> dict[str, Any]:
    """One run's figures before and after; of seed 1 those of the merged model too."""
    recipe = write_recipe(options, task, data_type, seed)
    started = time.perf_counter()
    qlora("train", recipe)
    seconds = time.perf_counter() - started
    folder = Path(yaml.safe_load(Path(recipe).read_text())["output_dir"])
    merged = folder / "merged"
    if seed == 1 and not merged.exists():
        qlora("merge", str(folder))
    measured = qlora("eval", str(folder), "--baseline", "--json", *(["--merged", str(merged)] if seed == 1 else []))
    return {"models": json.loads(measured)["models"], "seconds": round(seconds)}


def write_recipe(options: argparse.Namespace, task: str, data_type: str, seed: int) -> str:
    """The recipe of a run; returns its path."""
    about, rows = TASKS[task], options.data / "text" / "glue" / TASKS[task]["folder"]
    name = f"{task}-{data_type}-{seed}"
    recipe = {
        "model": {
            "name_or_path": str(options.data / "weights" / "tinystories-656k-hf"),
            "task": "sequence_classification",
            **about["model"],
        },
        "quantization": {"data_type": data_type, "compute_dtype": "float32"},
        "adapter": {"r": 16, "alpha": 16},
        "data": {
            "train": [{"path": str(rows / "train.tsv")}],
            "eval": [{"path": str(rows / "dev.tsv")}],
            "max_length": 512,
        },
        "training": {
            "max_steps": about["steps"],
            "micro_batch_size": 8,
            "gradient_accumulation_steps": 4,
            "learning_rate": 2e-3,
            "optimizer": "adamw",
            "max_grad_norm": 1.0,
            "eval_steps": 10_000,
            "save_steps": 10_000,
            "seed": seed,
        },
        "evaluation": {"suites": [{"suite": "classify", "metrics": about["metrics"]}], "bootstrap_resamples": 0},
        "output_dir": str(options.out / name),
    }
    path = options.out / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


def qlora(*arguments: str) -> str:
    """Runs the command line; its progress goes to stderr, its result is returned."""
    command = [sys.executable, "-m", "qlora_cli", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def print_tables(results: dict[str, Any]) -> None:
    """Every figure as Markdown, and SST-2's gap between the two data types."""
    print("| run | figure | before | after | merged | seconds of training |\n|---|---|---|---|---|---|")
    for name, found in results.items():
        models = found["models"]
        for figure in models["adapter"]:
            merged = f"{models['merged'][figure]:.4f}" if "merged" in models else ""
            before, after = models["base"][figure], models["adapter"][figure]
            print(f"| {name} | {figure} | {before:.4f} | {after:.4f} | {merged} | {found['seconds']} |")
    after = {name: found["models"]["adapter"].get("classify.accuracy") for name, found in results.items()}
    seeds = [name.removeprefix("sst2-nf4-") for name in results if name.startswith("sst2-nf4-")]
    gaps = [100 * (after[f"sst2-none-{seed}"] - after[f"sst2-nf4-{seed}"]) for seed in seeds]
    if gaps:
        print(f"\nSST-2, 16-bit less NF4, points: {', '.join(f'{gap:+.2f}' for gap in gaps)}; mean {mean(gaps):+.2f}")


if __name__ == "__main__":
    main()
