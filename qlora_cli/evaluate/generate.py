"""Answers to held-out prompts, greedy or by beams, and how many are exactly right."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_cli.data.encode import IGNORE_INDEX, Example
from qlora_cli.errors import Exit, UserError
from qlora_cli.model.base import Base
from qlora_cli.tasks.table import MOST_ROWS


class Decoding(NamedTuple):
    """How an answer is generated, by the names of the recipe's section `evaluation`."""

    max_new_tokens: int
    num_beams: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 0


@dataclass(frozen=True)
class Answer:
    """One generated answer beside the reference."""

    where: str
    prompt: str
    expected: str
    generated: str


def prompt_and_reference(example: Example, bos_id: int | None = None) -> tuple[list[int], list[int]] | None:
    """The tokens before the last trained span and that span; None where nothing, or BOS alone, precedes it (text)."""
    end = len(example.labels)
    while example.labels[end - 1] == IGNORE_INDEX:
        end -= 1
    start = end
    while start and example.labels[start - 1] != IGNORE_INDEX:
        start -= 1
    prompt = example.input_ids[:start]
    return (prompt, example.input_ids[start:end]) if prompt and prompt != [bos_id] else None


def batches_of_one_length(prompts: Sequence[Sequence[int]], size: int, num_new: int) -> Iterator[list[int]]:
    """Batches, as indices, of prompts of the same number of tokens, so that no padding can touch an answer.

    Longest first; `size` of the longest prompts at once, of shorter ones as many as take no more tokens with the
    num_new that may follow each, MOST_ROWS or `size` at most.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        groups[len(prompt)].append(index)
    budget = size * (max(groups, default=0) + num_new)
    for length in sorted(groups, reverse=True):
        number = max(size, min(MOST_ROWS, budget // (length + num_new)))
        for start in range(0, len(groups[length]), number):
            yield groups[length][start : start + number]


def generate_answers(
    base: Base, model: Any, examples: Sequence[Example], batch_size: int, decoding: Decoding
) -> Iterator[tuple[int, Answer]]:
    """The index and the answer of every example that has a prompt, as they are done, the longest prompts first.

    Decoding ends at a stop token of the base. Between two batches the model is as it was.
    """
    found = [
        (index, prompt_and_reference(example, base.tokenizer.bos_token_id)) for index, example in enumerate(examples)
    ]
    asked = [(index, pair) for index, pair in found if pair is not None]
    prompts = [prompt for _, (prompt, _) in asked]
    for batch in batches_of_one_length(prompts, batch_size, decoding.max_new_tokens):
        with torch.no_grad(), deciding(base, model, decoding):
            written = _written(base, model, [prompts[at] for at in batch])
        for at, generated in zip(batch, written, strict=True):
            index, (prompt, reference) = asked[at]
            prompt_text = _text(base, prompt, skip=False)
            yield index, Answer(examples[index].where, prompt_text, _text(base, reference), generated)


def only_numbers(input_ids: Tensor, scores: Tensor) -> Tensor:
    """The scores, as transformers' logits processors return them. Raises UserError where one is NaN."""
    if scores.isnan().any():
        what = "the model's logits are not numbers"
        raise UserError("generate", what, "check its weights and compute_dtype", Exit.FAILED)
    return scores


def _written(base: Base, model: Any, prompts: Sequence[list[int]]) -> list[str]:
    """What the model writes behind prompts of one length."""
    input_ids = torch.tensor(prompts, device=base.device)
    with base.compute():
        output = model.generate(
            input_ids=input_ids, attention_mask=torch.ones_like(input_ids), logits_processor=[only_numbers]
        )
    given = input_ids.shape[1] if base.task == "causal_lm" else 1  # the decoder's start token
    return [_text(base, _until_stop(base, tokens[given:])) for tokens in output.tolist()]


@contextmanager
def deciding(base: Base, model: Any, decoding: Decoding) -> Iterator[None]:
    """Evaluation mode, and generation settings of ours inside the block; what was set before comes back after.

    The base's own generation_config may sample, penalise repetition or return several answers, and transformers takes
    from it whatever a call leaves out.
    """
    from transformers import GenerationConfig

    before, training = base.model.generation_config, model.training
    base.model.generation_config = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        do_sample=False,
        num_beams=decoding.num_beams,
        length_penalty=decoding.length_penalty,
        no_repeat_ngram_size=decoding.no_repeat_ngram_size,
        use_cache=True,
        eos_token_id=sorted(base.stop_token_ids),
        pad_token_id=base.tokenizer.eos_token_id,
        decoder_start_token_id=getattr(base.config, "decoder_start_token_id", None),
    )
    model.eval()
    try:
        yield
    finally:
        base.model.generation_config = before
        model.train(training)


def _until_stop(base: Base, tokens: list[int]) -> list[int]:
    """The tokens before the first stop token: what follows in a batch is padding."""
    for position, token in enumerate(tokens):
        if token in base.stop_token_ids:
            return tokens[:position]
    return tokens


def _text(base: Base, tokens: list[int], skip: bool = True) -> str:
    return base.tokenizer.decode(tokens, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
