"""The base: what is loaded is what was asked for, and an evaluation leaves it as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_cli.errors import Exit, UserError
from qlora_cli.model.adapter import attach_adapter
from qlora_cli.model.base import compute_dtype_for, fingerprint, load_base
from qlora_cli.model.checks import check_share_quantized
from qlora_cli.model.fused import Fused
from qlora_cli.quant.layers import quantized_modules
from tests.tiny import write_tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("quantization", "kind", "nested"),
    [
        ({"data_type": "nf4"}, bnb.nn.Linear4bit, True),
        ({"data_type": "nf4", "double_quant": False}, bnb.nn.Linear4bit, False),
        ({"data_type": "fp4"}, bnb.nn.Linear4bit, True),
        ({"data_type": "fp4", "double_quant": False}, bnb.nn.Linear4bit, False),
    ],
)
def test_four_bit_types_are_stored_as_asked(make_recipe, quantization, kind, nested):
    base = load_base(make_recipe(quantization=quantization), CPU)
    layers = quantized_modules(base.model)
    assert len(layers) == 14
    for layer in layers.values():
        assert type(layer) is kind
        assert layer.weight.dtype == torch.uint8
        assert layer.weight.quant_type == quantization["data_type"]
        assert layer.weight.quant_state.nested is nested
    assert f"{quantization['data_type']}" in base.summary


def test_int8_takes_its_outlier_threshold(make_recipe):
    base = load_base(make_recipe(quantization={"data_type": "int8", "outlier_threshold": 3.0}), CPU)
    layers = quantized_modules(base.model)
    assert len(layers) == 14
    assert all(layer.state.threshold == 3.0 and layer.weight.dtype == torch.int8 for layer in layers.values())


def test_none_keeps_the_weights_in_the_compute_dtype(make_recipe):
    base = load_base(make_recipe(quantization={"data_type": "none", "compute_dtype": "bfloat16"}), CPU)
    assert not quantized_modules(base.model)
    assert {p.dtype for p in base.model.parameters()} == {torch.bfloat16}


def test_embeddings_head_and_norms_are_not_upcast(make_recipe):
    base = load_base(make_recipe(quantization={"compute_dtype": "bfloat16"}), CPU)
    others = [p.dtype for p in base.model.parameters() if p.dtype != torch.uint8]
    assert others
    assert set(others) == {torch.bfloat16}


def test_nothing_of_the_base_is_trainable(make_recipe):
    assert not any(p.requires_grad for p in load_base(make_recipe(), CPU).model.parameters())


def test_a_skipped_name_that_matches_nothing_is_refused(make_recipe):
    recipe = make_recipe(quantization={"skip_modules": ["lm_head", "nonsense"]})
    with pytest.raises(
        UserError, match=r"quantization\.skip_modules: 'nonsense' matches no module\. Choose from .*q_proj"
    ):
        load_base(recipe, CPU)
    load_base(make_recipe(quantization={"skip_modules": []}), CPU)


def test_a_tied_head_cannot_be_quantised(make_recipe, tmp_path):
    folder = write_tiny_model(tmp_path / "tied", tie_word_embeddings=True)
    recipe = make_recipe(model={"name_or_path": str(folder)}, quantization={"skip_modules": []})
    with pytest.raises(
        UserError, match=r"skip_modules: lm_head shares its weight with the embedding.* Put lm_head into"
    ):
        load_base(recipe, CPU)


def test_a_revision_of_a_folder_is_refused(make_recipe, tiny_model):
    recipe = make_recipe(model={"name_or_path": str(tiny_model), "revision": "main"})
    with pytest.raises(UserError, match=r"model\.revision: 'main' is set, but .* is a folder"):
        load_base(recipe, CPU)


def test_a_model_with_its_own_code_says_what_to_set(make_recipe, tiny_model, tmp_path):
    folder = broken_copy(tiny_model, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.MineLM"}}
    (folder / "config.json").write_text(json.dumps(config))
    check_refused(make_recipe, folder, r"trust_remote_code: true if you trust its source", Exit.REFUSED)


def test_int8_on_a_cpu_says_how_it_differs(make_recipe):
    assert "evaluates with int8 ones" in load_base(make_recipe(quantization={"data_type": "int8"}), CPU).note
    assert load_base(make_recipe(), CPU).note == ""


def test_skip_modules_stay_in_full(make_recipe):
    base = load_base(make_recipe(quantization={"skip_modules": ["lm_head", "down_proj"]}), CPU)
    assert not any("down_proj" in name for name in quantized_modules(base.model))
    assert len(quantized_modules(base.model)) == 12


def adapter_gradient(base, recipe) -> torch.Tensor:
    """The flat gradient of a LoRA adapter, both of its matrices drawn at random, for a fixed batch.

    By PEFT's own forward, which goes through bitsandbytes' layers; the fused one reads their weights by itself.
    """
    torch.manual_seed(3)
    model = base.model if hasattr(base.model, "peft_config") else attach_adapter(base, recipe.adapter)
    for module in model.modules():
        if isinstance(module, Fused):
            module.__class__ = type(module).__mro__[2]
    parameters = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(4)
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.02)
        parameter.grad = None
    model.train()
    ids = torch.arange(40).view(2, 20)
    with base.compute():
        model(input_ids=ids, labels=ids).loss.backward()
    return torch.cat([p.grad.flatten() for p in parameters])


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="the trap exists on CPUs with AVX512-BF16 only")
def test_an_evaluation_leaves_gradients_as_they_were_and_the_trap_was_armed(make_recipe):
    """bitsandbytes repacks 4-bit weights in eval mode; back in training, the gradient through them is gone."""
    differences = {}
    for armed in (False, True):
        recipe = make_recipe(quantization={"compute_dtype": "bfloat16"})
        base = load_base(recipe, CPU)
        for layer in quantized_modules(base.model).values():
            assert layer.support_avx512bf16_for_cpu is False
            layer.support_avx512bf16_for_cpu = armed
        before = adapter_gradient(base, recipe)
        packed = [layer.weight.data.clone() for layer in quantized_modules(base.model).values()]
        base.model.eval()
        with torch.no_grad(), base.compute():
            base.model(input_ids=torch.arange(20).view(1, 20))
        now = [layer.weight.data for layer in quantized_modules(base.model).values()]
        assert all(torch.equal(*pair) for pair in zip(packed, now, strict=True)) is not armed
        base.model.train()
        parameters = [p for p in base.model.parameters() if p.requires_grad]
        for parameter in parameters:
            parameter.grad = None
        ids = torch.arange(40).view(2, 20)
        with base.compute():
            base.model(input_ids=ids, labels=ids).loss.backward()
        after = torch.cat([p.grad.flatten() for p in parameters])
        differences[armed] = ((after - before).norm() / before.norm()).item()
    assert differences[False] == 0.0
    assert differences[True] > 0.05, "the trap is gone from bitsandbytes: disarm_cpu_repacking may go too"


def test_fingerprint_tells_data_types_and_weights_apart(make_recipe, tmp_path):
    other = write_tiny_model(tmp_path / "other", initializer_range=0.2)
    prints = [
        fingerprint(load_base(recipe, CPU).model)
        for recipe in (
            make_recipe(),
            make_recipe(),
            make_recipe(quantization={"double_quant": False}),
            make_recipe(model={"name_or_path": str(other)}),
        )
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_fingerprint_tells_configurations_apart(make_recipe, tiny_model, tmp_path):
    folder = broken_copy(tiny_model, tmp_path)
    same = fingerprint(load_base(make_recipe(), CPU).model)
    assert fingerprint(load_base(make_recipe(model={"name_or_path": str(folder)}), CPU).model) == same, "a copy"
    config = json.loads((folder / "config.json").read_text()) | {"rms_norm_eps": 0.1}
    (folder / "config.json").write_text(json.dumps(config))
    assert fingerprint(load_base(make_recipe(model={"name_or_path": str(folder)}), CPU).model) != same


def test_too_little_quantised_is_an_error_that_names_what_is_left(make_recipe):
    recipe = make_recipe(quantization={"skip_modules": ["lm_head", "up_proj"]})
    base = load_base(recipe, CPU)
    with pytest.raises(UserError, match=r"only \d+% of the weights .*model\.layers\.\d\.mlp\.up_proj") as error:
        check_share_quantized(base.model, ["lm_head"])
    assert error.value.code == Exit.REFUSED


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_compute_dtype_is_the_one_named(name, dtype):
    assert compute_dtype_for(name, CPU) == dtype


def broken_copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


def check_refused(make_recipe, folder: Path, message: str, code: Exit = Exit.USAGE) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_base(make_recipe(model={"name_or_path": str(folder)}), CPU)
    assert error.value.code == code


def test_a_missing_folder_is_refused_without_asking_a_hub(make_recipe, tmp_path):
    check_refused(make_recipe, tmp_path / "nowhere", r"nowhere: no such folder\.")


def test_a_file_in_place_of_a_folder_is_refused(make_recipe, rows_file):
    check_refused(make_recipe, rows_file, "must be a folder, this is a file")


def test_a_folder_without_weights_is_refused(make_recipe, tiny_model, tmp_path):
    folder = broken_copy(tiny_model, tmp_path)
    (folder / "model.safetensors").unlink()
    check_refused(make_recipe, folder, r"no \*\.safetensors weights")


def test_pickled_weights_are_refused(make_recipe, tiny_model, tmp_path):
    folder = broken_copy(tiny_model, tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    check_refused(make_recipe, folder, "pickle, which can run code", Exit.REFUSED)


def test_a_folder_without_config_is_refused(make_recipe, tiny_model, tmp_path):
    folder = broken_copy(tiny_model, tmp_path)
    (folder / "config.json").unlink()
    check_refused(make_recipe, folder, r"config\.json: no such file")


@pytest.mark.parametrize(("text", "message"), [("{", "not JSON"), ("[]", "expected a JSON object, found list")])
def test_a_damaged_config_is_refused(make_recipe, tiny_model, tmp_path, text, message):
    folder = broken_copy(tiny_model, tmp_path)
    (folder / "config.json").write_text(text)
    check_refused(make_recipe, folder, message)


def test_truncated_weights_are_refused(make_recipe, tiny_model, tmp_path):
    folder = broken_copy(tiny_model, tmp_path)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    check_refused(make_recipe, folder, r"model\.safetensors: damaged or cut short")


def test_weights_that_would_stay_random_are_refused(make_recipe, tiny_model, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = broken_copy(tiny_model, tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    check_refused(make_recipe, folder, r"1 weights would be random, not pretrained: model\.layers\.1\.mlp\.up_proj")


def test_an_encoder_decoder_is_no_causal_language_model(make_recipe, tiny_model, tmp_path):
    folder = broken_copy(tiny_model, tmp_path)
    config = json.loads((folder / "config.json").read_text()) | {"is_encoder_decoder": True}
    (folder / "config.json").write_text(json.dumps(config))
    check_refused(make_recipe, folder, "which cannot do causal_lm")


def test_a_tokenizer_beyond_the_embedding_is_refused(make_recipe, tmp_path):
    folder = write_tiny_model(tmp_path / "small", vocab_size=200, eos_token_id=2)
    check_refused(make_recipe, folder, r"largest id is \d+, the embedding has 200 rows")


def test_a_folder_without_tokenizer_is_refused(make_recipe, tiny_model, tmp_path):
    folder = broken_copy(tiny_model, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    check_refused(make_recipe, folder, "no tokenizer could be loaded")


def test_a_tokenizer_without_end_of_turn_is_refused(make_recipe, tiny_model, tmp_path):
    folder = broken_copy(tiny_model, tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    check_refused(make_recipe, folder, "no eos_token, so the model could never learn to stop")


def test_the_stop_tokens_of_generation_config_count(make_recipe, tiny_model, tmp_path):
    folder = broken_copy(tiny_model, tmp_path)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    assert load_base(make_recipe(model={"name_or_path": str(folder)}), CPU).stop_token_ids == {2, 5}
    (folder / "generation_config.json").write_text("{")
    check_refused(make_recipe, folder, r"generation_config\.json")


@pytest.mark.parametrize("width", [48, 80])
def test_rows_that_are_no_whole_blocks_are_computed_rightly(make_recipe, tmp_path, width):
    """bitsandbytes' CPU kernel is wrong where in_features is a multiple of 16 but not of the block."""
    folder = write_tiny_model(tmp_path / "odd", hidden_size=width, intermediate_size=2 * width)
    base = load_base(make_recipe(model={"name_or_path": str(folder)}), CPU)
    layer = quantized_modules(base.model)["model.layers.0.mlp.up_proj"]
    packed = layer.weight.data
    state = layer.weight.quant_state
    nibbles = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten().long()
    absmax = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    weight = (state.code[nibbles].view(-1, 64) * absmax[:, None]).view(state.shape)
    x = torch.randn(3, width)
    torch.testing.assert_close(layer(x), x @ weight.T)


