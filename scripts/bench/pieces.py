"""What each piece of a training step gains: the same step with the piece switched off, in turns, in one process.

    python scripts/bench/pieces.py --threads 1 --turns 6 [--length 128] [--recompute] [--json FILE]

C1's shape (SmolLM2-135M cut to 8 layers, random weights), NF4, bf16, LoRA r 16, one row. Switched off are the fused
LoRA layers (PEFT's own forward runs), the loss from hidden states (all logits are made, then their cross-entropy), our
attention on a CPU (torch's), norms and gated MLPs (the model's own forward runs); in the last lines nothing is, and
weights are kept dequantised, or the layers are compiled. Ratio: seconds without the piece ÷ with all of them, the
median over pairs of turns with its 95% bootstrap interval. Memory: the most bytes that a step's tensors take beside
those before it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from cases import SETS
from growth import prepared
from growth_part import Run, most_bytes, opened
from process import Machine
from stats import Ratio, paired_ratio, turns

from qlora_cli.kernels import causal_attention
from qlora_cli.model.compiled import compile_layers
from qlora_cli.model.fused import Fused
from qlora_cli.model.kept_weights import drop_weights, keep_weights
from qlora_cli.model.layer_kernels import FusedMLP, FusedNorm


@contextmanager
def own_forward(fused: type, run: Run) -> Iterator[None]:
    """PEFT's own forward in every LoRA layer, or the model's in every norm or MLP, by what stands before its class."""
    kinds = {module: type(module) for module in run.session.model.modules() if isinstance(module, fused)}
    for module, kind in kinds.items():
        module.__class__ = kind.__mro__[2]
    yield
    for module, kind in kinds.items():
        module.__class__ = kind


@contextmanager
def all_logits(run: Run) -> Iterator[None]:
    """As of a model whose way with its logits is unknown."""
    tail = run.session.base.tail
    run.session.base.__dict__["tail"] = None
    yield
    run.session.base.__dict__["tail"] = tail


@contextmanager
def torchs_attention(run: Run) -> Iterator[None]:
    """No row is long enough for ours."""
    shortest = causal_attention.SHORTEST
    causal_attention.SHORTEST = 1 << 62
    yield
    causal_attention.SHORTEST = shortest


@contextmanager
def compiled(run: Run) -> Iterator[None]:
    """As `training.torch_compile: true`; classes of compiled layers are made once."""
    kinds = {module: type(module) for module in run.session.model.modules()}
    compile_layers(run.session.model)
    yield
    for module, kind in kinds.items():
        module.__class__ = kind


@contextmanager
def kept(run: Run) -> Iterator[None]:
    """All weights dequantised; their memory is none of a step's."""
    keep_weights(run.session.model, run.session.base.compute_dtype)
    yield
    drop_weights(run.session.model)


ALL = "all"
PIECES: dict[str, Callable[[Run], Any]] = {
    "fused LoRA layers": partial(own_forward, Fused),
    "loss from hidden states": all_logits,
    "attention": torchs_attention,
    "norms": partial(own_forward, FusedNorm),
    "gated MLPs": partial(own_forward, FusedMLP),
    "(with memory: fast)": kept,
    "(with torch_compile)": compiled,
}


def main() -> None:
    """A line for each piece."""
    arguments = read_arguments()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="qlora-pieces-") as folder:
        found = next(iter(SETS["c1"]()))
        shape = replace(found.shape, layers=arguments.layers)
        steps = (len(PIECES) + 1) * ((arguments.turns + 1) * arguments.steps + 1)
        changes = {"length": arguments.length, "total_steps": steps, "recompute": arguments.recompute}
        case = replace(found, shape=shape, folder=str(Path(folder) / "c1"), **changes)
        prepared(Machine(threads=arguments.threads, models=Path(folder) / "models"), case)
        seconds, taken = measured(case, arguments.turns, arguments.steps)
    print("| without | time ÷ with all | 95% interval | memory |\n|---|---|---|---|")
    for name in PIECES:
        ratio: Ratio = paired_ratio(seconds[name], seconds[ALL])
        print(f"| {name} | {ratio.median:.3f} | {ratio.low:.3f} to {ratio.high:.3f} | {taken[name] / 1e6:.1f} MB |")
    recomputed = ", recomputed" if arguments.recompute else ""
    how = f"{arguments.length} tokens{recomputed}, {arguments.threads} threads, load {os.getloadavg()[0]:.1f}"
    print(f"\nA step of all takes {min(seconds[ALL]) * 1e3:.0f} ms at best, and {taken[ALL] / 1e6:.1f} MB; {how}.")
    if arguments.json:
        arguments.json.write_text(json.dumps({"how": how, "seconds": seconds, "bytes": taken}, indent=1) + "\n")


def measured(case: Any, number: int, steps: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of a step with all pieces and without each, one of each in every turn after a first one to warm up.

    Beside them the most bytes of one more step of each.
    """
    off: dict[str, Callable[[Run], Any]] = {ALL: nullcontext, **PIECES}
    seconds: dict[str, list[float]] = {name: [] for name in off}
    with opened(case) as run:
        for turn, order in enumerate(turns([*off], number + 1)):
            for name in order:
                with off[name](run):
                    taken = run.seconds(1, steps)
                if turn:
                    seconds[name].append(taken)
        most = {}
        for name, without in off.items():
            with without(run):
                most[name] = most_bytes(run.step)
    return seconds, most


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=6, help="measurements of everything")
    parser.add_argument("--steps", type=int, default=2, help="of a measurement")
    parser.add_argument("--layers", type=int, default=8, help="of C1's shape")
    parser.add_argument("--length", type=int, default=512, help="tokens of the row")
    parser.add_argument("--recompute", action="store_true", help="activations of every layer")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="where every single measurement goes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
