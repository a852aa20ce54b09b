"""What each data type costs: relative error on Gaussian and on real weights at its real bits, and CPU speed.

    python scripts/code_errors.py ../shared/data [--json FILE]

Errors are ‖W − Q‖ / ‖W‖ in blocks of 64 with double quantisation, over a Gaussian matrix, four attention matrices of
GPT-2 (weights/gpt2-matrices, 768 × 768 fp32, big-endian) and all linear weights of two tiny story models. Bits are
counted from the stored tensors. Speed: bfloat16 values of a 1024 × 1024 weight per second on one thread, beside
bitsandbytes' own nf4 in the same run, best of 20, ABBA.
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
from qlora_cli.quant.linear import Storage, tensors_of

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
    parser.add_argument("--json", type=Path, help="where every figure goes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    weights = read_weights(arguments.data / "weights")
    found = []
    print(f"| data type | bits | {' | '.join(weights)} | speed ÷ bitsandbytes' nf4 |")
    print("|---" * (len(weights) + 3) + "|")
    for name, code in TYPES.items():
        errors = {of: error(matrices, code) for of, matrices in weights.items()}
        bits, speed = stored_bits(weights["Gaussian"][0], code), relative_speed(code)
        found.append({"type": name, "bits": bits, "errors": errors, "speed": speed})
        print(
            f"| {name} | {bits:.3f} | {' | '.join(f'{one:.4f}' for one in errors.values())} | {speed:.2f} |", flush=True
        )
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


def relative_speed(code: Code, turns: int = 20) -> float:
    """Values per second beside those of bitsandbytes' nf4, scales in fp32 for both."""
    matrix = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    packed: Packed = quantize(matrix, code, BLOCK, double_quant=False)
    theirs, state = functional.quantize_4bit(matrix.bfloat16(), quant_type="nf4", blocksize=BLOCK)
    runs: dict[str, Callable[[], Any]] = {
        "ours": lambda: kernels.dequantize(packed, code, BLOCK, matrix.shape, torch.bfloat16),
        "theirs": lambda: functional.dequantize_4bit(theirs, state),
    }
    best = dict.fromkeys(runs, float("inf"))
    for turn in range(turns):
        for name in [*runs][:: 1 if turn % 2 == 0 else -1]:
            started = time.perf_counter()
            runs[name]()
            best[name] = min(best[name], time.perf_counter() - started)
    return best["theirs"] / best["ours"]


if __name__ == "__main__":
    main()
