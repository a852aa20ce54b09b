"""The figures around a rehearsal: the optimizer's state, the allocator, what fits and what to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from qlora_cli.plan import memory
from qlora_cli.plan.advice import offers
from qlora_cli.plan.allocator import LARGE_SEGMENT, SMALL_SEGMENT, reserved
from qlora_cli.plan.memory import MOST_ROWS, Plan, Rehearsals, alike, all_changes, plan
from qlora_cli.plan.meta_base import meta_model
from qlora_cli.plan.optimizer_memory import LEAST_PAGED, STATES, optimizer_state
from qlora_cli.plan.rehearsal import Shape, rehearse_model
from qlora_cli.plan.run_length import Rows
from qlora_cli.plan.search import largest_within
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


def test_a_micro_batch_too_large_to_be_rehearsed_follows_from_smaller_ones(monkeypatch: pytest.MonkeyPatch):
    """To 1% of its rehearsal, in rows and, where one row is too much, in tokens."""
    recipe = tiny_recipe(gradient_checkpointing=True)
    found = meta_model(recipe, CONFIG, "cuda")
    monkeypatch.setattr(memory, "MOST_CELLS", {"cuda": 2048})
    stage = Rehearsals(recipe, found, "cuda")
    for rows, length in ((32, 256), (1, 8192), (3, 2000)):
        told = stage.memory(rows, length)
        real = rehearse_model(found, recipe, Shape((length,) * rows, stage.packed), "cuda")
        assert told.by_proportion
        state = told.peak.by_kind["optimizer"]
        assert told.peak.num_bytes == pytest.approx(real.num_bytes + state, rel=0.01)
        assert told.reserved_bytes >= told.peak.num_bytes
    assert not stage.memory(8, 256).by_proportion


def test_tokens_by_the_million_are_planned():
    """16,384 rows of 513 tokens made an operator fail whose output depends on values; a billion rows have no list."""
    stage = Rehearsals(tiny_recipe(), meta_model(tiny_recipe(), CONFIG, "cuda"), "cuda")
    few, many = stage.memory(100_000, 513).num_bytes, stage.memory(10**9, 513).num_bytes
    assert 9_000 < many / few < 11_000


def test_the_largest_is_never_below_what_is_planned_and_fits():
    recipe = tiny_recipe(micro_batch_size=2)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_length": 257})})
    needed = plan(recipe, CONFIG, "cpu").memory.num_bytes
    found = plan(recipe, CONFIG, "cpu", needed)
    assert (found.fits, found.largest_rows, found.largest_length) == (True, 2, 257)


def test_changes_come_together_until_it_fits_and_none_that_makes_nothing_smaller():
    """Paged state in 32 bits is in the host, where 8 bits make the device's share no smaller."""
    recipe = tiny_recipe(micro_batch_size=2, gradient_checkpointing=True, optimizer="paged_adamw_32bit", memory="lean")
    recipe = recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"r": 512})})
    stage = Rehearsals(recipe, meta_model(recipe, CONFIG, "cuda"), "cuda")

    def needs(**changed: int) -> int:
        adapter = recipe.adapter.model_copy(update={"r": changed.get("r", 512)})
        other = alike(stage, recipe.model_copy(update={"adapter": adapter}), CONFIG)
        return other.memory(changed.get("rows", 2), changed.get("length", 256)).num_bytes

    budget = needs(r=64, rows=1)
    assert needs(rows=1) > budget
    rank = next(rank for rank in (256, 128, 64) if needs(r=rank, rows=1) <= budget)
    found = all_changes(recipe, CONFIG, stage, budget, 256)
    assert found.keys == {"training.micro_batch_size": 1, "adapter.r": rank}
    assert found.num_bytes == needs(r=rank, rows=1)
    found = all_changes(recipe, CONFIG, stage, 1000, 256)
    assert set(found.keys) <= {"training.micro_batch_size", "adapter.r", "data.max_length"}
    assert found.keys["adapter.r"] == 8
    single = recipe.model_copy(update={"training": recipe.training.model_copy(update={"micro_batch_size": 1})})
    found = all_changes(single, CONFIG, alike(stage, single, CONFIG), 1000, 256)
    assert "training.micro_batch_size" not in found.keys


def test_a_lower_rank_is_a_change_and_computing_in_16_bits_is():
    recipe = tiny_recipe(micro_batch_size=1, gradient_checkpointing=True, optimizer="adamw")
    wide = recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"r": 512})})
    needed = plan(wide, CONFIG, "cuda").memory
    told = {change.key: change.value for change in plan(wide, CONFIG, "cuda", needed.num_bytes - 1).changes}
    assert told["adapter.r"] == 256, "the highest that fits"
    slow = recipe.model_copy(
        update={"quantization": recipe.quantization.model_copy(update={"compute_dtype": "float32"})}
    )
    needed = plan(slow, CONFIG, "cuda").memory
    told = {change.key: change.value for change in plan(slow, CONFIG, "cuda", needed.num_bytes - 1).changes}
    assert told["quantization.compute_dtype"] == "bfloat16"


def test_where_auto_recomputes_all_layers_so_do_its_changes():
    recipe = tiny_recipe(micro_batch_size=2, gradient_checkpointing="auto")
    stage = Rehearsals(recipe, meta_model(recipe, CONFIG, "cpu"), "cpu")
    assert stage.checkpointed == 0
    stage.checkpointed = stage.num_layers
    assert alike(stage, recipe, CONFIG).memory(2, 256).num_bytes == stage.memory(2, 256).num_bytes


