"""The work-round layer against plain torch, in shapes where bitsandbytes' own layer is wrong on CPU."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qlora_cli.quant.linear4bit import Linear4bitByBlocks, work_round_cpu_dequantize
from qlora_cli.quant.roundtrip import values


def four_bit(in_features, out_features, dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    layer = Linear4bit(in_features, out_features, bias=bias, compute_dtype=dtype, quant_type="nf4")
    return layer.to(dtype).to("cpu").requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("in_features", "out_features"), [(48, 80), (288, 96), (720, 33), (64, 128), (30, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradient_are_those_of_the_dequantised_weight(in_features, out_features, dtype, bias):
    layer = four_bit(in_features, out_features, dtype, bias)
    layer.__class__ = Linear4bitByBlocks
    weight = values(layer.weight).to(dtype)
    x = torch.randn(2, 5, in_features, dtype=dtype, requires_grad=True)
    plain = x.detach().clone().requires_grad_()
    got, expected = layer(x), F.linear(plain, weight, layer.bias)
    upstream = torch.randn_like(got)
    got.backward(upstream)
    expected.backward(upstream)
    assert got.dtype == dtype
    assert torch.equal(got, expected)
    torch.testing.assert_close(x.grad, plain.grad)


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="the fault is in the AVX-512 kernel")
def test_bitsandbytes_own_layer_is_wrong_in_this_shape():
    layer = four_bit(288, 96)
    x = torch.randn(4, 288, requires_grad=True)
    expected = F.linear(x, values(layer.weight), layer.bias)
    assert (layer(x) - expected).norm() / expected.norm() > 0.01
    work_round_cpu_dequantize(nn.Sequential(layer))
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_under_checkpointing_is_equal(use_reentrant):
    layers = nn.Sequential(four_bit(48, 80), nn.GELU(), four_bit(80, 48))
    assert work_round_cpu_dequantize(layers) == ["0", "2"]
    gradients = []
    for run in (layers, lambda x: checkpoint(layers, x, use_reentrant=use_reentrant)):
        x = torch.randn(3, 48, generator=torch.Generator().manual_seed(1)).requires_grad_()
        run(x).square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_eval_mode_leaves_the_weight_and_the_next_gradient_alone():
    layer = four_bit(48, 80, torch.bfloat16)
    layer.__class__ = Linear4bitByBlocks
    before = layer.weight.data.clone()
    layer.eval()(torch.randn(3, 48))
    assert torch.equal(layer.weight.data, before)
    x = torch.randn(3, 48, requires_grad=True)
    layer.train()(x).sum().backward()
    assert x.grad.norm() > 0


def test_state_dict_is_unchanged():
    layer = four_bit(48, 80)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.__class__ = Linear4bitByBlocks
    after = layer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_only_wrong_four_bit_layers_are_swapped():
    model = nn.ModuleDict(
        {"wrong": four_bit(48, 80), "right": four_bit(64, 80), "plain": nn.Linear(48, 80), "odd": four_bit(30, 80)}
    )
    assert work_round_cpu_dequantize(model) == ["wrong"]
    assert type(model["right"]) is Linear4bit
    assert work_round_cpu_dequantize(model) == []


def test_input_dtype_is_kept_where_the_compute_dtype_differs():
    layer = four_bit(48, 80, torch.bfloat16)
    layer.__class__ = Linear4bitByBlocks
    assert layer(torch.randn(3, 48)).dtype == torch.float32
