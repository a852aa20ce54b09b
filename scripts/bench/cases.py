"""What is measured: model shapes, rows and settings of every case. Read by the runner and, from JSON, by every worker.

Nothing but the standard library is imported here: workers run under interpreters of their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

OURS = ("ours", "ours-fast", "ours-offload", "ours-lean")
PEERS = ("naive", "naive-autocast", "trl", "trl-defaults", "unsloth", "axolotl")
EVERYONE = (*OURS, *PEERS)
"""The first one is what the others are compared with."""

GSM8K, ALPACA = "text/gsm8k/train.jsonl", "text/llamafactory/alpaca_en_demo.json"
TOKENIZER = "tokenizers/smollm2-135m-instruct/tokenizer.json"


@dataclass(frozen=True)
class Shape:
    """A Llama by its sizes. The head dimension is hidden / heads."""

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool = True

    @property
    def name(self) -> str:
        """A folder name that is another one for every other model."""
        sizes = (self.vocab, self.hidden, self.intermediate, self.layers, self.heads, self.kv_heads)
        return "-".join((*map(str, sizes), "tied" if self.tied else "untied"))


SMOKE = Shape(256, 64, 128, 1, 4, 2)
SMOLLM2 = Shape(49152, 576, 1536, 30, 9, 3)
QWEN = Shape(151936, 896, 4864, 24, 14, 2)  # as a Llama, without its biases on q, k and v
LLAMA_1B = Shape(128256, 2048, 8192, 16, 32, 8)
LLAMA_8B = Shape(128256, 4096, 14336, 32, 32, 8, tied=False)


@dataclass(frozen=True)
class Case:
    """One comparison. Settings that a contestant's name does not say are these, for all of them.

    rows_per_step: rows of one optimizer step, in one micro-batch. length: tokens of a row, at most of a real one.
    recompute:     gradient checkpointing. steps: optimizer steps of a turn.
    data:          file below --data whose first `num_rows` rows a turn goes through as a whole; "": drawn rows, all of
                   `length` tokens, all trained, the next ones in every turn.
    packed_rows:   rows of `length` that ours fills for one step of a whole pass.
    total_steps:   steps, or passes, of a run: warm-up, turns and memory. folder: where the runner put model and rows.
    memory_limit_gib: what a process may take of the GPU; 0: all.
    """

    name: str
    shape: Shape
    length: int
    rows_per_step: int = 1
    recompute: bool = False
    steps: int = 4
    data: str = ""
    num_rows: int = 0
    packed_rows: int = 2
    contestants: tuple[str, ...] = (*OURS[:2], *PEERS)
    learning_rate: float = 2e-4
    total_steps: int = 0
    memory_limit_gib: float = 0
    compute: str = "bfloat16"
    seed: int = 42
    folder: str = ""

    @property
    def model(self) -> Path:
        """The base: config, weights and tokenizer, with the rows' tokenizer."""
        return Path(self.folder) / "model"

    @property
    def texts(self) -> Path:
        """The rows as text."""
        return Path(self.folder) / ("rows.json" if self.data.endswith(".json") else "rows.text.jsonl")

    @property
    def rows(self) -> Path:
        """The rows as {input_ids, labels}, in the order in which ours takes them."""
        return Path(self.folder) / "rows.ids.jsonl"

    @property
    def needed_steps(self) -> int:
        """Optimizer steps over drawn rows, else passes; one to spare: a step's clock stops where the next begins."""
        return self.total_steps + 1

    def read_rows(self) -> list[dict[str, list[int]]]:
        """The rows of a pass, or of all steps."""
        return [json.loads(line) for line in self.rows.read_text().splitlines()]

    def write(self, file: Path) -> Path:
        """The case as JSON."""
        file.write_text(json.dumps(asdict(self), indent=1) + "\n")
        return file


def read_case(file: Path) -> Case:
    """A case that `Case.write` wrote."""
    values: dict[str, Any] = json.loads(file.read_text())
    shape, names = Shape(**values.pop("shape")), tuple(values.pop("contestants"))
    return Case(**values, shape=shape, contestants=names)


def _both(case: Case) -> Iterator[Case]:
    """Without and with recomputation."""
    yield case
    yield replace(case, name=f"{case.name}, recomputed", recompute=True)


def _c1() -> Iterator[Case]:
    shape = replace(SMOLLM2, layers=8)
    for length, steps in ((512, 3), (128, 8)):
        yield from _both(Case(f"C1 SmolLM2 shape, 8 layers, {length} x 1", shape, length, steps=steps))


def _c2() -> Iterator[Case]:
    few = ("ours", "naive", "naive-autocast", "trl-defaults")
    for name, data in (("GSM8K", GSM8K), ("Alpaca", ALPACA)):
        rows = Case(f"C2 SmolLM2 shape, 30 layers, {name}", SMOLLM2, 1024, 8, data=data, num_rows=32, contestants=few)
        yield replace(rows, learning_rate=1e-7)  # so the loss over the first pass is that of the start, for the gate


def _g2() -> Iterator[Case]:
    for length, rows in ((2048, 1), (2048, 4), (8192, 1)):
        case = Case(f"G2 Llama-3.1-8B shape, {length} x {rows}", LLAMA_8B, length, rows, recompute=True, steps=3)
        yield replace(case, contestants=EVERYONE)


def _smoke() -> Iterator[Case]:
    yield Case("smoke", SMOKE, 32, 2, steps=2)


def _smoke_pass() -> Iterator[Case]:
    rows = Case("smoke, a whole pass", replace(SMOKE, vocab=SMOLLM2.vocab), 512, 4, data=GSM8K, num_rows=9)
    yield replace(rows, learning_rate=1e-7)


SETS = {
    "c1": _c1,
    "c2": _c2,
    "c3": lambda: _both(Case("C3 Qwen2.5-0.5B shape, 512 x 1", QWEN, 512, steps=2)),
    "g1": lambda: _both(Case("G1 Llama-3.2-1B shape, 512 x 8", LLAMA_1B, 512, 8, steps=10)),
    "g2": _g2,
    "smoke": _smoke,
    "smoke-pass": _smoke_pass,
}
"""The cases of a set by its name on the command line; g3 is a search of its own, in context.py."""

CONTEXT = Case("G3 Llama-3.1-8B shape, longest context", LLAMA_8B, 1024, recompute=True, steps=1)
LIMITS_GIB = (8, 16, 24)
