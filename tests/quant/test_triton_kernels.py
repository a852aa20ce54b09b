"""The kernel for GPUs gives the bits of plain torch: run by Triton's interpreter, and compiled for an H100 unrun."""

from __future__ import annotations

import re
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton is not installed (extra test, Linux)")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from qlora_cli.quant import blockwise, kernels, triton_kernels  # noqa: E402
from qlora_cli.quant.bits import pack  # noqa: E402
from qlora_cli.quant.blockwise import Code, Packed, quantize  # noqa: E402
from qlora_cli.quant.codebooks import CODE_BOOKS, SCALE_BLOCK, counted  # noqa: E402
from qlora_cli.quant.data_types import CODES, UNIFORM  # noqa: E402
from qlora_cli.quant.linear import PackedLinear  # noqa: E402
from qlora_cli.quant.packed import Storage  # noqa: E402
from qlora_cli.quant.scales import Scales, whole_range  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TYPES: dict[str, Code] = {
    **{name: code(False, "auto") for name, code in CODES.items()},
    **{f"{name} with zero point": CODES[name](True, "absmax") for name in UNIFORM},
    "nf8": Code(8, CODE_BOOKS["nf8"]),
    "int8 with zero point": Code(8, counted(8), range=whole_range),
}


@pytest.fixture(scope="module", autouse=True)
def _interpreted():
    """The kernel as Triton's interpreter runs it, on tensors in the CPU's memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_kernels, "_dequantize", InterpretedFunction(triton_kernels._dequantize.fn))
        yield


def wanted(packed: Packed, code: Code, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """What plain torch gives; to bfloat16 rounded toward zero, as the interpreter does and no GPU."""
    if dtype != torch.bfloat16:
        return blockwise.dequantize(packed, code, shape, dtype)
    values = blockwise.dequantize(packed, code, shape)
    return (values.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)


def same_bits(found: Tensor, expected: Tensor) -> bool:
    kind = torch.int32 if found.dtype == torch.float32 else torch.int16
    return found.dtype == expected.dtype and torch.equal(found.view(kind), expected.view(kind))


@pytest.mark.parametrize("block_size", [16, 20, 64, 96, 4096])
@pytest.mark.parametrize("name", TYPES)
def test_interpreted_it_gives_the_bits_of_plain_torch(name, block_size):
    """Of an odd number of blocks, so that halves split one, of more than one tile, and of no whole number of them."""
    number = (4096 // block_size + 4) | 1
    weight = torch.randn((number, block_size), generator=torch.Generator().manual_seed(0))
    weight *= torch.logspace(-3, 1, number).unsqueeze(1)
    for double_quant in (False, True):
        packed = quantize(weight, TYPES[name], block_size, double_quant)
        for dtype in DTYPES:
            found = triton_kernels.dequantize(packed, TYPES[name], block_size, weight.shape, dtype)
            assert same_bits(found, wanted(packed, TYPES[name], weight.shape, dtype))


@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from([2, 4, 8]),
    block_size=st.integers(1, 40).map(lambda fours: 4 * fours),
    number=st.integers(1, 300),
    kinds=st.tuples(st.booleans(), st.booleans(), st.sampled_from(DTYPES)),
    seed=st.integers(0, 2**32),
)
def test_of_any_bytes_too(bits, block_size, number, kinds, seed):
    """All codes, levels, scales and zero points that there can be, scales restored below zero among them."""
    with_zeros, double_quant, dtype = kinds
    random = torch.Generator().manual_seed(seed)

    def drawn(length: int) -> Tensor:
        return torch.randint(0, 256, (length,), generator=random, dtype=torch.uint8)

    code = Code(bits, tuple(torch.randn(2**bits, generator=random).tolist()))
    scales = Scales(torch.rand(number, generator=random))
    if double_quant:
        shares = torch.rand(-(-number // SCALE_BLOCK), generator=random)
        scales = Scales(drawn(number), shares, torch.tensor(0.3))
    zeros = pack(drawn(number) >> 8 - bits, bits) if with_zeros else None
    packed, shape = Packed(drawn(number * block_size * bits // 8), scales, zeros), torch.Size((number * block_size,))
    found = triton_kernels.dequantize(packed, code, block_size, shape, dtype)
    assert same_bits(found, wanted(packed, code, shape, dtype))


def compiled(bits: int, dtype: str, zero_point: bool = False) -> str:
    """PTX for an H100, of blocks of 64 with double quantisation, with the options of the launch."""
    kernel = JITFunction(triton_kernels._dequantize.fn)
    rows = triton_kernels.TILE[bits] // (64 if bits == 8 else 32)
    constants: dict[str, Any] = {"BITS": bits, "RUN": 64, "RUNS": 1, "ROWS": rows, "SCALE_BLOCK": SCALE_BLOCK}
    kinds = {"codes": "*u8", "scales": "*u8", "zeros": "*u8", "values": f"*{dtype}", "num_runs": "i32"}
    if not zero_point:
        constants["zeros"] = None
    kinds |= {"zeros_half": "i32"} | dict.fromkeys(constants, "constexpr")
    signature = {name: kinds.get(name, "*fp32") for name in kernel.arg_names}
    aligned = {(at,): [["tt.divisibility", 16]] for at, kind in enumerate(signature.values()) if kind.startswith("*")}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, places, aligned)
    found = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=triton_kernels.OPTIONS)
    text: str = found.asm["ptx"]
    return text


@pytest.mark.parametrize(("dtype", "rounding"), [("bf16", "cvt.rn.bf16x2.f32"), ("fp16", "cvt.rn.f16x2.f32")])
def test_compiled_for_a_gpu_it_rounds_to_nearest_and_fuses_nothing(dtype, rounding, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    text = compiled(4, dtype, zero_point=True)
    assert rounding in text
    assert "mul.rn.f32" in text
    assert "add.rn.f32" in text
    assert "fma" not in text
    assert ".ftz" not in text


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_compiled_for_a_gpu_it_reads_a_code_once_and_writes_16_bytes_at_a_time(bits, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    text = compiled(bits, "bf16")
    reads, writes = (Counter(re.findall(rf"{kind}\.global\.([.a-z0-9]+)", text)) for kind in ("ld", "st"))
    in_thread = triton_kernels.TILE[bits] // (32 * triton_kernels.OPTIONS["num_warps"])
    assert reads[f"v{in_thread // 4}.b32"] == 1, "of codes"
    assert set(reads) == {f"v{in_thread // 4}.b32", "b32", "b8"}, "levels and what restores scales"
    assert writes == {"v4.b32": in_thread * 8 // bits // 8}


class Called(TorchDispatchMode):
    """The names of all operators that run under it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def called_for_a_gpu(code: Code) -> set[str]:
    """The operators that `kernels` calls for a weight on a GPU; tensors without values stand for it."""
    packed = quantize(torch.randn(64, 64), code, 64, double_quant=False)
    with FakeTensorMode(allow_non_fake_inputs=True), Called() as called:
        codes, scales = (torch.empty_like(one, device="cuda") for one in (packed.codes, packed.scales.values))
        zeros = None if packed.zeros is None else torch.empty_like(packed.zeros, device="cuda")
        found = kernels.dequantize(Packed(codes, Scales(scales), zeros), code, 64, torch.Size((64, 64)), torch.bfloat16)
    assert (found.device.type, found.shape, found.dtype) == ("cuda", (64, 64), torch.bfloat16)
    return called.names & {"qlora.dequantize.default", "bitsandbytes.dequantize_4bit.default"}


