"""Scores of choices are those of a plain loop, one sequence at a time, whatever is shared and however it is batched."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from qlora_cli.errors import Exit, UserError
from qlora_cli.evaluate.choice import score_choices
from qlora_cli.evaluate.choice_forward import LONGEST_BRANCH, longest_in_tree
from qlora_cli.evaluate.choice_rows import ChoiceRow
from qlora_cli.model.adapter import attach_adapter
from qlora_cli.model.base import Base, load_base
from tests.evaluate.choices import (
    VOCAB,
    base_in,
    base_of,
    continuations,
    mmlu,
    plain_scores,
    questions,
    read,
    scores_of,
    write,
)
from tests.kernels.tiny_models import MODELS, tiny

WITHOUT_TREES = {
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}
"""Models that have no positions to be told, or a state that runs through the branches."""


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> Base:
    return base_in(tiny_model)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[ChoiceRow]:
    """All shapes, some rows twice."""
    folder = tmp_path_factory.mktemp("choices")
    found = []
    for make in (questions, continuations, mmlu):
        found += read(write(folder / f"{make.__name__}.jsonl", make(9)))
    return [*found, found[0]]


def tiny_base(kind: str, attention: str | None = None, **changes: object) -> Base:
    longest = {"n_positions": 512} if kind == "gpt2" else {"max_position_embeddings": 512}
    return base_of(tiny(kind, attention, **(longest | {"vocab_size": VOCAB} | WITHOUT_TREES.get(kind, {}) | changes)))


def check(base: Base, rows: list[ChoiceRow], token_budget: int, tolerance: float = 1e-4) -> None:
    wanted = plain_scores(base, rows)
    for row, scores, plain in zip(rows, scores_of(base, rows, token_budget), wanted, strict=True):
        for text, score, (logprob, is_greedy) in zip(row.choices, scores, plain, strict=True):
            assert score.logprob == pytest.approx(logprob, rel=1e-6, abs=tolerance)
            assert score.is_greedy == is_greedy
            assert (score.num_tokens, score.num_cut) == (len(text.encode()), 0)
            assert score.num_characters == len(text.strip())
            assert score.num_bytes == len(text.strip().encode())


@pytest.mark.parametrize("token_budget", [1, 300, 10_000])
def test_scores_are_those_of_a_plain_loop(base: Base, rows: list[ChoiceRow], token_budget: int) -> None:
    assert longest_in_tree(base, base.model) > 512
    check(base, rows, token_budget)


@pytest.mark.parametrize("kind", [*MODELS, *WITHOUT_TREES])
def test_every_architecture_scores_as_a_plain_loop_does_at_every_budget(kind: str, rows: list[ChoiceRow]) -> None:
    base = tiny_base(kind)
    some = [row for row in rows if len(row.context) < 100][:8] + rows[-2:]
    check(base, some, 400)
    found = [scores_of(base, some, budget) for budget in (1, 250, 10_000)]
    logprobs = [[score.logprob for each in scores for score in each] for scores in found]
    assert logprobs[0] == pytest.approx(logprobs[1], rel=1e-6, abs=1e-5)
    assert logprobs[0] == pytest.approx(logprobs[2], rel=1e-6, abs=1e-5)


@pytest.mark.parametrize("kind", WITHOUT_TREES)
def test_a_model_that_cannot_read_trees_is_told_by_its_logits(kind: str) -> None:
    base = tiny_base(kind)
    assert longest_in_tree(base, base.model) == 0


@pytest.mark.parametrize(("kind", "attention"), [("llama", "eager"), ("gpt2", "sdpa"), ("qwen3", "sdpa")])
def test_each_attention_reads_trees(kind: str, attention: str) -> None:
    base = tiny_base(kind, attention)
    assert longest_in_tree(base, base.model) == LONGEST_BRANCH


def test_a_sliding_window_bounds_trees_and_no_score(rows: list[ChoiceRow]) -> None:
    """The mask stands in for the window, so what is longer is read without a tree."""
    base = tiny_base("mistral", sliding_window=64)
    assert longest_in_tree(base, base.model) == 64
    assert {len(row.context) > 64 for row in rows} == {True, False}
    check(base, rows, 1000)


def test_rows_on_two_sides_of_a_change_of_frequencies_do_not_tell_each_other(rows: list[ChoiceRow]) -> None:
    """longrope has other frequencies for a whole batch as soon as one of its rows is longer than its first context."""
    lengths = [[len((row.context + choice).encode()) - 1 for choice in row.choices] for row in rows]
    boundary = next(min(each) for each in lengths if min(each) < max(each))
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": boundary}
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}
    base = tiny_base("phi3", rope_parameters=rope | factors, original_max_position_embeddings=boundary)
    assert {max(each) > boundary for each in lengths} == {True, False}
    check(base, rows, 1000)


def test_what_rows_share_is_read_once(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions behind the same long beginning, as five-shot MMLU has them: little more than the questions is read."""
    beginning = "Solved: " + "the cat sat on a mat. " * 12
    asked = [{**row, "query": beginning + row["query"]} for row in questions(6)]
    rows = read(write(tmp_path / "rows.jsonl", asked))
    num_read = 0
    forward = base.model.forward

    def counted(*arguments: object, **named: torch.Tensor) -> object:
        nonlocal num_read
        num_read += named["input_ids"].numel()
        return forward(*arguments, **named)

    monkeypatch.setattr(base.model, "forward", counted)
    longest_in_tree(base, base.model)
    proof, num_read = num_read, 0
    scores_of(base, rows, token_budget=4096)
    own = sum(len(row.context) - len(beginning) + sum(map(len, row.choices)) for row in rows)
    assert num_read - proof < len(beginning) + 1.1 * own


