"""The check finds every way in which packed documents are known to touch, and passes those models that are right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, GPT2LMHeadModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qlora_cli.kernels.isolation import NotIsolated, check_isolation, prepare_packing
from qlora_cli.kernels.packed_attention import NAME, register, use_packed_attention
from qlora_cli.model.adapter import attach_adapter
from qlora_cli.model.base import load_base
from tests.kernels.tiny_models import GPT2, MODELS, VOCAB, packed_logits, tiny

CPU = torch.device("cpu")
ALIBI = {"hidden_size": 32, "n_layer": 2, "n_head": 4}


def check(model: Any) -> None:
    check_isolation(model, CPU, VOCAB)


def other(kind: str, attention: str | None = None, **config: Any) -> Any:
    """A tiny model that is none of MODELS."""
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, vocab_size=VOCAB, **config), attn_implementation=attention
    )


@pytest.mark.parametrize("kind", MODELS)
def test_every_attention_of_a_model_with_positions_passes(kind):
    for attention in ("sdpa", "eager"):
        check(tiny(kind, attention))
    model = tiny(kind)
    assert prepare_packing(model, CPU, VOCAB) == NAME
    assert model.config._attn_implementation == NAME


def test_modes_and_random_state_are_as_before():
    model = tiny("llama", attention_dropout=0.5).train()
    model.lm_head.eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    check(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def leaking(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
    return sdpa_attention_forward(module, query, key, value, None, scaling=kwargs["scaling"])


def test_an_attention_that_looks_across_is_caught(monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, "leaking", leaking)
    with pytest.raises(NotIsolated, match="tokens of one document change the logits of the others"):
        check(tiny("llama", "leaking"))


def test_a_model_that_builds_its_own_mask_is_caught():
    model = other("opt", "sdpa", hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4)
    with pytest.raises(NotIsolated, match="tokens of one document"):
        check(model)
    assert prepare_packing(model, CPU, VOCAB) == NAME  # it hands its positions and bounds down all the same


def test_alibi_is_caught_and_names_its_reason():
    with pytest.raises(NotIsolated, match="tokens of one document"):
        check(other("bloom", **ALIBI))
    register()
    with pytest.raises(NotIsolated, match="BloomForCausalLM computes attention in a way of its own"):
        check(other("bloom", NAME, **ALIBI))


def test_a_state_that_runs_on_is_caught():
    config = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = other("lfm2", "sdpa", num_key_value_heads=2, layer_types=["conv", "full_attention"], **config)
    with pytest.raises(NotIsolated, match="tokens of one document"):
        prepare_packing(model, CPU, VOCAB)
    assert model.config._attn_implementation == "sdpa"


class IgnoresPositions(GPT2LMHeadModel):
    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **rest: Any) -> Any:  # type: ignore[override]
        return super().forward(input_ids, **rest)


class KnowsNoPositions(GPT2LMHeadModel):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False) -> Any:  # type: ignore[override]
        return super().forward(input_ids, attention_mask=attention_mask, use_cache=use_cache)


def test_learned_positions_that_go_on_over_documents_are_caught():
    register()
    model = IgnoresPositions._from_config(AutoConfig.for_model("gpt2", **GPT2), attn_implementation=NAME)
    with pytest.raises(NotIsolated, match="packed documents have other logits than rows of a batch"):
        check(model)


def test_a_model_that_takes_no_positions_is_caught():
    with pytest.raises(NotIsolated, match=r"a row of packed documents fails: .*position_ids"):
        check(KnowsNoPositions._from_config(AutoConfig.for_model("gpt2", **GPT2)))


def test_a_model_that_keeps_the_bounds_to_itself_is_left_with_its_own_attention():
    model = other(
        "stablelm", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4,
    )  # fmt: skip
    assert prepare_packing(model, CPU, VOCAB) == "sdpa"
    assert use_packed_attention(model)
    with pytest.raises(NotIsolated, match="a row of packed documents fails: the model does not hand the documents'"):
        check(model)


@pytest.mark.parametrize(("strength", "passes"), [(1e-6, True), (1e-2, True), (100.0, False)])
def test_what_rows_of_a_padded_batch_tell_of_each_other_is_allowed_within_rounding(strength, passes):
    model = tiny("llama")
    model.lm_head.register_forward_hook(lambda _, __, logits: logits + strength * logits.mean())
    if passes:
        check(model)
    else:
        with pytest.raises(NotIsolated, match="tokens of one document"):
            check(model)


@pytest.mark.parametrize("outlier_threshold", [0.5, 2.0, 6.0])
def test_int8_passes_though_its_outliers_reach_over_all_rows(shared, make_recipe, monkeypatch, outlier_threshold):
    recipe = make_recipe(
        model={"name_or_path": str(shared / "weights/stories260k-hf")},
        quantization={"data_type": "int8", "outlier_threshold": outlier_threshold},
    )
    model = load_base(recipe, CPU).model
    assert prepare_packing(model, CPU, model.config.vocab_size) == NAME
    monkeypatch.setitem(AttentionInterface._global_mapping, "leaking", leaking)
    model.set_attn_implementation("leaking")
    with pytest.raises(NotIsolated, match="tokens of one document change"):
        check_isolation(model, CPU, model.config.vocab_size)


def test_nan_does_not_pass():
    model = tiny("llama")
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(NotIsolated):
        check(model)


@pytest.mark.parametrize("data_type", ["nf4", "fp4", "int8", "none"])
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_quantised_models_with_adapters_pass_under_the_autocast_of_training(make_recipe, data_type, compute_dtype):
    recipe = make_recipe(quantization={"data_type": data_type, "compute_dtype": compute_dtype})
    base = load_base(recipe, CPU)
    model = attach_adapter(base, recipe.adapter).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    with base.compute():
        check(model)
        assert prepare_packing(model, CPU, VOCAB) == NAME
    assert model.training


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text", "qwen2", "cohere2"])
def test_windows_longer_than_the_proof_are_proven_too(kind):
    """Narrowed in config and layers alike, and put back after."""
    model = tiny(kind, sliding_window=16)
    windows = [getattr(module, "sliding_window", None) for module in (model.config, *model.modules())]
    assert prepare_packing(model, CPU, VOCAB) == NAME
    assert [getattr(module, "sliding_window", None) for module in (model.config, *model.modules())] == windows


@pytest.mark.parametrize("kind", ["olmoe", "phimoe"])
def test_a_window_that_only_the_mask_knows_is_seen(kind):
    """Packed, which builds no mask, such a model sees all of a document; shorter documents do not tell."""
    experts = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = tiny(kind, sliding_window=16, **experts)
    assert prepare_packing(model, CPU, VOCAB, longest=16) == NAME
    model = tiny(kind, sliding_window=16, **experts)
    try:
        assert prepare_packing(model, CPU, VOCAB, longest=17) != NAME
    except NotIsolated:
        return
    ids = torch.randint(VOCAB, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        packed, padded = packed_logits(model, ids, [40])[0], model(input_ids=ids, use_cache=False).logits[0]
    torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-4)
