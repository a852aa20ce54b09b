"""A run recomputes as few layers as its free memory asks for, and what cannot be planned still trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora_cli import commands
from qlora_cli.display import QuietReport
from qlora_cli.model.adapter import attach_adapter
from qlora_cli.model.base import Base, load_base
from qlora_cli.model.kept_weights import all_weights_bytes
from qlora_cli.plan import fitting
from qlora_cli.plan.fitting import LEAST_SHARE, SPARE_BYTES, SPARE_SHARE, Fitting, fewest_within, there
from qlora_cli.plan.memory import Memory, Rehearsals
from qlora_cli.plan.meta_base import meta_model
from qlora_cli.quant.layers import quantized_linear
from qlora_cli.recipe import Recipe
from qlora_cli.train.recompute import Choice, Need, Seen
from qlora_cli.train.room import Room
from tests.plan.measured import recipe_for
from tests.tiny import write_tiny_model

LAYERS, ROWS, LENGTH = 4, 2, 256


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("llama"), num_hidden_layers=LAYERS, hidden_size=128)


@pytest.fixture(scope="module")
def recipe(llama: Path) -> Recipe:
    training = {"micro_batch_size": ROWS, "gradient_accumulation_steps": 2}
    return recipe_for(llama, quantization={"compute_dtype": "bfloat16"}, training=training)


@pytest.fixture(scope="module")
def need(recipe: Recipe) -> Need:
    return Need(load_base(recipe, torch.device("cpu")), ROWS, LENGTH, True)


@pytest.fixture(scope="module")
def planned(recipe: Recipe, need: Need) -> list[Memory]:
    """By the number of layers recomputed."""
    stage = Rehearsals(recipe, meta_model(recipe, need.base.config, "cpu"), "cpu")
    return [stage.memory(ROWS, LENGTH, number) for number in range(LAYERS + 1)]


class OnGpu(Base):
    """A base that believes itself on a GPU."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda")


def on_gpu(need: Need) -> Need:
    base = need.base
    known = (base.folder, base.tokenizer, base.stop_token_ids, base.config, base.task)
    return replace(need, base=OnGpu(*known, base.model, base.compute_dtype, base.summary))


def needed(memory: Memory, share: float = 1.0, kind: str = "cpu") -> int:
    """On a CPU with the copy of adapter and optimizer state that a checkpoint is written from."""
    step, kinds = memory.peak.num_bytes - there(memory), memory.peak.by_kind
    snapshot = kinds["adapter"] + kinds["optimizer"] if kind == "cpu" else 0
    return memory.reserved_bytes + round((share - 1 + SPARE_SHARE) * step) + SPARE_BYTES[kind] + snapshot


def choose(recipe: Recipe, need: Need, num_bytes: int, held_bytes: int = 0) -> tuple[Fitting, Choice]:
    planner = Fitting(recipe, lambda device: Room(num_bytes - held_bytes, held_bytes))
    return planner, planner.choose(need)


def test_as_few_layers_are_recomputed_as_the_room_asks_for(recipe, need, planned):
    for number, memory in enumerate(planned[:LAYERS]):
        _, choice = choose(recipe, need, needed(memory))
        assert choice.number == number
        (line,) = choice.lines
        assert line.startswith(f"memory   planned peak {memory.reserved_bytes / 1e6:.1f} MB of ")
        _, more = choose(recipe, need, needed(memory) - 1)
        assert more.number > number or needed(planned[-1]) > needed(memory) - 1


def test_what_the_process_holds_counts_as_far_as_the_plan_counts_it_too(recipe, need, planned):
    """The base is there when memory is read, so what is free is beside it; other holdings are no room for steps."""
    whole, held = needed(planned[0]), there(planned[0])
    assert choose(recipe, need, whole, held_bytes=held)[1].number == 0
    assert choose(recipe, need, whole + 100, held_bytes=held + 100)[1].number == 0
    assert choose(recipe, need, whole, held_bytes=held + 1)[1].number > 0


def test_a_run_that_does_not_fit_goes_on_with_all_layers_and_changes_that_would_fit(recipe, need, planned):
    _, choice = choose(recipe, need, needed(planned[-1]) - (1 << 18))
    assert choice.number == LAYERS
    line, warning = choice.lines
    assert line.endswith(f"all {LAYERS} layers recomputed")
    assert warning.startswith("warning  that is too tight, it may be slow or be killed; these would make it fit")
    assert "training.micro_batch_size: 1 (" in warning
    assert "data.max_length: " in warning
    _, hopeless = choose(recipe, need, 1000)
    assert hopeless.lines[1].endswith("no single key would do")


def test_one_rehearsal_is_enough_where_there_is_room_enough(recipe, need, monkeypatch):
    asked: list[int | None] = []
    whole = Rehearsals.memory

    def memory(stage: Any, number: int, length: int, checkpointed: int | None = None) -> Memory:
        asked.append(checkpointed)
        return whole(stage, number, length, checkpointed)

    monkeypatch.setattr(Rehearsals, "memory", memory)
    choose(recipe, need, 1 << 40)
    assert set(asked) == {0}


