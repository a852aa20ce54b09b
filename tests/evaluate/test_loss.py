"""Held-out loss is that of a plain transformers loop, whatever the batch size."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_cli.evaluate.loss import exp, held_out_loss
from qlora_cli.model.base import load_base
from tests.tiny import train_rows

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def plain(tiny_model, tmp_path_factory):
    """Base and eighteen texts of unequal length, in 16-bit-LoRA mode and fp32: the same weights as on disk."""
    import json

    from qlora_cli.recipe import Recipe

    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    texts = [f"line {index} " + "lorem ipsum " * (index % 7) for index in range(18)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    recipe = Recipe.model_validate(
        {
            "model": {"name_or_path": str(tiny_model)},
            "quantization": {"data_type": "none", "compute_dtype": "float32"},
            "data": {"train": [{"path": str(path)}]},
        }
    )
    base = load_base(recipe, CPU)
    rows = train_rows(recipe, base)
    return base, rows, texts


def test_it_equals_a_ten_line_transformers_loop(plain, tiny_model):
    base, rows, texts = plain
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_model), AutoModelForCausalLM.from_pretrained(tiny_model)
    total, tokens = 0.0, 0
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([[*tokenizer.encode(text), tokenizer.eos_token_id]])
            count = ids.shape[1] - 1
            total += model(input_ids=ids, labels=ids).loss.item() * count
            tokens += count
    result = held_out_loss(base, base.model, rows, 4)
    assert result.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert (result.num_targets, result.num_rows) == (tokens, len(texts))


def test_it_does_not_change_with_the_batch_size(plain):
    base, rows, _ = plain
    results = [held_out_loss(base, base.model, rows, size) for size in (1, 3, 5, 18, 100)]
    for result in results[1:]:
        assert result.perplexity == pytest.approx(results[0].perplexity, rel=1e-5)
        assert result.accuracy == results[0].accuracy


def test_short_rows_go_through_in_fewer_passes_of_no_more_tokens(plain):
    base, rows, _ = plain
    shapes: list[torch.Size] = []
    hook = base.model.get_input_embeddings().register_forward_hook(lambda module, ids, out: shapes.append(ids[0].shape))
    try:
        held_out_loss(base, base.model, rows, 2)
    finally:
        hook.remove()
    assert sum(shape[0] for shape in shapes) == len(rows)
    assert max(shape.numel() for shape in shapes) == 2 * max(row.num_tokens for row in rows)
    assert len(shapes) < len(rows) / 2


def test_token_accuracy_counts_greedy_tokens(plain):
    base, rows, _ = plain
    right = 0
    with torch.no_grad():
        for row in rows:
            best = base.model(torch.tensor([row.input_ids])).logits[0].argmax(-1)
            right += (best[:-1] == torch.tensor(row.input_ids[1:])).sum().item()
    result = held_out_loss(base, base.model, rows, 7)
    assert result.accuracy == right / result.num_targets


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_restored(plain, training):
    base, rows, _ = plain
    base.model.train(training)
    held_out_loss(base, base.model, rows[:2], 2)
    assert base.model.training is training
    base.model.eval()


def test_a_huge_loss_is_an_infinite_perplexity():
    assert exp(1000.0) == math.inf
    assert exp(1.0) == math.e
