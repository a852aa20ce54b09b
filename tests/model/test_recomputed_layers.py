"""Recomputing the first layers: the gradients of a model that keeps everything, and nothing left in its evaluations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_cli.kernels.isolation import prepare_packing
from qlora_cli.model.recompute import checkpointing_layers, recompute
from qlora_cli.plan.rehearsal import Shape, examples_of
from qlora_cli.tasks.table import collated
from qlora_cli.train.step import accumulate
from tests.model.tiny_adapters import CPU, DTYPES, IDS, built, randomised, step
from tests.tiny import write_tiny_model

LAYERS = 3


@pytest.fixture(scope="module")
def three_layers(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("three"), num_hidden_layers=LAYERS))


@pytest.fixture
def build(make_recipe, three_layers) -> Callable[..., tuple[Any, Any]]:
    """Makes a quantised base of three layers and its adapter, with dropout."""

    def made(compute_dtype: str = "float32", **quantization: Any) -> tuple[Any, Any]:
        quantization = {"compute_dtype": compute_dtype, **quantization}
        return built(make_recipe, quantization, {"name_or_path": three_layers}, {"dropout": 0.3})

    return made


class Counter:
    """Forward passes of the MLP of each layer, those in backward too."""

    def __init__(self, model: Any) -> None:
        self.passes = [0] * LAYERS
        for index, layer in enumerate(checkpointing_layers(model)):
            layer.mlp.register_forward_pre_hook(self.count(index))

    def count(self, index: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.passes[index] += 1

        return hook


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("compute_dtype", DTYPES)
@pytest.mark.parametrize("data_type", ["none", "nf4", "int4"])
def test_no_bit_of_a_gradient_depends_on_how_many_layers_are_recomputed(build, data_type, compute_dtype, packed):
    base, model = build(compute_dtype, data_type=data_type)
    if packed:
        prepare_packing(model, CPU, 259)
    found: dict[int, list[Tensor]] = {}
    for number in (0, 1, 2, LAYERS, 1, 0):  # down again too
        recompute(base.model, number)
        one = step(base, model, packed)
        assert all(map(torch.equal, one, found.setdefault(number, one)))
    for number in (1, 2, LAYERS):
        assert all(map(torch.equal, found[0], found[number]))


@pytest.mark.parametrize("number", range(LAYERS + 1))
def test_the_first_layers_are_run_again_and_no_others(build, number):
    base, model = build()
    _ = base.tail  # read by a forward pass of its own
    counter = Counter(base.model)
    recompute(base.model, number)
    step(base, model)  # of two micro-batches
    assert counter.passes == [4] * number + [2] * (LAYERS - number)


def test_evaluations_and_generation_see_nothing_of_it(build):
    base, model = build()

    def seen() -> tuple[Tensor, Tensor]:
        model.eval()
        with torch.no_grad():
            logits = model(input_ids=IDS, use_cache=True).logits
            words = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, use_cache=True, pad_token_id=0)
        model.train()
        return logits, words

    before = seen()
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in base.model.modules())
    for number in (LAYERS, 1, 0):
        recompute(base.model, number)
        step(base, model)
        assert all(map(torch.equal, seen(), before))
    assert hooks == sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in base.model.modules())


@pytest.mark.parametrize(
    ("name", "task"), [("t5", "seq2seq_lm"), ("bert", "sequence_classification"), ("gpt2", "causal_lm")]
)
def test_other_architectures_learn_the_same_however_many_are_recomputed(name, task, architecture, make_recipe):
    """Encoder and decoder both have layers, in this order; positional and keyword arguments both hand tensors down."""
    from qlora_cli.model.adapter import attach_adapter
    from qlora_cli.model.base import load_base

    labels = {"num_labels": 3} if task == "sequence_classification" else {}
    chosen = {"name_or_path": str(architecture(name)), "task": task, **labels}
    recipe = make_recipe(model=chosen, adapter={"dropout": 0.2})
    base = load_base(recipe, CPU)
    torch.manual_seed(0)
    model = randomised(attach_adapter(base, recipe.adapter)).train()
    base.model.config.use_cache = False
    layers = checkpointing_layers(base.model)
    assert len(layers) == {"t5": 4}.get(name, 2)
    shape = Shape((20, 14))
    found = []
    for number in range(len(layers) + 1):
        recompute(base.model, number)
        model.zero_grad()
        torch.manual_seed(1)
        loss = accumulate(base, model, [collated(examples_of(shape, base), False, base)], 34)
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(one is not None and one.any() for one in gradients if one is not None)
        found.append([loss, *(one.clone() for one in gradients if one is not None)])
    assert all(len(one) == len(found[0]) and all(map(torch.equal, one, found[0])) for one in found)


class Whole(torch.nn.Module):
    """A model that knows no layers, only whether it recomputes."""

    is_gradient_checkpointing = False

    def activation_checkpointing_enable(self, how: Any) -> None:
        assert how == {"use_reentrant": False}
        self.is_gradient_checkpointing = True

    def activation_checkpointing_disable(self) -> None:
        self.is_gradient_checkpointing = False


def test_a_model_without_layers_recomputes_as_a_whole_or_not():
    model = Whole()
    for number in (0, 1, 1, 0):
        recompute(model, number)
        assert model.is_gradient_checkpointing is (number == 1)