@pytest.mark.parametrize("name", TYPES)
def test_on_a_gpu_every_code_goes_to_it(name, monkeypatch):
    monkeypatch.setattr(kernels, "HAS_TRITON", True)
    assert called_for_a_gpu(TYPES[name]) == {"qlora.dequantize.default"}


def test_on_a_gpu_without_triton_bitsandbytes_reads_what_it_knows(monkeypatch):
    monkeypatch.setattr(kernels, "HAS_TRITON", False)
    assert called_for_a_gpu(TYPES["nf4"]) == {"bitsandbytes.dequantize_4bit.default"}


def test_on_a_cpu_it_is_not_even_imported(monkeypatch):
    monkeypatch.setattr(kernels, "HAS_TRITON", True)
    monkeypatch.setitem(sys.modules, "qlora_cli.quant.triton_kernels", None)
    monkeypatch.delattr("qlora_cli.quant.triton_kernels")
    code = CODES["int4"](False, "auto")
    packed, shape = quantize(torch.randn(4, 64), code, 64, double_quant=True), torch.Size((4, 64))
    found = kernels.dequantize(packed, code, 64, shape, torch.float32)
    assert torch.equal(found, blockwise.dequantize(packed, code, shape))


def test_a_compiled_layer_calls_it_and_gives_the_same_bits(monkeypatch):
    monkeypatch.setattr(kernels, "dequantize", triton_kernels.dequantize)
    layer = PackedLinear(64, 32, False, Storage("int2", zero_point=True))
    layer.store(layer.packed_from(torch.randn(32, 64)))
    x = torch.randn(4, 64, requires_grad=True)
    found = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(found, layer(x))
    gradients = [torch.autograd.grad(one.square().sum(), x)[0] for one in (found, layer(x))]
    assert torch.equal(*gradients)


def test_the_operator_keeps_the_rules_of_torch():
    packed = quantize(torch.randn(16, 64), TYPES["int2 with zero point"], 64, double_quant=True)
    scales = packed.scales
    tensors = [packed.codes, scales.values, scales.absmax, scales.offset, packed.zeros]
    torch.library.opcheck(triton_kernels.dequantize_op, (tensors, list(counted(2)), 64, [16, 64], torch.float32))
