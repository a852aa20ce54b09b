"""What each data type costs: relative error on Gaussian and on real weights at its real bits, and speed.

    python scripts/code_errors.py ../shared/data [--device cuda] [--json FILE]

Errors are ‖W − Q‖ / ‖W‖ in blocks of 64 with double quantisation, over a Gaussian matrix, four attention matrices of
GPT-2 (weights/gpt2-matrices, 768 × 768 fp32, big-endian) and all linear weights of two tiny story models. Bits are
counted from the stored tensors. Speed: bfloat16 values of a 1024 × 1024 weight per second on one thread, beside
bitsandbytes' own nf4 in the same run, best of 20, ABBA. On a GPU of an 8192 × 8192 weight, ten calls at a time, and
beside it the share of copy bandwidth: bytes read and written per second over those of a copy of as much as is written.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bitsandbytes import functional
from safetensors.torch import load_file
from torch import Tensor

from qlora_cli.quant import blockwise, kernels
from qlora_cli.quant.blockwise import Code, Packed, quantize
from qlora_cli.quant.codebooks import lloyd_max
from qlora_cli.quant.packed import Storage, tensors_of

BLOCK = 64
GPT2 = ("query", "key", "value", "proj")
MODELS = ("stories260k-hf", "tinystories-656k-hf")
TYPES: dict[str, Code] = {
    "nf4": Storage("nf4").code,
    "fp4": Storage("fp4").code,
    "int4, absmax": Storage("int4", clip="absmax").code,
    "int4 (searched)": Storage("int4").code,
    "int4, zero point, whole range": Storage("int4", zero_point=True, clip="absmax").code,
    "int4, zero point (searched)": Storage("int4", zero_point=True).code,
    "Lloyd-Max, 4 bits": Code(4, lloyd_max(4, BLOCK)),
    "nf2": Storage("nf2").code,
    "int2 (±1/4, ±1, best scale)": Storage("int2").code,
    "int2, absmax": Storage("int2", clip="absmax").code,
    "int2, mean ± 2σ": Storage("int2", clip="2sigma", zero_point=True).code,
    "int2, zero point (searched)": Storage("int2", zero_point=True).code,
    "Lloyd-Max, 2 bits": Code(2, lloyd_max(2, BLOCK)),
}


def main() -> None:
    """The table, a line per data type."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--device", choices=SIZE, default="cpu", help="where speed is measured")
    parser.add_argument("--json", type=Path, help="where every figure goes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    weights = read_weights(arguments.data / "weights")
    found = []
    ratios = ["speed ÷ bitsandbytes' nf4", *(["share of copy bandwidth"] if arguments.device == "cuda" else [])]
    print(f"| data type | bits | {' | '.join([*weights, *ratios])} |")
    print("|---" * (len(weights) + len(ratios) + 2) + "|")
    for name, code in TYPES.items():
        errors = {of: error(matrices, code) for of, matrices in weights.items()}
        bits, speeds = stored_bits(weights["Gaussian"][0], code), relative_speeds(code, arguments.device)
        found.append({"type": name, "bits": bits, "errors": errors, **speeds})
        figures = [*(f"{one:.4f}" for one in errors.values()), *(f"{one:.2f}" for one in speeds.values())]
        print(f"| {name} | {bits:.3f} | {' | '.join(figures)} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


def read_weights(folder: Path) -> dict[str, list[Tensor]]:
    """Matrices by what they are of."""
    gpt2 = [np.fromfile(folder / "gpt2-matrices" / f"att.{name}.w.dat", ">f4").astype(np.float32) for name in GPT2]
    found = {
        "Gaussian": [torch.randn(2048, 1024, generator=torch.Generator().manual_seed(0))],
        "GPT-2": [torch.from_numpy(matrix).view(768, 768) for matrix in gpt2],
    }
    for model in MODELS:
        tensors = load_file(folder / model / "model.safetensors")
        found[model] = [one.float() for name, one in tensors.items() if name.endswith("_proj.weight")]
    return found


def error(matrices: list[Tensor], code: Code) -> float:
    """‖W − Q‖ / ‖W‖ over all matrices."""
    off = total = 0.0
    for matrix in matrices:
        packed = quantize(matrix, code, BLOCK, double_quant=True)
        off += float((blockwise.dequantize(packed, code, matrix.shape) - matrix).square().sum())
        total += float(matrix.square().sum())
    return (off / total) ** 0.5


def stored_bits(matrix: Tensor, code: Code) -> float:
    """Bits per weight of what is stored."""
    tensors = [one for one in tensors_of(quantize(matrix, code, BLOCK, double_quant=True)).values() if one is not None]
    return 8 * sum(one.numel() * one.element_size() for one in tensors) / matrix.numel()


def relative_speeds(code: Code, device: str, turns: int = 20) -> dict[str, float]:
    """speed: values per second beside those of bitsandbytes' nf4, scales in fp32 for both; on a GPU copy_share too."""
    matrix = torch.randn(SIZE[device], generator=torch.Generator().manual_seed(0)).to(device)
    packed: Packed = quantize(matrix, code, BLOCK, double_quant=False)
    theirs, state = functional.quantize_4bit(matrix.bfloat16(), quant_type="nf4", blocksize=BLOCK)
    runs: dict[str, Callable[[], Any]] = {
        "ours": lambda: kernels.dequantize(packed, code, BLOCK, matrix.shape, torch.bfloat16),
        "theirs": lambda: functional.dequantize_4bit(theirs, state),
    }
    if device == "cuda":
        source, target = (torch.zeros_like(matrix, dtype=torch.bfloat16) for _ in range(2))
        runs["copy"] = lambda: target.copy_(source)
    best = dict.fromkeys(runs, float("inf"))
    for turn in range(turns):
        for name in [*runs][:: 1 if turn % 2 == 0 else -1]:
            best[name] = min(best[name], TIMED[device](runs[name]))
    speeds = {"speed": best["theirs"] / best["ours"]}
    if device == "cuda":
        moved = target.nbytes + sum(one.nbytes for one in tensors_of(packed).values() if one is not None)
        speeds["copy_share"] = (moved / best["ours"]) / (2 * target.nbytes / best["copy"])
    return speeds


def timed_on_cpu(run: Callable[[], Any]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def timed_on_gpu(run: Callable[[], Any], calls: int = 10) -> float:
    """Seconds of one call by the GPU's clock, of some in a row, so that it need not wait for the launch of each."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / calls


SIZE = {"cpu": (1024, 1024), "cuda": (8192, 8192)}
"""Of the weight whose speed is measured, by device; on a GPU larger than its cache."""

TIMED = {"cpu": timed_on_cpu, "cuda": timed_on_gpu}


if __name__ == "__main__":
    main()
