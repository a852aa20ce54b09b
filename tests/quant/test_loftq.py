"""LoftQ's start is never worse than plain quantisation, is that of the exact algorithm, and uses the true scaling."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qlora_cli.quant import kernels
from qlora_cli.quant.blockwise import Packed, quantize
from qlora_cli.quant.linear import Storage
from qlora_cli.quant.loftq import Order, Quantizer, loftq


def quantizer_of(storage: Storage, dtype: torch.dtype = torch.float32) -> Quantizer[Packed]:
    def quantizer(weight: Tensor) -> tuple[Packed, Tensor]:
        packed = quantize(weight, storage.code, storage.block_size, storage.double_quant)
        return packed, kernels.dequantize(packed, storage.code, storage.block_size, weight.shape, dtype).float()

    return quantizer


def weight_of(rows: int = 128, columns: int = 192) -> Tensor:
    """Gaussian with some directions that stand out, as trained weights have."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn((size, 12), generator=generator) for size in (rows, columns))
    return torch.randn((rows, columns), generator=generator) + 0.3 * left @ right.T


def exact(weight: Tensor, storage: Storage, rank: int, iterations: int, order: Order) -> float:
    """Algorithm 1 with full SVDs in fp64: the least error of its iterates."""
    quantizer = quantizer_of(storage)
    errors, product = [], torch.zeros_like(weight)
    values = quantizer(weight)[1]
    errors.append((weight - values).norm())
    for iteration in range(iterations):
        if order == "quantize_first":
            values = quantizer(weight - product)[1]
        target = weight if order == "svd_first" and iteration == 0 else weight - values
        left, singular, right = torch.linalg.svd(target.double(), full_matrices=False)
        product = ((left[:, :rank] * singular[:rank]) @ right[:rank]).float()
        if order == "svd_first":
            values = quantizer(weight - product)[1]
        errors.append((weight - values - product).norm())
    return float(min(errors) / weight.norm())


@pytest.mark.parametrize("order", ["quantize_first", "svd_first"])
@pytest.mark.parametrize("rank", [2, 16, 32])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("name", ["nf4", "int4", "nf2", "int2"])
def test_the_error_is_that_of_the_exact_algorithm_and_never_above_plain(name, double_quant, rank, order):
    weight, storage = weight_of(), Storage(name, double_quant=double_quant)
    start = loftq(weight, quantizer_of(storage), rank, 2.0, 5, order)
    assert start.error <= start.plain
    assert start.error == pytest.approx(exact(weight, storage, rank, 5, order), rel=0.01)


@pytest.mark.parametrize(("alpha", "rank"), [(2, 8), (8, 8), (16, 8), (32, 8)])
@pytest.mark.parametrize("rslora", [False, True])
def test_what_the_adapter_adds_has_its_own_scaling(alpha, rank, rslora):
    weight, storage = weight_of(), Storage("nf4")
    scaling = alpha / rank**0.5 if rslora else alpha / rank
    start = loftq(weight, quantizer_of(storage), rank, scaling, 3)
    assert start.A is not None
    assert start.B is not None
    assert (start.A.shape, start.B.shape) == ((rank, 192), (128, rank))
    values = kernels.dequantize(start.stored, storage.code, 64, weight.shape, torch.float32)
    off = float((weight - (values + scaling * start.B @ start.A)).norm() / weight.norm())
    assert off == pytest.approx(start.error, rel=1e-4)
    assert off < 0.95 * start.plain
    torch.testing.assert_close(start.A.norm(dim=1), start.B.norm(dim=0), rtol=1e-3, atol=1e-5)


def test_a_weight_that_loses_nothing_keeps_the_plain_start():
    start = loftq(torch.zeros(64, 64), quantizer_of(Storage("nf4", double_quant=False)), 4, 1.0, 5)
    assert (start.A, start.B, start.iteration, start.error) == (None, None, 0, 0.0)


def test_the_rounding_of_the_compute_type_is_part_of_what_is_made_good():
    weight = weight_of()
    start = loftq(weight, quantizer_of(Storage("nf4"), torch.bfloat16), 16, 1.0, 5)
    values = kernels.dequantize(start.stored, Storage("nf4").code, 64, weight.shape, torch.bfloat16).float()
    assert start.A is not None
    assert start.B is not None
    assert float((weight - values - start.B @ start.A).norm() / weight.norm()) == pytest.approx(start.error, rel=1e-4)


@pytest.mark.parametrize("name", ["nf4", "int2"])
def test_a_quarter_of_the_error_is_made_good_on_gpt2(name, shared: Path):
    file = shared / "weights" / "gpt2-matrices" / "att.value.w.dat"
    weight = torch.from_numpy(np.fromfile(file, ">f4").astype(np.float32)).view(768, 768)
    start = loftq(weight, quantizer_of(Storage(name)), 64, 0.25, 5)
    assert start.error <= 0.75 * start.plain
