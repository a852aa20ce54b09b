"""The live names, orientations and shared weights of a checkpoint; models that a merge cannot know are refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from qlora_cli.errors import UserError
from qlora_cli.model.layout import read_layout


def test_llama_has_no_transposed_and_no_shared_weight(folders):
    layout = read_layout(folders / "llama", torch.bfloat16)
    assert layout.conv1d == layout.tied == frozenset()
    assert layout.parameter("model.layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight"
    assert layout.parameter("embed_tokens.weight") == "model.embed_tokens.weight"
    assert layout.parameter("model.rotary_emb.inv_freq") is None


def test_tied_head_and_embedding_are_known(folders):
    assert read_layout(folders / "tied", torch.bfloat16).tied == {"lm_head", "model.embed_tokens"}


def test_gpt2_stores_its_linear_weights_transposed_and_may_lack_its_prefix(folders):
    layout = read_layout(folders / "gpt2", torch.float32)
    assert "transformer.h.0.attn.c_proj" in layout.conv1d
    assert len(layout.conv1d) == 8
    assert layout.parameter("h.0.attn.c_proj.weight") == "transformer.h.0.attn.c_proj.weight"


@pytest.fixture
def base(folders, tmp_path):
    return shutil.copytree(folders / "llama", tmp_path / "base")


def edit(base, **changes):
    config = json.loads((base / "config.json").read_text()) | changes
    (base / "config.json").write_text(json.dumps(config))


def test_a_missing_or_damaged_config_is_named(base):
    (base / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: cannot be read \("):
        read_layout(base, torch.float32)
    (base / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json: cannot be read \("):
        read_layout(base, torch.float32)


def test_a_base_stored_quantised_has_the_layout_of_ordinary_weights(base):
    wanted = read_layout(base, torch.float32)
    edit(base, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert read_layout(base, torch.float32).parameters == wanted.parameters


@pytest.mark.parametrize("stored", [{"quant_method": "hqq"}, {"quant_method": "bitsandbytes", "load_in_8bit": True}])
def test_a_base_stored_in_a_form_that_does_not_load_is_refused(base, stored):
    edit(base, quantization_config=stored)
    with pytest.raises(UserError, match=r"the checkpoint is already quantised \((hqq|bitsandbytes, 8 bits)\)"):
        read_layout(base, torch.float32)


@pytest.mark.parametrize("architecture", ["ModelOfTomorrow", "torch", "AutoConfig"])
def test_an_unknown_architecture_is_refused(base, architecture):
    edit(base, architectures=[architecture])
    with pytest.raises(UserError, match=f"merging architecture '{architecture}' is not available yet"):
        read_layout(base, torch.float32)


def test_a_model_that_keeps_weights_in_float32_is_refused_in_16_bits(base, monkeypatch):
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["router"])
    with pytest.raises(UserError, match=r"in torch\.bfloat16 is not available yet: it keeps router in float32"):
        read_layout(base, torch.bfloat16)
    read_layout(base, torch.float32)
