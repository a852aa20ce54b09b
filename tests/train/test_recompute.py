"""How many layers are recomputed changes no bit of a run: not when it begins, not when it resumes, not in between."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qlora_cli.display import QuietReport
from qlora_cli.errors import UserError
from qlora_cli.model.recompute import checkpointing_layers
from qlora_cli.train import loop
from qlora_cli.train.recompute import Choice, Need, Recomputing, Seen, grow, words
from qlora_cli.train.run import Run
from tests.tiny import write_tiny_model

LAYERS = 4
PADDED, STREAMED, PACKED = {"packing": False}, {"packing": False, "streaming": True}, {"packing": True}


class Fixed:
    """A planner that knows what it wants, and draws from the generators for it."""

    def __init__(self, number: int, then: int | None = None, room: int = 0) -> None:
        self.number, self.then, self.room = number, then, room
        self.asked: list[Need | Seen] = []

    def choose(self, need: Need) -> Choice:
        self.asked.append(need)
        torch.rand(7)
        return Choice(self.number, ("memory   as planned",))

    def spare(self, need: Need, number: int) -> int:
        torch.rand(7)
        return self.room

    def correct(self, seen: Seen) -> Choice | None:
        self.asked.append(seen)
        torch.rand(7)
        return None if self.then is None else Choice(self.then, ("memory   corrected",))


class Told(QuietReport):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines += [text] if text.startswith(("memory", "resume")) else []


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("four"), num_hidden_layers=LAYERS))


@pytest.fixture
def train(make_recipe, four_layers, rows_file, tmp_path) -> Callable[..., list[str]]:
    """Trains three steps of two micro-batches in a folder, NF4 in bf16 with dropout; returns what was said."""

    def run(folder: str, planner: Any = None, data: Any = PADDED, pause_at: int | None = None, **training: Any) -> Any:
        data = dict(data)
        source = {"path": str(rows_file), "streaming": data.pop("streaming", False)}
        recipe = make_recipe(
            model={"name_or_path": four_layers},
            quantization={"compute_dtype": "bfloat16", "data_type": data.pop("data_type", "nf4")},
            adapter={"dropout": 0.1},
            data={"train": [source], **data},
            training={"max_steps": 3, **training},
            output_dir=str(tmp_path / folder),
        )
        (tmp_path / folder).mkdir(exist_ok=True)
        told = Told()
        loop.train(recipe, Run(tmp_path / folder), told, loop.Manner(pause_at, "auto", planner))
        return told.lines

    return run


def assert_equal(one: Path, other: Path) -> None:
    """Adapters to the byte, and every logged figure but those of time and memory."""
    first, second = ((folder / "adapter/adapter_model.safetensors").read_bytes() for folder in (one, other))
    assert first == second
    assert figures(one) == figures(other)


def figures(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    return [{name: line[name] for name in ("step", "loss", "grad_norm", "learning_rate", "epoch")} for line in lines]


@pytest.mark.parametrize("data", [PADDED, PACKED, STREAMED], ids=["padded", "packed", "streamed"])
def test_the_number_of_recomputed_layers_changes_no_bit_of_a_run(train, tmp_path, data):
    for number in (0, 1, LAYERS):
        assert train(str(number), Fixed(number), data) == ["memory   as planned"]
    assert_equal(tmp_path / "0", tmp_path / "1")
    assert_equal(tmp_path / "0", tmp_path / str(LAYERS))


def test_a_checkpoint_resumes_under_another_number_bit_for_bit(train, tmp_path):
    train("whole", Fixed(0))
    for number, pause_at in ((LAYERS, 1), (1, 2), (0, None)):
        lines = train("paused", Fixed(number), pause_at=pause_at)
    assert lines[0].startswith("resume")
    assert_equal(tmp_path / "whole", tmp_path / "paused")


@pytest.mark.parametrize(("wanted", "number"), [(True, LAYERS), (False, 0)])
def test_true_and_false_are_all_and_none_whatever_a_planner_would_say(train, spied, wanted, number):
    planner = Fixed(2)
    assert train("run", planner, gradient_checkpointing=wanted) == []
    assert planner.asked == []
    assert (spied.session.recomputing.number, spied.session.recomputing.of) == (number, LAYERS)


def test_a_planner_is_told_of_the_largest_micro_batch(train):
    padded, filled = Fixed(0), Fixed(0)
    train("padded", padded, pause_at=1)
    train("filled", filled, {**PACKED, "max_length": 150}, pause_at=1)
    (one,), (other,) = padded.asked, filled.asked
    assert (one.rows, one.packed, other.rows, other.length, other.packed) == (2, False, 2, 150, True)
    assert 60 < one.length < 150
    assert one.base.model.config.num_hidden_layers == LAYERS


# ── out of memory ────────────────────────────────────────────────────────────────────────────────────────────────────


class Spied:
    """The session of a run, whose first layer runs out of memory in the passes that `fails` numbers, from 1 on.

    forward: its forward passes count, those in backward too; else the gradients that come to it.
    """

    def __init__(self) -> None:
        self.fails: set[int] = set()
        self.forward = True
        self.count = 0
        self.session: Any = None

    def take(self, session: Any) -> None:
        self.session = session
        layer = checkpointing_layers(session.base.model)[0]
        layer.self_attn.register_forward_pre_hook(self.enter)
        layer.register_forward_hook(self.watch)

    def enter(self, module: Any, inputs: Any) -> None:
        if self.forward and module.training:  # a base proves something about itself in evaluation mode
            self.passes()

    def watch(self, module: Any, inputs: Any, output: Any) -> None:
        if not self.forward and module.training and output.requires_grad:
            output.register_hook(lambda gradient: self.passes())

    def passes(self) -> None:
        self.count += 1
        if self.count in self.fails:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it.")


@pytest.fixture
def spied(monkeypatch) -> Spied:
    spy, prepare = Spied(), loop.prepare

    def prepared(*arguments: Any) -> Any:
        session = prepare(*arguments)
        spy.take(session)
        return session

    monkeypatch.setattr(loop, "prepare", prepared)
    return spy


PLACES = {
    "the first pass of all": (0, True, {1}),
    "a later step": (0, True, {3}),
    "the middle of a window": (0, True, {4}),
    "a backward pass": (0, False, {3}),
    "a backward pass in the middle of a window": (0, False, {6}),
    "a recomputation": (1, True, {2}),
    "two steps": (0, True, {2, 7}),
}
"""Layers recomputed at first; whether forward passes of the first layer are counted, or backward ones; which of them
fail: a step has two of each, and as many forward ones again where they are recomputed."""


@pytest.mark.parametrize(
    ("place", "data"), [*((place, PADDED) for place in PLACES), ("a later step", PACKED), ("two steps", STREAMED)]
)
def test_a_step_that_ran_out_of_memory_is_repeated_as_if_it_never_had(train, spied, tmp_path, place, data):
    number, forward, fails = PLACES[place]
    train("whole", Fixed(number), data, save_steps=1)
    spied.count, spied.forward, spied.fails = 0, forward, fails
    lines = train("short", Fixed(number), data, save_steps=1)
    assert len([line for line in lines if "ran out" in line]) == len(fails)
    assert spied.session.recomputing.number > number
    assert_equal(tmp_path / "whole", tmp_path / "short")


def test_more_is_recomputed_halfway_and_then_all_and_the_lines_say_so(train, spied):
    spied.fails = {1, 2}
    assert train("run", Fixed(0), pause_at=1)[1:] == [
        "memory   ran out in step 1 with no layer recomputed: it is repeated with layers 0 to 1 of 4 recomputed",
        "memory   ran out in step 1 with layers 0 to 1 of 4 recomputed: it is repeated with all 4 layers recomputed",
    ]


@pytest.mark.parametrize(
    ("wanted", "first", "message"),
    [
        (
            "auto",
            0,
            r"step 1: out of memory at a peak of .* with all 4 layers recomputed.*GiB\. Lower training.micro_batch",
        ),
        (True, 0, r"with all 4 layers recomputed, the longest row has \d+ tokens"),
        (False, 0, r"with no layer recomputed.*, or set training.gradient_checkpointing: true; `qlora plan` tells"),
    ],
)
def test_where_no_more_can_be_recomputed_the_user_is_told_what_to_change(train, spied, wanted, first, message):
    spied.fails = set(range(1, 100))
    with pytest.raises(UserError, match=message) as caught:
        train("run", Fixed(first), gradient_checkpointing=wanted)
    assert ("set training.gradient_checkpointing" in str(caught.value)) is (wanted is False)
    assert "More of it" not in str(caught.value)
    assert spied.count == (3 if wanted == "auto" else 1)


def test_one_of_several_processes_cannot_go_back_alone(train, spied, monkeypatch):
    spied.fails = {1}
    take = loop.take_step

    def of_two(session: Any, *others: Any) -> Any:
        session.accelerator = SimpleNamespace(num_processes=2, process_index=0)
        return take(session, *others)

    monkeypatch.setattr(loop, "take_step", of_two)
    with pytest.raises(UserError, match=r"or set training\.gradient_checkpointing: true"):
        train("run", Fixed(0))


def test_an_optimizer_that_runs_out_of_memory_ends_the_run_once_its_weights_may_have_moved(train, spied, monkeypatch):
    def fails(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no room for its state")

    monkeypatch.setattr(torch.optim.AdamW, "step", fails)
    with pytest.raises(UserError, match=r"step 1: out of memory .*: no room for its state"):
        train("run", Fixed(0))
    assert spied.count == 2, "the passes of one window"


def test_numbers_grow_to_all_and_are_told_in_words():
    recomputing = Recomputing(torch.nn.Linear(1, 1), 0, 0, planner=Fixed(0))
    grown = []
    for number, of, again in ((0, 4, False), (0, 1, False), (3, 4, False), (5, 32, False), (5, 32, True)):
        recomputing.number, recomputing.of = number, of
        recomputing.change = lambda number: grown.append(number)  # type: ignore[method-assign]
        grow(recomputing, again)
    assert grown == [2, 1, 4, 19, 32]
    assert recomputing.planner is None, "the peak of the first step is of one that failed"
    told = [
        "no layer recomputed",
        "layer 0 of 4 recomputed",
        "layers 0 to 1 of 4 recomputed",
        "all 4 layers recomputed",
    ]
    assert [words(number, 4) for number in (0, 1, 2, 4)] == told


# ── weights kept dequantised ─────────────────────────────────────────────────────────────────────────────────────────

WEIGHTS = 2 * LAYERS * (4 * 64 * 64 + 3 * 64 * 128)
"""Bytes that the tiny model's linear layers take in bf16 at most."""


