"""How far a merged model is from the unmerged one, for each compute dtype and dtype written: a table.

    python scripts/merge_error.py

A random Llama of two layers (seed 0, weights of standard deviation 0.1) with a LoRA adapter on all linear layers, A as
it starts and B random, so that the update is as large as a trained one. The table is that of docs/merge.md.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for tests.tiny, the model that the tests use

from qlora_cli.merge.difference import Difference, compare, seen
from qlora_cli.merge.merge import How, merge_adapter
from qlora_cli.model.adapter import attach_adapter, save_adapter
from qlora_cli.model.base import load_base
from qlora_cli.model.owner import Owner
from qlora_cli.quant.layers import quantized_modules
from qlora_cli.recipe import Recipe
from tests.tiny import write_tiny_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CASES = [
    ("nf4", "float32", "float32", "dequantized"),
    ("nf4", "float32", "float16", "dequantized"),
    ("nf4", "float32", "bfloat16", "dequantized"),
    ("nf4", "bfloat16", "float32", "dequantized"),
    ("nf4", "bfloat16", "bfloat16", "dequantized"),
    ("fp4", "float32", "float32", "dequantized"),
    ("none", "float32", "float32", "dequantized"),
    ("nf4", "float32", "float32", "original"),
]
ROWS = [[(7 * row + 13 * position) % 250 + 3 for position in range(40)] for row in range(8)]


def main() -> None:
    """One line per case."""
    print("| base | compute | written | added to | largest logit difference | mean KL, nats | same top token |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_model(Path(folder) / "model")
        for number, (data_type, compute, written, onto) in enumerate(CASES):
            found = measure(model, Path(folder) / str(number), data_type, compute, written, onto)
            print(
                f"| {data_type} | {compute} | {written} | {onto} | {found.max_abs:.1e} | {found.mean_kl:.1e} "
                f"| {found.top1_agreement:.1%} |"
            )


def next_tokens(model: Any, row: list[int]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The logits behind every token of a row; the loss is not asked for."""
    return model(input_ids=torch.tensor([row])).logits[0], torch.zeros(()), 0


def measure(model: Path, folder: Path, data_type: str, compute: str, written: str, onto: str) -> Difference:
    """Merges one case and compares it with the unmerged model."""
    recipe = Recipe.model_validate(
        {
            "model": {"name_or_path": str(model)},
            "quantization": {"data_type": data_type, "compute_dtype": compute},
            "data": {"train": [{"path": "unused.jsonl"}]},
        }
    )
    base = load_base(recipe, torch.device("cpu"))
    names = sorted(quantized_modules(base.model))
    torch.manual_seed(1)
    unmerged = attach_adapter(base, recipe.adapter)
    for name, parameter in unmerged.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    save_adapter(unmerged, folder / "adapter", Owner(str(model)))
    with base.compute():
        reference = seen(unmerged, ROWS, next_tokens, 1 << 30).logits
    how = How(recipe.quantization, base.compute_dtype, onto, DTYPES[written], names)  # type: ignore[arg-type]
    merge_adapter(model, folder / "adapter", folder / "merged", how)
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=DTYPES[written])
    return compare(reference, seen(merged, ROWS, next_tokens, 1 << 30).logits)


if __name__ == "__main__":
    main()
