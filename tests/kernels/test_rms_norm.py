"""RMSNorm is its plain reference: forward bit for bit, backward up to rounding, and what it keeps is its input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from qlora_cli.kernels.rms_norm import ORDERS, reference_rms_norm, rms_norm

EPS = 1e-5
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
MIXED = [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F32, BF16)]
"""Types of x and of the weight."""


def inputs(
    shape: tuple[int, ...], x_type: torch.dtype, weight_type: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """x with rows of very different sizes, which takes a gradient, and a frozen weight."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * torch.logspace(-2, 1, shape[-2]).unsqueeze(1)
    weight = torch.randn(shape[-1], generator=generator, dtype=torch.float64)
    return x.to(x_type).requires_grad_(), weight.to(weight_type)


def gradient(y: Tensor, x: Tensor) -> Tensor:
    """Of x, for one and the same gradient of y."""
    by_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(y.dtype)
    (found,) = torch.autograd.grad(y, x, by_y)
    assert found.dtype == x.dtype
    return found.double()


def exact(x: Tensor, weight: Tensor, order: str) -> Tensor:
    """The gradient in fp64."""
    wide = x.detach().double().requires_grad_()
    return gradient(reference_rms_norm(wide, weight.double(), EPS, order), wide)


@pytest.mark.parametrize("types", MIXED, ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_forward_gives_the_bits_of_the_reference(order, types):
    x, weight = inputs((2, 7, 96), *types)
    found, wanted = rms_norm(x, weight, EPS, order), reference_rms_norm(x, weight, EPS, order)
    assert found.dtype == wanted.dtype
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("order", ORDERS)
def test_the_gradient_is_the_references_in_fp32(order):
    x, weight = inputs((2, 7, 96), torch.float32, torch.float32)
    found, wanted = (gradient(norm(x, weight, EPS, order), x) for norm in (rms_norm, reference_rms_norm))
    for ours, theirs in zip(found.view(-1, 96), wanted.view(-1, 96), strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("types", MIXED, ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_the_gradient_is_as_near_to_the_truth_as_the_references(order, types):
    x, weight = inputs((2, 7, 96), *types)
    truth = exact(x, weight, order)
    ours, theirs = (
        ((gradient(norm(x, weight, EPS, order), x) - truth).norm() / truth.norm()).item()
        for norm in (rms_norm, reference_rms_norm)
    )
    assert ours <= 1.05 * theirs + 1e-7


@pytest.mark.parametrize("order", ORDERS)
def test_gradcheck_in_fp64(order):
    x, weight = inputs((2, 3, 8), torch.float64, torch.float64)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight, EPS, order), x)


@settings(deadline=None, max_examples=30)
@given(shape=st.lists(st.integers(1, 5), max_size=3), width=st.integers(1, 40), order=st.sampled_from([*ORDERS]))
def test_any_shape_is_normalised_by_its_last_dimension(shape, width, order):
    x, weight = inputs((*shape, 1, width), torch.float32, torch.float32)
    found, wanted = rms_norm(x, weight, EPS, order), reference_rms_norm(x, weight, EPS, order)
    assert torch.equal(found, wanted)
    torch.testing.assert_close(gradient(found, x), gradient(wanted, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", ORDERS)
def test_kept_for_backward_are_the_input_the_weight_and_a_number_a_row(order):
    x, weight = inputs((1, 7, 96), torch.bfloat16, torch.bfloat16)
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        rms_norm(x, weight, EPS, order)
    assert [tensor.data_ptr() for tensor in kept[:2]] == [x.data_ptr(), weight.data_ptr()]
    assert [tensor.shape for tensor in kept[2:]] == [(1, 7, 1)]


def test_a_row_that_is_not_contiguous_is_the_same():
    x, weight = inputs((3, 7, 96), torch.float32, torch.float32)
    turned = x.detach().transpose(0, 1).requires_grad_()
    found = rms_norm(turned, weight, EPS)
    assert torch.equal(found, rms_norm(x, weight, EPS).transpose(0, 1))
    assert torch.isfinite(gradient(found, turned)).all()


def test_a_weight_changed_before_backward_is_an_error():
    x, weight = inputs((1, 2, 8), torch.float32, torch.float32)
    y = rms_norm(x, weight, EPS)
    weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