def test_what_cannot_be_rehearsed_is_told_and_trained_by_the_old_rule(recipe, need, monkeypatch):
    stored = replace(need.base, config=type(need.base.config)(quantization_config={"quant_method": "gptq"}))
    line = "memory   not planned, no layer recomputed: the base is stored as gptq, whose layers cannot be built"
    choice = choose(recipe, replace(need, base=stored), 1 << 40)[1]
    assert (choice.number, choice.lines[0].partition(" without")[0]) == (0, line)

    def breaks(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a model's own\ncode")

    monkeypatch.setattr(fitting, "meta_model", breaks)
    planner, choice = choose(recipe, need, 1 << 40)
    assert choice.lines == ("memory   not planned, no layer recomputed: ZeroDivisionError: a model's own",)
    assert planner.correct(Seen(1, 8, 0, 1)) is None
    assert choose(recipe, on_gpu(need), 1 << 40)[1].number == LAYERS


def test_a_gpu_is_planned_with_its_own_kernels_and_without_what_it_holds_for_itself(recipe, need):
    stage = Rehearsals(recipe, meta_model(recipe, need.base.config, "cuda"), "cuda")
    memory = stage.memory(ROWS, LENGTH, 2)
    assert memory.reserved_bytes > memory.peak.num_bytes
    assert choose(recipe, on_gpu(need), needed(memory, kind="cuda"))[1].number == 2
    assert torch.cuda.is_available() or not torch.cuda.is_initialized()


def test_the_first_step_corrects_the_plan_both_ways(recipe, need, planned):
    step = planned[1].peak.num_bytes - there(planned[1])
    for share, known in ((1.5, 1.5), (1.0, 1.0), (LEAST_SHARE, LEAST_SHARE), (0.1, LEAST_SHARE)):
        planner, choice = choose(recipe, need, needed(planned[1]))
        assert choice.number == 1
        found = planner.correct(Seen(ROWS, LENGTH, 1, round(share * step)))
        fits = [n for n in range(LAYERS + 1) if needed(planned[n], known) <= needed(planned[1])]
        wanted = min(fits, default=LAYERS)
        assert (found.number if found else 1) == wanted
        assert found is None or f"took {share:.0%} of what was planned" in found.lines[0]
    assert wanted == 0


@pytest.mark.parametrize("most", [0, 1, 2, 7, 32, 80])
def test_few_rehearsals_find_the_fewest_layers(most: int):
    """Every layer saves alike, until the peak is elsewhere."""
    for floor in (0, most // 3, most):
        for budget in range(0, 1100, 37):
            asked: list[int] = []

            def cost(number: int, asked: list[int] = asked, floor: int = floor) -> int:
                asked.append(number)
                return 1000 - 10 * min(number, floor)

            wanted = next((n for n in range(most + 1) if 1000 - 10 * min(n, floor) <= budget), None)
            assert fewest_within(cost, budget, most) == wanted
            assert len(asked) <= fitting.MOST_REHEARSALS
            assert wanted is None or wanted in asked


def test_train_plans_first_and_the_plan_touches_nothing_that_is_learned(make_recipe, tmp_path):
    said: list[str] = []

    class Told(QuietReport):
        def say(self, text: str) -> None:
            said.append(text)

    adapters = []
    for wanted in ("auto", False):
        recipe = make_recipe(
            adapter={"dropout": 0.1},
            training={"gradient_checkpointing": wanted, "max_steps": 2},
            output_dir=str(tmp_path / str(wanted)),
        )
        folder = commands.train(recipe, b"", Told(), main_process=True, resume="auto", pause_at=None)
        adapters.append(load_file(folder / "adapter_model.safetensors"))
    (line,) = (line for line in said if line.startswith("memory"))
    assert line.startswith("memory   planned peak ")
    assert line.endswith(" GB, no layer recomputed")
    assert all(adapters[0][name].equal(adapters[1][name]) for name in adapters[1])


def test_weights_are_kept_in_the_room_that_a_step_leaves_and_count_from_then_on(recipe, need, planned):
    need = replace(need, base=load_base(recipe, torch.device("cpu")))
    attach_adapter(need.base, recipe.adapter)
    every = all_weights_bytes(need.base.model, torch.bfloat16)
    assert every == 2 * sum(module.weight.numel() * 2 for module in quantized_linear(need.base.model).values())
    for number in (0, 2):
        planner, _ = choose(recipe, need, needed(planned[number]) + 1000)
        assert planner.spare(need, number) == 1000
        assert planner.spare(need, number) == 0, "taken"
    fresh = Fitting(recipe, lambda device: Room(needed(planned[2]) + 1000, 0))
    assert fresh.spare(need, 2) == 1000, "where the recipe says how many layers, nobody asked before"
    assert Fitting(recipe, lambda device: Room(1000, 0)).spare(need, 0) == 0
    roomy, _ = choose(recipe, need, 1 << 40)
    assert roomy.spare(need, 0) > every
    assert roomy.rehearsed is not None
    assert roomy.rehearsed.kept_bytes == every


def test_a_run_that_is_fast_keeps_its_weights_and_learns_the_same(make_recipe, rows_file, tmp_path):
    said: list[str] = []

    class Told(QuietReport):
        def say(self, text: str) -> None:
            said.append(text)

    adapters = []
    for value in ("auto", "fast"):
        recipe = make_recipe(
            data={"train": [{"path": str(rows_file)}]},
            training={"max_steps": 2, "memory": value, "gradient_checkpointing": False},
            quantization={"compute_dtype": "bfloat16"},
            output_dir=str(tmp_path / value),
        )
        folder = commands.train(recipe, b"", Told(), main_process=True, resume="auto", pause_at=None)
        adapters.append(load_file(folder / "adapter_model.safetensors"))
    assert [line for line in said if line.startswith("memory")] == [
        "memory   all 14 weights kept dequantised, 147.5 kB beside the rest"
    ]
    assert all(adapters[0][name].equal(adapters[1][name]) for name in adapters[1])