def test_what_a_model_cannot_read_is_cut_in_front_and_counted(base: Base) -> None:
    row = ChoiceRow("rows.jsonl:1", "long " * 150, (" ja", " nein, nein", " j"), 0)
    (scores,) = scores_of(base, [row])
    for text, score in zip(row.choices, scores, strict=True):
        ids = base.tokenizer(row.context.rstrip() + " " * row.context.endswith(" ") + text)["input_ids"]
        kept = ids[-513:]
        assert score.num_cut == len(ids) - 513 > 0
        num_tokens = len(text) + 1  # the space at the end of the context is of the choice
        with torch.no_grad():
            logits = base.model(torch.tensor([kept[:-1]])).logits[0].log_softmax(dim=-1)
        wanted = logits[-num_tokens:].gather(1, torch.tensor(kept[-num_tokens:])[:, None]).sum().item()
        assert score.num_tokens == num_tokens
        assert score.logprob == pytest.approx(wanted, abs=1e-4)


def test_a_choice_longer_than_the_model_reads_is_an_error(base: Base) -> None:
    row = ChoiceRow("rows.jsonl:3", "why?", (" yes", " no" * 200), 0)
    with pytest.raises(UserError, match=r"rows.jsonl:3: a choice has 600 tokens, the model reads 512"):
        scores_of(base, [row])


def test_logits_that_are_not_numbers_are_an_error(rows: list[ChoiceRow]) -> None:
    base = tiny_base("llama")
    with torch.no_grad():
        base.model.lm_head.weight[5] = math.nan
    with pytest.raises(UserError, match="the model's logits are not numbers") as raised:
        scores_of(base, rows[:2])
    assert raised.value.code == Exit.FAILED


def test_mode_and_gradients_are_as_before(base: Base, rows: list[ChoiceRow]) -> None:
    base.model.train()
    try:
        scores = score_choices(base, base.model, rows, 100)
        next(scores)
        assert torch.is_grad_enabled()
        assert not base.model.training
        scores.close()
        assert base.model.training
        assert not base.model.lm_head._forward_pre_hooks
    finally:
        base.model.eval()


def test_an_adapter_on_a_quantised_base_scores_as_a_plain_loop_does(make_recipe, rows: list[ChoiceRow]) -> None:
    recipe = make_recipe(quantization={"data_type": "nf4", "compute_dtype": "float32"})
    base = load_base(recipe, torch.device("cpu"))
    torch.manual_seed(0)
    model = attach_adapter(base, recipe.adapter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.eval()
    wanted = [logprob for each in plain_scores(base, rows[:6]) for logprob, _ in each]  # LoRA is inside of base.model
    found = [score.logprob for _, each in sorted(score_choices(base, model, rows[:6], 300)) for score in each]
    assert found == pytest.approx(wanted, abs=1e-3)


def test_sixteen_bits_share_too(tiny_model: Path, rows: list[ChoiceRow], base: Base, make_recipe) -> None:
    recipe = make_recipe(quantization={"data_type": "none", "compute_dtype": "bfloat16"})
    rough = load_base(recipe, torch.device("cpu"))
    assert longest_in_tree(rough, rough.model) > 0
    for left, right in zip(scores_of(rough, rows), scores_of(base, rows), strict=True):
        for coarse, fine in zip(left, right, strict=True):
            assert coarse.logprob == pytest.approx(fine.logprob, rel=0.02, abs=0.3)
