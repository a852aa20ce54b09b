"""Greedy answers to held-out prompts, and how many are exactly right."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from qlora_cli.data.encode import IGNORE_INDEX, Example
from qlora_cli.model.base import Base


@dataclass(frozen=True)
class Answer:
    """One generated answer beside the reference."""

    where: str
    prompt: str
    expected: str
    generated: str

    @property
    def exact(self) -> bool:
        """Equal but for white space at the ends."""
        return self.generated.strip() == self.expected.strip()


def prompt_and_reference(example: Example) -> tuple[list[int], list[int]] | None:
    """The tokens before the last trained span and that span, or None where nothing precedes it (plain text)."""
    end = len(example.labels)
    while example.labels[end - 1] == IGNORE_INDEX:
        end -= 1
    start = end
    while start and example.labels[start - 1] != IGNORE_INDEX:
        start -= 1
    return (example.input_ids[:start], example.input_ids[start:end]) if start > 1 else None


def batches_of_one_length(examples: Sequence[Example], size: int) -> Iterator[list[Example]]:
    """Batches whose prompts have the same number of tokens, so that no padding can touch an answer."""
    groups: dict[int, list[Example]] = defaultdict(list)
    for example in examples:
        if (pair := prompt_and_reference(example)) is not None:
            groups[len(pair[0])].append(example)
    for length in sorted(groups, reverse=True):
        for start in range(0, len(groups[length]), size):
            yield groups[length][start : start + size]


@torch.no_grad()
def generate_answers(
    base: Base, model: Any, examples: Sequence[Example], batch_size: int, max_new_tokens: int
) -> list[Answer]:
    """Greedy answers to every example that has a prompt; decoding ends at a stop token of the base."""
    answers: list[Answer] = []
    with plain_greedy(base, model, max_new_tokens):
        for batch in batches_of_one_length(examples, batch_size):
            pairs = [pair for example in batch if (pair := prompt_and_reference(example)) is not None]
            prompts = torch.tensor([prompt for prompt, _ in pairs], device=base.device)
            with base.compute():
                output = model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts))
            for example, (prompt, reference), tokens in zip(batch, pairs, output.tolist(), strict=True):
                generated = _text(base, _until_stop(base, tokens[len(prompt) :]))
                prompt_text = _text(base, prompt, skip=False)
                answers.append(Answer(example.where, prompt_text, _text(base, reference), generated))
    return answers


@contextmanager
def plain_greedy(base: Base, model: Any, max_new_tokens: int) -> Iterator[None]:
    """Evaluation mode, and generation settings of ours inside the block; what was set before comes back after.

    The base's own generation_config may sample, penalise repetition or return several answers, and transformers takes
    from it whatever a call leaves out.
    """
    from transformers import GenerationConfig

    before, training = base.model.generation_config, model.training
    base.model.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=sorted(base.stop_token_ids),
        pad_token_id=base.tokenizer.eos_token_id,
    )
    model.eval()
    try:
        yield
    finally:
        base.model.generation_config = before
        model.train(training)


def exact_match(answers: Sequence[Answer]) -> float:
    """The share of answers that equal their reference."""
    return sum(answer.exact for answer in answers) / len(answers)


def _until_stop(base: Base, tokens: list[int]) -> list[int]:
    """The tokens before the first stop token: what follows in a batch is padding."""
    for position, token in enumerate(tokens):
        if token in base.stop_token_ids:
            return tokens[:position]
    return tokens


def _text(base: Base, tokens: list[int], skip: bool = True) -> str:
    return base.tokenizer.decode(tokens, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
