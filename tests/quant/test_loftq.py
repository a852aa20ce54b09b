"""LoftQ's start is never worse than plain quantisation, is that of the exact algorithm, and uses the true scaling."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qlora_cli.quant import kernels
from qlora_cli.quant.blockwise import Packed, quantize
from qlora_cli.quant.loftq import Alternation, Measure, Order, Quantizer, Start, loftq, olora, pissa
from qlora_cli.quant.packed import Storage


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


def off(weight: Tensor, start: Start[Packed], storage: Storage, scaling: float) -> float:
    """‖W - (Q + scaling · B A)‖ / ‖W‖ of what a start says, in fp64."""
    values = kernels.dequantize(start.stored, storage.code, storage.block_size, weight.shape, torch.float32).double()
    product = 0 if start.A is None or start.B is None else scaling * (start.B.double() @ start.A.double())
    return float((weight.double() - values - product).norm() / weight.double().norm())


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("name", ["nf4", "fp4", "int4", "nf2", "int2", "int4 with zero point"])
@example(rank=2, alpha_by_rank=0.25, rslora=False, order="quantize_first", wide=True)
@example(rank=32, alpha_by_rank=4.0, rslora=True, order="svd_first", wide=False)
@settings(max_examples=6, deadline=None)
@given(
    rank=st.integers(2, 32),  # a quarter of the smaller size
    alpha_by_rank=st.sampled_from([0.25, 1.0, 2.0, 4.0]),
    rslora=st.booleans(),
    order=st.sampled_from(["quantize_first", "svd_first"]),
    wide=st.booleans(),
)
def test_the_error_is_that_of_the_exact_algorithm_and_never_above_plain(
    name, double_quant, rank, alpha_by_rank, rslora, order, wide
):
    weight = weight_of() if wide else weight_of(192, 128)
    storage = Storage(name.split()[0], double_quant=double_quant, zero_point="zero" in name)
    scaling = alpha_by_rank * rank**0.5 if rslora else alpha_by_rank
    start = loftq(weight, quantizer_of(storage), rank, scaling, Alternation(5, order))
    error, plain = off(weight, start, storage, scaling), off(weight, plain_start(weight, storage), storage, scaling)
    assert error <= plain * (1 + 1e-6)
    assert (start.error, start.plain) == pytest.approx((error, plain), rel=1e-4)
    # in a matrix so small another subspace of the weight's noise gives codes that are lucky or not, by up to 2.5%
    assert error <= exact(weight, storage, rank, 5, order) * (1.01 if order == "quantize_first" else 1.03)


@pytest.mark.parametrize("name", ["nf4", "int2"])
def test_the_other_order_too_is_that_of_the_exact_algorithm_where_luck_evens_out(name):
    weight, storage = weight_of(384, 512), Storage(name)
    start = loftq(weight, quantizer_of(storage), 48, 1.0, Alternation(3, "svd_first"))
    assert start.error == pytest.approx(exact(weight, storage, 48, 3, "svd_first"), rel=0.01)
    assert start.error < start.plain


def plain_start(weight: Tensor, storage: Storage) -> Start[Packed]:
    """Plain quantisation."""
    return Start(quantizer_of(storage)(weight)[0], None, None, 0, 0, 0)


@pytest.mark.parametrize(("alpha", "rank"), [(2, 8), (8, 8), (16, 8), (32, 8)])
@pytest.mark.parametrize("rslora", [False, True])
def test_what_the_adapter_adds_has_its_own_scaling(alpha, rank, rslora):
    weight, storage = weight_of(), Storage("nf4")
    scaling = alpha / rank**0.5 if rslora else alpha / rank
    start = loftq(weight, quantizer_of(storage), rank, scaling, Alternation(3))
    assert start.A is not None
    assert start.B is not None
    assert (start.A.shape, start.B.shape) == ((rank, 192), (128, rank))
    assert off(weight, start, storage, scaling) == pytest.approx(start.error, rel=1e-4)
    assert off(weight, start, storage, scaling) < 0.95 * start.plain
    assert_balanced(start)


def test_a_weight_that_loses_nothing_keeps_the_plain_start():
    start = loftq(torch.zeros(64, 64), quantizer_of(Storage("nf4", double_quant=False)), 4, 1.0, Alternation())
    assert (start.A, start.B, start.iteration, start.error) == (None, None, 0, 0.0)


def test_the_rounding_of_the_compute_type_is_part_of_what_is_made_good():
    weight = weight_of()
    start = loftq(weight, quantizer_of(Storage("nf4"), torch.bfloat16), 16, 1.0, Alternation())
    values = kernels.dequantize(start.stored, Storage("nf4").code, 64, weight.shape, torch.bfloat16).float()
    assert start.A is not None
    assert start.B is not None
    assert float((weight - values - start.B @ start.A).norm() / weight.norm()) == pytest.approx(start.error, rel=1e-4)


@pytest.mark.parametrize("name", ["nf4", "int2"])
def test_a_quarter_of_the_error_is_made_good_on_gpt2(name, shared: Path):
    file = shared / "weights" / "gpt2-matrices" / "att.value.w.dat"
    weight = torch.from_numpy(np.fromfile(file, ">f4").astype(np.float32)).view(768, 768)
    start = loftq(weight, quantizer_of(Storage(name)), 64, 0.25, Alternation())
    assert start.error <= 0.75 * start.plain


def assert_balanced(start: Start[Packed]) -> None:
    """Row i of A is as long as column i of B, and each is at right angles to the others."""
    assert start.A is not None
    assert start.B is not None
    rows, columns = start.A @ start.A.T, start.B.T @ start.B
    torch.testing.assert_close(rows.diagonal().sqrt(), start.B.norm(dim=0), rtol=1e-3, atol=0)
    assert rows.diagonal().diff().max() <= 0, "not from the largest on"
    for gram in (rows, columns):
        assert (gram - gram.diag().diag()).abs().max() < 1e-4 * gram.diagonal().max()


def moment_of(features: int, spread: float = 2.0) -> Tensor:
    """E[x xᵀ] fp64 of inputs whose directions differ by `spread` orders of magnitude, none along an axis."""
    generator = torch.Generator().manual_seed(1)
    turned = torch.linalg.qr(torch.randn((features, features), generator=generator, dtype=torch.float64)).Q
    return (turned * torch.logspace(0, -2 * spread, features, dtype=torch.float64)) @ turned.T


def closed_form(error: Tensor, moment: Tensor, rank: int) -> Tensor:
    """QERA's theorem 1 in fp64: the best rank-r part of E R^½, with the symmetric root, times R^-½."""
    values, vectors = torch.linalg.eigh(moment)
    root, inverse = ((vectors * values**power) @ vectors.T for power in (0.5, -0.5))
    left, singular, right = torch.linalg.svd(error.double() @ root, full_matrices=False)
    return (left[:, :rank] * singular[:rank]) @ right[:rank] @ inverse