@pytest.mark.parametrize(
    ("damage", "settings", "message"),
    [
        (float("nan"), {}, r"model.safetensors: model.layers.1.mlp.up_proj.weight: holds NaN or infinity"),
        (None, {"block_size": 96}, r"model.safetensors: .*q_proj.weight: has 4,096 values, which is no multiple of"),
    ],
)
def test_a_weight_that_cannot_be_packed_is_told_with_its_file(make_recipe, tmp_path, damage, settings, message):
    model = write_tiny_model(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    if damage is not None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = damage
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    recipe = make_recipe(model={"name_or_path": str(model)}, quantization={"data_type": "int2", **settings})
    with pytest.raises(UserError, match=message):
        load_base(recipe, torch.device("cpu"))


def test_overrides_do_not_hide_what_is_left_unquantised(make_recipe, tmp_path):
    """Fused experts stay as they are: most of the model, which only overrides to none may leave so."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = write_tiny_model(tmp_path / "model")
    config = AutoConfig.for_model(
        "mixtral", vocab_size=400, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    recipe = make_recipe(
        model={"name_or_path": str(model)}, quantization={"data_type": "int4", "overrides": {"*.q_proj": "nf4"}}
    )
    with pytest.raises(UserError, match="of the weights that should be quantised are"):
        load_base(recipe, torch.device("cpu"))
    plain = make_recipe(quantization={"data_type": "int2", "overrides": {"*.mlp.*": "none"}})
    assert len(quantized_modules(load_base(plain, torch.device("cpu")).model)) == 8


def test_a_pattern_that_is_none_is_refused(make_recipe):
    for data_type in ("nf4", "int2"):
        recipe = make_recipe(quantization={"data_type": data_type, "skip_modules": ["*.down_proj"]})
        with pytest.raises(UserError, match=r"'\*.down_proj' is no regular expression: nothing to repeat"):
            load_base(recipe, torch.device("cpu"))