@pytest.mark.parametrize("number", [0, LAYERS])
def test_fast_keeps_as_many_weights_as_there_is_room_for_and_changes_no_bit(train, tmp_path, number):
    train("auto", Fixed(number))
    for room, told in ((WEIGHTS, "all 28 weights"), (WEIGHTS // 2, "17 of 28 weights"), (1, "0 of 28 weights")):
        lines = train(str(room), Fixed(number, room=room), memory="fast")
        assert lines[1].startswith(f"memory   {told} kept dequantised, "), "the small ones that still fit too"
        assert_equal(tmp_path / "auto", tmp_path / str(room))


def test_where_no_weight_can_be_kept_fast_says_so(train):
    lines = train("run", Fixed(0, room=WEIGHTS), memory="fast", data={**PADDED, "data_type": "int8"}, pause_at=1)
    assert lines[1:] == ["memory   fast keeps nothing: no layer with an adapter is dequantised by us into bfloat16"]


def test_a_kept_weight_is_what_is_multiplied_with(train, spied):
    """The test above would pass if none were read."""
    train("run", Fixed(0, room=WEIGHTS), memory="fast", pause_at=1)
    base, model = spied.session.base, spied.session.model
    ids = torch.arange(3, 20)[None]
    with torch.no_grad(), base.compute():
        before = model.eval()(ids).logits
        base.model.model.layers[1].mlp.up_proj.base_layer.kept_weight.zero_()
        assert not torch.equal(model(ids).logits, before)


def test_where_memory_runs_out_no_weight_is_kept_before_more_layers_are_recomputed(train, spied, tmp_path):
    train("whole", Fixed(0))
    spied.count, spied.fails = 0, {3, 4}
    lines = train("short", Fixed(0, room=WEIGHTS), memory="fast")[2:]
    assert lines == [
        "memory   ran out in step 2 with no layer recomputed and weights kept dequantised: "
        "it is repeated with no layer recomputed",
        "memory   ran out in step 2 with no layer recomputed: it is repeated with layers 0 to 1 of 4 recomputed",
    ]
    assert_equal(tmp_path / "whole", tmp_path / "short")
    spied.count, spied.fails = 0, {1, 2}
    with pytest.raises(UserError, match=r"out of memory at a peak of .* with all 4 layers recomputed,"):
        train("all", Fixed(0, room=WEIGHTS), memory="fast", gradient_checkpointing=True)


def test_an_evaluation_that_runs_out_of_memory_is_begun_anew_without_kept_weights(train, spied, tmp_path, monkeypatch):
    held_out, failed = loop.held_out_loss, []

    def fails_once(base: Any, model: Any, *others: Any) -> Any:
        if not failed:
            failed.append(any("kept_weight" in vars(module) for module in model.modules()))
            raise torch.OutOfMemoryError("no room for an evaluation")
        assert not any("kept_weight" in vars(module) for module in model.modules())
        return held_out(base, model, *others)

    data = {**PADDED, "eval_fraction": 0.3}
    train("whole", Fixed(0), data)
    monkeypatch.setattr(loop, "held_out_loss", fails_once)
    lines = train("short", Fixed(0, room=WEIGHTS), data, memory="fast")
    assert failed == [True]
    assert lines[2:] == ["memory   ran out in an evaluation: from here on no weight is kept dequantised"]
    assert_equal(tmp_path / "whole", tmp_path / "short")
    failed.clear()
    with pytest.raises(UserError, match="no room for an evaluation"):
        train("auto", Fixed(0), data)


@pytest.mark.parametrize("memory", ["offload", "lean"])
def test_on_a_cpu_there_is_nothing_to_move_and_all_is_recomputed(train, spied, memory):
    said = f"memory   {memory} moves nothing on a CPU, whose memory is the host's; "
    assert train("auto", Fixed(0), memory=memory) == [f"{said}all 4 layers recomputed"]
    assert train("false", Fixed(0), memory=memory, gradient_checkpointing=False) == [f"{said}no layer recomputed"]


# ── after the first step ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def on_a_gpu(monkeypatch) -> None:
    """The CPU with the counters of a GPU's memory: a step takes 900 bytes more than the 100 that were there."""
    monkeypatch.setattr(loop, "start_measuring", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1000)
    prepare = loop.prepare

    def prepared(*arguments: Any) -> Any:
        session = prepare(*arguments)
        session.recomputing.planner = arguments[-1]
        return session

    monkeypatch.setattr(loop, "prepare", prepared)


@pytest.mark.parametrize("then", [None, 0, 3])
def test_a_planner_hears_once_what_the_first_step_took_and_may_change_its_mind(train, on_a_gpu, spied, tmp_path, then):
    train("whole", Fixed(1))
    planner = Fixed(1, then)
    lines = train("run", planner)
    need, seen = planner.asked
    assert lines == ["memory   as planned", *(["memory   corrected"] if then is not None else [])]
    assert seen == Seen(2, seen.length, 1, 900)
    assert seen.length <= need.length
    assert spied.session.recomputing.number == (1 if then is None else then)
    assert_equal(tmp_path / "whole", tmp_path / "run")
