"""What is measured of a weight is what a live layer holds and multiplies with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_cli.quant.layers import layer_values
from qlora_cli.quant.measure import TURNS, Figures, fastest, measure, quantizer
from qlora_cli.recipe.of_model import DATA_TYPES
from qlora_cli.recipe.schema import Quantization

OPTIONS = {
    "default": {},
    "single scales": {"double_quant": False},
    "blocks of 128": {"block_size": 128},
    "zero points": {"zero_point": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("data_type", [*DATA_TYPES, "none"])
def test_the_error_is_of_the_values_that_a_layer_multiplies_with(data_type, options, dtype):
    how = Quantization(data_type=data_type, **OPTIONS[options])
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(0)) * 0.02
    values = layer_values(weight, how, "layer", dtype)
    made = quantizer(how, "layer", dtype)
    assert torch.equal(made(weight).values().float(), values)
    figures = measure(weight, made)
    assert figures.error == pytest.approx(((weight - values).norm() / weight.norm()).item(), rel=1e-5)
    assert figures.num_weights == weight.numel()
    assert figures.quantize_s > 0
    assert figures.dequantize_s > 0


@pytest.mark.parametrize(
    ("options", "stored"),
    [
        ({"data_type": "nf2"}, 4096 / 4 + 64 + 4 + 4),  # codes, a byte per block, an fp32 per 256 of these, their mean
        ({"data_type": "nf2", "double_quant": False}, 4096 / 4 + 4 * 64),
        ({"data_type": "nf4"}, 4096 / 2 + 64 + 4 + 4),
        ({"data_type": "nf4", "double_quant": False}, 4096 / 2 + 4 * 64),
        ({"data_type": "int4", "block_size": 32}, 4096 / 2 + 128 + 4 + 4),
        ({"data_type": "int2", "zero_point": True}, 4096 / 4 + 64 + 4 + 4 + 64 / 4),
        ({"data_type": "int8"}, 4096 + 4 * 32),  # an fp32 per row
    ],
)
def test_bytes_are_codes_scales_and_zero_points(options, stored):
    made = quantizer(Quantization(**options), "layer", torch.float32)
    assert measure(torch.randn(32, 128), made).num_bytes == stored


def test_nf2_with_double_quantisation_takes_its_stated_bits_where_scales_fill_their_blocks():
    figures = measure(torch.randn(512, 1024), quantizer(Quantization(data_type="nf2"), "layer", torch.float32))
    assert figures.bits == pytest.approx(2.127, abs=5e-4)


def test_zeros_have_no_error():
    figures = measure(torch.zeros(4, 64), quantizer(Quantization(data_type="nf4"), "layer", torch.float32))
    assert (figures.error, figures.energy) == (0.0, 0.0)


FIGURES = st.builds(
    Figures,
    num_weights=st.integers(1, 10**9),
    num_bytes=st.integers(1, 10**9),
    lost=st.floats(0, 1e6),
    energy=st.floats(1e-6, 1e6),
    quantize_s=st.floats(1e-6, 10),
    dequantize_s=st.floats(1e-6, 10),
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(FIGURES, FIGURES)
def test_totals_lie_between_their_parts(one, other):
    total = one + other
    for name in ("error", "bits"):
        low, high = sorted([getattr(one, name), getattr(other, name)])
        assert low * (1 - 1e-9) <= getattr(total, name) <= high * (1 + 1e-9) + 1e-12
    assert one + Figures() == replace(one)


def test_the_fastest_of_a_few_runs_counts_and_a_slow_run_is_not_repeated(monkeypatch):
    clock = iter([0.0, 0.03, 1.0, 1.01, 2.0, 2.02, 3.0, 3.5, 9.0, 9.5])
    monkeypatch.setattr("qlora_cli.quant.measure.time.perf_counter", lambda: next(clock))
    runs = iter("abcdefgh")
    assert fastest(lambda: next(runs), torch.device("cpu")) == ("d", pytest.approx(0.01))
    assert fastest(lambda: next(runs), torch.device("cpu")) == ("e", pytest.approx(0.5))
    monkeypatch.setattr("qlora_cli.quant.measure.time.perf_counter", lambda: 0.0)
    runs = iter(range(100))
    assert fastest(lambda: next(runs), torch.device("cpu"))[0] == TURNS - 1
