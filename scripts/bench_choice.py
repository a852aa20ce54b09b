"""Rows per second of the suite `choice` beside lm-evaluation-harness's HF backend, in one process, over the same rows.

    OMP_NUM_THREADS=2 python scripts/bench_choice.py ../shared/data [--compute bfloat16] [--json FILE]

SmolLM2-135M's shape with random weights (speed does not depend on them) on the CPU, the first rows of PIQA and ARC-easy
(text/llm-foundry-eval in the data folder, with tokenizers/smollm2-135m-instruct/tokenizer.json). Both get the same
loaded model and the same texts, and both tokenise, compute and return every log-likelihood. The harness runs at each of
several batch sizes and its fastest one counts; ours runs at several token budgets likewise. The runs take turns,
forwards and then backwards. Every run's log-likelihoods must agree with the harness's, or there is no figure. The last
line is one evaluation of both data sets. Tokens read are those of all sequences, and those that are left where what
choices share is read once: their ratio bounds what sharing can gain.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qlora_cli.evaluate.choice import score_choices
from qlora_cli.evaluate.choice_forward import LONGEST_BRANCH
from qlora_cli.evaluate.choice_rows import ChoiceRow, read_choices
from qlora_cli.evaluate.choice_tokens import encode_rows
from qlora_cli.evaluate.choice_tree import trees_of
from qlora_cli.model.base import Base

DATA = {"piqa": "text/llm-foundry-eval/piqa.jsonl", "arc_easy": "text/llm-foundry-eval/arc_easy.jsonl"}
TOKENIZER = "tokenizers/smollm2-135m-instruct/tokenizer.json"
AGREEMENT = {"float32": 1e-3, "bfloat16": 0.5}
"""Nats by which a log-likelihood may differ; in 16 bits that of 50 tokens is rough."""

KINDS = ("harness", "ours")

Logprobs = list[tuple[float, bool]]


def main() -> None:
    """One line per data set, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int, default=200, help="of each data set")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 8, 16, 32], help="of the harness")
    parser.add_argument("--budgets", type=int, nargs="+", default=[512, 1024], help="tokens of our forward passes")
    parser.add_argument("--turns", type=int, default=2, help="measurements of each, in alternating order")
    parser.add_argument("--compute", choices=AGREEMENT, default="float32")
    parser.add_argument("--json", type=Path, help="where every single measurement goes")
    arguments = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.disable(logging.WARNING)
    base = random_base(arguments.data / TOKENIZER, arguments.layers, getattr(torch, arguments.compute))
    found = []
    print("| data | rows | tokens read | harness (batch size) | ours (token budget) | ratio | largest difference |")
    print("|---|---|---|---|---|---|---|")
    for name, path in DATA.items():
        kind: dict[str, Any] = {"delimiter": None, "shots": 0, "shots_from": None, "seed": 0}
        rows = read_choices([str(arguments.data / path)], limit=arguments.rows, **kind)
        found.append(
            {"data": name, "rows": len(rows), "tokens": tokens_read(base, rows), **measure(base, rows, arguments)}
        )
        print(line(found[-1]), flush=True)
    found.append(together(found))
    print(line(found[-1]), flush=True)
    how = f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, {arguments.compute}"
    print(f"\nRows per second, the fastest of {arguments.turns} runs; {how}.")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


def random_base(tokenizer: Path, layers: int, dtype: torch.dtype) -> Base:
    """SmolLM2-135M's shape with weights drawn from seed 0."""
    fast = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer), bos_token="<|im_start|>", eos_token="<|im_end|>")
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(dtype).eval()
    found = (tokenizer.parent, fast, frozenset([fast.eos_token_id]), config, "causal_lm")
    return Base(*found, model=model, compute_dtype=dtype, summary="")


