"""transformers loads, saves and loads again what is packed, bit for bit, and bad weights are told by their names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from qlora_cli.errors import UserError
from qlora_cli.model.base import fingerprint
from qlora_cli.quant.layers import (
    is_packed,
    layer_values,
    packed_config,
    quantization_config,
    quantized_modules,
    stored_tensors,
)
from qlora_cli.quant.linear import PackedLinear
from qlora_cli.quant.plugin import PackedConfig
from qlora_cli.recipe.schema import Quantization

SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {**SHAPE, **HEADS, "tie_word_embeddings": False},
    "qwen2": {**SHAPE, **HEADS, "tie_word_embeddings": True},  # with biases, and a head that is the embedding
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "bart": {
        "vocab_size": 64,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "max_position_embeddings": 64,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
    },
}
CONFIGS = {
    "int2": {"data_type": "int2"},
    "nf2 of single scales": {"data_type": "nf2", "double_quant": False},
    "int4 with zero point": {"data_type": "int4", "zero_point": True, "block_size": 32},
    "mixed": {"data_type": "int2", "overrides": {"*.1.*": "nf4", "*proj": "none"}},
}


@pytest.fixture(params=KINDS)
def folder(request, tmp_path):
    """A tiny random model of an architecture, saved."""
    auto = AutoModelForSeq2SeqLM if request.param == "bart" else AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(AutoConfig.for_model(request.param, **KINDS[request.param])).eval()
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(folder, **arguments: Any) -> tuple[Any, dict[str, Any]]:
    bart = "bart" in (folder / "config.json").read_text()
    auto = AutoModelForSeq2SeqLM if bart else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **arguments)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 23)[None]).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_is_quantised_while_it_is_read_and_comes_back_from_disk_as_it_was(folder, name, tmp_path):
    config = PackedConfig(**CONFIGS[name])
    plain, _ = load(folder)
    packed, told = load(folder, quantization_config=config)
    assert not any(told.values()), told
    layers = {key: module for key, module in packed.named_modules() if isinstance(module, PackedLinear)}
    assert layers
    for key, layer in layers.items():
        weight = plain.get_submodule(key).weight
        wanted = layer.packed_from(weight.T if layer.transposed else weight)
        assert torch.equal(layer.packed.codes, wanted.codes)
        assert layer.storage == config.storage_of(key)
    untouched = {key for key, module in plain.named_modules() if hasattr(module, "weight")} - set(layers)
    assert all(torch.equal(packed.get_submodule(key).weight, plain.get_submodule(key).weight) for key in untouched)
    packed.save_pretrained(tmp_path / "packed")
    again, told = load(tmp_path / "packed")
    assert not any(told.values()), told
    assert fingerprint(again) == fingerprint(packed)
    assert torch.equal(logits(again), logits(packed))


def test_the_first_override_that_fits_counts_and_none_leaves_a_layer_as_it_is(folder):
    model, _ = load(folder, quantization_config=PackedConfig(**CONFIGS["mixed"]))
    kinds = {name: module.storage.data_type for name, module in quantized_modules(model).items()}
    wanted = {"nf4" if ".1." in name else "none" if name.endswith("proj") else "int2" for name in kinds}
    assert {name for name in kinds if ".1." in name}
    for name, kind in kinds.items():
        assert kind == ("nf4" if ".1." in name else "int2")
        assert ".1." in name or not name.endswith("proj")
    assert wanted == set(kinds.values())


def test_what_is_stored_is_counted_once_and_told_by_its_type(folder):
    model, _ = load(folder, quantization_config=PackedConfig("nf2"))
    kinds = {kind for kind, _ in stored_tensors(model)}
    assert kinds == {"nf2", "scales", "float32"}
    held = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()}
    assert sum(tensor.numel() * tensor.element_size() for _, tensor in stored_tensors(model)) >= sum(held.values())
    before = fingerprint(model)
    next(iter(quantized_modules(model).values())).weight.data[0] ^= 1
    assert fingerprint(model) != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [
        *({"data_type": kind} for kind in ("int4", "nf2", "int2")),
        {"data_type": "nf4", "block_size": 32},
        {"data_type": "int4", "zero_point": True, "clip": "2sigma"},
        {"data_type": "nf4", "overrides": {"*.0.*": "int2"}},
        {"data_type": "none", "overrides": {"*.0.*": "int2"}},
    ],
)
def test_a_merge_adds_to_the_values_that_the_layer_multiplies_with(tmp_path, settings, dtype):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **KINDS["llama"]))
    model.save_pretrained(tmp_path)
    quantization = Quantization.model_validate(settings)
    assert is_packed(quantization)
    packed = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=dtype, quantization_config=quantization_config(quantization, dtype)
    )
    for name, layer in quantized_modules(packed).items():
        found = layer_values(model.get_submodule(name).weight, quantization, name, dtype)
        assert torch.equal(found, layer.dequantized(dtype).float())


def test_an_adapter_trains_on_a_saved_packed_model_and_peft_saves_it(folder, tmp_path):
    model, _ = load(folder, quantization_config=PackedConfig("int2"))
    model.save_pretrained(tmp_path / "packed")
    base, _ = load(tmp_path / "packed")
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    assert adapted.get_nb_trainable_parameters()[0] > 0
    adapted(input_ids=torch.arange(3, 23)[None]).logits.square().mean().backward()
    grads = [one.grad for name, one in adapted.named_parameters() if "lora_B" in name]
    assert all(grad is not None for grad in grads)
    assert any(grad.abs().sum() > 0 for grad in grads if grad is not None)
    adapted.save_pretrained(tmp_path / "adapter")
    assert all("lora_" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def llama(tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **KINDS["llama"])).save_pretrained(tmp_path)
    return tmp_path


def test_a_pattern_that_matches_nothing_is_refused(llama):
    message = r"quantization.overrides: 'model.layer.*' matches no linear module. Name whole modules"
    with pytest.raises(UserError, match=message):
        load(llama, quantization_config=PackedConfig("int2", overrides={"model.layer.*": "nf4"}))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"lm_head": "nf4"}, r"'lm_head' has no effect: skip_modules leaves it out. Take it out of skip_modules"),
        (
            {"model.layers.*": "nf4", "*.down_proj": "int2"},
            r"'\*.down_proj' has no effect: a pattern before it decides",
        ),
    ],
)
def test_a_pattern_that_decides_nothing_is_refused(llama, overrides, message):
    with pytest.raises(UserError, match=message):
        load(llama, quantization_config=PackedConfig("int2", overrides=overrides))


def test_a_weight_that_is_no_multiple_of_the_block_is_named(llama):
    message = r"model.layers.0.self_attn.q_proj.weight: has 1,024 values, which is no multiple of .*block_size 96"
    with pytest.raises(UserError, match=message):
        load(llama, quantization_config=PackedConfig("int2", block_size=96))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(llama, value):
    tensors = load_file(llama / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    message = r"model.layers.1.mlp.up_proj.weight: holds NaN or infinity \(1 such tensors\)"
    with pytest.raises(UserError, match=message):
        load(llama, quantization_config=PackedConfig("int2"))


def test_bitsandbytes_keeps_what_it_has_layers_for():
    for settings, packed in (
        ({"data_type": "nf4"}, False),
        ({"data_type": "int8"}, False),
        ({"data_type": "none"}, False),
        ({"data_type": "fp4", "block_size": 128}, True),
        ({"data_type": "nf2"}, True),
    ):
        quantization = Quantization.model_validate(settings)
        assert is_packed(quantization) is packed
        found = quantization_config(quantization, torch.float32)
        assert isinstance(found, PackedConfig) is packed
    assert packed_config(Quantization(skip_modules="a.*")).skip_modules == ["a.*"]
