"""Greedy answers are transformers' own, end at the stop token, and do not depend on the batch."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.data.encode import IGNORE_INDEX, Example
from qlora_cli.evaluate.generate import Answer, Decoding, batches_of_one_length, generate_answers, prompt_and_reference
from qlora_cli.model.base import Base, load_base
from tests.tiny import train_rows


@pytest.fixture(scope="module")
def ready(tiny_model, rows_file):
    from qlora_cli.recipe import Recipe

    recipe = Recipe.model_validate(
        {
            "model": {"name_or_path": str(tiny_model)},
            "quantization": {"compute_dtype": "float32"},
            "data": {"train": [{"path": str(rows_file)}]},
        }
    )
    base = load_base(recipe, torch.device("cpu"))
    return base, train_rows(recipe, base)


def answers_of(base: Base, rows: Sequence[Example], size: int, max_new_tokens: int = 12) -> list[Answer]:
    """The answers in the order in which they are done."""
    return [answer for _, answer in generate_answers(base, base.model, rows, size, Decoding(max_new_tokens))]


def test_answers_equal_a_plain_greedy_loop_for_every_batch_size(ready):
    base, rows = ready
    expected = {}
    with torch.no_grad():
        for row in rows:
            ids = list(prompt_and_reference(row)[0])
            answer: list[int] = []
            while len(answer) < 12:
                token = base.model(torch.tensor([ids])).logits[0, -1].argmax().item()
                if token in base.stop_token_ids:
                    break
                ids.append(token)
                answer.append(token)
            expected[row.where] = base.tokenizer.decode(answer, skip_special_tokens=True)
    for size in (1, 5):
        answers = answers_of(base, rows, size)
        assert {answer.where: answer.generated for answer in answers} == expected


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 6), st.integers(1, 30))
def test_prompts_of_a_batch_have_one_length_and_short_ones_are_more(lengths: list[int], size: int, num_new: int):
    batches = list(batches_of_one_length([[0] * length for length in lengths], size, num_new))
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    budget = size * (max(lengths) + num_new)
    for batch in batches:
        (length,) = {lengths[row] for row in batch}
        assert len(batch) * (length + num_new) <= budget
        left = lengths[batch[0] :].count(length)
        assert len(batch) == left or (len(batch) + 1) * (length + num_new) > budget, "no smaller than it has to be"
    assert [lengths[batch[0]] for batch in batches] == sorted((lengths[b[0]] for b in batches), reverse=True)


def test_the_bases_own_generation_settings_do_not_matter(ready, monkeypatch):
    from transformers import GenerationConfig

    base, rows = ready
    plain = answers_of(base, rows[:4], 4)
    odd = GenerationConfig(repetition_penalty=5.0, num_return_sequences=2, do_sample=True, min_new_tokens=9)
    monkeypatch.setattr(base.model, "generation_config", odd)
    assert answers_of(base, rows[:4], 4) == plain
    assert base.model.generation_config is odd


def test_prompt_and_reference_are_the_last_answers():
    ignore = IGNORE_INDEX
    two_turns = Example([5, 6, 7, 8, 9, 4], [ignore, 6, ignore, ignore, 9, ignore], "here")
    assert prompt_and_reference(two_turns) == ([5, 6, 7, 8], [9])
    assert prompt_and_reference(Example([5, 6], [5, 6], "here")) is None, "plain text has no prompt"
    after_bos = Example([1, 6], [ignore, 6], "here")
    assert prompt_and_reference(after_bos, 1) is None, "nor has text behind BOS"
    assert prompt_and_reference(after_bos, 2) == ([1], [6])


def test_the_reference_is_the_answer_without_its_stop_token(ready):
    base, rows = ready
    answers = answers_of(base, rows[:3], 1, 2)
    assert {answer.expected for answer in answers} == {"0", "1 batman", "2 batman batman"}
    assert all(answer.prompt.endswith("<|im_start|>assistant\n") for answer in answers)
