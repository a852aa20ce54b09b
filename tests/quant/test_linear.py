"""A packed layer multiplies with exactly the values it stores, passes gradients on, and keeps its bits anywhere."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qlora_cli.quant import blockwise, kernels
from qlora_cli.quant.blockwise import quantize
from qlora_cli.quant.codebooks import bits_per_weight
from qlora_cli.quant.data_types import CLIPS, CODES
from qlora_cli.quant.linear import PackedLinear
from qlora_cli.quant.packed import BUFFERS, Storage

STORAGES = {
    **{name: Storage(name) for name in CODES},
    "nf4 of single scales": Storage("nf4", double_quant=False),
    "int2 in blocks of 16": Storage("int2", block_size=16),
    "nf2 in blocks of 48": Storage("nf2", block_size=48),
    "int4 with zero point": Storage("int4", zero_point=True),
    "int2 with zero point": Storage("int2", block_size=32, zero_point=True, double_quant=False),
}


def layer_of(storage: Storage, out: int = 24, inner: int = 96, bias: bool = True) -> tuple[PackedLinear, Tensor]:
    """A layer and the weight that it was given."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((out, inner), generator=generator)
    layer = PackedLinear(inner, out, bias, storage)
    layer.store(layer.packed_from(weight))
    if bias:
        layer.bias.data = torch.randn(out, generator=generator)
    return layer, weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", STORAGES)
def test_the_fast_kernels_give_the_bits_of_the_plain_one(name, dtype):
    storage = STORAGES[name]
    layer, weight = layer_of(storage)
    packed = quantize(weight, storage.code, storage.block_size, storage.double_quant)
    plain = blockwise.dequantize(packed, storage.code, weight.shape, dtype)
    assert torch.equal(layer.dequantized(dtype), plain)
    assert torch.equal(kernels.dequantize(packed, storage.code, storage.block_size, weight.shape, dtype), plain)


@pytest.mark.parametrize("name", STORAGES)
def test_product_and_gradient_are_those_of_the_stored_weight(name):
    layer, _ = layer_of(STORAGES[name])
    x, other = (torch.randn(3, 5, 96, generator=torch.Generator().manual_seed(1), requires_grad=True) for _ in "ab")
    found, wanted = layer(x), F.linear(other, layer.dequantized(), layer.bias)
    assert torch.equal(found, wanted)
    found.square().sum().backward()
    wanted.square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-6, atol=1e-5)
    assert [name for name, one in layer.named_parameters() if one.requires_grad or one.grad is not None] == []


@pytest.mark.parametrize("name", ["nf4", "int2", "int4 with zero point"])
def test_under_autocast_it_multiplies_in_its_type_and_under_checkpointing_gradients_are_the_same(name):
    layer, _ = layer_of(STORAGES[name], bias=False)
    x = torch.randn(4, 96, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, F.linear(x.bfloat16(), layer.dequantized(torch.bfloat16)))
    (plain,) = torch.autograd.grad(layer(x).square().sum(), x)
    (recomputed,) = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), x)
    assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("name", STORAGES)
def test_it_is_saved_loaded_copied_and_cast_without_losing_a_bit(name, tmp_path):
    layer, _ = layer_of(STORAGES[name])
    wanted = layer.dequantized()
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    loaded = PackedLinear(96, 24, True, STORAGES[name], device="cpu")
    loaded.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    for one in (loaded, copy.deepcopy(layer), copy.deepcopy(layer).to(torch.bfloat16), copy.deepcopy(layer).half()):
        assert torch.equal(one.dequantized(), wanted)
    assert copy.deepcopy(layer).to(torch.bfloat16).bias.dtype == torch.bfloat16
    on_meta = PackedLinear(96, 24, True, STORAGES[name], device="meta")
    shapes = {key: (tensor.shape, tensor.dtype) for key, tensor in layer.state_dict().items()}
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in on_meta.state_dict().items()} == shapes


@pytest.mark.parametrize(("name", "bits"), [("nf2", 2.127), ("nf4", 4.127), ("int2", 2.127)])
def test_the_buffers_hold_the_bits_that_are_promised(name, bits):
    layer, weight = layer_of(Storage(name), out=512, inner=512, bias=False)
    held = sum(tensor.numel() * tensor.element_size() for tensor in (layer.weight, *layer.buffers()))
    assert 8 * held / weight.numel() == pytest.approx(bits, rel=1e-3)
    assert bits_per_weight(layer.code.bits, 64, double_quant=True) == pytest.approx(bits, rel=1e-3)


def test_zero_points_cost_their_bits():
    layer, weight = layer_of(Storage("int4", zero_point=True), out=512, inner=512, bias=False)
    held = sum(tensor.numel() * tensor.element_size() for tensor in (layer.weight, *layer.buffers()))
    wanted = bits_per_weight(4, 64, double_quant=True, zero_point=True)
    assert 8 * held / weight.numel() == pytest.approx(wanted, rel=1e-3)
    assert {name for name in BUFFERS if getattr(layer, name) is None} == set()


def test_peft_attaches_lora_that_learns_beside_the_frozen_codes():
    layers = [layer_of(Storage("int2"), 96, 96)[0] for _ in range(2)]
    model = get_peft_model(nn.Sequential(*layers), LoraConfig(r=4, target_modules=["0", "1"]))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.1)
    for _ in range(2):
        model(torch.randn(8, 96)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if "lora_" in name}


def test_an_adapter_on_stored_weights_is_the_adapter_on_their_values():
    layer, _ = layer_of(Storage("nf2"), bias=False)
    plain = nn.Linear(96, 24, bias=False)
    plain.weight.data = layer.dequantized()
    torch.manual_seed(0)
    packed_model = get_peft_model(nn.Sequential(layer), LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    plain_model = get_peft_model(nn.Sequential(plain), LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    adapter = {name: tensor for name, tensor in packed_model.state_dict().items() if "lora_" in name}
    plain_model.load_state_dict(adapter, strict=False)
    x = torch.randn(3, 96)
    torch.testing.assert_close(packed_model(x), plain_model(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("name", ["int4", "int2"])
def test_every_clipping_range_is_its_own(name, zero_point, clip):
    weight = torch.randn((64, 64), generator=torch.Generator().manual_seed(0))
    found = {}
    for other in (clip, "absmax", "auto"):
        layer = PackedLinear(64, 64, False, Storage(name, zero_point=zero_point, clip=other))
        layer.store(layer.packed_from(weight))
        found[other] = float((layer.dequantized() - weight).norm())
    assert clip == "absmax" or found[clip] != found["absmax"]
    assert found["auto"] <= min(found.values()) * 1.0001


def test_it_shows_how_it_is_stored():
    assert "in_features=96, out_features=24, bias=True, Storage(data_type='int2'" in repr(layer_of(Storage("int2"))[0])


def test_a_bias_that_is_trained_gets_its_gradient():
    """PEFT's bias: lora_only sets requires_grad on biases of the base."""
    layer, _ = layer_of(Storage("int4"))
    layer.bias.requires_grad_(True)
    x = torch.randn(3, 5, 96)
    layer(x).square().sum().backward()
    wanted = torch.zeros(24, requires_grad=True)
    F.linear(x, layer.dequantized(), layer.bias.detach() + wanted).square().sum().backward()
    torch.testing.assert_close(layer.bias.grad, wanted.grad)
