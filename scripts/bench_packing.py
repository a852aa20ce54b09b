"""What packing gains in trained tokens per second, beside what the absence of padding promises: a table.

    python scripts/bench_packing.py ../shared/data [--json FILE]

SmolLM2-135M's shape cut to 8 layers with random weights (speed does not depend on them), LoRA r 16 on all linear
layers, unquantised, on 2 threads of the CPU, rows of 1,024 tokens. The same rows go through the same training step in
three layouts, which take turns (ABC CBA): padded batches of 4 rows in the order of the file, the same batches one row
behind the other (data.packing: auto), and rows packed to 1,024 tokens (data.packing: true). The data folder holds
text/gsm8k/train.jsonl, text/llamafactory/alpaca_en_demo.json and tokenizers/smollm2-135m-instruct/tokenizer.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qlora_cli.data.encode import Example
from qlora_cli.data.examples import Examples, load_examples
from qlora_cli.data.order import Order, micro_batches
from qlora_cli.data.packing import efficiency
from qlora_cli.kernels.isolation import prepare_packing
from qlora_cli.model.adapter import attach_adapter
from qlora_cli.model.base import Base, load_base
from qlora_cli.recipe import Recipe
from qlora_cli.tasks.causal_lm import Batch, PackedBatch, collate_packed
from qlora_cli.tasks.table import batches
from qlora_cli.train.optimizers import build_optimizer
from qlora_cli.train.step import accumulate, clip, seed_everything

CPU = torch.device("cpu")
ROWS = 4  # of a padded batch
DATA = {"gsm8k": "text/gsm8k/train.jsonl", "alpaca": "text/llamafactory/alpaca_en_demo.json"}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

Layout = Callable[[], Iterator[Batch | PackedBatch]]


def main() -> None:
    """One line per data set and dtype."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=576, help="a multiple of 18")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a packed row, and at most of any other")
    parser.add_argument("--bins", type=int, default=3, help="packed rows of a step")
    parser.add_argument("--turns", type=int, default=3, help="measurements of each layout")
    parser.add_argument("--threads", type=int, default=2, help="1 on a busy machine: two wait for each other")
    parser.add_argument("--compute", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path, help="where every single measurement goes")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = []
    print("| data | compute | real tokens of padded batches | packed rows full | padded | auto | packed | kept |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        os.environ["QLORA_CACHE"] = name
        folder = write_model(Path(name), arguments.data, arguments.layers, arguments.hidden)
        for dtype in arguments.compute:
            for data, path in DATA.items():
                recipe = recipe_of(folder, str(arguments.data / path), dtype, arguments.length)
                found.append({"data": data, "dtype": dtype, **measure(recipe, arguments.bins, arguments.turns)})
                print(line(found[-1]), flush=True)
    print("\nTrained tokens per second, the median and in brackets the fastest. kept: packed ÷ (padded ÷ real tokens).")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


def write_model(folder: Path, data: Path, layers: int, hidden: int) -> Path:
    """A Llama with random weights, and SmolLM2's tokenizer beside it."""
    file = data / "tokenizers" / "smollm2-135m-instruct" / "tokenizer.json"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def recipe_of(model: Path, data: str, dtype: str, length: int) -> Recipe:
    """The run that is measured."""
    return Recipe.model_validate(
        {
            "model": {"name_or_path": str(model)},
            "quantization": {"data_type": "none", "compute_dtype": dtype},
            "adapter": {"r": 16},
            "data": {"train": [{"path": data}], "max_length": length, "on_long_row": "skip", "packing": True},
            "training": {"micro_batch_size": ROWS, "optimizer": "adamw"},
        }
    )


def measure(recipe: Recipe, bins: int, turns: int) -> dict[str, Any]:
    """Seconds of a step over the same rows in each layout, and how full these are."""
    base = load_base(recipe, CPU)
    examples = load_examples(recipe.data, "train", base.tokenizer, base.stop_token_ids, seed=0, today=date.today())
    seed_everything(recipe.training.seed)
    model = attach_adapter(base, recipe.adapter)
    with base.compute():
        prepare_packing(base.model, CPU, base.model.get_input_embeddings().weight.shape[0])
    model.train()
    length = recipe.data.max_length
    assert length is not None
    units, shares = rows_of(examples, length, bins)
    layouts = layouts_of(examples, units, length, base)
    optimizer, _ = build_optimizer(model, recipe.training, CPU)
    num_tokens = sum(examples.rows[row].num_trained for unit in units for row in unit)
    seconds: dict[str, list[float]] = {name: [] for name in layouts}
    for layout in layouts.values():  # to warm up
        step_seconds(base, model, optimizer, islice(layout(), 1), num_tokens)
    order = [name for turn in range(turns) for name in [*layouts][:: 1 if turn % 2 == 0 else -1]]
    for name in tqdm(order, leave=False, desc=f"{Path(recipe.data.train[0].path).stem}, {base.compute_dtype}"):
        seconds[name].append(step_seconds(base, model, optimizer, layouts[name](), num_tokens))
    return {**shares, "num_tokens": num_tokens, "seconds": seconds}


def rows_of(examples: Examples, length: int, bins: int) -> tuple[list[list[int]], dict[str, float]]:
    """The first packed rows of the first epoch, and how full packed and padded ones are.

    `share` is over the rows that are measured, `share_of_epoch` over all.
    """
    sources = ((len(examples.rows), 1.0),)
    packed, plain = (Order(sources, 1, 0, examples.lengths, capacity) for capacity in (length, None))
    lengths = examples.lengths.tolist()
    everything = packed.epoch(0)
    units = everything.slice(0, bins)
    return units, {
        "share": real_share(lengths, sorted(row for unit in units for row in unit)),
        "share_of_epoch": real_share(lengths, plain.epoch(0).rows.tolist()),
        "packed_share": efficiency(units, lengths, length),
        "packed_share_of_epoch": efficiency(everything.slice(0, len(everything)), lengths, length),
    }


def real_share(lengths: Sequence[int], rows: Sequence[int]) -> float:
    """The share of real tokens in padded batches of the rows, in their order."""
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in micro_batches(rows, ROWS))
    return sum(lengths[row] for row in rows) / padded


