"""What each piece of a training step gains: the same step with the piece switched off, in turns, in one process.

    python scripts/bench/pieces.py --threads 1 --turns 6 [--length 128] [--json FILE]

C1's shape (SmolLM2-135M cut to 8 layers, random weights), NF4, bf16, LoRA r 16, one row. Switched off are the fused
LoRA layers (PEFT's own forward runs), the loss from hidden states (all logits are made, then their cross-entropy) and
our backward pass of attention on a CPU (torch's). Ratio: seconds without the piece ÷ with all of them, the median over
pairs of turns with its 95% bootstrap interval.
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
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from cases import SETS
from growth import prepared
from growth_part import Run, opened
from process import Machine
from stats import Ratio, paired_ratio, turns

from qlora_cli.kernels import causal_attention
from qlora_cli.model.fused import Fused


@contextmanager
def peft_layers(run: Run) -> Iterator[None]:
    """PEFT's own forward in every LoRA layer."""
    fused = {module: type(module) for module in run.session.model.modules() if isinstance(module, Fused)}
    for module, kind in fused.items():
        module.__class__ = kind.__mro__[2]
    yield
    for module, kind in fused.items():
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


ALL = "all"
PIECES: dict[str, Callable[[Run], Any]] = {
    "fused LoRA layers": peft_layers,
    "loss from hidden states": all_logits,
    "backward pass of attention": torchs_attention,
}


def main() -> None:
    """A line for each piece."""
    arguments = read_arguments()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="qlora-pieces-") as folder:
        found = next(iter(SETS["c1"]()))
        shape = replace(found.shape, layers=arguments.layers)
        steps = (len(PIECES) + 1) * (arguments.turns + 1) * arguments.steps
        case = replace(found, shape=shape, length=arguments.length, total_steps=steps, folder=str(Path(folder) / "c1"))
        prepared(Machine(threads=arguments.threads, models=Path(folder) / "models"), case)
        seconds = measured(case, arguments.turns, arguments.steps)
    print("| without | time ÷ with all | 95% interval |\n|---|---|---|")
    for name in PIECES:
        ratio: Ratio = paired_ratio(seconds[name], seconds[ALL])
        print(f"| {name} | {ratio.median:.3f} | {ratio.low:.3f} to {ratio.high:.3f} |")
    how = f"{arguments.length} tokens, {arguments.threads} threads, load {os.getloadavg()[0]:.1f}"
    print(f"\nA step of all takes {min(seconds[ALL]) * 1e3:.0f} ms at best; {how}.")
    if arguments.json:
        arguments.json.write_text(json.dumps({"how": how, "seconds": seconds}, indent=1) + "\n")


def measured(case: Any, number: int, steps: int) -> dict[str, list[float]]:
    """Seconds of a step with all pieces and without each, one of each in every turn after a first one to warm up."""
    off: dict[str, Callable[[Run], Any]] = {ALL: nullcontext, **PIECES}
    seconds: dict[str, list[float]] = {name: [] for name in off}
    with opened(case) as run:
        for turn, order in enumerate(turns([*off], number + 1)):
            for name in order:
                with off[name](run):
                    taken = run.seconds(1, steps)
                if turn:
                    seconds[name].append(taken)
    return seconds


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=6, help="measurements of everything")
    parser.add_argument("--steps", type=int, default=2, help="of a measurement")
    parser.add_argument("--layers", type=int, default=8, help="of C1's shape")
    parser.add_argument("--length", type=int, default=512, help="tokens of the row")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="where every single measurement goes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
