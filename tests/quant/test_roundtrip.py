"""The weight of a live layer, bit for bit, from its checkpoint; and where bitsandbytes' CPU kernel is wrong."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes import functional
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from qlora_cli.quant.roundtrip import (
    QUANTIZERS,
    cpu_dequantize_is_wrong,
    dequantized,
    module_digest,
    quantized,
    quantized_digest,
    values,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CONFIGS = {
    "nf4": lambda compute, double: BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=["lm_head"],
    ),
    "fp4": lambda compute, double: BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="fp4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=["lm_head"],
    ),
    "int8": lambda compute, double: BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"]),
    "none": lambda compute, double: None,
}
CASES = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False), ("int8", False), ("none", False)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders of one random Llama saved in float32, bfloat16 and float16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=64,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config)
    folders = {}
    for name, dtype in DTYPES.items():
        folders[name] = tmp_path_factory.mktemp(name)
        model.to(dtype).save_pretrained(folders[name])
    return folders


def load(folder, data_type, double_quant, compute_dtype):
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=compute_dtype, quantization_config=CONFIGS[data_type](compute_dtype, double_quant)
    )
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


def checkpoint_weight(folder, name):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")[name + ".weight"]


def live_values(module):
    """The weight that a live layer multiplies with, by the library's own dequantisation (whole blocks per row)."""
    weight = module.weight
    if isinstance(weight, bnb.nn.Params4bit):
        return functional.dequantize_4bit(weight.data, weight.quant_state).float()
    if isinstance(weight, bnb.nn.Int8Params):
        return functional.int8_vectorwise_dequant(weight.data, weight.SCB)
    return weight.detach().float()


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize(("data_type", "double_quant"), CASES)
def test_dequantized_is_the_live_weight_bit_for_bit(checkpoints, data_type, double_quant, stored, compute):
    dtype = DTYPES[compute]
    model = load(checkpoints[stored], data_type, double_quant, dtype)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"):
        weight = checkpoint_weight(checkpoints[stored], name)
        mine = dequantized(weight, data_type, double_quant, 64, dtype)
        assert mine.dtype == torch.float32
        assert torch.equal(mine, live_values(model.get_submodule(name)))


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize(("data_type", "double_quant"), CASES)
def test_dequantized_is_what_the_layer_multiplies_with(checkpoints, data_type, double_quant, compute):
    """Unit vectors through the layer in training mode show its weight: exact but for int8's rounding there."""
    dtype = DTYPES[compute]
    layer = load(checkpoints["fp32"], data_type, double_quant, dtype).model.layers[0].mlp.down_proj.train()
    mine = dequantized(
        checkpoint_weight(checkpoints["fp32"], "model.layers.0.mlp.down_proj"), data_type, double_quant, 64, dtype
    )
    shown = layer(torch.eye(192, dtype=dtype)).T.float()
    if data_type == "int8":
        torch.testing.assert_close(shown, mine.to(dtype).float(), rtol=2e-7 if compute == "fp32" else 2**-8, atol=0)
    else:
        assert torch.equal(shown, mine)


@pytest.mark.parametrize("data_type", QUANTIZERS)
def test_dequantized_leaves_the_weight_of_the_caller_alone(data_type):
    weight = torch.randn(8, 64)
    before = weight.clone()
    dequantized(weight, data_type, True, 64, torch.float32)
    assert torch.equal(weight, before)


@pytest.mark.parametrize(("data_type", "double_quant"), CASES)
def test_digest_is_equal_for_a_live_module_and_a_fresh_tensor(checkpoints, data_type, double_quant):
    name = "model.layers.0.mlp.gate_proj"
    layer = load(checkpoints["bf16"], data_type, double_quant, torch.float32).get_submodule(name).train()
    weight = checkpoint_weight(checkpoints["bf16"], name)
    fresh = quantized_digest(quantized(weight, data_type, double_quant, 64, torch.float32))
    assert fresh == module_digest(layer)
    layer(torch.randn(2, 64))  # an int8 layer moves its scales into its state
    assert fresh == module_digest(layer)


def test_digest_differs_where_anything_differs():
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    changed = weight.clone()
    changed[3, 5] += 1
    digests = [
        quantized_digest(quantized(tensor, data_type, double_quant, block_size, dtype))
        for tensor, data_type, double_quant, block_size, dtype in [
            (weight, "nf4", True, 64, torch.float32),
            (changed, "nf4", True, 64, torch.float32),
            (weight, "nf4", False, 64, torch.float32),
            (weight, "nf4", True, 128, torch.float32),
            (weight, "nf4", True, 64, torch.bfloat16),
            (weight, "fp4", True, 64, torch.float32),
            (weight, "int8", True, 64, torch.float32),
            (weight, "none", True, 64, torch.float32),
            (weight.T, "none", True, 64, torch.float32),
        ]
    ]
    assert len(set(digests)) == len(digests)


def by_hand(packed, state):
    """4-bit values from the code table, high nibble first, one scale per block of the flat weight."""
    nibbles = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], dim=1).view(-1).long()
    scale = state.absmax.repeat_interleave(state.blocksize)[: state.shape.numel()]
    return (state.code[nibbles][: state.shape.numel()] * scale).view(state.shape)


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="the fault is in the AVX-512 kernel")
@pytest.mark.parametrize("block_size", [32, 64, 128, 256])
def test_predicate_names_exactly_the_shapes_that_bitsandbytes_dequantises_wrongly(block_size):
    generator = torch.Generator().manual_seed(block_size)
    widths = [*range(4, 34, 2), 48, 62, 64, 80, 96, 112, 128, 144, 192, 200, 240, 256, 272, 288, 320, 512, 576, 720]
    seen = set()
    for in_features in widths:
        for out_features in (1, 2, 3, 4, 5, 16, 33):
            weight = torch.randn(out_features, in_features, generator=generator)
            packed, state = functional.quantize_4bit(weight, blocksize=block_size, quant_type="nf4")
            wrong = not torch.equal(functional.dequantize_4bit(packed, state), by_hand(packed, state))
            assert wrong == cpu_dequantize_is_wrong(in_features, out_features, block_size), (in_features, out_features)
            mine = values(quantized(weight, "nf4", False, block_size, torch.float32))
            assert torch.equal(mine, by_hand(packed, state)), (in_features, out_features)
            seen.add(wrong)
    assert seen == {True, False}


@pytest.mark.parametrize(("in_features", "wrong"), [(288, True), (720, True), (48, True), (256, False), (300, False)])
def test_predicate_on_known_models(in_features, wrong):
    assert cpu_dequantize_is_wrong(in_features, 64, 64) is wrong


def test_an_inference_layout_is_refused():
    weight = quantized(torch.randn(64, 64), "nf4", False, 64, torch.float32)
    weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(AssertionError, match="repacked for AVX-512 inference"):
        values(weight)
    with pytest.raises(AssertionError, match="repacked for AVX-512 inference"):
        quantized_digest(weight)


def test_an_int8_weight_without_its_scales_is_refused():
    weight = quantized(torch.randn(8, 64), "int8", False, 64, torch.float32)
    weight.SCB = None
    with pytest.raises(AssertionError, match=r"state\.SCB"):
        quantized_digest(weight)
