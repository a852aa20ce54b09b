"""How long LoftQ's start of one weight takes beside PEFT's algorithm, at the same rank and iterations, and its error.

    python scripts/bench_loftq.py [--size 4096] [--rank 64] [--iterations 2] [--json FILE]

PEFT 0.21's `loftq_init` (utils/loftq_utils.py) needs CUDA; its steps are run here on the CPU: quantise with
bitsandbytes' nf4, dequantise, a full fp32 SVD of what is lost, the two factors. Quantising counts on both sides. The
weight is Gaussian; errors are ‖W − (Q + BA)‖ / ‖W‖ with single quantisation, which is all that PEFT's has.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional
from torch import Tensor

from qlora_cli.quant import kernels
from qlora_cli.quant.blockwise import Packed, quantize
from qlora_cli.quant.loftq import Alternation, loftq
from qlora_cli.quant.packed import Storage

THEIRS = "PEFT's steps"


def main() -> None:
    """Two lines: PEFT's steps and ours."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where the figures go")
    arguments = parser.parse_args()
    weight = torch.randn(arguments.size, arguments.size, generator=torch.Generator().manual_seed(0))
    runs: dict[str, Callable[[], float]] = {
        "qlora": lambda: ours(weight, arguments.rank, arguments.iterations),
        THEIRS: lambda: theirs(weight, arguments.rank, arguments.iterations),
    }
    ours(weight[:512, :512].contiguous(), 8, 1)  # to warm up
    found: dict[str, Any] = {"size": arguments.size, "rank": arguments.rank, "iterations": arguments.iterations}
    for name, run in runs.items():
        started, cpu = time.perf_counter(), time.process_time()
        error = run()
        found[name] = {"seconds": time.perf_counter() - started, "cpu_s": time.process_time() - cpu, "error": error}
    print("| | seconds | processor seconds | error |")
    print("|---|---|---|---|")
    for name in runs:
        one = found[name]
        print(f"| {name} | {one['seconds']:.2f} | {one['cpu_s']:.1f} | {one['error']:.4f} |")
    ratio = found[THEIRS]["seconds"] / found["qlora"]["seconds"]
    print(f"\n{ratio:.1f} times as fast")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


def ours(weight: Tensor, rank: int, iterations: int) -> float:
    """qlora_cli.quant.loftq."""
    storage = Storage("nf4", double_quant=False)

    def quantizer(rows: Tensor) -> tuple[Packed, Tensor]:
        packed = quantize(rows, storage.code, storage.block_size, storage.double_quant)
        return packed, kernels.dequantize(packed, storage.code, storage.block_size, rows.shape, torch.float32)

    return loftq(weight, quantizer, rank, 1.0, Alternation(iterations)).error


def theirs(weight: Tensor, rank: int, iterations: int) -> float:
    """The loop of PEFT's loftq_init."""
    residual = weight.clone()
    for _ in range(iterations):
        codes, state = functional.quantize_4bit(residual, quant_type="nf4")
        dequantized = functional.dequantize_4bit(codes, state)
        residual = weight - dequantized
        left, values, right = torch.linalg.svd(residual, full_matrices=False)
        root = values[:rank].sqrt()
        factors = (left[:, :rank] * root, root[:, None] * right[:rank])
        residual = weight - factors[0] @ factors[1]
    return float((weight - dequantized - factors[0] @ factors[1]).norm() / weight.norm())


if __name__ == "__main__":
    main()