def test_what_lies_in_host_memory_leaves_the_gpu_and_nothing_else_does():
    """Of a lean run's weights the host has those of all layers and the embedding, the device two layers and a head."""
    recipe = tiny_recipe(gradient_checkpointing=True)
    memories = {}
    for value in ("auto", "offload", "lean"):
        training = recipe.training.model_copy(update={"memory": value})
        memories[value] = plan(recipe.model_copy(update={"training": training}), CONFIG, "cuda").memory
    auto, offload, lean = memories.values()
    embedding = 1024 * 256 * 2
    assert offload.host["weights"] == embedding == on_device(auto) - on_device(offload)
    layer = (lean.host["weights"] - embedding) // 3
    assert layer & (layer - 1) == 0, "pinned in powers of two"
    one = on_device(offload) - on_device(lean)  # all three layers less two that are on the device
    assert layer // 2 < one <= layer
    assert auto.host["activations"] == 0
    for less in (offload, lean):
        assert less.host["activations"] == 2 * 4 * 256 * 256 * 2, "what the second layer and the third are given"
        assert less.peak.num_bytes < auto.peak.num_bytes - embedding
    kinds = ("adapter", "optimizer", "activations", "temporary")
    assert all(lean.peak.by_kind[kind] == offload.peak.by_kind[kind] for kind in kinds)
    assert plan(recipe, CONFIG, "cpu").memory == plan(with_memory(recipe, "lean"), CONFIG, "cpu").memory


def on_device(memory: memory.Memory) -> int:
    return memory.peak.by_kind["weights"]


def with_memory(recipe: Recipe, value: str) -> Recipe:
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"memory": value})})


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_weights_are_kept_dequantised_in_what_a_budget_leaves(kind):
    recipe = tiny_recipe()
    auto, fast = plan(recipe, CONFIG, kind).memory, plan(with_memory(recipe, "fast"), CONFIG, kind).memory
    every = 3 * (4 * 256 * 256 + 3 * 256 * 512) * 2
    assert fast.kept_bytes == every == on_device(fast) - on_device(auto)
    assert fast.num_bytes == auto.num_bytes + every
    for room in (every + 1, every - 1, 1, 0, -1):
        found = plan(with_memory(recipe, "fast"), CONFIG, kind, auto.num_bytes + room)
        assert found.memory.kept_bytes == max(0, min(every, room))
        assert found.memory.keepable_bytes == every
        assert found.fits is (room >= 0)


def test_a_gpu_that_is_too_small_is_told_of_host_memory():
    recipe = tiny_recipe(gradient_checkpointing=True, micro_batch_size=1)
    large = LlamaConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, vocab_size=1 << 15)
    need = {value: plan(with_memory(recipe, value), large, "cuda").memory.num_bytes for value in ("offload", "lean")}
    for value, num_bytes in need.items():
        told = {change.value: change.num_bytes for change in plan(recipe, large, "cuda", num_bytes).changes}
        assert told[value] == num_bytes
    assert "lean" not in {change.value for change in plan(recipe, large, "cuda", need["lean"] - 1).changes}
    assert "lean" not in {change.value for change in plan(recipe, large, "cpu", 1 << 20).changes}
    assert [*offers(recipe, True, "cuda")] == [{"training.memory": "offload"}, {"training.memory": "lean"}]
    assert offers(with_memory(recipe, "fast"), True, "cuda") == offers(recipe, True, "cuda")
    for update in ({"adapter": {"use_dora": True}}, {"quantization": {"data_type": "int8"}}):
        other = recipe_for(Path("somewhere"), **update)
        assert {"training.memory": "lean"} not in offers(other, True, "cuda")


@pytest.mark.parametrize("value", ["auto", "offload"])
def test_int8_is_planned_for_a_gpu(value):
    """Weights of one byte, and in backward one of them dequantised; columns with outliers are not known."""
    recipe = with_memory(recipe_for(Path("somewhere"), quantization={"data_type": "int8"}), value)
    found = plan(recipe, CONFIG, "cuda").memory
    linear, embedding = 3 * (4 * 256 * 256 + 3 * 256 * 512), 1024 * 256 * 2
    rest = embedding * (2 if value == "auto" else 1)
    assert linear + rest < on_device(found) < 1.02 * (linear + rest)
    assert found.peak.by_kind["activations"] > 0


def test_a_device_smaller_than_its_own_context_gets_no_advice():
    found = plan(tiny_recipe(), CONFIG, "cuda", 600 * 10**6)
    assert (found.fits, found.largest_rows, found.changes, found.together) == (False, 0, (), None)


def test_disk_steps_and_tokens_follow_from_recipe_and_rows(roomy: Plan):
    kinds = roomy.memory.peak.by_kind
    one = kinds["adapter"] + kinds["optimizer"]
    assert (roomy.disk.checkpoints, roomy.disk.adapter, roomy.disk.base) == (4 * one, kinds["adapter"], 0)
    assert (roomy.steps, roomy.tokens) == (None, None)
    recipe = tiny_recipe(micro_batch_size=2, gradient_accumulation_steps=3, epochs=2)
    found = plan(recipe, CONFIG, "cpu", rows=Rows(number=20, num_tokens=2000, longest=120))
    assert (found.steps, found.tokens) == (8, 4000)
    assert max(found.memory.peak.shape.lengths) == 120