def measure(base: Base, rows: Sequence[ChoiceRow], arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each run, the best rows per second of both, their ratio, and by how much the scores differ."""
    runs: dict[str, Callable[[], Logprobs]] = {}
    for size in arguments.batch_sizes:
        runs[f"harness {size}"] = lambda size=size: harness(base, rows, size)
    for budget in arguments.budgets:
        runs[f"ours {budget}"] = lambda budget=budget: ours(base, rows, budget)
    wanted = harness(base, rows, arguments.batch_sizes[-1])  # warms up both
    tolerance = AGREEMENT[arguments.compute]
    largest = agreement(wanted, ours(base, rows, arguments.budgets[-1]), tolerance)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(arguments.turns):
        for name in list(runs) if turn % 2 == 0 else reversed(list(runs)):
            begin = time.perf_counter()
            logprobs = runs[name]()
            seconds[name].append(time.perf_counter() - begin)
            largest = max(largest, agreement(wanted, logprobs, tolerance))
    best = {kind: min((min(seconds[name]), name) for name in runs if name.startswith(kind)) for kind in KINDS}
    speeds = {kind: len(rows) / taken for kind, (taken, _) in best.items()}
    return {
        "seconds": seconds,
        "best": {kind: name for kind, (_, name) in best.items()},
        "rows_per_s": speeds,
        "ratio": speeds["ours"] / speeds["harness"],
        "largest_difference": largest,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
    }


def together(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All data sets as one evaluation: the sums of their rows, tokens and fastest runs."""
    rows = sum(each["rows"] for each in found)
    speeds = {kind: rows / sum(each["rows"] / each["rows_per_s"][kind] for each in found) for kind in KINDS}
    return {
        "data": "both",
        "rows": rows,
        "tokens": [sum(each["tokens"][at] for each in found) for at in range(2)],
        "best": dict.fromkeys(KINDS, "each its best"),
        "rows_per_s": speeds,
        "ratio": speeds["ours"] / speeds["harness"],
        "largest_difference": max(each["largest_difference"] for each in found),
    }


def tokens_read(base: Base, rows: Sequence[ChoiceRow]) -> list[int]:
    """Tokens of all sequences, and of the trees that they make; without padding."""
    encoded = list(encode_rows(base.tokenizer, rows, base.context))
    trees = trees_of(encoded, (), LONGEST_BRANCH)
    return [sum(len(each.read) for row in encoded for each in row), sum(len(tree.tokens) for tree in trees)]


def ours(base: Base, rows: Sequence[ChoiceRow], budget: int) -> Logprobs:
    """The score of every choice, in the order of the rows."""
    scores = dict(score_choices(base, base.model, rows, budget))
    return [(score.logprob, score.is_greedy) for index in range(len(rows)) for score in scores[index]]


def harness(base: Base, rows: Sequence[ChoiceRow], batch_size: int) -> Logprobs:
    """The same from lm-evaluation-harness; its logarithms in fp32, where it would take them in the model's dtype."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=base.model, tokenizer=base.tokenizer, batch_size=batch_size, softmax_dtype="float32")
    pairs = [(row.context, choice) for row in rows for choice in row.choices]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    return list(model.loglikelihood(requests, disable_tqdm=True))


def agreement(wanted: Logprobs, found: Logprobs, tolerance: float) -> float:
    """The largest difference of two lists of scores. Raises SystemExit where the two did not compute the same."""
    largest = max(abs(left - right) for (left, _), (right, _) in zip(wanted, found, strict=True))
    if not largest <= tolerance:
        raise SystemExit(f"log-likelihoods differ by up to {largest:.2g} nats: not the same work, so no figure")
    return largest


def line(found: dict[str, Any]) -> str:
    """A row of the table."""
    speeds, best = found["rows_per_s"], found["best"]
    cells = [f"{speeds[kind]:.2f} ({best[kind].removeprefix(kind).strip()})" for kind in KINDS]
    tokens = "{:,} / {:,}".format(*found["tokens"])
    columns = [
        found["data"],
        found["rows"],
        tokens,
        *cells,
        f"{found['ratio']:.2f}",
        f"{found['largest_difference']:.1e}",
    ]
    return f"| {' | '.join(map(str, columns))} |"


if __name__ == "__main__":
    main()