def weighted(error: Tensor, moment: Tensor) -> float:
    """√E ‖E x‖², in fp64."""
    return float((error.double() @ moment @ error.double().T).trace().sqrt())


@pytest.mark.parametrize(
    ("shape", "rank", "apart"),
    [
        ((64, 48), 16, True),
        ((48, 64), 12, True),
        ((256, 320), 2, False),
        ((320, 256), 48, False),
        ((320, 256), 8, True),
    ],
)
def test_the_weighted_step_is_the_closed_form(shape, rank, apart):
    """apart: whether the search finds the very matrix: it is small, or its rank stands out; else one as near."""
    generator = torch.Generator().manual_seed(2)
    error, moment = torch.randn(shape, generator=generator), moment_of(shape[1])
    if shape[0] == 320 and apart:
        left, right = (torch.randn((size, rank), generator=generator) for size in shape)
        error += 20 * left @ right.T
    found = Measure(torch.linalg.cholesky(moment).float()).low_rank(error, rank, None)
    product = (found.left * found.values) @ found.right.T
    best = closed_form(error, moment, rank)
    assert weighted(error - product, moment) == pytest.approx(weighted(error - best, moment), rel=0.01)
    assert not apart or weighted(product - best, moment) < 1e-3 * weighted(best, moment)
    for one in (found.left, found.right):
        torch.testing.assert_close(one.T @ one, torch.eye(rank), rtol=0, atol=1e-4)


