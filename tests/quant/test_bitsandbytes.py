"""Our quantiser in bitsandbytes' place gives the library's bits, and leaves the library as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes import functional
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora_cli.model.base import fingerprint, load_base
from qlora_cli.quant import bitsandbytes
from qlora_cli.quant.bitsandbytes import OPERATOR, faster_quantiser

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def ours_runs() -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(OPERATOR, "CPU")


def bits(tensor: Tensor) -> Any:
    """Type, shape and bytes; every NaN has the same ones."""
    tensor = torch.where(tensor.isnan(), torch.nan, tensor) if tensor.is_floating_point() else tensor
    return tensor.dtype, tensor.shape, tensor.contiguous().flatten().view(torch.uint8).tolist()


def everything(weight: Tensor, **how: Any) -> list[Any]:
    """All that bitsandbytes keeps of a weight."""
    codes, state = functional.quantize_4bit(weight, **how)
    nested = [] if state.state2 is None else [state.state2.absmax, state.state2.code, state.offset]
    plain = [state.shape, state.dtype, state.blocksize, state.quant_type, state.nested]
    return [bits(tensor) for tensor in (codes, state.absmax, state.code, *nested)] + plain


@settings(deadline=None, max_examples=80)
@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.sampled_from(DTYPES),
    st.sampled_from(["nf4", "fp4"]),
    st.sampled_from([32, 64, 128]),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_every_weight_gets_the_library_s_codes_and_scales_to_the_bit(rows, columns, dtype, kind, block, nested, seed):
    weight = torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed)).to(dtype)
    weight *= torch.tensor([1.0, 1e-3, 0.0, 1e4, 1e-7])[torch.arange(rows) % 5].unsqueeze(1).to(dtype)
    how = {"quant_type": kind, "blocksize": block, "compress_statistics": nested}
    wanted = everything(weight, **how)
    with faster_quantiser():
        assert ours_runs()
        assert everything(weight, **how) == wanted


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_also_on_bounds_beyond_them_and_where_a_weight_is_not_finite(kind, dtype):
    levels = functional.get_4bit_type(kind, device="cpu").sort().values
    bounds = (levels[1:] + levels[:-1]) / 2
    near = [torch.nextafter(bounds, bounds + side) for side in (-1, 0, 1)]
    weight = torch.cat([*near, torch.tensor([1.0, -0.0, 0.0])])  # with what comes next a block with an absmax of 1
    weight = torch.cat([weight, weight.roll(7) * -3e-39, weight.roll(3)[:32], torch.full((32,), torch.nan), weight])
    weight[-5:] = torch.tensor([torch.inf, -torch.inf, 1.0, -1.0, torch.nan])
    for part in (weight, weight[:-1], weight[:33], weight[:2], weight[-5:]):
        for storage in (torch.uint8, torch.bfloat16) if len(part) % 4 == 0 else (torch.uint8,):
            wanted = everything(part.to(dtype), quant_type=kind, quant_storage=storage)
            with faster_quantiser():
                assert everything(part.to(dtype), quant_type=kind, quant_storage=storage) == wanted


def test_the_library_is_left_as_it_was_also_after_an_error():
    assert not ours_runs()
    with faster_quantiser(), faster_quantiser():
        assert ours_runs()
    assert not ours_runs()
    with pytest.raises(KeyError), faster_quantiser():
        raise KeyError
    assert not ours_runs()


def test_a_version_with_other_bits_keeps_its_own_quantiser(monkeypatch):
    monkeypatch.setattr(bitsandbytes, "_has_our_bits", lambda: False)
    with faster_quantiser():
        assert not ours_runs()


def test_a_difference_in_one_bit_is_seen(monkeypatch):
    real = functional.quantize_4bit

    def other(weight: Tensor, **how: Any) -> Any:
        codes, state = real(weight, **how)
        return codes ^ (torch.arange(len(codes)).unsqueeze(1) == 5).to(torch.uint8), state

    bitsandbytes._has_our_bits.cache_clear()
    assert bitsandbytes._has_our_bits()
    bitsandbytes._has_our_bits.cache_clear()
    monkeypatch.setattr(functional, "quantize_4bit", other)
    assert not bitsandbytes._has_our_bits()
    bitsandbytes._has_our_bits.cache_clear()


@pytest.mark.parametrize("how", [{"data_type": "nf4"}, {"data_type": "fp4", "double_quant": False}])
def test_a_model_is_loaded_by_it_and_is_the_one_that_the_library_loads(make_recipe, monkeypatch, how):
    recipe, seen = make_recipe(quantization={**how, "compute_dtype": "bfloat16"}), []
    real = bitsandbytes._quantize_4bit
    monkeypatch.setattr(bitsandbytes, "_quantize_4bit", lambda *args: seen.append(args) or real(*args))
    found = fingerprint(load_base(recipe, torch.device("cpu")).model)
    assert len(seen) >= 14, "our quantiser was not asked"
    monkeypatch.setattr(bitsandbytes, "_has_our_bits", lambda: False)
    assert fingerprint(load_base(recipe, torch.device("cpu")).model) == found
