"""Tokens per second of `qlora chat` beside plain transformers with PEFT on the same run: the median of turns, a table.

    python scripts/bench_chat.py [RUN] [--tokens 40] [--turns 7] [--threads 1] [--prompt TEXT] [--json FILE]

All ways answer the same ids greedily, in one process, in turn; a first round of each is not counted. Plain is a 4-bit
model of transformers and bitsandbytes with `PeftModel`, in the type that the run computes in. Without RUN a Llama of
random weights (85 M, NF4, rank 16) is trained for a step. RUN has to be quantised to nf4 or fp4, or not at all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
QUICKSTART = REPOSITORY / "configs" / "quickstart"
TEXT = "Record: On Sunday, 8 brown candles were borrowed by Valentin."


def made_run(folder: Path) -> Path:
    """A run of one step on a random Llama: 12 layers of 768, as many weights in them as GPT-2 has."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
        num_attention_heads=12, num_key_value_heads=12, max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    values = {
        "model": {"name_or_path": str(folder / "base")},
        "adapter": {"r": 16},
        "data": {"train": [{"path": str(QUICKSTART / "train.jsonl"), "limit": 8}], "max_length": 128},
        "training": {"max_steps": 1, "micro_batch_size": 2, "gradient_accumulation_steps": 1, "optimizer": "adamw"},
        "output_dir": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(json.dumps(values))  # JSON is YAML
    command = [sys.executable, "-m", "qlora_cli", "train", str(folder / "recipe.yaml")]
    subprocess.run(command, check=True, stdout=sys.stderr, cwd=REPOSITORY)
    return folder / "run"


def plain_model(recipe: Any, adapter: Path, dtype: Any) -> Any:
    """The base as transformers loads it in 4 bits, under the adapter as PEFT loads it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    kind = recipe.quantization.data_type
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=recipe.quantization.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )  # fmt: skip
    more = {} if kind == "none" else {"quantization_config": four_bit}
    model = AutoModelForCausalLM.from_pretrained(recipe.model.name_or_path, dtype=dtype, **more)
    return PeftModel.from_pretrained(model, str(adapter)).eval()


def rates(run: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    """Generated tokens per second of every turn, by the way, the reading of the prompt included."""
    import torch

    from qlora_cli.chat.dialogue import Dialogue
    from qlora_cli.chat.session import opened
    from qlora_cli.chat.wanted import Sampling, Voices
    from qlora_cli.display import make_report
    from qlora_cli.recipe import load_recipe

    torch.set_num_threads(options.threads)
    recipe = load_recipe(run / "resolved.yaml", [f"output_dir={run}"])
    with opened(recipe, make_report(), Voices(), Sampling(options.tokens)) as session:
        base = session.speakers[0].base
        dialogue = Dialogue(session, session.speakers[0])
        plain = plain_model(recipe, run / "adapter", base.compute_dtype)
        if session.has_template:
            ids = session.prompts.of([{"role": "user", "content": options.prompt}]).ids
        else:
            ids = session.prompts.of(session.asked(options.prompt) if session.asked else options.prompt).ids
        input_ids = torch.tensor([ids])

        def of_plain() -> int:
            output = plain.generate(
                input_ids=input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=options.tokens,
                do_sample=False, eos_token_id=sorted(base.stop_token_ids),
            )  # fmt: skip
            return int(output.shape[1]) - len(ids)

        def of_chat() -> int:
            dialogue.reset()
            reply = dialogue.ask(options.prompt, lambda text: None)
            return reply.generated_tokens + (reply.stopped == "stop token")

        ways: dict[str, Callable[[], int]] = {"plain transformers + PEFT": of_plain, "qlora chat": of_chat}
        found: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(options.turns + 1):
            for name, way in ways.items():
                began = time.perf_counter()
                number = way()
                if turn:
                    found[name].append(number / (time.perf_counter() - began))
    return found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt", default=TEXT)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = rates(options.run or made_run(Path(folder)), options)
    print("| way | tokens/s, median | lowest | highest |\n| --- | ---: | ---: | ---: |")
    for name, values in found.items():
        print(f"| {name} | {statistics.median(values):.1f} | {min(values):.1f} | {max(values):.1f} |")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