def layouts_of(examples: Examples, units: list[list[int]], length: int, base: Base) -> dict[str, Layout]:
    """The same rows in the three layouts; without packing, in the order of the data, which knows nothing of lengths."""
    rows: list[list[Example]] = [[examples.rows[row] for row in unit] for unit in units]
    plain = [examples.rows[row] for row in sorted(row for unit in units for row in unit)]

    def in_batches(packed: bool) -> Iterator[Batch | PackedBatch]:
        for few in micro_batches(plain, ROWS):
            yield from batches(few, [row.num_tokens for row in few], ROWS, length, packed, base)

    return {
        "padded": lambda: in_batches(False),
        "auto": lambda: in_batches(True),
        "packed": lambda: (collate_packed(unit, CPU) for unit in rows),
    }


def step_seconds(base: Base, model: Any, optimizer: Any, passes: Iterator[Any], num_tokens: int) -> float:
    """A training step, collating included."""
    started = time.perf_counter()
    accumulate(base, model, passes, num_tokens)
    clip([parameter for parameter in model.parameters() if parameter.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - started


def line(found: dict[str, Any]) -> str:
    """A line of the table."""
    rates = {
        name: (found["num_tokens"] / statistics.median(each), found["num_tokens"] / min(each))
        for name, each in found["seconds"].items()
    }
    kept = [packed / (padded / found["share"]) for packed, padded in zip(rates["packed"], rates["padded"], strict=True)]
    shown = " | ".join(f"{middle:,.0f} ({best:,.0f})" for middle, best in rates.values())
    shares = (
        f"{found['share']:.1%}, of the whole epoch {found['share_of_epoch']:.1%} "
        f"| {found['packed_share']:.1%}, of the whole epoch {found['packed_share_of_epoch']:.1%}"
    )
    return f"| {found['data']} | {found['dtype']} | {shares} | {shown} | {kept[0]:.1%} ({kept[1]:.1%}) |"


if __name__ == "__main__":
    main()