@pytest.mark.parametrize("order", ["quantize_first", "svd_first"])
@pytest.mark.parametrize("name", ["int2", "nf4"])
def test_what_the_inputs_weigh_is_made_good_in_what_comes_out(name, order):
    """The start is no worse than plain quantisation in the norm that counts, and than LoftQ's where an SVD is last."""
    weight, storage, moment = weight_of(), Storage(name), moment_of(192)
    measure = Measure(torch.linalg.cholesky(moment).float())
    aware = loftq(weight, quantizer_of(storage), 16, 0.5, Alternation(5, order, measure))
    unaware = loftq(weight, quantizer_of(storage), 16, 0.5, Alternation(5, order))

    def error(start: Start[Packed]) -> float:
        values = kernels.dequantize(start.stored, storage.code, 64, weight.shape, torch.float32)
        product = 0 if start.A is None or start.B is None else 0.5 * start.B @ start.A
        return weighted(weight - values - product, moment) / weighted(weight, moment)

    plain = error(plain_start(weight, storage))
    assert (aware.error, aware.plain) == pytest.approx((error(aware), plain), rel=1e-3)
    assert error(aware) <= plain
    if order == "quantize_first":
        assert error(aware) < 0.8 * error(unaware)
    assert_balanced(aware)


def test_an_iterate_that_is_worse_in_what_comes_out_is_not_kept():
    """A quantiser that loses more at every call: what was first is best."""
    calls = []

    def worsening(weight: Tensor) -> tuple[int, Tensor]:
        calls.append(1)
        return len(calls), weight + 10.0 ** len(calls) * torch.eye(64)

    start = loftq(torch.ones(64, 64), worsening, 2, 1.0, Alternation(4, "svd_first", Measure(2 * torch.eye(64))))
    assert (start.stored, start.A, start.B, start.iteration) == (1, None, None, 0)
    assert start.error == start.plain == pytest.approx(10 * 8 / 64)
    assert start.errors == pytest.approx([10.0**n * 8 / 64 for n in (2, 3, 4, 5)], rel=0.3)  # but for two directions
    assert len(calls) == 5


def of_peft(weight: Tensor, rank: int, alpha: int, init: str) -> tuple[Tensor, Tensor, Tensor, float]:
    """The weight, A, B and scaling that PEFT makes of a linear layer."""
    layer = nn.Linear(*weight.shape[::-1], bias=False)
    layer.weight.data = weight.clone()
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"], init_lora_weights=init)
    made = peft.get_peft_model(nn.Sequential(layer), config).base_model.model[0]
    factors = (made.lora_A["default"].weight.data, made.lora_B["default"].weight.data)
    return made.base_layer.weight.data, *factors, made.scaling["default"]


def unrounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A quantiser that loses nothing."""
    return weight, weight


@pytest.mark.parametrize(("shape", "rank", "alpha"), [((96, 64), 8, 4), ((64, 96), 4, 16), ((64, 64), 64, 64)])
def test_pissa_is_that_of_peft(shape, rank, alpha):
    left, right = (torch.randn((size, rank), generator=torch.Generator().manual_seed(3)) for size in shape)
    weight = weight_of(*shape) + 10 * left @ right.T  # whose principal part stands out: there is one answer
    rest, a, b, scaling = of_peft(weight, rank, alpha, "pissa")
    start = pissa(weight, unrounded, rank, alpha / rank)
    assert start.A is not None
    assert start.B is not None
    torch.testing.assert_close(alpha / rank * start.B @ start.A, scaling * b @ a, rtol=0, atol=1e-5 * weight.norm())
    torch.testing.assert_close(start.stored, rest, rtol=0, atol=1e-5 * weight.norm())
    assert start.error < 1e-5
    assert_balanced(start)


@pytest.mark.parametrize(("shape", "rank", "alpha"), [((96, 64), 8, 4), ((64, 96), 4, 16), ((96, 64), 64, 64)])
def test_olora_is_that_of_peft(shape, rank, alpha):
    weight = weight_of(*shape)
    rest, a, b, scaling = of_peft(weight, rank, alpha, "olora")
    start = olora(weight, unrounded, rank, alpha / rank)
    assert start.A is not None
    assert start.B is not None
    assert scaling == alpha / rank
    for ours, theirs in ((start.A, a), (start.B, b), (start.stored, rest)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("begin", [pissa, olora])
def test_what_a_start_leaves_is_quantised_as_it_is_deployed(begin):
    weight, storage = weight_of(), Storage("int2")
    start = begin(weight, quantizer_of(storage), 16, 0.5)
    assert (start.plain, start.error) == pytest.approx(
        (off(weight, plain_start(weight, storage), storage, 0.5), off(weight, start, storage, 0.5)), rel=1e-4
    )
    assert start.error < start.plain, "these weights have directions that stand out"
