"""The fused LoRA layer is its plain reference, in value and in every gradient; dropout's mask is fair and repeats."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qlora_cli.kernels.lora_linear import (
    LANES,
    FrozenWeight,
    _LoraLinear,
    keep_mask,
    lora_linear,
    reference_lora_linear,
)

CPU = torch.device("cpu")


class Layer(NamedTuple):
    """x (*leading, in) and what multiplies it: W (out, in), a bias or none, A (r, in), B (out, r)."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor

    @property
    def base(self) -> FrozenWeight:
        return frozen(self.weight, self.bias)

    def to(self, dtype: torch.dtype) -> Layer:
        """The same values, rounded to `dtype`; x, A and B require a gradient."""
        x, weight, bias, a, b = (None if t is None else t.detach().to(dtype) for t in self)
        assert x is not None
        assert weight is not None
        assert a is not None
        assert b is not None
        return Layer(x.requires_grad_(), weight, bias, a.requires_grad_(), b.requires_grad_())


def frozen(weight: Tensor, bias: Tensor | None = None) -> FrozenWeight:
    return FrozenWeight(weight, weight.to, bias)


def layer(leading: tuple[int, ...], sizes: tuple[int, int, int], bias: bool = True, seed: int = 0) -> Layer:
    """A random layer in fp64; sizes: in, out, r."""
    generator = torch.Generator().manual_seed(seed)
    inputs, outputs, r = sizes
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    x, weight, added = normal(*leading, inputs), normal(outputs, inputs), normal(outputs)
    a, b = normal(r, inputs) / math.sqrt(inputs), normal(outputs, r)
    return Layer(x, weight / math.sqrt(inputs), added if bias else None, a, b).to(torch.float64)


def passed(y: Tensor, of: Layer) -> list[Tensor]:
    """The output and the gradients of x, A and B, for one and the same gradient of y, all in fp64."""
    generator = torch.Generator().manual_seed(99)
    by_y = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    found = torch.autograd.grad(y, [of.x, of.a, of.b], by_y)
    assert all(gradient.dtype == y.dtype for gradient in found)
    return [tensor.detach().double() for tensor in (y, *found)]


