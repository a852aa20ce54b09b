"""Greedy answers are transformers' own, end at the stop token, and do not depend on the batch."""

from __future__ import annotations

import pytest
import torch

from qlora_cli.data.encode import IGNORE_INDEX, Example
from qlora_cli.evaluate.generate import Answer, exact_match, generate_answers, prompt_and_reference
from qlora_cli.model.base import load_base
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
        answers = generate_answers(base, base.model, rows, size, 12)
        assert {answer.where: answer.generated for answer in answers} == expected


def test_the_bases_own_generation_settings_do_not_matter(ready, monkeypatch):
    from transformers import GenerationConfig

    base, rows = ready
    plain = generate_answers(base, base.model, rows[:4], 4, 12)
    odd = GenerationConfig(repetition_penalty=5.0, num_return_sequences=2, do_sample=True, min_new_tokens=9)
    monkeypatch.setattr(base.model, "generation_config", odd)
    assert generate_answers(base, base.model, rows[:4], 4, 12) == plain
    assert base.model.generation_config is odd


def test_prompt_and_reference_are_the_last_answers():
    ignore = IGNORE_INDEX
    two_turns = Example([5, 6, 7, 8, 9, 4], [ignore, 6, ignore, ignore, 9, ignore], "here")
    assert prompt_and_reference(two_turns) == ([5, 6, 7, 8], [9])
    assert prompt_and_reference(Example([5, 6], [5, 6], "here")) is None, "plain text has no prompt"


def test_exact_match_forgives_white_space_at_the_ends_only():
    def answer(generated: str) -> Answer:
        return Answer("here", "prompt", "a b", generated)

    assert exact_match([answer("a b"), answer(" a b\n"), answer("a  b"), answer("a")]) == 0.5


def test_the_reference_is_the_answer_without_its_stop_token(ready):
    base, rows = ready
    answers = generate_answers(base, base.model, rows[:3], 1, 2)
    assert {answer.expected for answer in answers} == {"0", "1 batman", "2 batman batman"}
    assert all(answer.prompt.endswith("<|im_start|>assistant\n") for answer in answers)
