"""Rows of every shape, and bases of tiny models, for the tests of the suite `choice`."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qlora_cli.evaluate.choice import ChoiceScore, score_choices
from qlora_cli.evaluate.choice_rows import ChoiceRow, read_choices
from qlora_cli.model.base import Base, load_base
from qlora_cli.recipe import Recipe
from tests.tiny import tiny_tokenizer

VOCAB = 259
"""Bytes and three special tokens: what the tiny tokenizer has."""

WORDS = ("the", "cat", "sat", "on", "a", "mat", "with", "Ünal", "and", "42", "dogs", "near", "Łódź", "while", "rain")


def some_text(draw: random.Random, most: int) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))


def questions(number: int, seed: int = 0, longest: int = 12) -> list[dict[str, Any]]:
    """Rows of {query, choices, gold}; some choices are equal or begin alike, some are the beginning of another."""
    draw = random.Random(seed)
    rows = []
    for index in range(number):
        first = some_text(draw, 4)
        choices = [first, f"{first} {some_text(draw, 3)}", some_text(draw, 5), first][: draw.randint(2, 4)]
        asked = f"Question: {some_text(draw, longest)} {index}?" if index % 2 else some_text(draw, longest)
        rows.append({"query": asked, "choices": choices, "gold": draw.randrange(len(choices))})
    return rows


def continuations(number: int, seed: int = 0, longest: int = 12) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    return [{"context": some_text(draw, longest), "continuation": some_text(draw, 2)} for _ in range(number)]


def mmlu(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows as in the QLoRA repository's MMLU, of three subjects."""
    draw = random.Random(seed)
    rows = []
    for index in range(number):
        subject = f"subject_{index % 3}"
        header = f"The following are multiple choice questions (with answers) about  {subject.replace('_', ' ')}.\n\n"
        answers = "".join(f"\n{letter}. {some_text(draw, 3)}" for letter in "ABCD")
        asked = f"{some_text(draw, 8)} {index}{answers}\nAnswer:"
        rows.append({"subject": subject, "input": header + asked, "output": draw.choice("ABCD")})
    return rows


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(path: str, **how: Any) -> list[ChoiceRow]:
    settings: dict[str, Any] = {"delimiter": None, "shots": 0, "shots_from": None, "limit": None, "seed": 0}
    return read_choices([path], **(settings | how))


def base_in(folder: Path) -> Base:
    """The model of a folder, unquantised, in float32."""
    sections = {"model": {"name_or_path": str(folder)}, "data": {"train": [{"path": "none.jsonl"}]}}
    return load_base(
        Recipe.model_validate(sections | {"quantization": {"data_type": "none", "compute_dtype": "float32"}}),
        torch.device("cpu"),
    )


def base_of(model: Any) -> Base:
    """A model in memory, with a vocabulary of VOCAB, read by bytes."""
    tokenizer = tiny_tokenizer()
    found = (Path("tiny"), tokenizer, frozenset([tokenizer.eos_token_id]), model.config, "causal_lm")
    return Base(*found, model=model, compute_dtype=torch.float32, summary="")


def scores_of(base: Base, rows: Sequence[ChoiceRow], token_budget: int = 512) -> list[list[ChoiceScore]]:
    """The scores in the order of the rows."""
    found = dict(score_choices(base, base.model, rows, token_budget))
    return [found[index] for index in range(len(rows))]


def plain_logprob(model: Any, ids: Sequence[int], num_context: int) -> tuple[float, bool]:
    """The reference: one sequence through the model, what stands behind the context summed token by token."""
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]])).logits[0].double()
    targets = torch.tensor(ids[num_context:])
    behind = logits[num_context - 1 :]
    logprob = behind.log_softmax(dim=-1).gather(1, targets[:, None]).sum().item()
    return logprob, bool((behind.argmax(dim=-1) == targets).all())


def plain_scores(base: Base, rows: Sequence[ChoiceRow]) -> list[list[tuple[float, bool]]]:
    """The same of every choice; bytes are tokens, so context and choice are encoded apart."""

    def encode(text: str) -> list[int]:
        return base.tokenizer(text)["input_ids"]

    return [
        [
            plain_logprob(base.model, [*encode(row.context), *encode(text)], len(encode(row.context)))
            for text in row.choices
        ]
        for row in rows
    ]
