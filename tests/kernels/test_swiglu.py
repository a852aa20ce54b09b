"""The gated product gives every bit of the plain one, forward and backward, and keeps a third less."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from qlora_cli.kernels.swiglu import ACTIVATIONS, gated, reference_gated

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """gate and up, which take gradients, and the gradient of their product."""
    generator = torch.Generator().manual_seed(0)
    gate, up, by_y = (3 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    return gate.to(dtype).requires_grad_(), up.to(dtype).requires_grad_(), by_y.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_bit_is_the_references(name, dtype):
    gate, up, by_y = inputs((2, 7, 96), dtype)
    found, wanted = gated(gate, up, name), reference_gated(gate, up, name)
    assert torch.equal(found, wanted)
    for ours, theirs in zip(
        torch.autograd.grad(found, [gate, up], by_y), torch.autograd.grad(wanted, [gate, up], by_y), strict=True
    ):
        assert ours.dtype == dtype
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradcheck_in_fp64(name):
    gate, up, _ = inputs((2, 3, 4), torch.float64)
    assert torch.autograd.gradcheck(lambda gate, up: gated(gate, up, name), (gate, up))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_gradient_that_nobody_asks_for_is_not_made(name):
    gate, up, by_y = inputs((2, 3, 4), torch.float32)
    for frozen in (0, 1):
        pair = [gate, up]
        pair[frozen] = pair[frozen].detach()
        (found,) = torch.autograd.grad(gated(*pair, name), pair[1 - frozen], by_y)
        (wanted,) = torch.autograd.grad(reference_gated(*pair, name), pair[1 - frozen], by_y)
        assert torch.equal(found, wanted)


def kept_bytes(function: object, name: str) -> int:
    """Of the tensors that are kept for backward."""
    gate, up, _ = inputs((1, 7, 96), torch.bfloat16)
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        function(gate, up, name)  # type: ignore[operator]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in kept}.values())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_it_keeps_two_thirds_of_what_the_reference_keeps(name):
    assert 3 * kept_bytes(gated, name) == 2 * kept_bytes(reference_gated, name)
