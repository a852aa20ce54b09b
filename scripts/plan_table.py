"""The tables of docs/plan.md: LLaMA's four sizes as `qlora plan` has them, beside the QLoRA paper's figures.

    python scripts/plan_table.py [7B 13B 33B 65B]
    python scripts/plan_table.py --memory

Shapes are LLaMA's and stand below: no weights, no network, no GPU. One row of 512 tokens, r 64 on all linear layers,
NF4 with double quantisation, bf16, every layer recomputed, paged 8-bit AdamW whose state is in the host's memory. The
16-bit column is the same with data_type none. Full finetuning is arithmetic: 16 bytes for each weight (bf16 weight and
gradient, fp32 master and two moments) and the activations and temporaries of the 16-bit rehearsal.

--memory: Llama-3-8B by training.memory, r 16, one row, every layer recomputed; what a GPU holds, and what the host.
"""

from __future__ import annotations

import argparse
import time
import warnings
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig

from qlora_cli.plan.memory import plan
from qlora_cli.plan.meta_base import meta_model
from qlora_cli.plan.rehearsal import KINDS, Peak, Shape, rehearse_model
from qlora_cli.recipe import Recipe

SHAPES = {
    "7B": (4096, 11008, 32, 32),
    "13B": (5120, 13824, 40, 40),
    "33B": (6656, 17920, 60, 52),
    "65B": (8192, 22016, 80, 64),
}
"""Hidden and intermediate size, layers and heads of LLaMA (Touvron et al. 2023, table 2)."""

PAPER_GB = {"7B": 5, "13B": 10, "33B": 21, "65B": 41}
"""QLoRA, table 6."""

FULL_BYTES = 16
GB = 1e9


class Line(NamedTuple):
    """One size: the peak in 4 bits, that in 16 bits, weights of the bare model, and CPU seconds of a rehearsal."""

    name: str
    in_4_bits: Peak
    in_16_bits: Peak
    num_weights: int
    rehearsal_s: float

    @property
    def full_bytes(self) -> int:
        """Full finetuning, by arithmetic."""
        kinds = self.in_16_bits.by_kind
        return FULL_BYTES * self.num_weights + kinds["activations"] + kinds["temporary"]


def main() -> None:
    """Prints the table, then the 4-bit column by kind, then what the rehearsals cost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sizes", nargs="*", metavar="SIZE", help=f"of {', '.join(SHAPES)}; all without")
    parser.add_argument("--memory", action="store_true", help="the table of training.memory instead")
    options = parser.parse_args()
    names = options.sizes or [*SHAPES]
    if unknown := set(names) - SHAPES.keys():
        parser.error(f"no size of LLaMA: {', '.join(sorted(unknown))}; choose from {', '.join(SHAPES)}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)
    if options.memory:
        by_memory()
        return
    lines = [line_of(name) for name in names]
    print("| | plan, NF4 | paper, NF4 | 16-bit LoRA | full finetuning |\n|---|---|---|---|---|")
    for line in lines:
        cells = [gb(line.in_4_bits.num_bytes), str(PAPER_GB[line.name]), gb(line.in_16_bits.num_bytes)]
        print(f"| {' | '.join([line.name, *cells, gb(line.full_bytes)])} |")
    print(f"\n| GB | {' | '.join(KINDS)} | peak |\n|---|{'---|' * len(KINDS)}---|")
    for line in lines:
        cells = [gb(line.in_4_bits.by_kind[kind]) for kind in KINDS]
        print(f"| {' | '.join([line.name, *cells, line.in_4_bits.where])} |")
    print()
    for line in lines:
        layers = SHAPES[line.name][2]
        print(f"rehearsal of {line.name}, {layers} layers: {line.rehearsal_s:.1f} CPU s after imports")


LENGTHS = (512, 2048, 8192)


def by_memory() -> None:
    """A line for each value of training.memory and length of the row."""
    print("| training.memory | tokens | allocated | reserved | of it weights | in host memory |")
    print("|---|---|---|---|---|---|")
    for value in ("auto", "offload", "lean", "fast"):
        for length in LENGTHS:
            memory = plan(recipe_of("nf4", length, value, r=16), LLAMA_3_8B, "cuda").memory
            held = (memory.peak.num_bytes, memory.reserved_bytes, memory.peak.by_kind["weights"], memory.host_bytes)
            print(f"| {value} | {length:,} | {' | '.join(map(gb, held))} |")


def gb(num_bytes: int) -> str:
    """Bytes in GB, three digits of them."""
    return f"{num_bytes / GB:.2f}" if num_bytes < 100 * GB else f"{num_bytes / GB:.0f}"


def line_of(name: str) -> Line:
    """A size rehearsed in 4 and in 16 bits."""
    config = config_of(name)
    started = time.process_time()
    in_4_bits, _ = rehearsed("nf4", config)
    spent = time.process_time() - started
    in_16_bits, model = rehearsed("none", config)
    num_weights = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    return Line(name, in_4_bits, in_16_bits, num_weights, spent)


def rehearsed(data_type: str, config: Any) -> tuple[Peak, Any]:
    """The peak of a step on a GPU, and the model."""
    recipe = recipe_of(data_type)
    found = meta_model(recipe, config, "cuda")
    return rehearse_model(found, recipe, Shape((512,)), "cuda"), found.model


def config_of(name: str) -> LlamaConfig:
    """LLaMA's configuration of a size."""
    hidden, intermediate, layers, heads = SHAPES[name]
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=2048,
    )


LLAMA_3_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=8192,
)


def recipe_of(data_type: str, length: int = 512, memory: str = "auto", r: int = 64) -> Recipe:
    """The recipe of the tables: of what a run reads it names nothing that is there."""
    return Recipe.model_validate(
        {
            "model": {"name_or_path": "llama"},
            "quantization": {"data_type": data_type, "compute_dtype": "bfloat16"},
            "adapter": {"r": r, "alpha": 16},
            "data": {"train": [{"path": "rows.jsonl"}], "max_length": length},
            "training": {
                "micro_batch_size": 1,
                "gradient_accumulation_steps": 1,
                "gradient_checkpointing": True,
                "memory": memory,
            },
        }
    )


if __name__ == "__main__":
    main()
