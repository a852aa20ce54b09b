"""LoftQ and its rivals on two tiny story models: error, and perplexity before and after training, over three seeds.

    python scripts/study_loftq.py errors ../shared/data            error against T and order, on real matrices
    python scripts/study_loftq.py train ../shared/data stories260k-hf 8 --work FOLDER
    python scripts/study_loftq.py iterations ../shared/data        perplexity before training against T

Every run is a recipe through `qlora train`. A start's learning rate is the one of least loss on rows for tuning with
seed 1; what is told is the perplexity of other rows, for seeds 1, 2 and 3. Results go to docs/loftq/*.json one by one:
a study that was stopped goes on where it was. scripts/study_loftq_page.py makes the tables and figures of them.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from qlora_cli import commands
from qlora_cli.display import QuietReport
from qlora_cli.model.stored_base import on_stored_base, start_folder
from qlora_cli.quant import kernels
from qlora_cli.quant.blockwise import Packed, quantize
from qlora_cli.quant.loftq import Alternation, Order, loftq
from qlora_cli.quant.packed import Storage
from qlora_cli.recipe import load_recipe
from qlora_cli.recipe.schema import Adapter

RESULTS = Path(__file__).parents[1] / "docs" / "loftq"
SEEDS = (1, 2, 3)
RATES = (5e-3, 1e-2, 2e-2)
STEPS, ROWS, CHARACTERS = 100, 8, 700
"""Optimizer steps, rows of a step, characters of a row (some 250 tokens)."""

FIRST = {
    "stories260k-hf": {
        "2.25": ["*.layers.0.mlp.*"],
        "2.5": ["*.layers.0.*", "*.layers.1.self_attn.*"],
        "3": ["*.layers.[01].*", "*.layers.2.self_attn.*", "*.layers.2.mlp.gate_proj"],
    },
    "tinystories-656k-hf": {
        "2.25": ["*.layers.0.self_attn.*"],
        "2.5": ["*.layers.0.self_attn.*", "*.layers.0.mlp.gate_proj"],
        "3": ["*.layers.0.*"],
    },
}
"""Modules at nf4 where the rest is int2, by the bits that a weight has on average."""

PLAIN: dict[str, Any] = {"init": "default"}
LOFTQ: dict[str, Any] = {"init": "loftq"}
SVD_FIRST: dict[str, Any] = {"init": "loftq", "loftq": {"order": "svd_first"}}
AWARE: dict[str, Any] = {"init": "loftq", "loftq": {"calibration": 100}}
AWARE_SVD_FIRST: dict[str, Any] = {"init": "loftq", "loftq": {"calibration": 100, "order": "svd_first"}}


def starts(model: str) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """The sections `quantization` and `adapter` of every contestant."""
    found: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {"16-bit LoRA": ({"data_type": "none"}, PLAIN)}
    stored: dict[str, dict[str, Any]] = {"nf4": {"data_type": "nf4"}, "int4": {"data_type": "int4"}}
    for bits in ("3", "2.5", "2.25"):
        overrides = dict.fromkeys(FIRST[model][bits], "nf4")
        stored[f"{bits} bits"] = {"data_type": "int2", "overrides": overrides}
    stored |= {"int2": {"data_type": "int2"}, "nf2": {"data_type": "nf2"}}
    for name, quantization in stored.items():
        found[name] = (quantization, PLAIN)
        found[f"{name} + LoftQ"] = (quantization, LOFTQ)
        if name in ("nf4", "int2", "nf2"):
            found[f"{name} + LoftQ, SVD first"] = (quantization, SVD_FIRST)
            found[f"{name} + aware"] = (quantization, AWARE)
            found[f"{name} + aware, SVD first"] = (quantization, AWARE_SVD_FIRST)
    return found


def main() -> None:
    """One part of the study."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    for name in ("errors", "iterations", "train"):
        parts.add_parser(name).add_argument("data", type=Path)
    train = parts.choices["train"]
    train.add_argument("model")
    train.add_argument("rank", type=int)
    for part in (train, parts.choices["iterations"]):
        part.add_argument("--work", type=Path, default=Path("/tmp/study-loftq"), help="where runs are made and deleted")
    train.add_argument("--only", nargs="*", help="contestants")
    train.add_argument("--rates", nargs="*", type=float, default=RATES)
    train.add_argument("--steps", type=int, default=STEPS)
    for part in parts.choices.values():
        part.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.results.mkdir(exist_ok=True, parents=True)
    {"errors": errors, "iterations": iterations, "train": train_all}[arguments.part](arguments)


