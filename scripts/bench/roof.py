"""How fast this machine multiplies matrices now, and the matmul FLOPs that a training step cannot do without.

    python scripts/bench/roof.py

prints the best square product in bfloat16 and in float32, in FLOP per second, as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from cases import Shape

SIZES = {"cpu": (1536, 2048, 2560), "cuda": (4096, 8192)}
SECONDS = 1.5


def main() -> None:
    """Prints the roofs."""
    print(json.dumps({name: probe(name) for name in ("bfloat16", "float32")}))


def probe(dtype: str) -> float:
    """FLOP per second of the fastest square product, on the device that would be trained on.

    In float32 with the precision that PyTorch has by default: no TF32.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    best = 0.0
    for size in SIZES[device]:
        left, right = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
        ends = time.perf_counter() + SECONDS / len(SIZES[device])
        while time.perf_counter() < ends:
            started = time.perf_counter()
            torch.mm(left, right)
            if device == "cuda":
                torch.cuda.synchronize()
            best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def required_flops(shape: Shape, lengths: Sequence[int], trained: int, r: int = 16) -> float:
    """Matmul FLOPs of forward and backward over rows of these lengths with a frozen base and a LoRA of rank r.

    Per weight and token, frozen linears and the head 4: a product forward, one for the input's gradient. The head only
    at the `trained` positions whose next token is trained. LoRA's A and B 6: their own gradient besides. Attention per
    row and layer 2 products forward and 4 backward of T x T x hidden, of which the causal half counts. Recomputation,
    dequantisation, norms, softmax and padding are not required, and lower the fraction of the roof.
    """
    width = shape.hidden // shape.heads
    queries, keys = shape.heads * width, shape.kv_heads * width
    linears = [
        *((shape.hidden, out) for out in (queries, keys, keys, shape.intermediate, shape.intermediate)),
        (queries, shape.hidden),
        (shape.intermediate, shape.hidden),
    ]
    frozen = shape.layers * sum(inner * outer for inner, outer in linears)
    lora = shape.layers * sum(r * (inner + outer) for inner, outer in linears)
    head = shape.vocab * shape.hidden
    attention = shape.layers * sum(6 * 2 * length**2 * queries / 2 for length in lengths)
    return sum(lengths) * (4 * frozen + 6 * lora) + 4 * trained * head + attention


if __name__ == "__main__":
    main()
