"""Each adapter tensor is used exactly once, with PEFT's own rank and scaling; anything else is refused by name."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from merge_models import ADAPTERS, LINEAR, save_adapter
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_cli.errors import UserError
from qlora_cli.merge.adapter_delta import LowRank, Replacement, plan_updates, read_adapter
from qlora_cli.merge.fold import Fold, folded
from qlora_cli.model.layout import read_layout
from qlora_cli.model.safetensors_stream import read_checkpoint


def planned(base, folder):
    layout, adapter = read_layout(base, torch.float32), read_adapter(folder)
    shapes = {layout.parameter(name): entry.shape for name, entry in read_checkpoint(base).entries().items()}
    return adapter, plan_updates(adapter, shapes, layout)


@pytest.fixture
def copied(folders, tmp_path):
    """A copy of the default adapter that a test may damage."""
    return shutil.copytree(folders / "adapter-default", tmp_path / "adapter")


def edit_config(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(folder, edit):
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("name", ADAPTERS)
def test_scaling_is_the_one_that_peft_resolves(folders, name):
    base = AutoModelForCausalLM.from_pretrained(folders / "llama")
    live = PeftModel.from_pretrained(base, folders / f"adapter-{name}").base_model.model
    adapter, updates = planned(folders / "llama", folders / f"adapter-{name}")
    low_rank = {n: update for n, update in updates.items() if isinstance(update, LowRank)}
    assert len(low_rank) == 14
    for update in low_rank.values():
        assert update.scaling == live.get_submodule(update.module).scaling["default"]
        assert update.magnitude == (name == "dora")
    used = 3 if name == "dora" else 2
    assert len(adapter.shapes) == used * 14 + len(updates) - len(low_rank)


def test_patterns_really_differ_in_the_test_above(folders):
    _, updates = planned(folders / "llama", folders / "adapter-patterns")
    scaling = {update.module: update.scaling for update in updates.values()}
    assert scaling["model.layers.0.self_attn.q_proj"] == 11 / 2
    assert scaling["model.layers.1.mlp.down_proj"] == 6 / 8
    assert scaling["model.layers.0.mlp.up_proj"] == 6 / 3
    assert scaling["model.layers.1.mlp.up_proj"] == 6 / 4
    assert scaling["model.layers.1.self_attn.k_proj"] == 3 / 4


def test_a_module_to_save_replaces_its_tensor(folders):
    adapter, updates = planned(folders / "llama", folders / "adapter-modules_to_save")
    assert updates["lm_head.weight"] == Replacement("base_model.model.lm_head.weight")
    saved = load_file(adapter.weights)["base_model.model.lm_head.weight"]
    (found,) = folded(adapter, Fold("lm_head", updates["lm_head.weight"]), torch.zeros(256, 64), torch.float32)
    assert torch.equal(found, saved)


def test_a_missing_folder_or_file_is_named(folders, copied, tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no adapter_config\.json"):
        read_adapter(tmp_path / "nowhere")
    (copied / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: this file is missing"):
        read_adapter(copied)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_damaged_config_is_named(copied, content):
    (copied / "adapter_config.json").write_text(content)
    with pytest.raises(UserError, match=r"adapter_config\.json: damaged: no JSON with a peft_type"):
        read_adapter(copied)


def test_damaged_weights_are_named(copied):
    (copied / "adapter_model.safetensors").write_bytes(b"12345")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: damaged safetensors file"):
        read_adapter(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "merging peft_type 'IA3' is not available yet"),
        ({"bias": "all"}, "merging with bias: 'all' is not available yet"),
        ({"lora_bias": True}, "merging with lora_bias: True is not available yet"),
        ({"use_qalora": True}, "merging with use_qalora: True"),
        ({"alora_invocation_tokens": [1]}, "merging with alora_invocation_tokens"),
        ({"layer_replication": [[0, 2]]}, "merging with layer_replication"),
        ({"a_variant_of_tomorrow": {"x": 1}}, "merging with a_variant_of_tomorrow"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa' changed the base"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights: 'loftq' changed the base"),
    ],
)
def test_variants_with_other_arithmetic_are_refused(copied, change, message):
    edit_config(copied, **change)
    with pytest.raises(UserError, match=message):
        read_adapter(copied)


def test_leftover_tensors_are_named(folders, copied):
    def add(tensors):
        tensors["base_model.model.model.layers.7.mlp.up_proj.lora_A.weight"] = torch.zeros(4, 64)

    edit_weights(copied, add)
    with pytest.raises(
        UserError, match=r"no place in the base.* for base_model\.model\.model\.layers\.7\.mlp\.up_proj"
    ):
        planned(folders / "llama", copied)


def test_half_a_pair_is_named(folders, copied):
    edit_weights(copied, lambda tensors: tensors.pop("base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"))
    with pytest.raises(UserError, match=r"no other half, for .*layers\.0\.mlp\.up_proj\.lora_A\.weight"):
        planned(folders / "llama", copied)


def test_a_magnitude_without_dora_is_left_over(folders, tmp_path):
    folder = shutil.copytree(folders / "adapter-dora", tmp_path / "adapter")
    edit_config(folder, use_dora=False)
    with pytest.raises(UserError, match=r"for .*lora_magnitude_vector.* and 11 more"):
        planned(folders / "llama", folder)


def test_another_base_is_refused_by_shape(folders):
    with pytest.raises(UserError, match=r"has shape \[4, 128\], but base and adapter_config\.json ask for \[4, 80\]"):
        planned(folders / "awkward", folders / "adapter-default")


def test_a_rank_that_contradicts_the_config_is_refused(folders, copied):
    edit_config(copied, r=8)
    with pytest.raises(UserError, match=r"has shape \[4, 128\], but base and adapter_config\.json ask for \[8, 128\]"):
        planned(folders / "llama", copied)


def test_a_replacement_of_another_shape_is_refused(folders, copied):
    edit_weights(copied, lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.zeros(300, 64)}))
    with pytest.raises(UserError, match=r"lm_head\.weight has shape \[300, 64\]"):
        planned(folders / "llama", copied)


def test_a_module_without_its_tensors_is_named(folders, copied):
    def lose(tensors):
        for part in "AB":
            tensors.pop(f"base_model.model.model.layers.0.mlp.up_proj.lora_{part}.weight")

    edit_weights(copied, lose)
    with pytest.raises(UserError, match=r"has the adapter change model\.layers\.0\.mlp\.up_proj, and no tensor of"):
        planned(folders / "llama", copied)


def test_a_module_to_save_without_its_tensor_is_named(folders, tmp_path):
    folder = shutil.copytree(folders / "adapter-modules_to_save", tmp_path / "adapter")
    edit_weights(folder, lambda tensors: tensors.pop("base_model.model.lm_head.weight"))
    with pytest.raises(UserError, match="has the adapter change lm_head, and no tensor of"):
        planned(folders / "llama", folder)


def test_an_embedding_adapter_is_refused(folders, tmp_path):
    folder = save_adapter(folders / "llama", tmp_path / "adapter", [*LINEAR, "embed_tokens"])
    with pytest.raises(UserError, match=r"no place in the base, or no other half, for .*embed_tokens"):
        planned(folders / "llama", folder)