# --- training ---------------------------------------------------------------------------------------------------------


def train_all(arguments: argparse.Namespace) -> None:
    """Every contestant at every rate with the first seed, then at its best rate with the others."""
    contestants = starts(arguments.model)
    for name in arguments.only or contestants:
        study = Study(arguments, name, *contestants[name])
        tuned = {rate: study.run(rate, SEEDS[0])["after"]["tune"] for rate in arguments.rates}
        best = min(tuned, key=lambda rate: tuned[rate])
        found = [study.run(best, seed)["after"]["test"] for seed in SEEDS]
        print(f"{name:<16} rate {best:g}  " + "  ".join(f"{np.exp(loss):.3f}" for loss in found), flush=True)


class Study:
    """One contestant on one model and rank, with its finished runs."""

    def __init__(
        self, arguments: argparse.Namespace, name: str, quantization: dict[str, Any], adapter: dict[str, Any]
    ) -> None:
        self.name, self.quantization, self.adapter = name, quantization, {**adapter, "r": arguments.rank}
        self.model, self.steps, self.work = arguments.model, arguments.steps, arguments.work
        self.weights = arguments.data / "weights" / arguments.model
        self.rows = split(arguments.data, self.work)
        self.file = arguments.results / f"{arguments.model}-r{arguments.rank}.json"

    def run(self, rate: float, seed: int) -> dict[str, Any]:
        """Mean losses of the rows for tuning and for testing, before and after training; from the file if known."""
        key = {"start": self.name, "rate": rate, "seed": seed, "steps": self.steps}
        for one in self.known():
            if key.items() <= one.items():
                return dict(one)
        found = {**key, **self.trained(rate, seed)}
        with (Path(tempfile.gettempdir()) / f"{self.file.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # other processes may write other starts to the same file
            self.file.write_text("[\n" + ",\n".join(json.dumps(one) for one in [*self.known(), found]) + "\n]\n")
        return found

    def known(self) -> list[dict[str, Any]]:
        """The finished runs."""
        return json.loads(self.file.read_text()) if self.file.exists() else []

    def trained(self, rate: float, seed: int) -> dict[str, Any]:
        """Trains, measures and deletes the run."""
        folder = self.work / "run"
        shutil.rmtree(folder, ignore_errors=True)
        recipe = self.recipe(folder, rate, seed)
        commands.train(recipe, b"", QuietReport(), main_process=True, resume="auto", pause_at=None)
        found: dict[str, Any] = {"before": {}, "after": {}}
        for part in ("tune", "test"):
            on = self.recipe(folder, rate, seed, part)
            measured = commands.evaluate(on, QuietReport(), commands.Wanted(baseline=True, again=True))["models"]
            before = measured.get("start") or measured["base"]
            found["before"][part], found["after"][part] = before["loss"], measured["adapter"]["loss"]
        return found

    def before_training(self) -> float:
        """Mean loss of the rows for testing with the adapter's start."""
        folder = self.work / "base"
        shutil.rmtree(folder, ignore_errors=True)
        recipe = self.recipe(folder, RATES[0], SEEDS[0], "test")
        commands.quantize(recipe, QuietReport(), folder)
        started = on_stored_base(recipe, folder)
        started = started.model_copy(update={"adapter": Adapter()})
        wanted = commands.Wanted(start_folder(folder, recipe.adapter), again=True)
        (measured,) = commands.evaluate(started, QuietReport(), wanted)["models"].values()
        return float(measured["loss"])

    def recipe(self, folder: Path, rate: float, seed: int, held_out: str = "tune") -> Any:
        """The recipe of a run, through the real loader."""
        values = {
            "model": {"name_or_path": str(self.weights)},
            "quantization": {**self.quantization, "compute_dtype": "float32"},
            "adapter": {**self.adapter, "alpha": 2 * self.adapter["r"]},
            "data": {
                "train": [{"path": str(self.rows["train"])}],
                "eval": [{"path": str(self.rows[held_out])}],
                "max_length": 512,
                "on_long_row": "truncate",
            },
            "training": {
                "max_steps": self.steps,
                "micro_batch_size": ROWS,
                "gradient_accumulation_steps": 1,
                "learning_rate": rate,
                "max_grad_norm": 1.0,
                "optimizer": "adamw",
                "seed": seed,
                **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), self.steps),
            },
            "evaluation": {"batch_size": 32},
            "output_dir": str(folder),
        }
        path = self.work / "recipe.yaml"
        path.write_text(yaml.safe_dump(values))
        return load_recipe(path)


