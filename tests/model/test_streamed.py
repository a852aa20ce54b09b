"""Layers streamed from host memory: every bit of a resident model's gradients, whatever is trained and recomputed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_cli.errors import UserError
from qlora_cli.kernels.host_stack import HostStack
from qlora_cli.kernels.isolation import prepare_packing
from qlora_cli.kernels.layer_stream import LayerStream
from qlora_cli.model import streamed
from qlora_cli.model.adapter import attach_adapter
from qlora_cli.model.base import fingerprint, load_base
from qlora_cli.model.compiled import _has_cpp_compiler, compile_layers
from qlora_cli.model.recompute import checkpointing_layers, recompute
from qlora_cli.model.streamed import Streamed, stream_layers
from qlora_cli.plan.rehearsal import Shape, examples_of
from qlora_cli.quant.layers import quantized_linear, stored_tensors
from qlora_cli.tasks.table import collated
from qlora_cli.train.step import accumulate
from tests.model.tiny_adapters import CPU, DTYPES, randomised, step
from tests.tiny import write_tiny_model

LAYERS = 4


class Late(LayerStream):
    """Copies that arrive no sooner than they are asked for, as a GPU's may: before, there are no numbers in a place."""

    due: dict[int, int]

    def _bring(self, index: int) -> None:
        super()._bring(index)
        self.due = {**getattr(self, "due", {}), index % 2: index}
        self.slots[index % 2].fill_(0xFF)

    def ask(self, index: int) -> None:
        super().ask(index)
        if self.due.get(index % 2) == index:
            host = self.hosts[self.due.pop(index % 2)]
            self.slots[index % 2][: len(host)].copy_(host)


@contextmanager
def late_copies() -> Iterator[None]:
    """Inside the block layers are streamed so."""
    streamed.LayerStream = Late  # type: ignore[misc]
    try:
        yield
    finally:
        streamed.LayerStream = LayerStream  # type: ignore[misc]


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("four"), num_hidden_layers=LAYERS, attention_bias=True))


@pytest.fixture
def build(make_recipe, four_layers):
    """Makes a base and its adapter; with `streams` its layers pass through two places, on the CPU too."""

    def made(streams: bool, adapter: dict[str, Any], **quantization: Any) -> tuple[Any, Any]:
        recipe = make_recipe(
            quantization=quantization, model={"name_or_path": four_layers}, adapter={"r": 4, "alpha": 8, **adapter}
        )
        base = load_base(recipe, CPU)
        if streams:
            with late_copies():
                base.model.stream = stream_layers(base.model, CPU)
        torch.manual_seed(0)
        return base, randomised(attach_adapter(base, recipe.adapter)).train()

    return made


STORED = {
    "nf4": {"data_type": "nf4"},
    "fp4": {"data_type": "fp4", "double_quant": False},
    "int4": {"data_type": "int4", "zero_point": True},
    "nf2": {"data_type": "nf2"},
    "none": {"data_type": "none"},
    "mixed": {"data_type": "nf4", "overrides": {"*.layers.1.*": "int2", "*.layers.2.self_attn.*": "none"}},
}


@pytest.mark.parametrize(
    "targets", ["all-linear", ["q_proj"], ["layers.0.mlp.up_proj", "layers.3.mlp.up_proj"]], ids=str
)
@pytest.mark.parametrize("compute_dtype", DTYPES)
@pytest.mark.parametrize("stored", STORED)
def test_streamed_gradients_are_those_of_a_resident_model_bit_for_bit(build, stored, compute_dtype, targets):
    """Linear layers without an adapter among them, whose backward needs their weight as well."""
    quantization = {**STORED[stored], "compute_dtype": compute_dtype}
    adapter = {"target_modules": targets, "dropout": 0.2}
    base, model = build(False, adapter, **quantization)
    resident = {}
    for number in (0, 2, LAYERS):
        recompute(base.model, number)
        resident[number] = step(base, model)
    base, model = build(True, adapter, **quantization)
    for number in (LAYERS, 0, 2, LAYERS):
        recompute(base.model, number)
        found = step(base, model)
        assert len(found) == len(resident[number]) > 1
        assert all(map(torch.equal, found, resident[number]))


@pytest.mark.parametrize("number", [0, LAYERS])
def test_packed_rows_and_evaluation_between_steps_see_the_same_weights(build, number):
    (base, model), (other, lean) = build(False, {}), build(True, {})
    for one in (base, other):
        prepare_packing(one.model, CPU, 259)
        recompute(one.model, number)
    ids = torch.arange(3, 53).view(2, 25)
    for _ in range(2):
        for mine, theirs in zip(step(other, lean, True), step(base, model, True), strict=True):
            assert torch.equal(mine, theirs)
        with torch.no_grad():
            assert torch.equal(lean.eval()(ids).logits, model.eval()(ids).logits)
        model.train()
        lean.train()


def test_each_layer_is_copied_once_in_forward_and_once_in_backward_and_is_foreseen(build):
    base, model = build(True, {})
    _ = base.tail
    recompute(base.model, LAYERS)
    step(base, model)
    stream = base.model.stream
    stream.copies = stream.late = 0
    step(base, model)  # of two micro-batches
    assert stream.copies == 2 * (2 * LAYERS - 4), "of each pass the last two layers, and the first two, are there yet"
    assert stream.late == 0