def off(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def with_mask(of: Layer, scaling: float, keep: Tensor, kept_share: float) -> Tensor:
    """The fused layer, its mask given."""
    result: Tensor = _LoraLinear.apply(of.x, of.weight, of.bias, of.a, of.b, of.weight.to, scaling, keep, kept_share)
    return result


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("leading", [(5,), (2, 3), ()])
def test_gradients_are_those_of_finite_differences(leading, bias):
    one = layer(leading, (6, 4, 2), bias)

    def fused(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_linear(x, one.base, a, b, 1.7)

    assert torch.autograd.gradcheck(fused, (one.x, one.a, one.b))


@pytest.mark.parametrize("leading", [(5,), (2, 3)])
def test_gradients_under_dropout_are_those_of_finite_differences(leading):
    one = layer(leading, (6, 4, 2))
    torch.manual_seed(2)
    keep, kept_share = keep_mask(math.prod(leading), 6, 0.4, CPU)
    assert keep.any()
    assert not keep.all()

    def fused(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return with_mask(one._replace(x=x, a=a, b=b), 1.7, keep, kept_share)

    assert torch.autograd.gradcheck(fused, (one.x, one.a, one.b))


@settings(max_examples=60, deadline=None)
@given(
    leading=st.lists(st.integers(1, 7), min_size=0, max_size=3).map(tuple),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12)),
    scaling=st.floats(0.05, 8),
    bias=st.booleans(),
    p=st.sampled_from([0.0, 0.05, 0.5]),
    seed=st.integers(0, 99),
)
def test_in_fp32_it_is_the_reference(leading, sizes, scaling, bias, p, seed):
    one = layer(leading, sizes, bias, seed).to(torch.float32)
    torch.manual_seed(seed)
    found = passed(lora_linear(one.x, one.base, one.a, one.b, scaling, p), one)
    torch.manual_seed(seed)
    keep, kept_share = keep_mask(math.prod(leading), sizes[0], p, CPU)
    wanted = passed(
        reference_lora_linear(one.x, one.base, one.a, one.b, scaling, keep if p else None, 1 - kept_share), one
    )
    largest = max(float(tensor.abs().max()) for tensor in wanted)
    for ours, plain in zip(found, wanted, strict=True):
        assert float((ours - plain).abs().max()) <= 1e-5 * max(float(plain.abs().max()), 1e-2 * largest)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("scaling", [0.25, 1.7])
@pytest.mark.parametrize("sizes", [(64, 64, 8), (96, 40, 16), (256, 512, 4)])
def test_in_bf16_it_is_as_near_to_the_truth_as_the_reference(sizes, scaling, p):
    one = layer((4, 64), sizes).to(torch.bfloat16)
    exact = one.to(torch.float64)
    torch.manual_seed(1)
    keep, kept_share = keep_mask(4 * 64, sizes[0], p, CPU)
    truth = passed(reference_lora_linear(exact.x, exact.base, exact.a, exact.b, scaling, keep, 1 - kept_share), exact)
    fused = passed(with_mask(one, scaling, keep, kept_share), one)
    plain = passed(reference_lora_linear(one.x, one.base, one.a, one.b, scaling, keep, 1 - kept_share), one)
    for ours, theirs, wanted in zip(fused, plain, truth, strict=True):
        assert (ours - wanted).norm() <= 1.15 * (theirs - wanted).norm()
        assert 0 < (theirs - wanted).norm() <= 0.02 * wanted.norm(), "else this shows nothing"


def test_only_gradients_that_are_asked_for_come_back():
    one = layer((5,), (6, 4, 2))
    whole = passed(lora_linear(one.x, one.base, one.a, one.b, 1.7), one)
    for frozen_one in ("x", "a", "b"):
        part = one._replace(**{frozen_one: getattr(one, frozen_one).detach()})
        y = lora_linear(part.x, part.base, part.a, part.b, 1.7)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(99), dtype=torch.float64))
        for name, wanted in zip(("x", "a", "b"), whole[1:], strict=True):
            gradient = getattr(part, name).grad
            assert gradient is None if name == frozen_one else torch.equal(gradient, wanted)
            getattr(one, name).grad = None
    with torch.no_grad():
        assert not lora_linear(one.x, one.base, one.a, one.b, 1.7).requires_grad