def split(data: Path, work: Path) -> dict[str, Path]:
    """Stories in rows of whole paragraphs: eight of ten for training, one for tuning, one for testing."""
    work.mkdir(parents=True, exist_ok=True)
    rows: list[str] = [""]
    for paragraph in (data / "text" / "tinystories" / "tinystories.txt").read_text().split("\n\n"):
        if len(rows[-1]) + len(paragraph) > CHARACTERS and rows[-1]:
            rows.append("")
        rows[-1] = f"{rows[-1]}\n\n{paragraph.strip()}".strip()
    places = {"train": range(8), "tune": range(8, 9), "test": range(9, 10)}
    files = {name: work / f"{name}.jsonl" for name in places}
    for name, file in files.items():
        chosen = [row for at, row in enumerate(rows) if at % 10 in places[name]]
        file.write_text("".join(json.dumps({"text": row}) + "\n" for row in chosen))
    return files


# --- errors -----------------------------------------------------------------------------------------------------------

TYPES = ("nf4", "int4", "int2", "nf2")
MOST_ITERATIONS = 10


def errors(arguments: argparse.Namespace) -> None:
    """Error ÷ plain's for T from 1 to 10 and both orders, over the matrices of each source, r = d / 16 and d / 8."""
    found = []
    for source, weights in matrices(arguments.data / "weights").items():
        width = weights[0].shape[1] if source == "GPT-2" else min(weights[0].shape)
        for rank in (width // 16, width // 8):
            for name in TYPES:
                for order in ("quantize_first", "svd_first"):
                    ratios = [error_ratios(weight, name, rank, order) for weight in weights]
                    mean = np.mean(ratios, axis=0).round(4).tolist()
                    found.append({"source": source, "rank": rank, "type": name, "order": order, "ratios": mean})
                    print(f"{source} r {rank} {name} {order}: {mean[0]} {mean[4]} {mean[9]}", flush=True)
    (arguments.results / "errors.json").write_text("[\n" + ",\n".join(map(json.dumps, found)) + "\n]\n")


def matrices(folder: Path) -> dict[str, list[Tensor]]:
    """Weights by what they are of: GPT-2's attention matrices, and the linear weights of the story models."""
    from safetensors.torch import load_file

    gpt2 = [np.fromfile(folder / "gpt2-matrices" / f"att.{n}.w.dat", ">f4") for n in ("query", "key", "value", "proj")]
    found = {"GPT-2": [torch.from_numpy(one.astype(np.float32)).view(768, 768) for one in gpt2]}
    for model in FIRST:
        tensors = load_file(folder / model / "model.safetensors")
        found[model] = [tensor.float() for name, tensor in tensors.items() if name.endswith("_proj.weight")]
    return found


def error_ratios(weight: Tensor, name: str, rank: int, order: Order) -> list[float]:
    """Error of the iterate at T = 1, ..., 10, divided by plain's: each by itself, not the best so far."""
    storage = Storage(name)

    def quantizer(matrix: Tensor) -> tuple[Packed, Tensor]:
        packed = quantize(matrix, storage.code, storage.block_size, storage.double_quant)
        return packed, kernels.dequantize(packed, storage.code, storage.block_size, matrix.shape, torch.float32)

    start = loftq(weight, quantizer, min(rank, *weight.shape), 1.0, Alternation(MOST_ITERATIONS, order))
    return [error / start.plain for error in start.errors]


# --- iterations -------------------------------------------------------------------------------------------------------


def iterations(arguments: argparse.Namespace) -> None:
    """Perplexity before training against T, for both orders: stories260k-hf at rank 8, on the rows for testing."""
    arguments.model, arguments.rank, arguments.steps = "stories260k-hf", 8, 1
    found = []
    for name in ("nf4", "int2", "nf2"):
        for order in ("quantize_first", "svd_first"):
            for count in (1, 2, 3, 5, 7, 10):
                adapter = {"init": "loftq", "loftq": {"iterations": count, "order": order}}
                loss = Study(arguments, name, {"data_type": name}, adapter).before_training()
                found.append({"type": name, "order": order, "iterations": count, "loss": loss})
                print(f"{name} {order} T {count}: perplexity {np.exp(loss):.3f}", flush=True)
    (arguments.results / "iterations.json").write_text("[\n" + ",\n".join(map(json.dumps, found)) + "\n]\n")


if __name__ == "__main__":
    main()