def test_two_layers_are_on_the_device_and_all_of_them_on_the_host(build):
    base, _ = build(False, {})
    of_layers = [
        sum(module.weight.nbytes for module in quantized_linear(layer).values())
        for layer in checkpointing_layers(base.model)
    ]
    base, model = build(True, {})
    stream = base.model.stream
    assert len(stream.hosts) == LAYERS
    assert all(max(of_layers) <= len(slot) < 1.5 * max(of_layers) for slot in stream.slots)
    slots = {slot.untyped_storage().data_ptr() for slot in stream.slots}
    linears = [module for module in model.modules() if isinstance(module, Streamed)]
    assert len(linears) == 7 * LAYERS
    assert all(linear.weight.untyped_storage().data_ptr() in slots for linear in linears)


@pytest.mark.parametrize("stored", STORED)
def test_the_fingerprint_is_that_of_the_model_and_not_of_what_is_in_its_places(build, stored):
    (base, _), (other, model) = (build(streams, {}, **STORED[stored]) for streams in (False, True))
    wanted = fingerprint(base.model)
    assert fingerprint(other.model) == wanted
    step(other, model)
    assert fingerprint(other.model) == wanted
    sizes = [sum(tensor.nbytes for _, tensor in stored_tensors(one.model)) for one in (base, other)]
    assert sizes[0] == sizes[1]


def test_a_weight_read_without_being_asked_for_is_another_layers(build):
    """What the tests above would see if a layer were not asked for: the places do change."""
    resident, _model = build(False, {}, data_type="none")
    own = resident.model.model.layers[0].self_attn.q_proj.weight
    base, model = build(True, {}, data_type="none")
    with torch.no_grad():
        model(torch.arange(3, 20)[None])
    assert not torch.equal(base.model.model.layers[0].self_attn.q_proj.weight, own)


@pytest.mark.parametrize(
    ("name", "task"), [("t5", "seq2seq_lm"), ("bert", "sequence_classification"), ("gpt2", "causal_lm")]
)
def test_other_architectures_stream_the_same_gradients(name, task, architecture, make_recipe):
    labels = {"num_labels": 3} if task == "sequence_classification" else {}
    recipe = make_recipe(model={"name_or_path": str(architecture(name)), "task": task, **labels})
    found = []
    for streams in (False, True):
        base = load_base(recipe, CPU)
        if streams:
            with late_copies():
                stream_layers(base.model, CPU)
        torch.manual_seed(0)
        model = randomised(attach_adapter(base, recipe.adapter)).train()
        base.model.config.use_cache = False
        for number in (0, 99):
            recompute(base.model, number)
            model.zero_grad()
            loss = accumulate(base, model, [collated(examples_of(Shape((20, 14)), base), False, base)], 34)
            found.append([loss, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) > 4
    for one in found[1:]:
        assert all(map(torch.equal, one, found[0]))


def test_what_cannot_be_streamed_is_told(make_recipe, four_layers):
    base = load_base(make_recipe(quantization={"data_type": "int8"}), CPU)
    with pytest.raises(UserError, match=r"training.memory: `lean`, and no layer .*Use offload"):
        stream_layers(base.model, CPU)
    recipe = make_recipe(
        quantization={"data_type": "none"},
        model={"name_or_path": four_layers},
        adapter={"modules_to_save": ["layers.1.mlp.up_proj"]},
    )
    base = load_base(recipe, CPU)
    stream_layers(base.model, CPU)
    with pytest.raises(UserError, match=r"adapter\.modules_to_save: names a layer"):
        attach_adapter(base, recipe.adapter)
    base = load_base(recipe, CPU)
    stream_layers(base.model, CPU, recipe.adapter.modules_to_save)
    attach_adapter(base, recipe.adapter)


# ── what recomputed layers are given ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("number", [1, 3, LAYERS])
def test_gradients_are_the_same_with_what_recomputed_layers_are_given_in_host_memory(build, number):
    base, model = build(False, {"dropout": 0.2})
    recompute(base.model, number)
    wanted = step(base, model)
    stack = Watched(CPU)
    recompute(base.model, number, stack)
    for _ in range(2):
        stack.pushed = stack.pulled = 0
        assert all(map(torch.equal, step(base, model), wanted))
        assert stack.pushed == stack.pulled == 2 * (number - 1), "two micro-batches, and the embedding has no gradient"
    assert stack.last is None or stack.last() is None, "nothing is kept behind a step"


class Watched(HostStack):
    """Counts what is taken and given back."""

    pushed = pulled = 0

    def _push(self, tensor: Tensor) -> Any:
        self.pushed += 1
        kept = super()._push(tensor)
        assert kept.host is not None
        assert kept.host.data_ptr() != tensor.data_ptr()
        assert sum(one.fresh is not None for one in below(kept)) == 1, "one is on the device: the one just taken"
        return kept

    def _pull(self, kept: Any) -> Tensor:
        if not isinstance(kept, Tensor):
            self.pulled += 1
        tensor = super()._pull(kept)
        if not isinstance(kept, Tensor):
            fresh = [one.fresh is not None for one in below(kept)]
            assert fresh == [False, True, *[False] * (len(fresh) - 2)][: len(fresh)], "the next one is on its way"
        return tensor


def below(kept: Any) -> list[Any]:
    """A tensor's keeper and those of the tensors before it that are still wanted."""
    found = []
    while kept is not None:
        found.append(kept)
        kept = kept.below() if kept.below is not None else None
    return found


@pytest.mark.skipif(not _has_cpp_compiler(), reason="torch finds no C++ compiler, or no headers of Python")
def test_streamed_layers_are_compiled_as_resident_ones_are(build):
    found = []
    for streams in (False, True):
        torch._dynamo.reset()
        base, model = build(streams, {"target_modules": ["q_proj"]}, compute_dtype="bfloat16")
        recompute(base.model, 2, HostStack(CPU) if streams else None)
        compile_layers(model)
        found.append(step(base, model))
    assert len(found[0]) > 1
    assert all(map(torch.equal, *found))
