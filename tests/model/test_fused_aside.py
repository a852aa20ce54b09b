"""Where a layer is no plain LoRA with one active adapter, PEFT's own forward runs; and copies do not outlive a step."""

from __future__ import annotations

import copy
from contextlib import nullcontext, suppress
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from qlora_cli.model.fused import cast_once, fuse_adapter
from tests.model.tiny_adapters import IDS, by_peft, fused_layers, randomised, step


@pytest.mark.parametrize("data_type", ["none", "nf4"])
def test_dora_goes_pefts_way(build, calls, data_type):
    base, model = build({"data_type": data_type}, use_dora=True)
    ours = step(base, model)
    assert not calls
    if fused_layers(model):
        with by_peft(model):
            assert all(map(torch.equal, ours, step(base, model)))


def test_int8_is_left_alone(build, calls):
    base, model = build({"data_type": "int8"})
    assert fused_layers(model) == []
    step(base, model)
    assert not calls


def with_two(model: Any) -> Any:
    """The model with a second adapter on some of its layers."""
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
    return randomised(model)


@torch.no_grad()
def logits(model: Any, **more: Any) -> Tensor:
    found: Tensor = model(IDS, **more).logits
    return found


@pytest.mark.parametrize("data_type", ["none", "nf4", "int4"])
def test_several_adapters_and_adapters_by_row_go_pefts_way(build, calls, data_type):
    model = with_two(build({"data_type": data_type})[1]).eval()
    names = ["default", "other", "__base__"]
    default = logits(model)
    assert len(calls) == 14
    calls.clear()
    by_row = logits(model, adapter_names=names)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    assert len(calls) == 0
    model.set_adapter("other")
    other, off = logits(model), None
    assert len(calls) == 4, "of the layers that have it"
    with model.disable_adapter():
        off = logits(model)
    assert len(calls) == 4
    with by_peft(model):
        assert torch.equal(by_row, logits(model, adapter_names=names))
        torch.testing.assert_close(other, logits(model), rtol=1e-5, atol=1e-5)
        with model.disable_adapter():
            assert torch.equal(off, logits(model))
        model.base_model.set_adapter(["default", "other"])
        assert torch.equal(both, logits(model))
    torch.testing.assert_close(by_row, torch.stack([default[0], other[1], off[2]]), rtol=1e-4, atol=1e-4)
    assert (default - off).abs().max() > 0.1


@pytest.mark.parametrize("data_type", ["none", "nf4"])
def test_merging_and_unmerging_are_pefts(build, calls, data_type):
    _, model = build({"data_type": data_type})
    model.eval()
    before, other = logits(model), copy.deepcopy(model)
    calls.clear()
    model.merge_adapter()
    with by_peft(other):
        other.merge_adapter()
        merged = logits(other)
    assert torch.equal(logits(model), merged)
    assert not calls
    model.unmerge_adapter()
    unmerged, whole = logits(model), model.merge_and_unload()
    assert calls
    assert not any(hasattr(module, "lora_A") for module in whole.modules())
    if data_type == "none":
        for found in (merged, unmerged, logits(whole)):
            torch.testing.assert_close(found, before, rtol=1e-4, atol=1e-4)


class Plain(nn.Module):
    """A model of one layer with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


def plain_model(**config: Any) -> tuple[Any, Any]:
    model: Any = fuse_adapter(
        randomised(peft.get_peft_model(Plain(), peft.LoraConfig(target_modules=["layer"], **config)))
    )
    return model, model.base_model.model.layer


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_a_bias_that_is_trained_has_its_gradient(bias):
    model, layer = plain_model(bias=bias)
    model(torch.ones(3, 8)).sum().backward()
    assert (layer.base_layer.bias.grad is not None) == (bias != "none")


@pytest.mark.parametrize("config", [{"lora_bias": True}, {}])
def test_biases_of_adapters_trained_bases_and_watched_layers_go_pefts_way(config, calls):
    model, layer = plain_model(**config)
    x, seen = torch.randn(3, 8), []
    if not config:
        model(x)
        assert calls.pop() == 0.0
        layer.base_layer.weight.requires_grad_()
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    layer.base_layer.weight.requires_grad_(False)
    layer.base_layer.register_forward_hook(lambda *call: seen.append(call[2].shape))
    model(x)
    assert seen == [(3, 6)]
    assert not calls


@pytest.mark.parametrize("data_type", ["none", "nf4", "int4"])
def test_what_comes_back_is_of_the_type_that_peft_returns(build, calls, data_type):
    base, model = build({"data_type": data_type, "compute_dtype": "bfloat16"})
    layer = fused_layers(model)[0]
    for x in (torch.ones(2, 64), torch.ones(2, 64, dtype=torch.bfloat16)):
        with base.compute():
            ours = layer(x)
            with by_peft(model):
                plain = layer(x)
        assert ours.dtype == plain.dtype
        torch.testing.assert_close(ours, plain, rtol=0.05, atol=0.05)
    assert len(calls) == 2


def test_copies_are_made_once_within_the_block_and_dropped_even_if_it_raises():
    model, layer = plain_model()
    weight = layer.lora_A["default"].weight
    with suppress(KeyError), cast_once(model):
        one = layer.copied(weight, torch.bfloat16)
        assert layer.copied(weight, torch.bfloat16) is one
        assert layer.copied(weight, torch.float32) is weight
        with torch.no_grad():
            assert not layer.copied(weight, torch.bfloat16).requires_grad
        assert one.requires_grad
        raise KeyError
    assert layer.copies is None
    assert "copies" not in model.state_dict()
    weight.data += 1
    for block in (cast_once(model), nullcontext()):
        with block:
            assert torch.equal(layer.copied(weight, torch.bfloat16), weight.bfloat16())