def test_a_bias_of_another_type_is_cast_and_a_view_of_x_is_read_right():
    one = layer((6, 4), (6, 5, 2)).to(torch.float32)
    turned = one.x.transpose(0, 1)
    assert not turned.is_contiguous()
    wide = frozen(one.weight, None if one.bias is None else one.bias.double())
    y = lora_linear(turned, wide, one.a, one.b, 2.0)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, reference_lora_linear(turned, one.base, one.a, one.b, 2.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("leading", [(0,), (2, 0)])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_no_rows_give_no_rows_and_gradients_of_zero(leading, p):
    """An expert of a mixture may get no token."""
    one = layer(leading, (6, 4, 2))
    y = lora_linear(one.x, one.base, one.a, one.b, 1.7, p)
    assert y.shape == (*leading, 4)
    y.sum().backward()
    assert one.x.grad is not None
    assert one.x.grad.shape == one.x.shape
    for weight in (one.a, one.b):
        assert weight.grad is not None
        assert not weight.grad.any()


def test_what_is_kept_for_backward_is_x_and_what_is_as_wide_as_the_rank():
    one = layer((32,), (64, 64, 2)).to(torch.float32)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        lora_linear(one.x, one.base, one.a, one.b, 2.0)
    known = {tensor.data_ptr() for tensor in (one.x, one.weight, one.a, one.b)}
    assert [tuple(tensor.shape) for tensor in kept if tensor.data_ptr() not in known] == [(32, 2)]


def test_a_weight_that_changes_before_backward_is_an_error():
    one = layer((5,), (6, 4, 2))
    y = lora_linear(one.x, one.base, one.a, one.b, 1.7)
    one.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("p", [0.01, 0.05, 0.1, 0.5, 0.9])
def test_each_of_the_lanes_drops_with_the_probability_asked_for(p):
    torch.manual_seed(5)
    keep, kept_share = keep_mask(500, 1200, p, CPU)
    assert keep.dtype == torch.bool
    assert kept_share == pytest.approx(1 - p, abs=2**-17)
    for lane in keep.flatten().view(-1, LANES).T:
        assert abs(int(lane.sum()) - kept_share * len(lane)) <= 5 * math.sqrt(len(lane) * p * (1 - p))


def test_lanes_rows_and_columns_tell_nothing_of_each_other():
    torch.manual_seed(6)
    keep, share = keep_mask(1000, 600, 0.3, CPU)
    values = (keep.double() - share) / math.sqrt(share * (1 - share))
    lanes = values.flatten().view(-1, LANES)
    pairs = [(lanes[:, one], lanes[:, other]) for one in range(LANES) for other in range(one)]
    pairs += [(lanes[1:, one], lanes[:-1, other]) for one in range(LANES) for other in range(LANES)]
    pairs += [(values[1:], values[:-1]), (values[:, 1:], values[:, :-1])]
    for one, other in pairs:
        assert abs(float((one * other).mean())) <= 5 / math.sqrt(one.numel())


def test_odd_sizes_get_a_mask_of_their_shape_and_certainty_is_certain():
    torch.manual_seed(7)
    assert keep_mask(3, 7, 0.5, CPU)[0].shape == (3, 7)
    keep, kept_share = keep_mask(100, 100, 2**-20, CPU)  # below what 16 bits tell
    assert keep.all()
    assert kept_share == 1


def test_the_mean_over_many_masks_is_the_layer_without_dropout():
    one = layer((6,), (16, 8, 4))
    torch.manual_seed(8)
    with torch.no_grad():
        plain = lora_linear(one.x, one.base, one.a, one.b, 2.0)
        many = lora_linear(one.x.repeat(4000, 1), one.base, one.a, one.b, 2.0, 0.2).view(4000, 6, 8)
    error = many.std(dim=0) / math.sqrt(4000)
    assert error.min() > 0
    assert ((many.mean(dim=0) - plain).abs() <= 5 * error).all()


def test_dropout_spares_the_base():
    one = layer((50,), (16, 8, 4))
    torch.manual_seed(9)
    y = lora_linear(one.x, one.base, one.a, torch.zeros_like(one.b), 2.0, 0.5)
    torch.testing.assert_close(y, torch.nn.functional.linear(one.x, one.weight, one.bias))


def test_masks_follow_the_seed_and_differ_from_call_to_call():
    one = layer((50,), (16, 8, 4))

    def draws(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [lora_linear(one.x, one.base, one.a, one.b, 2.0, 0.5).detach() for _ in range(2)]

    first, again, other = draws(1), draws(1), draws(2)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_recomputation_draws_the_same_mask():
    one, two = layer((50,), (16, 16, 4)).to(torch.float32), layer((50,), (16, 16, 4), seed=1).to(torch.float32)

    def both(x: Tensor) -> Tensor:
        for each in (one, two):
            x = lora_linear(x, each.base, each.a, each.b, 2.0, 0.3)
        return x

    def gradients(run: Any) -> list[Tensor]:
        torch.manual_seed(3)
        y = run(one.x) + run(one.x)  # two segments: the second one's forward lies between
        return list(torch.autograd.grad(y.square().sum(), [one.x, one.a, one.b, two.a, two.b]))

    plain = gradients(both)
    recomputed = gradients(lambda x: checkpoint(both, x, use_reentrant=False))
    assert all(map(torch.equal, plain, recomputed))
    assert not torch.equal(plain[1], gradients(lambda x: both(x) * 1.0001)[1]), "else this shows nothing"
