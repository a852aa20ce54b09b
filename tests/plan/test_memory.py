"""The figures around a rehearsal: the optimizer's state, the allocator, what fits and what to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from qlora_cli.plan.allocator import LARGE_SEGMENT, SMALL_SEGMENT, reserved
from qlora_cli.plan.memory import MOST_ROWS, Plan, Rehearsals, Rows, plan
from qlora_cli.plan.meta_base import meta_model
from qlora_cli.plan.optimizer_memory import LEAST_PAGED, STATES, optimizer_state
from qlora_cli.plan.search import largest_within, least_within
from qlora_cli.recipe import Recipe
from qlora_cli.recipe.schema import Training
from qlora_cli.train.optimizers import build_optimizer
from tests.plan.measured import recipe_for

CONFIG = LlamaConfig(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=4,
    vocab_size=1024,
    max_position_embeddings=1024,
)


def tiny_recipe(**training: Any) -> Recipe:
    training = {"gradient_checkpointing": False, **training}
    recipe = recipe_for(Path("somewhere"), quantization={"compute_dtype": "bfloat16"}, training=training)
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_length": 256})})


@pytest.mark.parametrize("name", STATES)
def test_an_optimizers_state_is_as_large_as_was_reckoned(name: str):
    sizes = ((64, 63), (64, 64), (300, 77), (1, 5))
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(size)) for size in sizes])
    optimizer, _ = build_optimizer(model, Training(optimizer=name), torch.device("cpu"))
    for parameter in model:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tables = {"qmap1", "qmap2"}  # one for all
    tensors = [t for state in optimizer.state.values() for key, t in state.items() if key not in tables]
    held = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
    assert optimizer_state(name, [parameter.numel() for parameter in model], "cpu") == (held, 0)


def test_a_paged_state_of_large_weights_lies_in_the_host():
    state = optimizer_state("paged_adamw_32bit", [LEAST_PAGED, LEAST_PAGED - 1], "cuda")
    assert state == (8 * (LEAST_PAGED - 1), 8 * LEAST_PAGED)


def test_the_allocator_reserves_segments_and_uses_them_again():
    mib = 1 << 20
    assert reserved([], []) == 0
    assert reserved([1], []) == SMALL_SEGMENT
    assert reserved([3 * mib], []) == LARGE_SEGMENT
    assert reserved([11 * mib], []) == 12 * mib
    assert reserved([], [(0, 5 * mib), (0, -5 * mib), (1, 5 * mib), (2, 5 * mib)]) == LARGE_SEGMENT
    halves = [(0, 10 * mib), (1, 10 * mib), (0, -10 * mib), (1, -10 * mib), (2, 19 * mib), (2, -19 * mib)]
    assert reserved([], halves) == 40 * mib, "two segments do not join, and neither holds 19 MiB"
    joined = [(0, 9 * mib), (1, 9 * mib), (0, -9 * mib), (1, -9 * mib), (2, 17 * mib), (2, -17 * mib)]
    assert reserved([], joined) == LARGE_SEGMENT, "what lies side by side joins when it is free"


@pytest.mark.parametrize("most", [1, 2, 7, 100])
def test_a_search_finds_the_last_number_within_a_budget(most: int):
    for budget in range(0, 120, 7):
        asked: list[int] = []

        def cost(number: int, asked: list[int] = asked) -> int:
            asked.append(number)
            return 3 * number + number * number // 9

        expected = max((n for n in range(1, most + 1) if 3 * n + n * n // 9 <= budget), default=0)
        assert largest_within(cost, budget, most) == expected
        assert expected == 0 or expected in asked
        least = next((n for n in range(most + 1) if 100 - 2 * n <= budget), None)
        assert least_within(lambda n: 100 - 2 * n, budget, most) == least


@pytest.fixture(scope="module")
def roomy() -> Plan:
    return plan(tiny_recipe(micro_batch_size=2), CONFIG, "cpu")


def test_a_plan_tells_memory_by_kind_and_where_the_peak_is(roomy: Plan):
    kinds = roomy.memory.peak.by_kind
    assert kinds["optimizer"] == sum(8 * n + 4 for n in adapter_sizes())
    assert kinds["adapter"] == sum(4 * n for n in adapter_sizes())
    assert roomy.memory.num_bytes >= sum(kinds.values())
    assert " of " in roomy.memory.peak.where
    assert roomy.fits
    assert roomy.largest_rows is None


def adapter_sizes() -> list[int]:
    model = meta_model(tiny_recipe(), CONFIG, "cpu").model
    return [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]


def test_the_largest_micro_batch_fits_and_one_row_more_does_not(roomy: Plan):
    recipe = tiny_recipe(micro_batch_size=2)
    budget = roomy.memory.num_bytes * 2
    found = plan(recipe, CONFIG, "cpu", budget)
    stage = Rehearsals(recipe, meta_model(recipe, CONFIG, "cpu"), "cpu")
    assert found.largest_length
    assert found.largest_rows
    assert 2 <= found.largest_rows < MOST_ROWS["cpu"]
    assert stage.memory(found.largest_rows, 256).num_bytes <= budget
    assert stage.memory(found.largest_rows + 1, 256).num_bytes > budget
    assert stage.memory(2, found.largest_length).num_bytes <= budget
    assert found.largest_length == 1024 or stage.memory(2, found.largest_length + 64).num_bytes > budget


def test_what_does_not_fit_comes_with_changes_that_do(roomy: Plan):
    budget = int(roomy.memory.num_bytes * 0.8)
    found = plan(tiny_recipe(micro_batch_size=2), CONFIG, "cpu", budget)
    assert not found.fits
    assert {change.key for change in found.changes} >= {"training.gradient_checkpointing", "training.micro_batch_size"}
    assert all(change.num_bytes <= budget for change in found.changes)


def test_where_auto_decides_it_fits_with_as_many_layers_recomputed_as_that_takes(roomy: Plan):
    recipe = tiny_recipe(micro_batch_size=2, gradient_checkpointing="auto")
    found = plan(recipe, CONFIG, "cpu", int(roomy.memory.num_bytes * 0.8))
    assert (found.fits, found.memory.checkpointed) == (True, 3)
    assert plan(recipe, CONFIG, "cpu", roomy.memory.num_bytes).memory.checkpointed == 0


def test_a_budget_that_nothing_fits_gets_no_false_promise():
    found = plan(tiny_recipe(), CONFIG, "cpu", 1000)
    assert (found.fits, found.largest_rows, found.largest_length, found.changes) == (False, 0, 0, ())
    assert found.together
    assert found.together.num_bytes > 1000


def test_the_fewest_layers_that_make_it_fit_are_found(roomy: Plan):
    recipe = tiny_recipe(micro_batch_size=2)
    stage = Rehearsals(recipe, meta_model(recipe, CONFIG, "cpu"), "cpu")
    costs = [stage.memory(2, 256, layers).num_bytes for layers in range(4)]
    assert stage.fewest_checkpointed(costs[0], 2, 256) == 0
    assert stage.fewest_checkpointed(costs[1], 2, 256) == 1
    assert stage.fewest_checkpointed(costs[3] - 1, 2, 256) is None


def test_disk_steps_and_tokens_follow_from_recipe_and_rows(roomy: Plan):
    kinds = roomy.memory.peak.by_kind
    one = kinds["adapter"] + kinds["optimizer"]
    assert (roomy.disk.checkpoints, roomy.disk.adapter, roomy.disk.base) == (4 * one, kinds["adapter"], 0)
    assert (roomy.steps, roomy.tokens) == (None, None)
    recipe = tiny_recipe(micro_batch_size=2, gradient_accumulation_steps=3, epochs=2)
    found = plan(recipe, CONFIG, "cpu", rows=Rows(number=20, num_tokens=2000, longest=120))
    assert (found.steps, found.tokens) == (8, 4000)
    assert max(found.memory.peak.shape.lengths) == 120
